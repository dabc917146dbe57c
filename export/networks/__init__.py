"""Networks of checkpoints as graphs: what surrounds each of them, and what goes in and out."""
