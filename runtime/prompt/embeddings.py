"""What the denoiser reads of prompts, given by the caller in their place: diffusers' prompt_embeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from ...engines.bundle import Bundle, TensorInfo
from ...engines.device import Array
from ...engines.errors import RequestError
from ..loop.hoisted import conditioning

Read = tuple[str, ...]
"""What each tokenizer reads of one prompt, in their order."""
Encode = Callable[[Read, bool], Mapping[str, Array]]
"""Returns the conditioning [1, …] of a prompt by tensor; the second argument tells a negative one."""

ARGUMENT = {3: "prompt_embeds", 2: "pooled_prompt_embeds"}
"""What diffusers calls the conditioning of a prompt, by the axes of its tensor."""


@dataclass(frozen=True)
class Conditioning:
    """The conditioning of a request's prompts, and of what they should not show: [P, …] each, by tensor.

    It is in place of the prompt graphs, which a request with it does not run. `negative` is empty without guidance.
    """

    prompt: Mapping[str, Array]
    negative: Mapping[str, Array]
    images_per_prompt: int

    def rows(self, first: int, count: int, padded: int) -> dict[str, Array]:
        """Return the rows [R, …] of `count` images, the last repeated until there are `padded`; negatives first."""
        images = np.minimum(np.arange(first, first + padded), first + count - 1) // self.images_per_prompt
        sides = (self.negative, self.prompt) if self.negative else (self.prompt,)
        return {name: np.concatenate([side[name][images % len(side[name])] for side in sides]) for name in self.prompt}

    def blank(self, rows: int) -> dict[str, Array]:
        """Return zeros of the shape and type of `rows` rows."""
        return {name: np.zeros((rows, *each.shape[1:]), each.dtype) for name, each in self.prompt.items()}


@dataclass(frozen=True)
class Embeddings:
    """What a caller gave in place of prompts, or of negative prompts: [P, …] by tensor, float32; empty for nothing."""

    prompt: Mapping[str, Array]
    negative: Mapping[str, Array]

    def conditioning(
        self,
        specs: Sequence[TensorInfo],
        prompts: Sequence[Read],
        negatives: Sequence[Read],
        images_per_prompt: int,
        encode: Encode,
        *,
        guided: bool,
    ) -> Conditioning:
        """Return the conditioning of a request; prompts for which nothing was given are encoded, each once."""
        prompt: Mapping[str, Array] = self.prompt or _encoded(prompts, encode, False)
        negative: Mapping[str, Array] = {}
        if guided:
            negative = self.negative or _encoded(negatives, encode, True)
            for name in prompt:
                if negative[name].shape[1:] != prompt[name].shape[1:]:
                    raise RequestError(
                        f"prompt_embeds is of shape {list(prompt[name].shape)}, and the negative prompt of "
                        f"{list(negative[name].shape)}: give negative_prompt_embeds of the same length"
                    )
        both = [
            {spec.name: side[spec.name].astype(spec.dtype) for spec in specs if side} for side in (prompt, negative)
        ]
        return Conditioning(both[0], both[1], images_per_prompt)


def conditioning_tensors(bundle: Bundle) -> list[TensorInfo]:
    """Return what the denoiser reads of the graphs that run once for each prompt: rows of tokens, and one of a whole.

    Raises `RequestError` where that is anything else, which a caller could not give.
    """
    graphs = [graph for graph in bundle.manifest.graphs if graph.stage == "prompt"]
    written = {spec.name for graph in graphs for spec in (*graph.inputs, *graph.outputs)}
    read = [spec for spec in conditioning(bundle.manifest) if spec.name in written]
    counted = any(np.dtype(spec.dtype).kind != "f" for spec in read)  # such as a mask of tokens
    if counted or sorted(len(spec.shape) for spec in read) not in ([3], [2, 3]):
        names = ", ".join(spec.name for spec in read) or "nothing"
        raise RequestError(f"the denoiser of this bundle reads {names} of a prompt: prompt_embeds cannot stand for it")
    return sorted(read, key=lambda spec: -len(spec.shape))


def conditioning_tensor(bundle: Bundle) -> TensorInfo:
    """Return the one tensor of tokens that the denoiser reads; raises `RequestError` where there is another."""
    read = conditioning_tensors(bundle)
    if len(read) > 1:
        names = ", ".join(spec.name for spec in read)
        raise RequestError(f"the denoiser of this bundle reads {names} of a prompt: prompt_syntax is for one tensor")
    return read[0]


def embeddings_of(bundle: Bundle, given: Mapping[str, Any]) -> Embeddings | None:
    """Return what stands in place of the prompts of a call, checked as diffusers checks it; None where nothing does.

    `given` are the arguments that are texts, prompt_embeds and negative_prompt_embeds, and those with pooled_ before.
    """
    for side, place in product(("", "negative_"), ("", "_2", "_3")):
        name, embeds = f"{side}prompt{place}", f"{side}prompt_embeds"
        if given.get(name) is not None and given[embeds] is not None:
            raise RequestError(f"{name} and {embeds} are given: give one of them")
    if given["prompt"] is None and given["prompt_embeds"] is None:
        raise RequestError("prompt is None: give a text, several, or prompt_embeds")
    if all(given.get(f"{side}{name}") is None for side in ("", "negative_") for name in ARGUMENT.values()):
        return None
    specs = conditioning_tensors(bundle)
    prompt, negative = (_side(given, side, specs) for side in ("", "negative_"))
    for name in prompt.keys() & negative.keys():
        if prompt[name].shape != negative[name].shape:
            shapes = [list(each[name].shape) for each in (prompt, negative)]
            raise RequestError(
                f"prompt_embeds is of shape {shapes[0]} and negative_prompt_embeds of {shapes[1]}: give one shape"
            )
    return Embeddings(prompt, negative)


def _side(given: Mapping[str, Any], side: str, specs: Sequence[TensorInfo]) -> dict[str, Array]:
    """Return what was given in place of prompts, or of negative prompts, by tensor: all of them or nothing."""
    names = {spec.name: f"{side}{ARGUMENT[len(spec.shape)]}" for spec in specs}
    found = [name for name in names.values() if given.get(name) is not None]
    if found and len(found) < len(names):
        missing = next(name for name in names.values() if given.get(name) is None)
        raise RequestError(f"{found[0]} is given without {missing}: this bundle's denoiser reads both")
    for name in ARGUMENT.values():
        if given.get(f"{side}{name}") is not None and f"{side}{name}" not in names.values():
            raise RequestError(f"{side}{name} is given: this bundle's denoiser does not read it, leave it out")
    arrays = {spec.name: _checked(given[names[spec.name]], names[spec.name], spec) for spec in specs if found}
    if len({len(array) for array in arrays.values()}) > 1:
        raise RequestError(f"{' and '.join(names.values())} are for different numbers of prompts: give one for each")
    return arrays


def _checked(value: Any, what: str, spec: TensorInfo) -> Array:
    """Return an array of embeddings, float32, that fits a tensor's shape."""
    array = float_array(value, what)
    fits = array.ndim == len(spec.shape) and len(array) > 0
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


def _encoded(prompts: Sequence[Read], encode: Encode, negative: bool) -> dict[str, Array]:
    """Return the conditioning of prompts, each encoded once."""
    known = {prompt: encode(prompt, negative) for prompt in dict.fromkeys(prompts)}
    return {name: np.concatenate([known[prompt][name] for prompt in prompts]) for name in known[prompts[0]]}
