"""The fields of a request to the web UI's API: those that are served, those that mean nothing here, those refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ..request import MAX_SEED
from ..service.errors import RefusedError

Number = Annotated[float, Field(allow_inf_nan=False)]
Text = Annotated[str, Field(max_length=1_000_000)]
Count = Annotated[int, Field(ge=1, le=1024)]
Blur = Annotated[float, Field(ge=0, le=256, allow_inf_nan=False, description="Pixels that its edge is softened by.")]
Side = Annotated[int, Field(ge=1, le=65536)]


class TextToImage(BaseModel):
    """What is asked of /sdapi/v1/txt2img. A field that is null is as one that is not there."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    prompt: Text = ""
    negative_prompt: Text = ""
    seed: Annotated[int, Field(ge=-1, le=MAX_SEED, description="Of the first picture, others follow it; -1: any.")] = -1
    sampler_name: Annotated[str | None, Field(max_length=200)] = None
    sampler_index: Annotated[str | None, Field(max_length=200, description="An older name of sampler_name.")] = None
    scheduler: Annotated[str | None, Field(max_length=200)] = None
    batch_size: Count = 1
    n_iter: Count = 1
    steps: Annotated[int | None, Field(ge=1, le=100_000)] = None
    cfg_scale: Number | None = None
    distilled_cfg_scale: Number | None = None
    width: Side | None = None
    height: Side | None = None
    eta: Number | None = None
    override_settings: dict[str, Any] = {}
    override_settings_restore_afterwards: bool = True
    send_images: bool = True
    force_task_id: Annotated[str | None, Field(max_length=200)] = None

    @field_validator("*", mode="wrap")
    @classmethod
    def _null_is_absent(cls, value: Any, check: Callable[[Any], Any], info: Any) -> Any:
        default = cls.model_fields.get(info.field_name)
        return default.get_default() if value is None and default is not None else check(value)

    @property
    def images(self) -> int:
        """How many pictures are asked for."""
        return self.batch_size * self.n_iter


class ImageToImage(TextToImage):
    """What is asked of /sdapi/v1/img2img: pictures are base64 or data: URLs."""

    init_images: Annotated[list[str], Field(max_length=64)] = []
    mask: str | None = None
    denoising_strength: Number = 0.75
    resize_mode: Annotated[int, Field(ge=0, le=3, description="0 stretch, 1 cut, 2 fill.")] = 0
    mask_blur: Blur = 4
    mask_blur_x: Blur | None = None
    mask_blur_y: Blur | None = None
    inpainting_fill: Annotated[int, Field(ge=0, le=3, description="0 fill with what is around, 1 as it is.")] = 0
    inpaint_full_res: bool = True
    inpaint_full_res_padding: Annotated[int, Field(ge=0, le=65536)] = 0
    inpainting_mask_invert: Annotated[int, Field(ge=0, le=1)] = 0
    include_init_images: bool = False


def _is_on(value: Any) -> bool:
    return bool(value)


def is_none(value: Any) -> bool:
    """Tell whether a choice is none, which the web UI writes as a text too."""
    return value in (None, "", "None", "none")


def _is_chosen(value: Any) -> bool:
    return bool(value) and not is_none(value)


def _has_styles(value: Any) -> bool:
    return any(map(_is_chosen, value)) if isinstance(value, list) else _is_chosen(value)


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and value > 0


def _is_more_than_one(value: Any) -> bool:
    return isinstance(value, (int, float)) and value > 1


def _has_arguments(value: Any) -> bool:
    """Tell whether scripts are asked to do something: clients name some without arguments."""
    scripts = value.values() if isinstance(value, Mapping) else ()
    return any(each.get("args") if isinstance(each, Mapping) else each for each in scripts)


Test = Callable[[Any], bool]

CLIP_SKIP = "the layer that is read is chosen when a checkpoint is exported: give 1"

REFUSED: Mapping[str, tuple[Test, str]] = {
    "enable_hr": (_is_on, "pictures are drawn at one size: give it as width and height"),
    "tiling": (_is_on, "the networks are fixed at export, and draw no tiles"),
    "alwayson_scripts": (_has_arguments, "there are no scripts, and no ControlNet: leave it out"),
    "script_name": (_is_on, "there are no scripts: leave it out"),
    "subseed_strength": (_is_positive, "noise of two seeds is not mixed: leave it out"),
    "seed_resize_from_w": (_is_positive, "noise is drawn at the picture's own size: leave it out"),
    "seed_resize_from_h": (_is_positive, "noise is drawn at the picture's own size: leave it out"),
    "s_churn": (_is_positive, "noise is not added between steps: give 0, or a sampler with fresh noise"),
    "refiner_checkpoint": (_is_chosen, "one bundle draws a picture: leave it out"),
    "clip_skip": (_is_more_than_one, CLIP_SKIP),
    "infotext": (_is_on, "parameters are not read from a text: give them as fields"),
    "firstphase_width": (_is_positive, "pictures are drawn at one size: give it as width and height"),
    "firstphase_height": (_is_positive, "pictures are drawn at one size: give it as width and height"),
}
"""Fields that ask for another picture than the one that would come: when they do, and why they are refused."""

NOTED: Mapping[str, Test] = {
    "styles": _has_styles,
    "restore_faces": _is_on,
    "save_images": _is_on,
    "s_min_uncond": _is_positive,
    "s_noise": lambda value: value not in (None, 1),
    "initial_noise_multiplier": lambda value: value not in (None, 1),
    "image_cfg_scale": lambda value: value not in (None, 1.5),
}
"""Fields that mean nothing here: when they are named among what was ignored."""

SILENT = frozenset(
    (
        *("do_not_save_samples", "do_not_save_grid", "script_args", "comments", "subseed", "refiner_switch_at"),
        *("denoising_strength", "s_tmin", "s_tmax", "disable_extra_networks", "mask_round", "latent_mask"),
        *("hr_scale", "hr_upscaler", "hr_second_pass_steps", "hr_resize_x", "hr_resize_y", "hr_checkpoint_name"),
        *("hr_sampler_name", "hr_scheduler", "hr_prompt", "hr_negative_prompt", "hr_cfg", "hr_distilled_cfg"),
        "hr_additional_modules",
    )
)
"""Fields that mean nothing by themselves, whatever they hold: nobody is told."""


def ignored(body: TextToImage) -> list[str]:
    """Return the fields that mean nothing here; raises `RefusedError` for those that ask for another picture."""
    given = body.model_extra or {}
    for name, (asks, why) in REFUSED.items():
        if name in given and asks(given[name]):
            raise RefusedError(f"{name} is not supported: {why}", name)
    known = REFUSED.keys() | NOTED.keys() | SILENT
    named = [name for name, test in NOTED.items() if name in given and test(given[name])]
    return [*named, *(name[:60] for name, value in given.items() if name not in known and value is not None)]
