"""Records, and everything that is made from them."""
