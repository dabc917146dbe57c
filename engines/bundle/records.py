"""Records of a manifest that say what a request becomes: tokens, numbers, guidance, latents and a schedule."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

TensorName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.]{0,63}$")]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]


class Strict(BaseModel):
    """A record without other fields than its own, which does not change."""

    # Scheduler configs hold infinities. JSON has none, and null would be another value: they are written as words.
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class TokenizerInfo(Strict):
    """One tokenizer file and the fixed-length contract of the text encoder behind it."""

    file: str
    max_length: int = Field(gt=2, le=8192)
    """Tokens of a prompt, begin and end among them."""
    lengths: tuple[Annotated[int, Field(gt=2, le=8192)], ...] = Field(default=(), max_length=64)
    """Shorter lengths that a request's prompts are filled up to where all of them fit, ascending; none: always all."""
    any_length: bool = False
    """Whether a request may ask for rows of another number of tokens, up to the most."""
    bos_id: TokenId | None
    """Begins every prompt; null: nothing does."""
    eos_id: TokenId | None
    """Ends every prompt; null: nothing does."""
    pad_id: TokenId
    """Fills a prompt up."""
    template: str = Field(default="{}", max_length=10_000)
    """What is tokenized, with the prompt in place of `{}`, which stands there once: a conversation, for instance."""
    source: Literal["prompt", "prompt_2", "prompt_3"] = "prompt"
    """The text of a request that it reads; one that is not given is the first."""
    output: TensorName = "token_ids"
    """The graph input that the token ids feed."""
    mask_output: TensorName | None = None
    """The graph input that tells tokens, 1, from what fills a prompt up, 0."""

    def model_post_init(self, _: Any, /) -> None:
        """Check that the template has one place for a prompt, and that lengths rise."""
        if self.template.count("{}") != 1:
            raise ValueError(f"the template of tokenizer {self.file!r} has no one place {{}} for a prompt")
        if self.lengths and self.any_length:
            raise ValueError(f"tokenizer {self.file!r} has lengths, and takes any")
        if list(self.lengths) != sorted({n for n in self.lengths if n < self.max_length}):
            raise ValueError(f"the lengths of tokenizer {self.file!r} do not rise below its max_length")

    @property
    def room(self) -> int:
        """Tokens of a text that fit between begin and end."""
        return self.room_of(self.max_length)

    def room_of(self, length: int) -> int:
        """Return the tokens of a text that fit between begin and end in a row of so many."""
        return max(0, length - (self.bos_id is not None) - (self.eos_id is not None))


RequestField = Literal[
    "height",
    "width",
    "num_inference_steps",
    "guidance_scale",
    "true_cfg_scale",
    "negative_given",
    "original_height",
    "original_width",
    "crop_top",
    "crop_left",
    "target_height",
    "target_width",
    "negative_original_height",
    "negative_original_width",
    "negative_crop_top",
    "negative_crop_left",
    "negative_target_height",
    "negative_target_width",
    "aesthetic_score",
    "negative_aesthetic_score",
]
"""Numbers of a request; `negative_given` is 1 where it has a negative prompt, else 0."""

RequestValue = RequestField | Annotated[float, Field(allow_inf_nan=False)]
"""A number of the request, or a constant."""


class NumbersInput(Strict):
    """Numbers that graphs read and no graph writes: one row [N] for each row of the network.

    A value is a constant or a number of the request, such as `("height", "width", 0, 0)` for size conditioning. The
    element type is that of the graph input of this name.
    """

    kind: Literal["numbers"] = "numbers"
    name: TensorName
    values: tuple[RequestValue, ...] = Field(min_length=1, max_length=64)
    negative: tuple[RequestValue, ...] | None = Field(default=None, min_length=1, max_length=64)
    """Those of rows with the negative prompt, where they are others."""

    def model_post_init(self, _: Any, /) -> None:
        """Check that all rows are equally long."""
        if self.negative is not None and len(self.negative) != len(self.values):
            raise ValueError(f"input {self.name!r} has rows of {len(self.values)} and of {len(self.negative)} numbers")


class Branch(Strict):
    """A prediction that guidance adds to others, weighed by constant + scale * (the request's guidance)."""

    text: Literal["prompt", "negative"]
    """What its rows are conditioned on."""
    constant: float = Field(default=0.0, allow_inf_nan=False)
    scale: float = Field(default=0.0, allow_inf_nan=False)


class SkippedLayers(Strict):
    """Layers that the denoiser leaves out in some rows, so that guidance can move away from what it then predicts."""

    input: TensorName = "skipped"
    """The denoiser's input [R] that is 1 in rows without these layers, and 0 in all others."""
    layers: tuple[Annotated[int, Field(ge=0, le=10_000)], ...] = Field(min_length=1, max_length=1000)
    """Their numbers, from 0, ascending."""

    def model_post_init(self, _: Any, /) -> None:
        """Check that the numbers rise."""
        if list(self.layers) != sorted({*self.layers}):
            raise ValueError(f"the skipped layers {list(self.layers)} do not rise")


class GuidanceInfo(Strict):
    """How the predictions for a prompt, and for what it should not show, become one.

    By default classifier-free guidance (Ho and Salimans 2022): (1 - g) u + g c, for g above 1.
    """

    scale: Literal["guidance_scale", "true_cfg_scale"] = "guidance_scale"
    """The request's number that is meant."""
    above: float | None = Field(default=1.0, ge=0, le=1000, allow_inf_nan=False)
    """Where it is no more, the prompt's prediction is taken as it is; null: always."""
    needs_negative: bool = False
    """Whether a request without a negative prompt takes the prompt's prediction as it is."""
    branches: tuple[Branch, ...] = Field(
        default=(Branch(text="negative", constant=1, scale=-1), Branch(text="prompt", scale=1)),
        min_length=1,
        max_length=2,
    )
    """In the order of the network's rows; the prompt's is last."""
    skipped: SkippedLayers | None = None
    """What a request may have skipped in a branch more, for the prompt, before all others; null: nothing."""

    def model_post_init(self, _: Any, /) -> None:
        """Check that the prompt's branch is the last, after one of the negative prompt."""
        if [branch.text for branch in self.branches] not in (["prompt"], ["negative", "prompt"]):
            raise ValueError("guidance has other branches than the negative prompt's and the prompt's, in this order")

    def weights(self, scale: float, *, negative_given: bool) -> tuple[float, ...]:
        """Return the weight of each branch, by the network's rows; one of 1 where there is no guidance."""
        off = self.above is None or scale <= self.above or (self.needs_negative and not negative_given)
        return (1.0,) if off else tuple(branch.constant + branch.scale * scale for branch in self.branches)


class LatentInfo(Strict):
    """Latent geometry: pixels per latent cell and side, channels, and the size that the checkpoint was trained for."""

    channels: int = Field(gt=0, le=4096)
    """Channels of a latent cell."""
    downscale: int = Field(gt=0, le=256)
    """Pixels of a latent cell on each side."""
    size_multiple: int = Field(gt=0, le=4096)
    """Height and width in pixels must be multiples of this."""
    default_height: int = Field(gt=0, le=16384)
    """Pixels, when a request names no size."""
    default_width: int = Field(gt=0, le=16384)
    """Pixels, when a request names no size."""


class ShiftLine(Strict):
    """A line that gives the shift of a schedule for the size of a picture: mu = slope * tokens**power + offset."""

    slope: float = Field(allow_inf_nan=False)
    """Shift for a token, or for a token to the rule's power."""
    offset: float = Field(allow_inf_nan=False)
    """Shift without tokens."""
    steps: int = Field(default=1, gt=0, le=100_000)
    """The number of steps that the line is for, where a rule has two."""


class ScheduleRule(Strict):
    """What the checkpoint's pipeline hands to its scheduler for a number of steps and a size."""

    sigmas: Literal["scheduler", "even", "whole"] = "scheduler"
    """The scheduler's own; even, from 1 to 1/steps; or whole timesteps, even from the last training timestep to 1."""
    lines: tuple[ShiftLine, ...] = Field(default=(), max_length=2)
    """None: no shift. Of two, the shift is linear in the number of steps between them."""
    power: float = Field(default=1.0, gt=0, le=4)
    """Of the number of tokens."""
    pixels_per_token: int = Field(default=16, gt=0, le=4096)
    """Side of the square of pixels that is one token."""
    tokens: int | None = Field(default=None, gt=0, le=2**31)
    """The number of tokens for any size, where the pipeline does not count them."""
    last_line_above: int | None = Field(default=None, ge=0, le=2**31)
    """The last line holds alone for more tokens than this."""

    def model_post_init(self, _: Any, /) -> None:
        """Check that two lines are for different numbers of steps."""
        if len({line.steps for line in self.lines}) < len(self.lines):
            raise ValueError("two lines of a schedule are for one number of steps")
