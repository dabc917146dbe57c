"""NVIDIA's Triton Inference Server: a model repository for a bundle, and the model of Triton's Python backend in it."""
