"""The fields of a request over HTTP: OpenAI's, ours on top, and how they become `Work`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..request import MAX_SEED
from ..service import Output, Work
from ..service.errors import RefusedError
from ..service.pictures import bytes_of_text, check_shape, mask_of, picture_of
from ..sizes import parse_size

Text = Annotated[str, Field(max_length=1_000_000)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Numbers = Annotated[list[Number], Field(max_length=1000)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]


class Generation(BaseModel):
    """What is asked of /v1/images/generations."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    prompt: Text
    model: Annotated[str | None, Field(description="A bundle's name; without it the first one.")] = None
    n: Annotated[int | None, Field(ge=1, le=1024, description="How many pictures (1).")] = None
    size: Annotated[str | None, Field(description="WIDTHxHEIGHT in pixels, or auto.")] = None
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: Annotated[int | None, Field(ge=0, le=100, description="Quality of jpeg and webp.")] = None
    stream: bool | None = None
    partial_images: Annotated[int | None, Field(ge=0, le=1000)] = None

    negative_prompt: Text | None = None
    prompt_2: Text | None = None
    prompt_3: Text | None = None
    negative_prompt_2: Text | None = None
    negative_prompt_3: Text | None = None
    prompt_syntax: Literal["a1111", "compel"] | None = None
    num_inference_steps: Annotated[int | None, Field(ge=1, le=100_000)] = None
    timesteps: Numbers | None = None
    sigmas: Numbers | None = None
    guidance_scale: Number | None = None
    guidance_interval: Annotated[list[Number] | None, Field(min_length=2, max_length=2)] = None
    guidance_reuse: Number | None = None
    skip_guidance_layers: Annotated[list[int] | None, Field(max_length=1000)] = None
    skip_layer_guidance_scale: Number | None = None
    skip_layer_guidance_start: Number | None = None
    skip_layer_guidance_stop: Number | None = None
    decoder: Annotated[Literal["full", "tiny"] | None, Field(description="The bundle's own, or its small one.")] = None
    tiled: Annotated[bool | None, Field(description="Decode a large picture in tiles.")] = None
    true_cfg_scale: Number | None = None
    sampler: Annotated[str | None, Field(max_length=200)] = None
    eta: Number | None = None
    forecast: Annotated[str | None, Field(max_length=200)] = None
    seed: Annotated[
        Seed | Annotated[list[Seed], Field(max_length=1024)] | None,
        Field(description="Of the first picture, others follow it; or one for each."),
    ] = None
    clip_skip: int | None = None
    max_sequence_length: Annotated[int | None, Field(ge=1, le=8192)] = None
    timeout: Annotated[
        float | None, Field(gt=0, allow_inf_nan=False, description="Seconds after which nobody wants the result.")
    ] = None

    background: str | None = None
    complexity: str | None = None
    frame_count: int | None = None
    frame_duration_ms: int | None = None
    moderation: str | None = None
    quality: str | None = None
    safety_identifier: str | None = None
    style: str | None = None
    svg: Any = None
    user: str | None = None


class Edit(Generation):
    """What is asked of /v1/images/edits: pictures are base64, or files of a form."""

    image: Annotated[str | list[str] | None, Field(description="The picture to start from: base64 or a data: URL.")] = (
        None
    )
    mask: Annotated[
        str | None,
        Field(description="What is repainted: where it is transparent, or white if it is opaque everywhere."),
    ] = None
    strength: Annotated[Number | None, Field(description="How far to leave the picture, above 0, to 1.")] = None
    padding_mask_crop: Annotated[int | None, Field(description="Draw only the mask with so many pixels around it.")] = (
        None
    )
    input_fidelity: str | None = None
    markup: Any = None


class JobBody(Edit):
    """What is asked of /v1/jobs: a generation, or with a picture an edit."""


IGNORED = (
    *("background", "complexity", "frame_count", "frame_duration_ms", "input_fidelity", "markup", "moderation"),
    *("quality", "safety_identifier", "style", "svg", "user"),
)
"""Fields that clients of OpenAI send and that mean nothing here: taken, and named in the answer."""

PASSED = (
    *("negative_prompt", "prompt_2", "prompt_3", "negative_prompt_2", "negative_prompt_3", "prompt_syntax"),
    *("num_inference_steps", "timesteps", "sigmas", "guidance_scale", "true_cfg_scale", "sampler", "eta"),
    *("guidance_interval", "guidance_reuse", "skip_guidance_layers", "skip_layer_guidance_scale"),
    *("skip_layer_guidance_start", "skip_layer_guidance_stop", "decoder", "tiled"),
    *("forecast", "seed", "clip_skip", "max_sequence_length", "strength", "padding_mask_crop"),
)
"""Fields that are arguments of a pipeline's call as they are."""

NAMES = tuple(JobBody.model_fields)


def ignored(body: Generation) -> list[str]:
    """Return the fields of a request that were given and mean nothing here."""
    idle = {
        "output_compression": body.output_format in (None, "png") and body.output_compression is not None,
        "partial_images": bool(body.partial_images) and not body.stream and not isinstance(body, JobBody),
    }
    given = [name for name in IGNORED if name in body.model_fields_set and getattr(body, name) is not None]
    return [*given, *(name for name, is_idle in idle.items() if is_idle)]


def work_of(body: Generation, *, owner: str = "", request_id: str = "", files: dict[str, bytes] | None = None) -> Work:
    """Return a request's work; `files` are pictures that came as files. Raises `RefusedError`.

    Pictures are decoded here, which takes time: not on an event loop.
    """
    if body.response_format == "url":
        raise RefusedError(
            "response_format is 'url': no picture is stored here to be fetched; use b64_json, or /v1/jobs",
            "response_format",
            "unsupported_response_format",
        )
    arguments: dict[str, Any] = {"prompt": body.prompt, "num_images_per_prompt": body.n or 1}
    for name in PASSED:
        if (value := getattr(body, name, None)) is not None:
            arguments[name] = value
    if body.size not in (None, "auto"):
        try:
            arguments["width"], arguments["height"] = parse_size(body.size or "")
        except ValueError as error:
            raise RefusedError(str(error), "size") from error
    pictures = {**_pictures(body), **(files or {})} if isinstance(body, Edit) else {}
    if "image" in pictures:
        arguments["image"] = picture_of(pictures["image"], "image")
    if "mask" in pictures:
        arguments["mask_image"] = mask_of(pictures["mask"], "mask")
        if "image" in arguments:
            check_shape(arguments["mask_image"], arguments["image"])
    watched = body.stream or isinstance(body, JobBody)
    return Work(
        arguments,
        model=body.model,
        task="edit" if "image" in arguments else "generation",
        output=Output(body.output_format or "png", 95 if body.output_compression is None else body.output_compression),
        previews=(body.partial_images or 0) if watched else 0,
        timeout=body.timeout,
        owner=owner,
        request_id=request_id,
    )


def _pictures(body: Edit) -> dict[str, bytes]:
    given: dict[str, str] = {}
    if isinstance(body.image, list):
        if len(body.image) != 1:
            raise RefusedError(f"image is {len(body.image)} pictures: give one", "image")
        given["image"] = body.image[0]
    elif body.image is not None:
        given["image"] = body.image
    if body.mask is not None:
        given["mask"] = body.mask
    return {name: bytes_of_text(text, name) for name, text in given.items()}
