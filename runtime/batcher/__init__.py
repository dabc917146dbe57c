"""In-flight batching: images of unlike requests share every call of the network, and come and go between steps."""

from .batcher import Batcher

__all__ = ["Batcher"]
