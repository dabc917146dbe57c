"""An NVIDIA GPU as a device, over `cuda.bindings`."""
