"""A fixed piece of work that takes its turn with the contenders: it tells how fast the machine was at that time.

Virtual machines change speed between runs by more than many a change to the program does.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SIZE = 1024
REPEATS = 4


class Contender:
    """Matrix products and copies; the same on every run and for every workload."""

    def __init__(self, variant: str, options: dict[str, Any]) -> None:
        """Allocate; on a GPU the work is done there, by PyTorch."""
        self.facts: dict[str, Any] = {"import": 0.0, "open": 0.0, "build": None, "versions": {}, "options": {}}
        rng = np.random.default_rng(0)
        a, b = (rng.standard_normal((SIZE, SIZE), np.float32) for _ in range(2))
        self._torch: Any = None
        self._work: Callable[[], object] = lambda: np.copyto(a, np.matmul(a, b) / SIZE)
        if options["device"] == "cuda":
            import torch

            self._torch, size = torch, 8 * SIZE
            x, y = (torch.randn(size, size, device="cuda", dtype=torch.float16) for _ in range(2))
            self._work = lambda: x.copy_(torch.mm(x, y))

    def run(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do the work; returns its seconds as `total`."""
        start = time.perf_counter()
        for _ in range(REPEATS):
            self._work()
        if self._torch is not None:
            self._torch.cuda.synchronize()
        return {"total": time.perf_counter() - start}

    def save(self, file: Path, *, latents: bool) -> None:
        """Refuse: there is no answer."""
        raise NotImplementedError
