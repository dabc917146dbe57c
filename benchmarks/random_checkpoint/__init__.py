"""Checkpoints with the true architectures of models and random weights, for measurements without downloads.

Run `python -m latentrt.benchmarks.random_checkpoint sd15 OUT`. Weights have unit gain per layer, so activations stay
finite in half precision too; pictures are noise. They are written tensor by tensor: memory holds a few of the largest.
"""

from __future__ import annotations

from .tokenizers import write_tokenizer
from .weights import write_random_weights
from .writer import ARCHITECTURES, architecture, write_random_checkpoint

__all__ = ["ARCHITECTURES", "architecture", "write_random_checkpoint", "write_random_weights", "write_tokenizer"]
