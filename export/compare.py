"""How near tensors and pictures are to a reference, and how near they must be."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from ..engines.bundle import Manifest, Precision
from ..engines.device import Array
from ..engines.selfcheck import BOUND, QUANTIZED_BOUND, relative_error

EXPORT_BOUND: Mapping[Precision, float] = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}
"""Largest relative error of an exported graph, run without optimizations on the CPU."""

PSNR_BOUND: Mapping[Precision, float] = {"fp32": 45.0, "fp16": 35.0, "bf16": 30.0}
"""Smallest peak signal-to-noise ratio of a picture, in decibels."""

QUANTIZED_PSNR = 15.0
"""The same with a network in 8 bits, whatever it computes in beside."""
MORE, MOST_LOST, LEAST_PSNR = 1.5, 0.75, 10.0
"""How many times what its manifest says such a network may have lost: that was measured on a few prompts. And what it
may not be beyond whatever the manifest says: the relative error of nothing at all is 1."""


class Bounds:
    """How far runs of bundles may be from each other: what the coarsest number format that takes part allows.

    A network in 8 bits may be off by as much as its engines may; on one side alone, or against a checkpoint, also by
    `MORE` times what its manifest says. `options` are those of the backend, which may compute in less than that.
    """

    def __init__(self, *manifests: Manifest, options: Mapping[str, Any]) -> None:
        named: dict[Any, Precision] = {"bf16": "bf16", "f16": "fp16"}
        asked = named.get(options.get("precision"), "fp16" if options.get("tf32") else "fp32")
        precisions = [asked, *(manifest.precision for manifest in manifests)]
        self._precision = max(precisions, key=BOUND.__getitem__)
        sides = [{g.name: g.quantization for g in each.graphs if g.quantization is not None} for each in manifests]
        self._quantized = {name for side in sides for name in side}
        alike = {
            name for name in self._quantized if len(sides) > 1 and all(s.get(name) == sides[0].get(name) for s in sides)
        }
        self._lost = [(name, each) for side in sides for name, each in side.items() if name not in alike]

    def error(self, graph: str) -> float:
        """Return the largest relative error of an output of a graph."""
        lost = [min(MOST_LOST, MORE * each.relative_error) for name, each in self._lost if name == graph]
        return max([BOUND[self._precision], *([QUANTIZED_BOUND] if graph in self._quantized else []), *lost])

    def psnr(self) -> float:
        """Return the smallest PSNR of a picture, in decibels."""
        less = 20 * math.log10(MORE)
        lost = [max(LEAST_PSNR, each.psnr - less) for _, each in self._lost if each.psnr is not None]
        return min([PSNR_BOUND[self._precision], *([QUANTIZED_PSNR] if self._quantized else []), *lost])


@dataclass(frozen=True)
class TensorReport:
    """One tensor against its reference, with the largest relative error that is allowed."""

    tensor: str
    max_abs_error: float
    relative_error: float
    """Root-mean-square of the difference over root-mean-square of the reference."""
    cosine: float
    nan_count: int
    bound: float

    @property
    def within(self) -> bool:
        """Whether the tensor is finite and inside its bound."""
        return self.nan_count == 0 and self.relative_error <= self.bound


@dataclass(frozen=True)
class RequestReport:
    """One request against its reference: relative error of the latents after each step, and the pictures."""

    steps: list[float]
    """The last alone where the two ran other numbers of steps."""
    max_pixel_difference: int
    psnr: float | None
    ssim: float
    haarpsi: float
    nan_count: int
    bound: float | None
    """Smallest PSNR that is allowed, in decibels; None for a request whose loss has none."""

    @property
    def within(self) -> bool:
        """Whether everything is finite and the pictures are inside their bound."""
        return self.nan_count == 0 and (self.psnr is None or self.bound is None or self.psnr >= self.bound)


@dataclass
class Report:
    """What was found of a bundle on a backend."""

    bundle: str
    backend: str
    precision: str
    against: str
    """What it was compared with, in words."""
    options: dict[str, Any] = field(default_factory=dict)
    """What is in 8 bits, and what the backend and the request were told besides."""
    tensors: list[TensorReport] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    """Graphs that are not compared, each with the reason."""
    request: RequestReport | None = None

    @property
    def within(self) -> bool:
        """Whether every line is inside its bound."""
        return all(t.within for t in self.tensors) and (self.request is None or self.request.within)

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {**asdict(self), "within": self.within}


def told(manifest: Manifest, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what graphs in 8 bits compute in, by their names, and the options that may change a result."""
    quantized = {graph.name: graph.quantization.precision for graph in manifest.graphs if graph.quantization}
    return quantized | {name: value for name, value in options.items() if name != "threads"}


def pictures_needed(manifest: Manifest, *, starts: bool = False) -> dict[str, Any]:
    """Return a picture, and a mask of its left half, where a request draws nothing without; `starts`: the picture."""
    if manifest.masked_input is None and not starts:
        return {}
    size = (manifest.latent.default_width, manifest.latent.default_height)
    shades, mask = Image.linear_gradient("L").resize(size).convert("RGB"), Image.new("L", size)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    return {"image": shades, "strength": 1.0} if starts else {"image": shades, "mask_image": mask}


def compare_requests(
    steps: tuple[Sequence[Array], Sequence[Array]], pictures: tuple[Array, Array], bound: float | None
) -> RequestReport:
    """Return how far a request is from its reference: of each the latents after every step, and uint8 [B, H, W, 3]."""
    ours, theirs = steps if len(steps[0]) == len(steps[1]) else (steps[0][-1:], steps[1][-1:])
    pairs = list(zip(*pictures, strict=True))
    return RequestReport(
        steps=[relative_error(a, b) for a, b in zip(ours, theirs, strict=True)],
        max_pixel_difference=max_difference(*pictures),
        psnr=psnr(*pictures),
        ssim=float(np.mean([ssim(a, b) for a, b in pairs])),
        haarpsi=float(np.mean([haarpsi(a, b) for a, b in pairs])),
        nan_count=int(sum((~np.isfinite(latents)).sum() for latents in steps[0])),
        bound=bound,
    )


@np.errstate(invalid="ignore")  # infinities give NaN, which no bound accepts
def compare(name: str, values: Array, reference: Array, bound: float) -> TensorReport:
    """Return how far one tensor is from its reference of the same shape.

    Bytes are compared as parts of 255 and may be off by one: a value at a rounding edge may fall on either side.
    """
    a, b = values.astype(np.float64).ravel(), reference.astype(np.float64).ravel()
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    cosine = float(a @ b / norm) if norm else float(np.array_equal(a, b))
    difference = np.abs(a - b)
    if reference.dtype == np.uint8:
        difference = np.maximum(difference - 1, 0) / 255
    return TensorReport(
        tensor=name,
        max_abs_error=float(difference.max()),
        relative_error=relative_error(values, reference),
        cosine=cosine,
        nan_count=int((~np.isfinite(a)).sum()),
        bound=bound,
    )


def psnr(values: Array, reference: Array) -> float | None:
    """Return the peak signal-to-noise ratio of uint8 pictures, 10 log10(255² / MSE), in decibels; None when equal.

    Squares are added up along the first axis: of many pictures, one at a time is held in float64.
    """
    squares = (np.square(a.astype(np.float64) - b).sum() for a, b in zip(values, reference, strict=True))
    error = float(sum(squares)) / values.size
    return None if error == 0 else float(10 * np.log10(255**2 / error))


def max_difference(values: Array, reference: Array) -> int:
    """Return the largest difference of a value of uint8 pictures, of 255."""
    return max(int(np.abs(a.astype(np.int16) - b).max()) for a, b in zip(values, reference, strict=True))


def ssim(values: Array, reference: Array) -> float:
    """Return the structural similarity of two uint8 pictures [H, W, 3], the mean over all windows and channels.

    Wang et al. 2004, equation 13, with its 11×11 Gaussian window of standard deviation 1.5, K₁ = 0.01 and K₂ = 0.03.
    Sides are 11 pixels or more.
    """
    x, y = values.astype(np.float64), reference.astype(np.float64)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mx, my = _blur(x), _blur(y)
    vx, vy, cov = _blur(x * x) - mx**2, _blur(y * y) - my**2, _blur(x * y) - mx * my
    similarity = ((2 * mx * my + c1) * (2 * cov + c2)) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    return float(similarity.mean())


_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])


def haarpsi(values: Array, reference: Array) -> float:
    """Return the Haar wavelet-based perceptual similarity of two uint8 pictures [H, W, 3]; 1 for equal ones.

    Reisenhofer et al. 2018, with their C = 30 and α = 4.2, which they fitted to what people said in four databases:
    edges of two scales are compared where there are edges of the third, and colors. No network takes part.
    """
    (y, i, q), (y_ref, i_ref, q_ref) = (_halved(picture @ _YIQ.T).transpose(2, 0, 1) for picture in (values, reference))
    similarities, weights = [], []
    for axis in (0, 1):
        fine = [_alike(_haar(y, scale, axis), _haar(y_ref, scale, axis)) for scale in (1, 2)]
        similarities.append(np.mean(fine, axis=0))
        weights.append(np.maximum(abs(_haar(y, 3, axis)), abs(_haar(y_ref, 3, axis))))
    colors = [_alike(_mean(a), _mean(b)) for a, b in ((i, i_ref), (q, q_ref))]
    similarities.append(np.mean(colors, axis=0))
    weights.append(np.mean(weights, axis=0))
    if not np.any(weights):  # both are black
        return 1.0
    logistic = np.average(1 / (1 + np.exp(-4.2 * np.stack(similarities))), weights=np.stack(weights))
    return float((np.log(logistic / (1 - logistic)) / 4.2) ** 2)


def _alike(a: Array, b: Array) -> Array:
    return np.asarray((2 * abs(a * b) + 30) / (a**2 + b**2 + 30))


def _halved(x: Array) -> Array:
    return _mean(x)[::2, ::2]


def _mean(x: Array) -> Array:
    """Return the mean of each 2×2 window, zero outside of a picture."""
    return _along(_along(x, np.full(2, 0.5), 0), np.full(2, 0.5), 1)


def _haar(x: Array, scale: int, axis: int) -> Array:
    """Return the Haar coefficients of a scale across an axis; the other is summed over."""
    side = 2**scale
    edge = np.repeat([-1.0, 1.0], side // 2) / side
    return _along(_along(x, edge, axis), np.ones(side), 1 - axis)


def _along(x: Array, kernel: Array, axis: int) -> Array:
    """Return the convolution along an axis, of the same size: zeros stand outside."""
    size, after = len(kernel), len(kernel) // 2  # as MATLAB centers an even kernel
    padding = [(0, 0)] * x.ndim
    padding[axis] = (size - 1 - after, after)
    padded = np.moveaxis(np.pad(x, padding), axis, 0)
    whole = sum(weight * padded[size - 1 - j : size - 1 - j + x.shape[axis]] for j, weight in enumerate(kernel))
    return np.moveaxis(np.asarray(whole), 0, axis)


def _blur(x: Array) -> Array:
    """Return Gaussian means of all 11×11 windows that lie inside a picture."""
    window = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window /= window.sum()
    height, width = x.shape[0] - 10, x.shape[1] - 10
    rows = sum(weight * x[i : i + height] for i, weight in enumerate(window))
    return np.asarray(sum(weight * rows[:, i : i + width] for i, weight in enumerate(window)))
