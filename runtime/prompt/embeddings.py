"""What the denoiser reads of prompts, given by the caller in their place: diffusers' prompt_embeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...engines.bundle import Bundle, TensorInfo
from ...engines.device import Array
from ...engines.errors import RequestError

Encode = Callable[[str], Array]
"""Returns the conditioning [1, L, E] of a text."""


@dataclass(frozen=True)
class Conditioning:
    """The conditioning of a request's prompts, and of what they should not show: [P, L, E] each.

    It is in place of the prompt graphs, which a request with it does not run. `negative` is None without guidance.
    """

    name: str
    """The tensor that the denoiser reads."""
    prompt: Array
    negative: Array | None
    images_per_prompt: int

    def rows(self, first: int, count: int, padded: int) -> Array:
        """Return the rows [R, L, E] of `count` images, the last repeated until there are `padded`; negatives first."""
        images = np.minimum(np.arange(first, first + padded), first + count - 1) // self.images_per_prompt
        negative = () if self.negative is None else (self.negative[images % len(self.negative)],)
        return np.concatenate([*negative, self.prompt[images]])

    def blank(self, rows: int) -> Array:
        """Return zeros of the shape and type of `rows` rows."""
        return np.zeros((rows, *self.prompt.shape[1:]), self.prompt.dtype)


@dataclass(frozen=True)
class Embeddings:
    """What a caller gave in place of prompts, or of negative prompts: [P, L, E], float32."""

    prompt: Array | None
    negative: Array | None

    def conditioning(
        self,
        spec: TensorInfo,
        prompts: Sequence[str],
        negatives: Sequence[str],
        images_per_prompt: int,
        encode: Encode,
        *,
        guided: bool,
    ) -> Conditioning:
        """Return the conditioning of a request; texts for which nothing was given are encoded, each once."""
        kind = np.dtype(spec.dtype)
        prompt = _encoded(prompts, encode) if self.prompt is None else self.prompt
        negative = None
        if guided:
            negative = _encoded(negatives, encode) if self.negative is None else self.negative
            if negative.shape[1:] != prompt.shape[1:]:
                raise RequestError(
                    f"prompt_embeds is of shape {list(prompt.shape)}, and the negative prompt of "
                    f"{list(negative.shape)}: give negative_prompt_embeds of the same length"
                )
            negative = negative.astype(kind)
        return Conditioning(spec.name, prompt.astype(kind), negative, images_per_prompt)


def conditioning_tensor(bundle: Bundle) -> TensorInfo:
    """Return what the denoiser reads of the graphs that run once for each prompt.

    Raises `RequestError` where that is not one tensor of rows, which a caller could give.
    """
    written = {spec.name for graph in bundle.manifest.graphs if graph.stage == "prompt" for spec in graph.outputs}
    read = [spec for spec in bundle.graph("denoiser").inputs if spec.name in written]
    if len(read) != 1 or len(read[0].shape) != 3:
        names = ", ".join(spec.name for spec in read) or "nothing"
        raise RequestError(f"the denoiser of this bundle reads {names} of a prompt: prompt_embeds is for one tensor")
    return read[0]


def embeddings_of(bundle: Bundle, given: Mapping[str, Any]) -> Embeddings | None:
    """Return what stands in place of the prompts of a call, checked as diffusers checks it; None where nothing does.

    `given` are the arguments prompt, negative_prompt, prompt_embeds and negative_prompt_embeds.
    """
    for name in ("prompt", "negative_prompt"):
        if given[name] is not None and given[f"{name}_embeds"] is not None:
            raise RequestError(f"{name} and {name}_embeds are given: give one of them")
    if given["prompt"] is None and given["prompt_embeds"] is None:
        raise RequestError("prompt is None: give a text, several, or prompt_embeds")
    if given["prompt_embeds"] is None and given["negative_prompt_embeds"] is None:
        return None
    spec = conditioning_tensor(bundle)
    names = ("prompt_embeds", "negative_prompt_embeds")
    prompt, negative = (None if given[name] is None else _checked(given[name], name, spec) for name in names)
    if prompt is not None and negative is not None and prompt.shape != negative.shape:
        shapes = [list(each.shape) for each in (prompt, negative)]
        raise RequestError(
            f"prompt_embeds is of shape {shapes[0]} and negative_prompt_embeds of {shapes[1]}: give one shape"
        )
    return Embeddings(prompt, negative)


def _checked(value: Any, what: str, spec: TensorInfo) -> Array:
    """Return an array of embeddings, float32, that fits a tensor's shape."""
    array = float_array(value, what)
    fits = array.ndim == 3 and len(array) > 0
    if not fits or any(isinstance(n, int) and n != m for n, m in zip(spec.shape[1:], array.shape[1:], strict=True)):
        shape = ", ".join(map(str, spec.shape[1:]))
        raise RequestError(f"{what} is of shape {list(array.shape)}: this bundle takes [prompts, {shape}]")
    return array


def float_array(value: Any, what: str) -> npt.NDArray[np.float32]:
    """Return an array, or a tensor of any library that numpy reads, as float32; raises `RequestError` for others.

    A torch tensor on a device, of bfloat16 or with a gradient is read as well; PyTorch is not imported.
    """
    array: Any = value
    try:
        for method in ("detach", "cpu"):
            array = getattr(array, method)() if hasattr(array, method) else array
        if "bfloat16" in str(getattr(array, "dtype", "")):  # numpy has none
            array = array.float() if hasattr(array, "float") else array.astype(np.float32)
        readable = hasattr(array, "__array__") or not hasattr(array, "__dlpack__")
        array = np.asarray(array) if readable else np.from_dlpack(array)
    except Exception as error:  # libraries raise many kinds
        raise RequestError(f"{what} is a {type(value).__name__} that numpy cannot read: give an array") from error
    if array.dtype.kind != "f":
        raise RequestError(f"{what} is a {type(value).__name__} of {array.dtype}: give an array of floats")
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise RequestError(f"{what} holds numbers that are not finite: give finite ones")
    return np.ascontiguousarray(array)


def _encoded(texts: Sequence[str], encode: Encode) -> Array:
    """Return the conditioning of texts, each encoded once."""
    known = {text: encode(text) for text in dict.fromkeys(texts)}
    return np.concatenate([known[text] for text in texts])
