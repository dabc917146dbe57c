"""The arguments of diffusers' text, image and inpaint pipelines: what each means here, or why it is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..engines.errors import RequestError

EVERY = ("text", "image", "inpaint")

STEP_TENSORS = ("latents",)
"""What callbacks of steps may look at and replace."""


@dataclass(frozen=True)
class Argument:
    """An argument of a diffusers pipeline."""

    meaning: str
    """What latentrt does with it, or why it does not."""
    tasks: tuple[str, ...] = EVERY
    """The pipelines that have it."""
    idle: tuple[Any, ...] | None = None
    """None: it is served. Values that ask for nothing, of an argument that is refused otherwise."""


SERVED = {
    "prompt": Argument("a text, or a list"),
    "negative_prompt": Argument("a text for all prompts, or a list with one for each"),
    "prompt_embeds": Argument("in place of `prompt`: `[prompts, tokens, width]`, any float type, numpy or a tensor"),
    "negative_prompt_embeds": Argument("in place of `negative_prompt`; of the shape of `prompt_embeds`"),
    "height": Argument(
        "pixels; without it the bundle's, or the picture's (diffusers repaints at the U-Net's own size)",
        ("text", "inpaint"),
    ),
    "width": Argument("as `height`", ("text", "inpaint")),
    "image": Argument("a path, picture or array, or a list with one for each image", ("image", "inpaint")),
    "mask_image": Argument("as `image`; white is repainted", ("inpaint",)),
    "padding_mask_crop": Argument(
        "pixels around the mask that are drawn with it, at `height` and `width`", ("inpaint",)
    ),
    "strength": Argument("above 0, to 1; one that leaves no step is refused", ("image", "inpaint")),
    "num_inference_steps": Argument("a whole number; without it the bundle's"),
    "timesteps": Argument("decreasing, for samplers whose class takes them"),
    "sigmas": Argument("decreasing, for samplers whose class takes them"),
    "guidance_scale": Argument("0 to 1000; without it the bundle's"),
    "num_images_per_prompt": Argument("a whole number"),
    "eta": Argument("0 to 1, for DDIM and TCD"),
    "generator": Argument(
        "a `torch.Generator` of the CPU, which draws for the whole batch, a list with one for each image, or seeds"
    ),
    "latents": Argument("the first noise `[images, C, h, w]`, before it is scaled", ("text", "inpaint")),
    "output_type": Argument("`pil`, `np` or `latent`; `pt` needs PyTorch"),
    "return_dict": Argument("`False` returns `(images, None)`"),
    "callback_on_step_end": Argument("sees every step, and may replace the latents"),
    "callback_on_step_end_tensor_inputs": Argument('`["latents"]`: the other tensors stay on the device'),
    "callback": Argument("the older form: `callback(step, timestep, latents)`"),
    "callback_steps": Argument("how often `callback` is called (default: 1)"),
}

REFUSED = {
    "guidance_rescale": Argument(
        "it measures each prediction, which no step table holds: use a checkpoint or a sampler without it",
        ("text",),
        (None, 0.0),
    ),
    "clip_skip": Argument(
        "the bundle's text encoder ends at its last layer: encode the prompt elsewhere and give prompt_embeds",
        EVERY,
        (None,),
    ),
    "cross_attention_kwargs": Argument(
        "weights are fixed at export: merge a LoRA, at the scale you want, into the checkpoint and export it",
        EVERY,
        (None, {}),
    ),
    "ip_adapter_image": Argument("bundles hold no IP-Adapter: start from a picture with image", EVERY, (None, [])),
    "ip_adapter_image_embeds": Argument(
        "bundles hold no IP-Adapter: start from a picture with image", EVERY, (None, [])
    ),
    "masked_image_latents": Argument(
        "only inpainting checkpoints of 9 channels read it, and latentrt exports none: leave it out",
        ("inpaint",),
        (None,),
    ),
}


def refuse(others: Mapping[str, Any]) -> None:
    """Raise `RequestError`, with the reason, for arguments that latentrt has no equivalent for.

    Their values that ask for nothing, such as diffusers' defaults, are taken. Raises `TypeError` for a name that is no
    argument at all.
    """
    for name, value in others.items():
        if name not in REFUSED:
            raise TypeError(f"a call of the pipeline has no argument {name!r}: see its documentation for those it has")
        if not any(
            value is idle or (isinstance(value, type(idle)) and value == idle) for idle in REFUSED[name].idle or ()
        ):
            raise RequestError(f"{name} is not supported: {REFUSED[name].meaning}")


def check_tensor_inputs(names: Any) -> None:
    """Raise `RequestError` unless a step's callback asks for nothing but latents."""
    for name in names or ():
        if name not in STEP_TENSORS:
            raise RequestError(
                f"callback_on_step_end_tensor_inputs has {name!r}: give ['latents'], others stay on the device"
            )
