"""What a user may ask for, validated once."""

from __future__ import annotations

import secrets
from functools import cached_property
from typing import Annotated, Any, NamedTuple

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from ..engines.bundle import GuidanceInfo, Manifest
from ..engines.errors import RequestError
from .loop.decoding import DecoderName
from .prompt.syntax import PromptSyntax
from .sizes import check_size

MAX_SEED = 2**64 - 1
MAX_SIZE = 8192

TEXTS = ("prompt", "negative_prompt", "prompt_2", "negative_prompt_2", "prompt_3", "negative_prompt_3")
"""Fields that hold texts."""

Pair = tuple[Annotated[int, Field(ge=0, le=2**20)], Annotated[int, Field(ge=0, le=2**20)]]
"""Height and width, or top and left, in pixels."""

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
"""A part of a run's steps."""

_SEED = TypeAdapter(Annotated[int, Field(ge=0, le=MAX_SEED)])


class GenerationRequest(BaseModel):
    """One request: prompts, and everything that shapes their pictures.

    `None` stands for the bundle's own default (size, steps, guidance, sampler) or for a random seed. Image i of a
    request uses seed + i, counted over all prompts, or seed i of several. Prompts are empty where their embeddings were
    given. `timesteps` or `sigmas` stand for a number of steps.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: tuple[str, ...] = Field(min_length=1)
    negative_prompt: tuple[str, ...] | None = None
    prompt_2: tuple[str, ...] | None = None
    negative_prompt_2: tuple[str, ...] | None = None
    prompt_3: tuple[str, ...] | None = None
    negative_prompt_3: tuple[str, ...] | None = None
    prompt_syntax: PromptSyntax | None = None
    height: int | None = Field(default=None, gt=0, le=MAX_SIZE)
    width: int | None = Field(default=None, gt=0, le=MAX_SIZE)
    num_inference_steps: int | None = Field(default=None, ge=1)
    guidance_scale: float | None = Field(default=None, ge=0, le=1000, allow_inf_nan=False)
    true_cfg_scale: float = Field(default=1.0, ge=0, le=1000, allow_inf_nan=False)
    num_images_per_prompt: int = Field(default=1, ge=1, le=1024)
    timesteps: tuple[float, ...] | None = None
    sigmas: tuple[float, ...] | None = None
    original_size: Pair | None = None
    crops_coords_top_left: Pair = (0, 0)
    target_size: Pair | None = None
    negative_original_size: Pair | None = None
    negative_crops_coords_top_left: Pair = (0, 0)
    negative_target_size: Pair | None = None
    aesthetic_score: float = Field(default=6.0, ge=0, le=1000, allow_inf_nan=False)
    negative_aesthetic_score: float = Field(default=2.5, ge=0, le=1000, allow_inf_nan=False)
    denoising_start: float | None = Field(default=None, gt=0, lt=1)
    denoising_end: float | None = Field(default=None, gt=0, lt=1)
    max_sequence_length: int | None = Field(default=None, ge=1, le=8192)
    seed: int | tuple[int, ...] = Field(default_factory=lambda: secrets.randbits(32))
    sampler: str | None = None
    eta: float = Field(default=0.0, ge=0, le=1)
    forecast: str | None = None
    guidance_interval: tuple[Share, Share] | None = None
    guidance_reuse: Share | None = None
    skip_guidance_layers: tuple[int, ...] | None = None
    skip_layer_guidance_scale: float = Field(default=2.8, ge=0, le=1000, allow_inf_nan=False)
    skip_layer_guidance_start: Share = 0.01
    skip_layer_guidance_stop: Share = 0.2
    strength: float = Field(default=1.0, gt=0, le=1)
    decoder: DecoderName = "full"
    tiled: bool | None = None

    @field_validator(*TEXTS, mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("timesteps", "sigmas", mode="before")
    @classmethod
    def _numbers(cls, value: Any) -> Any:
        return value.tolist() if hasattr(value, "tolist") else value

    @field_validator(*TEXTS)
    @classmethod
    def _is_text(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for text in value or ():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"character {error.start + 1} is half of a pair, which is no text: give valid Unicode (UTF-8)"
                ) from error
        return value

    @field_validator("seed", mode="plain")
    @classmethod
    def _one_or_many_seeds(cls, value: Any) -> int | tuple[int, ...]:
        try:
            if isinstance(value, list | tuple):
                return tuple(map(_SEED.validate_python, value))
            return _SEED.validate_python(value)
        except ValidationError as error:
            raise ValueError(error.errors()[0]["msg"]) from error

    @model_validator(mode="after")
    def _matching(self) -> GenerationRequest:
        for name in TEXTS[1:]:
            texts = getattr(self, name)
            if texts is not None and len(texts) not in (1, len(self.prompt)):
                what = name.replace("_", " ").replace("prompt", "prompts")
                raise ValueError(f"{len(texts)} {what} for {len(self.prompt)} prompts: give one, or one for each")
        images = len(self.prompt) * self.num_images_per_prompt
        if isinstance(self.seed, tuple) and len(self.seed) != images:
            raise ValueError(
                f"seed is a list of {len(self.seed)}: give one seed, or one for each of the {images} images"
            )
        if (self.denoising_start or 0.0) >= (self.denoising_end or 1.0):
            raise ValueError(
                f"denoising_start {self.denoising_start} is not below denoising_end {self.denoising_end}: give another"
            )
        if self.guidance_interval is not None and self.guidance_interval[0] >= self.guidance_interval[1]:
            raise ValueError("guidance_interval ends before it starts: give two shares of the run, such as 0.2, 0.8")
        if self.timesteps is not None and self.sigmas is not None:
            raise ValueError("timesteps and sigmas are given: give one of them")
        return self

    @classmethod
    def of(cls, **fields: Any) -> GenerationRequest:
        """Validate fields; raises `RequestError` naming the first bad one, what was given and what is allowed."""
        fields = {k: v for k, v in fields.items() if not (k == "seed" and v is None)}
        try:
            return cls(**fields)
        except ValidationError as error:
            first = problem_of(error)
            name = ".".join(first.where)
            raise RequestError(f"{name} is {first.given}: {first.text}" if name else first.text) from error

    def with_defaults(
        self, manifest: Manifest, picture_size: tuple[int, int] | None = None, *, from_picture: bool = False
    ) -> GenerationRequest:
        """Return the request with the bundle's defaults filled in, validated; an initial picture sets the size.

        `from_picture`: it starts from one, of whatever size. A picture whose sides are no multiple of what the bundle
        needs is cut to the next lower one, as in diffusers.
        Raises `RequestError` when the size does not fit the latent geometry.
        """
        width, height = manifest.latent.default_width, manifest.latent.default_height
        if picture_size is not None:
            multiple = manifest.latent.size_multiple
            width, height = (max(multiple, side // multiple * multiple) for side in picture_size)
        custom = self.timesteps or self.sigmas
        complete = {
            **self.model_dump(),
            "width": self.width or width,
            "height": self.height or height,
            "num_inference_steps": len(custom)
            if custom
            else self.num_inference_steps or manifest.default_num_inference_steps,
            "guidance_scale": manifest.default_guidance_scale if self.guidance_scale is None else self.guidance_scale,
            "sampler": self.sampler or manifest.scheduler.get("_class_name"),
        }
        check_size(complete["width"], complete["height"], manifest.latent)
        if from_picture:  # diffusers fills these in for its image pipelines alone
            size = (complete["height"], complete["width"])
            for name in ("original_size", "target_size"):
                complete[f"negative_{name}"] = complete[f"negative_{name}"] or complete[name] or size
            if not any("aesthetic_score" in info.values for info in manifest.inputs):
                complete["negative_crops_coords_top_left"] = complete["crops_coords_top_left"]
        return GenerationRequest.of(**complete)

    @property
    def negative_given(self) -> bool:
        """Whether there is a negative prompt, be it an empty one."""
        return self.negative_prompt is not None

    def weights(self, guidance: GuidanceInfo) -> tuple[float, ...]:
        """Return the weight of each branch of a bundle's guidance, by the network's rows: two, or one of 1."""
        scale = self.true_cfg_scale if guidance.scale == "true_cfg_scale" else self.guidance_scale
        return guidance.weights(scale or 0.0, negative_given=self.negative_given)

    def guided_part(self, guidance: GuidanceInfo) -> tuple[float, float, float]:
        """Return the shares of the run where guidance starts, stops and is reused from; 0, 1 and 1 without any."""
        if len(self.weights(guidance)) == 1:
            return 0.0, 1.0, 1.0
        return *(self.guidance_interval or (0.0, 1.0)), 1.0 if self.guidance_reuse is None else self.guidance_reuse

    def skipped_part(self, guidance: GuidanceInfo) -> tuple[float, float, float]:
        """Return the scale of guidance by skipped layers, and the shares of the run between which it is; 0 for none."""
        if not self.skip_guidance_layers or not self.skip_layer_guidance_scale or len(self.weights(guidance)) == 1:
            return 0.0, 0.0, 0.0
        return self.skip_layer_guidance_scale, self.skip_layer_guidance_start, self.skip_layer_guidance_stop

    def texts(self, source: str, *, negative: bool = False) -> tuple[str, ...]:
        """Return the texts of all prompts that a tokenizer of a source reads, or of what they should not show.

        What is not given in a second place is that of the first; no negative prompt is an empty one.
        """
        names = (f"negative_{source}", "negative_prompt") if negative else (source, "prompt")
        texts = next((found for found in (getattr(self, name) for name in names) if found is not None), ("",))
        return texts * (len(self.prompt) if len(texts) == 1 else 1)

    @cached_property
    def images(self) -> list[tuple[str, str, int]]:
        """Prompt, negative prompt and seed of every image, in order."""
        negatives = self.texts("prompt", negative=True)
        pairs = [p for p in zip(self.prompt, negatives, strict=True) for _ in range(self.num_images_per_prompt)]
        if isinstance(self.seed, tuple):
            return [(*pair, seed) for pair, seed in zip(pairs, self.seed, strict=True)]
        return [(prompt, negative, (self.seed + i) % (MAX_SEED + 1)) for i, (prompt, negative) in enumerate(pairs)]


class Problem(NamedTuple):
    """The first thing wrong with some fields: pydantic's kind of it, the field, what was given, what is allowed."""

    kind: str
    where: tuple[str, ...]
    given: str
    text: str


def problem_of(error: ValidationError) -> Problem:
    """Return the first problem that a validation found; how many values there may be is said in our own words."""
    found = error.errors(include_url=False)
    first, given = found[0], found[0]["input"]
    kind, where, about = first["type"], first["loc"], first.get("ctx", {})
    text = first["msg"].removeprefix("Value error, ")
    text = text[:1].lower() + text[1:]
    if kind == "missing" and isinstance(given, list | tuple):  # of so many, one is told for each that is not there
        last = max(int(each["loc"][-1]) for each in found if each["type"] == kind and each["loc"][:-1] == where[:-1])
        kind, where, text = "too_short", where[:-1], f"give {last + 1}, not {len(given)}"
    elif kind in ("too_short", "too_long"):
        bound = about.get("min_length", about.get("max_length"))
        text = f"give at {'least' if kind == 'too_short' else 'most'} {bound}, not {about['actual_length']}"
    elif kind in ("tuple_type", "list_type") and where:
        text = "give a text, or a list" if where[-1] in TEXTS else "give a list"
    return Problem(kind, tuple(map(str, where)), short(given), text)


def short(value: Any) -> str:
    """Return the beginning of a value as Python writes it."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
