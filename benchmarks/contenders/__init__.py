"""Who is measured: latentrt on every backend and mode that works here, and what else its users could run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, get_args

from ...engines.backends import unavailable_reasons
from ...engines.bundle import Bundle
from ...engines.errors import RequestError
from ...engines.machine import has_bf16
from ...runtime.loop.decoding import decodings_of
from ...runtime.loop.denoise import Mode
from ...runtime.loop.forecast import METHODS
from .process import interpreter

REFERENCE = "diffusers/eager"
"""The contender whose answers are the reference when it runs in fp32."""

STAGES = ("tokenize", "encode", "prepare", "denoise", "decode", "png")
"""The stages of a request that every contender tells apart, in their order."""
NETWORKS = {"text_encoder": "encode", "denoiser": "denoise", "decoder": "decode"}
"""The graphs that are networks, and the stage in which each runs."""

OWN_GRAPHS = "own-graphs"
"""A mode in which the backend's library captures and replays its graphs itself."""
MODES = {"onnxruntime-cuda": ("eager", OWN_GRAPHS), "openvino": ("step",)}
"""Modes of the backends that do not have all of the loop's, or differ from others in the networks alone."""
LOSSY: Mapping[str, Mapping[str, Any]] = {
    **{name: {"forecast": name} for name in METHODS},
    "guided-half": {"guidance_interval": (0.0, 0.5)},
    "guidance-kept": {"guidance_reuse": 0.5},
    "tiny-decoder": {"decoder": "tiny"},
    "tiled": {"tiled": True},
}
"""Modes that are not exact, by the end of a contender's name, and the arguments of a request that they stand for."""
ON_A_PROCESSOR = ("onnxruntime-cpu", "openvino")
"""Backends that are measured on the processor; the others on a GPU."""


@dataclass(frozen=True)
class Candidate:
    """A contender by name, what it is in words, and why it cannot run here (None when it can)."""

    name: str
    title: str
    missing: str | None = None
    bundle: Bundle | None = None
    """What it opens instead of the workload's bundle."""

    @property
    def lossy(self) -> bool:
        """Whether it is one of `LOSSY`, which are measured when they are asked for."""
        return "+" in self.name

    @property
    def ours(self) -> bool:
        """Whether this is latentrt."""
        return self.name.startswith("latentrt/")


def is_exact(name: str) -> bool:
    """Tell by its name whether a contender computes in the precision that is asked for and leaves nothing out."""
    return "+" not in name and not in_bf16(name)


def in_bf16(name: str) -> bool:
    """Tell by its name whether a contender computes in bf16, whatever the precision that is asked for."""
    return "bf16" in name


def candidates(device: str) -> list[Candidate]:
    """Return every contender that this project knows for a device, `cpu` or `cuda`, latentrt first."""
    ours = []
    for backend, reason in unavailable_reasons().items():
        if (backend in ON_A_PROCESSOR) == (device == "cpu"):
            for mode in MODES.get(backend, sorted(get_args(Mode), key=lambda mode: mode != "step")):
                ours.append(Candidate(f"latentrt/{backend}/{mode}", f"latentrt ({backend}, {mode})", reason))
    torch = _missing("torch", "diffusers", "transformers")
    bf16 = None if has_bf16() else "this processor has no bf16 units"
    if device == "cpu":
        unavailable = unavailable_reasons()["openvino"] or bf16
        ours.append(Candidate("latentrt/openvino-bf16/step", "latentrt (openvino, bf16, step)", unavailable))
    ours += [
        Candidate(f"{c.name}+{name}", f"{c.title[:-1]}, {_words(lossy)})", c.missing)
        for c in ours
        if c.name.endswith("/step")
        for name, lossy in LOSSY.items()
    ]
    others = [
        Candidate("diffusers/eager", "diffusers", torch),
        Candidate("diffusers/compile", "diffusers + torch.compile", torch or _no_compiler(device)),
        Candidate("optimum", "ONNX Runtime through Optimum", _optimum_missing()),
    ]
    if device == "cpu":
        openvino = _missing("openvino") or torch
        others += [
            Candidate("diffusers/eager-bf16", "diffusers in bf16", torch or bf16),
            Candidate(
                "diffusers/compile-bf16", "diffusers + torch.compile in bf16", torch or bf16 or _no_compiler(device)
            ),
            Candidate("openvino", "OpenVINO in diffusers", openvino),
            Candidate("openvino/bf16", "OpenVINO in diffusers, bf16", openvino or bf16),
        ]
    return ours + others


def choose(device: str, names: Sequence[str] | None = None, *, lossy: bool = False) -> list[Candidate]:
    """Return the candidates with one of `names`, or whose names begin with it; all by default, missing ones included.

    `lossy` adds those that are not exact. Raises `RequestError` for a name that no candidate has.
    """
    known = [candidate for candidate in candidates(device) if lossy or not candidate.lossy]
    if not names:
        return known
    for name in names:
        if not any(c.name.startswith(name) for c in known):
            raise RequestError(f"unknown contender {name!r}: choose from {', '.join(c.name for c in known)}")
    exact = {c.name for c in known if c.name.partition("+")[0] in names}
    beginnings = [name for name in names if name not in exact]
    return [c for c in known if c.name in exact or any(c.name.startswith(name) for name in beginnings)]


def of_bundle(found: Sequence[Candidate], bundle: Bundle, height: int, width: int) -> list[Candidate]:
    """Return candidates, and why those cannot run whose decoder a bundle lacks, or whose picture fits in one tile."""
    cells = [side // bundle.manifest.latent.downscale for side in (height, width)]

    def missing(candidate: Candidate) -> str | None:
        lossy = LOSSY.get(candidate.name.partition("+")[2], {})
        try:
            decodings = decodings_of(bundle, lossy.get("decoder", "full"), lossy.get("tiled"), cells)
        except RequestError:
            return f"the bundle has no {lossy['decoder']} decoder"
        return f"{width}x{height} fits in one tile" if lossy.get("tiled") and decodings[0].tile is None else None

    return [replace(each, missing=each.missing or missing(each)) for each in found]


def beside(found: Sequence[Candidate], bundle: Bundle, others: Sequence[Bundle]) -> list[Candidate]:
    """Return candidates, and each of latentrt's exact ones again with every further bundle of the same checkpoint.

    A bundle whose denoiser is in parts ends their names with `-parts`, one whose convolutions are in half the products
    with `-winograd`, a quantized one with `+int8` or `+fp8`. Raises `RequestError` for a bundle that is none of these,
    is like another, or comes from another checkpoint than `bundle`.
    """
    kinds: dict[str, str] = {}
    added = list[Candidate]()
    for other in others:
        graphs = other.manifest.graphs
        quantized = next((graph.quantization.precision for graph in graphs if graph.quantization), None)
        words = {"in parts": bool(other.manifest.bytes_of("request")), "winograd": any(g.winograd for g in graphs)}
        said = [word for word, holds in words.items() if holds]
        kind = "".join(f"-{word.split()[-1]}" for word in said) + (f"+{quantized}" if quantized else "")
        weights, own = (each.manifest.source.get("files", {}) for each in (other, bundle))
        if not (both := weights.keys() & own.keys()) or any(weights[name] != own[name] for name in both):
            raise RequestError(f"{other.path} comes from another checkpoint than the workload's bundle, {bundle.path}")
        if not kind:
            raise RequestError(f"{other.path} is not quantized, in parts or winograd: nothing of it would differ")
        if kind in kinds:
            raise RequestError(f"{kinds[kind]} and {other.path} are alike ({kind[1:]}): give one of them")
        kinds[kind] = str(other.path)
        title = ", ".join([*said, *([quantized] if quantized else [])])
        added += [
            replace(c, name=c.name + kind, title=f"{c.title[:-1]}, {title})", bundle=other)
            for c in found
            if c.ours and not c.lossy and c.name.endswith("/step")
        ]
    return [*found, *added]


def precision_apart(backend: str) -> tuple[str, str | None]:
    """Return a backend and the precision that a contender's name asks it for: `openvino-bf16`."""
    plain = backend.removesuffix("-bf16")
    return plain, None if plain == backend else "bf16"


def _words(lossy: Mapping[str, Any]) -> str:
    """Return in words what a mode that is not exact asks for: forecast taylor, guidance_interval 0.0-0.5."""
    parts = ((name, "-".join(map(str, value)) if isinstance(value, tuple) else value) for name, value in lossy.items())
    return ", ".join(f"{name} {value}" for name, value in parts)


def _missing(*modules: str) -> str | None:
    for module in modules:
        try:
            found = find_spec(module) is not None
        except ModuleNotFoundError:
            found = False
        if not found:
            return f"{module} is not installed"
    return None


def _optimum_missing() -> str | None:
    if interpreter("optimum") is not None or _missing("optimum.onnxruntime") is None:
        return None
    return (
        "optimum-onnx is not installed; it wants an older transformers than ours, so install it with latentrt in a "
        "virtual environment of its own and name its interpreter in LATENTRT_BENCH_PYTHON_OPTIMUM"
    )


def _no_compiler(device: str) -> str | None:
    import shutil

    if device == "cpu" and not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        return "torch.compile needs a C++ compiler on the CPU"
    return None
