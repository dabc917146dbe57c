"""The denoising loop: buffers, bound engines and captured work of a request."""
