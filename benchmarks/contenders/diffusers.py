"""diffusers as a contender, as its own users would set it up: `eager` or `compile`, with `-bf16` in that precision."""

from __future__ import annotations

import functools
import io
import json
import os
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ...engines.cache import home


class Contender:
    """The checkpoint's pipeline with a clock at the borders of its stages; nothing inside a stage is touched."""

    def __init__(self, variant: str, options: dict[str, Any]) -> None:
        """Load the checkpoint; fp16 and channels_last on a GPU, where attention is PyTorch's fused kernel as well."""
        began = time.perf_counter()
        how, _, precision = variant.partition("-")
        if how == "compile":
            cache = home() / "torch-compile"
            compiled_before = cache.exists()
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
        import diffusers
        import torch
        import transformers

        index = json.loads((Path(options["checkpoint"]) / "model_index.json").read_text(encoding="utf-8"))
        self._class: Any = getattr(diffusers, index["_class_name"])  # a lazy name: only this line imports the pipeline
        self._checked = "safety_checker" in index
        self._torch = torch
        self._device = options["device"]
        self._build: float | None = None
        self.versions: dict[str, str] = {}
        torch.set_num_threads(options["threads"])
        self.settings: dict[str, Any] = {"device": self._device, "precision": precision or options["precision"]}
        imported = time.perf_counter()
        self._pipe = self._load(options)
        self._pipe.set_progress_bar_config(disable=True)
        if how == "compile":
            self._compile()
            self.settings["compile_cache"] = "warm" if compiled_before else "cold"
        self.facts: dict[str, Any] = {
            "import": imported - began,
            "build": self._build,
            "open": time.perf_counter() - imported - (self._build or 0.0),
            "versions": {m.__name__: m.__version__ for m in (torch, diffusers, transformers)} | self.versions,
            "options": self.settings,
        }
        self._marks: dict[str, Any] = {}
        self._tokenizing = 0.0
        self._last: tuple[Any, list[Any]] = None, []
        self._watch()

    def _load(self, options: dict[str, Any]) -> Any:
        """Return the opened pipeline; what its users do once per machine, not once per process, goes to `_build`."""
        torch = self._torch
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(self.settings["precision"], torch.float32)
        unchecked = {"safety_checker": None} if self._checked else {}
        pipe = self._class.from_pretrained(
            options["checkpoint"], torch_dtype=dtype, local_files_only=True, **unchecked
        ).to(self._device)
        if self._device == "cuda":
            self._channels_last(pipe)
        return pipe

    def _channels_last(self, pipe: Any) -> None:
        self.settings["memory_format"] = "channels_last"
        getattr(pipe, network_of(pipe)).to(memory_format=self._torch.channels_last)
        pipe.vae.to(memory_format=self._torch.channels_last)

    def _compile(self) -> None:
        mode = self.settings["compile"] = "max-autotune" if self._device == "cuda" else "default"
        self._channels_last(self._pipe)
        name = network_of(self._pipe)
        setattr(self._pipe, name, self._torch.compile(getattr(self._pipe, name), mode=mode))
        self._pipe.vae.decode = self._torch.compile(self._pipe.vae.decode, mode=mode)

    def _mark(self) -> Any:
        if self._device != "cuda":
            return time.perf_counter()
        event = self._torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, a: Any, b: Any) -> float:
        return float(a.elapsed_time(b) / 1e3 if self._device == "cuda" else b - a)

    def _watch(self) -> None:
        """Read the clock where the pipeline goes from one stage to the next."""
        pipe, tokenizer = self._pipe, type(self._pipe.tokenizer)
        encode, tokenize = pipe.encode_prompt, tokenizer.__call__

        @functools.wraps(encode)
        def watched_encode(*args: Any, **kwargs: Any) -> Any:
            self._marks["encode"] = self._mark()
            result = encode(*args, **kwargs)
            self._marks["encoded"] = self._mark()
            return result

        def starts(module: Any, inputs: Any) -> None:
            if "denoise" not in self._marks:
                self._marks["denoise"] = self._mark()

        @functools.wraps(tokenize)
        def watched_tokenize(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = tokenize(*args, **kwargs)
            self._tokenizing += time.perf_counter() - start
            return result

        pipe.encode_prompt = watched_encode
        getattr(pipe, network_of(pipe)).register_forward_pre_hook(starts)
        tokenizer.__call__ = watched_tokenize

    def run(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer one request; see `worker.Contender`."""
        torch = self._torch
        self._marks.clear()
        self._tokenizing = 0.0
        steps: list[Any] = []
        final: dict[str, Any] = {}

        def on_step(pipe: Any, step: int, timestep: Any, state: dict[str, Any]) -> dict[str, Any]:
            steps.append(self._mark())
            final.update(state)
            return {}

        prompts = [request["prompt"]] if isinstance(request["prompt"], str) else request["prompt"]
        seeds = [request["seed"] + i for i in range(len(prompts) * request["batch"])]
        start, begun = time.perf_counter(), self._mark()
        images = self._pipe(
            prompts,
            height=request["height"],
            width=request["width"],
            num_inference_steps=request["steps"],
            guidance_scale=request["guidance"],
            num_images_per_prompt=request["batch"],
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            callback_on_step_end=on_step,
        ).images
        decoded, done = self._mark(), time.perf_counter()
        for picture in images:
            picture.save(io.BytesIO(), "PNG")
        end = time.perf_counter()
        self._last = final["latents"], images
        marks = self._marks
        stages = {
            "tokenize": self._tokenizing,
            "encode": self._between(marks["encode"], marks["encoded"]) - self._tokenizing,
            "prepare": self._between(begun, marks["encode"]) + self._between(marks["encoded"], marks["denoise"]),
            "denoise": self._between(marks["denoise"], steps[-1]),
            "decode": self._between(steps[-1], decoded),
            "png": end - done,
        }
        borders = [marks["denoise"], *steps]
        return {
            "stages": stages,
            "steps": [self._between(a, b) for a, b in pairwise(borders)],
            "evaluations": len(steps),
            "total": end - start,
        }

    def save(self, file: Path, *, latents: bool) -> None:
        """Write the last request's answer."""
        last, images = self._last
        more = {"latents": last.float().cpu().numpy()} if latents and last.ndim == 4 else {}
        np.savez(file, images=np.stack([np.asarray(picture) for picture in images]), **more)


def network_of(pipe: Any) -> str:
    """Return under which name a pipeline holds the network of its steps."""
    return "unet" if hasattr(pipe, "unet") else "transformer"
