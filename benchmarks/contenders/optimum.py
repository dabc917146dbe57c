"""ONNX Runtime through Optimum as a contender: its own export of the checkpoint, its own pipeline."""

from __future__ import annotations

import time
from typing import Any

from . import diffusers as contender_diffusers


class Contender(contender_diffusers.Contender):
    """An `ORTStableDiffusionPipeline`; it is a diffusers pipeline, so the same clock fits."""

    def _load(self, options: dict[str, Any]) -> Any:
        from importlib.metadata import version

        import onnxruntime
        from optimum.onnxruntime import ORTStableDiffusionPipeline

        start = time.perf_counter()
        session = onnxruntime.SessionOptions()
        session.intra_op_num_threads = options["threads"]
        provider = "CUDAExecutionProvider" if options["device"] == "cuda" else "CPUExecutionProvider"
        pipe = ORTStableDiffusionPipeline.from_pretrained(
            options["checkpoint"], export=True, provider=provider, session_options=session, safety_checker=None
        )
        self.settings["provider"] = provider
        self.versions |= {name: version(name) for name in ("optimum-onnx", "onnxruntime")}
        self._build = time.perf_counter() - start
        return pipe
