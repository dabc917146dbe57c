"""TensorRT and TensorRT-RTX: plans built, found, opened and executed."""
