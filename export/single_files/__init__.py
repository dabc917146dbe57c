"""Single-file checkpoints of original layouts."""
