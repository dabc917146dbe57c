"""Inputs and outputs of the model, and what becomes of a request's inputs.

Names are those of the HTTP server's fields. Numbers have numpy's own types, int64 and float64, so that a plain
`numpy.array([7.5])` fits, and a float is the one that was meant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import numpy as np

from ...engines.device import Array
from ..service import Output, Work
from ..service.errors import RefusedError
from ..service.pictures import bytes_of_text, check_shape, mask_of, picture_of
from ..sizes import parse_size

Kind = Literal["STRING", "INT64", "UINT64", "FP64", "BOOL", "UINT8", "INT32"]
DTYPES: dict[Kind, Any] = {
    "STRING": np.object_,
    "INT64": np.int64,
    "UINT64": np.uint64,
    "FP64": np.float64,
    "BOOL": np.bool_,
    "UINT8": np.uint8,
    "INT32": np.int32,
}


@dataclass(frozen=True)
class Tensor:
    """An input or output: its name, Triton's type without TYPE_, and its shape, -1 for any length."""

    name: str
    kind: Kind
    dims: tuple[int, ...] = (1,)


TEXTS = (
    *("negative_prompt", "prompt_2", "negative_prompt_2", "prompt_3", "negative_prompt_3"),
    *("prompt_syntax", "sampler", "forecast"),
)
WHOLE = ("n", "num_inference_steps", "padding_mask_crop", "partial_images", "output_compression")
REAL = ("guidance_scale", "true_cfg_scale", "eta", "strength", "timeout")

INPUTS = (
    Tensor("prompt", "STRING"),
    *(Tensor(name, "STRING") for name in (*TEXTS, "size", "image", "mask", "output_format", "response_format")),
    *(Tensor(name, "INT64") for name in WHOLE),
    *(Tensor(name, "FP64") for name in REAL),
    *(Tensor(name, "FP64", (-1,)) for name in ("timesteps", "sigmas")),
    Tensor("seed", "UINT64", (-1,)),
    Tensor("progress", "BOOL"),
    Tensor("probe", "BOOL"),
)
"""The first is required, all others may be left out. With `probe` nothing is drawn: `facts` say what there is."""

OUTPUTS = (
    Tensor("image", "STRING"),
    Tensor("pixels", "UINT8", (-1, -1, 3)),
    Tensor("seed", "UINT64"),
    Tensor("index", "INT32"),
    Tensor("step", "INT32"),
    Tensor("steps", "INT32"),
    Tensor("preview", "STRING"),
    Tensor("facts", "STRING"),
)
"""A response has those that it is about, and of those what was asked for."""

ARGUMENTS = {"n": "num_images_per_prompt"}
"""Inputs that a pipeline's call names otherwise."""
OTHER = ("size", "image", "mask", "output_format", "response_format", "output_compression")
"""Inputs that are no argument of it, or not as they are; the others are."""
AROUND = ("progress", "probe", "partial_images", "timeout")

Format = Literal["png", "jpeg", "webp", "raw"]
Response = Literal["bytes", "b64_json"]


@dataclass(frozen=True)
class Wanted:
    """What a request asks for, and how its responses are to be."""

    work: Work
    raw: bool
    """Whether pictures are arrays in `pixels`, instead of files in `image`."""
    base64: bool
    """Whether `image` and `preview` are base64, for JSON."""
    progress: bool
    """Whether there is a response for each step."""


def wanted_of(inputs: Mapping[str, Array], *, request_id: str = "", timeout: float | None = None) -> Wanted:
    """Return what a request's inputs ask for; `timeout` is Triton's own, in seconds. Raises `RequestError`.

    Pictures are decoded here, which takes time.
    """
    given = {each.name: value_of(each, inputs[each.name]) for each in INPUTS if each.name in inputs}
    if "prompt" not in given:
        raise RefusedError("prompt is missing: give a text", "prompt")
    arguments = {ARGUMENTS.get(name, name): value for name, value in given.items() if name not in (*OTHER, *AROUND)}
    if isinstance(seeds := arguments.get("seed"), list) and len(seeds) == 1:
        arguments["seed"] = seeds[0]
    if given.get("size", "auto") != "auto":
        arguments["width"], arguments["height"] = parse_size(given["size"])
    for name, argument, read in (("image", "image", picture_of), ("mask", "mask_image", mask_of)):
        if name in given:
            arguments[argument] = read(_file(given[name], name), name)
    if "image" in given and "mask" in given:
        check_shape(arguments["mask_image"], arguments["image"])
    chosen = _choice(given, "output_format", Format)
    quality = given.get("output_compression", 95)
    if not 0 <= quality <= 100:
        raise RefusedError(f"output_compression is {quality}: give 0 to 100", "output_compression")
    response = _choice(given, "response_format", Response)
    given_timeout = given.get("timeout", timeout)
    if given_timeout is not None and not 0 < given_timeout < float("inf"):
        raise RefusedError(f"timeout is {given_timeout:g}: give seconds, more than 0", "timeout")
    if (previews := given.get("partial_images", 0)) < 0:
        raise RefusedError(f"partial_images is {previews}: give 0 or more", "partial_images")
    work = Work(
        arguments,
        task="edit" if "image" in arguments else "generation",
        output=Output(cast(Any, "ppm" if chosen == "raw" else chosen), quality),
        previews=previews,
        timeout=given_timeout,
        request_id=request_id,
    )
    return Wanted(work, chosen == "raw", response == "b64_json", given.get("progress", False))


def value_of(spec: Tensor, array: Array) -> Any:
    """Return an input's value: one, or a list where it may have any length. Raises `RefusedError`."""
    values = array.reshape(-1).tolist()
    if spec.name not in ("image", "mask"):
        values = [_text(value, spec.name) if isinstance(value, bytes) else value for value in values]
    if spec.dims == (-1,):
        return values
    if len(values) != 1:
        raise RefusedError(f"{spec.name} has {len(values)} values: give one", spec.name)
    return values[0]


def _text(value: bytes, name: str) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise RefusedError(f"{name} is no UTF-8 at byte {error.start}: give a text", name) from error


def _file(value: bytes | str, name: str) -> bytes:
    """Return a file's bytes, which over JSON come in base64. No picture's file is ASCII."""
    data = value.encode() if isinstance(value, str) else value
    return bytes_of_text(data.decode(), name) if data.isascii() else data


def _choice(given: Mapping[str, Any], name: str, kind: Any) -> str:
    known = get_args(kind)
    value = given.get(name, known[0])
    if value not in known:
        raise RefusedError(f"{name} is {str(value)[:60]!r}: choose {', '.join(known)}", name)
    return str(value)


def pixels_of(ppm: bytes) -> Array:
    """Return the picture [H, W, 3] in the bytes of a PPM file of our own."""
    head, size, depth, data = ppm.split(b"\n", 3)
    assert (head, depth) == (b"P6", b"255"), ppm[:20]
    width, height = map(int, size.split())
    return np.frombuffer(data, np.uint8).reshape(height, width, 3)
