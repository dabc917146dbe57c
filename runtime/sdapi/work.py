"""From a request to the web UI's API to the work of a service."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from PIL import ImageFilter

from ...engines.bundle import LatentInfo
from ...engines.errors import LatentRTError, RequestError
from ..prompt.chunks import takes_chunks
from ..prompt.embeddings import conditioning_tensor
from ..sampling import takes_eta
from ..service import Model, Service, Work
from ..service.errors import RefusedError
from .fields import ImageToImage, TextToImage, ignored
from .pictures import initial_mask, initial_picture, sized, spread
from .samplers import sampler_of
from .settings import Settings

NAMES = {
    "n": "batch_size times n_iter",
    "num_inference_steps": "steps",
    "num_images_per_prompt": "batch_size times n_iter",
    "guidance_scale": "cfg_scale",
    "true_cfg_scale": "cfg_scale",
    "strength": "denoising_strength",
    "image": "init_images",
    "mask_image": "mask",
    "sampler": "sampler_name",
    "padding_mask_crop": "inpaint_full_res_padding",
}
"""Fields of ours that messages begin with, and what this API calls them."""

LARGEST_RANDOM = 2**32


@dataclass(frozen=True)
class Drawing:
    """What is drawn for a request, and what its answer says beside the pictures."""

    body: TextToImage
    work: Work
    model: Model
    seed: int
    sampler: str
    settings: Settings
    """Those of the request, its own overrides among them."""
    ignored: list[str]


def drawing_of(
    body: TextToImage, service: Service, settings: Settings, *, owner: str = "", request_id: str = ""
) -> Drawing:
    """Return what a request asks for; raises `RefusedError`.

    Pictures are decoded here, which takes time: not on an event loop.
    """
    notes = ignored(body)
    settings = settings.with_options(body.override_settings, service.models)
    overrides = settings.ignored(body.override_settings, service.models)
    notes += [f"override_settings.{name[:60]}" for name in overrides]
    model = service.models.find(settings.model)
    sampler = sampler_of(body.sampler_name or body.sampler_index, body.scheduler, model.manifest.scheduler)
    seed = secrets.randbelow(LARGEST_RANDOM) if body.seed < 0 else body.seed
    arguments: dict[str, Any] = {"prompt": body.prompt, "num_images_per_prompt": body.images, "seed": seed}
    given = {
        "negative_prompt": body.negative_prompt or None,
        "num_inference_steps": body.steps,
        "sampler": sampler,
        "prompt_syntax": "a1111" if reads_weights(model) else None,
        **_guidance(body, model),
    }
    arguments |= {name: value for name, value in given.items() if value is not None}
    if body.eta is not None:
        if _takes_eta(sampler, model):
            arguments["eta"] = body.eta
        elif body.eta not in (0, 1):  # fresh noise is whole here, which clients call 1, and older ones 0
            notes.append("eta")
    latent = model.manifest.latent
    work = Work(
        arguments,
        model=model.name,
        task="edit" if isinstance(body, ImageToImage) else "generation",
        output=settings.output,
        previews=service.limits.previews if settings.previews else 0,
        owner=owner,
        request_id=request_id,
    )

    def with_more(more: Mapping[str, Any]) -> Work:
        return replace(work, arguments={**arguments, **more})

    if isinstance(body, ImageToImage):
        work = with_more(_pictures(body, latent, lambda size: service.check(with_more(size))))
    else:
        work = with_more(_size(body, latent))
    return Drawing(body, work, model, seed, sampler or model.manifest.scheduler.get("_class_name", ""), settings, notes)


def reads_weights(model: Model) -> bool:
    """Tell whether prompts of a model may have weights, which is with one CLIP text encoder."""
    tokenizers = model.manifest.tokenizers
    try:
        conditioning_tensor(model.bundle)
    except RequestError:
        return False
    return len(tokenizers) == 1 and takes_chunks(tokenizers[0])


def _guidance(body: TextToImage, model: Model) -> dict[str, float | None]:
    """Return the numbers of guidance: a network that was distilled with one has two, as Forge has."""
    if model.manifest.guidance.scale == "true_cfg_scale":
        return {"true_cfg_scale": body.cfg_scale, "guidance_scale": body.distilled_cfg_scale}
    return {"guidance_scale": body.cfg_scale}


def _takes_eta(sampler: str | None, model: Model) -> bool:
    config = model.manifest.scheduler
    try:
        return takes_eta(sampler or config.get("_class_name", ""), config)
    except LatentRTError:  # the pipeline says what is wrong with the name
        return False


def _size(body: TextToImage, latent: LatentInfo) -> dict[str, int]:
    """Return width and height: one alone gets the model's own for the other, and none is left to the service."""
    if body.width is None and body.height is None:
        return {}
    return {"width": body.width or latent.default_width, "height": body.height or latent.default_height}


def _pictures(body: ImageToImage, latent: LatentInfo, check: Callable[[dict[str, int]], object]) -> dict[str, Any]:
    """Return what is drawn from, and at which size where the request or a mask says so; raises `RefusedError`.

    `check` raises it for a size that is not served: before a picture gets that size, which takes memory and time.
    """
    if len(body.init_images) != 1:
        count = len(body.init_images)
        raise RefusedError(f"init_images is {count} pictures: give one, as base64 or a data: URL", "init_images")
    if not body.denoising_strength > 0:
        raise RefusedError("denoising_strength is 0, which draws nothing: give more, to 1", "denoising_strength")
    if size := _size(body, latent):
        check(size)
    picture = initial_picture(body.init_images[0])
    arguments: dict[str, Any] = {"strength": body.denoising_strength, **size}
    if not body.mask:
        if size:
            picture = sized(picture, size["width"], size["height"], body.resize_mode)
        return {**arguments, "image": picture}
    mask = initial_mask(body.mask, invert=bool(body.inpainting_mask_invert))
    if mask.size != picture.size:
        mask = mask.resize(picture.size)
    if body.inpainting_fill > 1:
        raise RefusedError(
            f"inpainting_fill is {body.inpainting_fill}: give 0 to begin with the colors around the mask, or 1 with "
            "what is there; denoising_strength 1 begins with noise",
            "inpainting_fill",
        )
    padding = body.inpaint_full_res_padding
    if not body.inpaint_full_res:  # the whole picture is drawn, and pasted where the mask is
        multiple = latent.size_multiple
        width, height = (max(multiple, side // multiple * multiple) for side in picture.size)
        size = {"width": width, "height": height, **size}
        check(size)
        picture, mask = (sized(each, size["width"], size["height"], body.resize_mode) for each in (picture, mask))
        arguments |= size
        padding = max(size.values())
    if body.inpainting_fill == 0:
        picture = spread(picture, mask.point(lambda value: 255 * (value > 127)))
    blur = tuple(body.mask_blur if given is None else given for given in (body.mask_blur_x, body.mask_blur_y))
    mask = mask.filter(ImageFilter.GaussianBlur(blur)).convert("RGB")
    return {**arguments, "image": picture, "mask_image": mask, "padding_mask_crop": padding}


def renamed(message: str) -> str:
    """Return a message with the name of the field that it begins with as this API has it."""
    match = re.match(r"(\w+)(?= (?:is|has|was|of)\b)", message)
    return NAMES[match[1]] + message[match.end() :] if match and match[1] in NAMES else message
