"""How near pictures are to a reference, and how good they are."""
