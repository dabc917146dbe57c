"""What a pipeline returns."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from .loop.workspace import Trace
from .request import GenerationRequest


@dataclass
class Timings:
    """Seconds spent in each stage of a request, summed over its batches; `total` is what the caller waited."""

    tokenize: float = 0.0
    encode: float = 0.0
    prepare: float = 0.0
    """Step tables and noise, on the host."""
    denoise: float = 0.0
    decode: float = 0.0
    total: float = 0.0
    steps: int = 0
    """Denoiser evaluations, summed over batches."""
    queue: float = 0.0
    """Seconds in a batcher's queue, until the first image got a slot; part of `total`."""


log = logging.getLogger(__name__)

Images = TypeVar("Images")


@dataclass
class GenerationResult(Generic[Images]):
    """Pictures in request order, the seed of each, and where the time and the memory went.

    `images` is a list of PIL pictures, or an array: float32 [B, H, W, 3] in [0, 1] for `"np"`, float32 [B, C, h, w] for
    `"latent"`.
    """

    images: Images
    seeds: list[int]
    timings: Timings
    memory: dict[str, int] = field(default_factory=dict)
    """Bytes of the device's memory in use at the end of encode, denoise and decode, the most of all batches: on a GPU
    what was taken since it was opened, on the CPU what is resident. A request captured whole has one figure, under
    denoise."""
    warnings: list[str] = field(default_factory=list)
    tokens_cut: int = 0
    """Tokens of prompts that were not used, once for each text and length of tokens."""
    request: GenerationRequest | None = None
    """The request with every default filled in."""

    logged: bool = field(default=False, repr=False, compare=False)
    """Whether warnings are logged as well: they quote prompts, which a server's log has no place for."""

    nsfw_content_detected: None = None
    """Always None, as in diffusers without a safety checker: bundles hold none."""

    def __getitem__(self, key: int | slice | str) -> Any:
        """Return the pictures for 0 or "images", as results of diffusers do; raises `LookupError` for others.

        Slices and numbers below 0 are of a tuple of the pictures alone; 1 is None, the flags of a safety checker.
        """
        if isinstance(key, str):
            return {"images": self.images, "nsfw_content_detected": None}[key]
        return None if key == 1 else (self.images,)[key]

    def __iter__(self) -> Iterator[str]:
        """Name what there is, as results of diffusers do: `images`."""
        return iter(("images",))

    def warn(self, message: str, cut: int = 0) -> None:
        """Add a warning once; `cut` is how many tokens it says are not used."""
        if message not in self.warnings:
            self.warnings.append(message)
            self.tokens_cut += cut
            if self.logged:
                log.warning(message)

    def add(self, trace: Trace, steps: int) -> None:
        """Add what one batch took; waits for its last stage."""
        encode, denoise, decode = trace.seconds()
        self.timings.encode += encode
        self.timings.denoise += denoise
        self.timings.decode += decode
        self.timings.steps += steps
        for stage, used in trace.memory.items():
            self.memory[stage] = max(used, self.memory.get(stage, 0))
