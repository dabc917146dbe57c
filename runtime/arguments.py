"""The arguments of diffusers' text, image and inpaint pipelines: what each means here, or why it is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from ..engines.bundle import Manifest
from ..engines.errors import RequestError
from .loop.decoding import DecoderName
from .loop.hoisted import conditioning
from .prompt.syntax import PromptSyntax
from .request import GenerationRequest

EVERY = ("text", "image", "inpaint")

STEP_TENSORS = ("latents",)
"""What callbacks of steps may look at and replace."""


class RequestArguments(TypedDict, total=False):
    """The keyword arguments of `Pipeline.__call__` that do not change the type of its result."""

    height: int | None
    width: int | None
    num_inference_steps: int | None
    timesteps: Sequence[float] | None
    sigmas: Sequence[float] | None
    guidance_scale: float | None
    num_images_per_prompt: int
    seed: int | Sequence[int] | None
    generator: Any
    latents: Any
    prompt_embeds: Any
    negative_prompt_embeds: Any
    prompt_2: str | Sequence[str] | None
    prompt_3: str | Sequence[str] | None
    negative_prompt_2: str | Sequence[str] | None
    negative_prompt_3: str | Sequence[str] | None
    pooled_prompt_embeds: Any
    negative_pooled_prompt_embeds: Any
    original_size: tuple[int, int] | None
    crops_coords_top_left: tuple[int, int]
    target_size: tuple[int, int] | None
    negative_original_size: tuple[int, int] | None
    negative_crops_coords_top_left: tuple[int, int]
    negative_target_size: tuple[int, int] | None
    aesthetic_score: float
    negative_aesthetic_score: float
    true_cfg_scale: float
    denoising_start: float | None
    denoising_end: float | None
    max_sequence_length: int | None
    prompt_syntax: PromptSyntax | None
    sampler: str | None
    eta: float
    forecast: str | None
    guidance_interval: tuple[float, float] | None
    guidance_reuse: float | None
    skip_guidance_layers: Sequence[int] | None
    skip_layer_guidance_scale: float
    skip_layer_guidance_start: float
    skip_layer_guidance_stop: float
    image: Any
    mask_image: Any
    padding_mask_crop: int | None
    strength: float | None
    decoder: DecoderName
    tiled: bool | None
    callback_on_step_end: Callable[[Any, int, float, dict[str, Any]], dict[str, Any] | None] | None
    callback_on_step_end_tensor_inputs: Sequence[str]
    callback: Callable[[int, float, Any], Any] | None
    callback_steps: int | None
    on_batch: Callable[[GenerationRequest, int, Sequence[Any]], None] | None
    keep_images: bool
    progress: Callable[[str, int, int], None]


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
    "image": Argument("a path, picture, array or tensor, or a list with one for each image", ("image", "inpaint")),
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

SIZES = "`(height, width)`, or `(top, left)`, in pixels, for bundles that read them"

READ_BY_SOME = {
    "prompt_2": Argument("for bundles whose second tokenizer reads a text of its own; without it `prompt`"),
    "prompt_3": Argument("as `prompt_2`, for a third"),
    "negative_prompt_2": Argument("as `prompt_2`; without it `negative_prompt`"),
    "negative_prompt_3": Argument("as `negative_prompt_2`, for a third"),
    "pooled_prompt_embeds": Argument("beside `prompt_embeds`, for denoisers that read both: `[prompts, width]`"),
    "negative_pooled_prompt_embeds": Argument("as `pooled_prompt_embeds`, beside `negative_prompt_embeds`"),
    "original_size": Argument(SIZES),
    "crops_coords_top_left": Argument(SIZES),
    "target_size": Argument(SIZES),
    "negative_original_size": Argument(SIZES),
    "negative_crops_coords_top_left": Argument(SIZES),
    "negative_target_size": Argument(SIZES),
    "aesthetic_score": Argument("for bundles that read it"),
    "negative_aesthetic_score": Argument("for bundles that read it"),
    "true_cfg_scale": Argument("guidance by a negative prompt, for bundles whose `guidance_scale` is another"),
    "denoising_start": Argument("a share of the schedule, 0 to 1: `image` is latents that were denoised up to it"),
    "denoising_end": Argument("a share of the schedule, above 0, below 1: latents are returned as they are by then"),
    "skip_guidance_layers": Argument(
        "layers without which the prompt is predicted once more at some steps, for bundles that skip them",
        ("text",),
    ),
    "skip_layer_guidance_scale": Argument("how far to move away from that: 0 to 1000", ("text",)),
    "skip_layer_guidance_start": Argument("a share of the run, after which it is so", ("text",)),
    "skip_layer_guidance_stop": Argument("a share of the run, before which it is so", ("text",)),
    "max_sequence_length": Argument(
        "tokens of a row, for bundles whose text encoder takes several numbers; others take their own number alone"
    ),
}
"""Arguments of some families' pipelines."""

WEIGHTS = "weights are fixed at export: merge a LoRA, at the scale you want, into the checkpoint and export it"

REFUSED = {
    "guidance_rescale": Argument(
        "it measures each prediction, which no step table holds: use a checkpoint or a sampler without it",
        ("text",),
        (None, 0.0),
    ),
    "clip_skip": Argument(
        "the layer that is read is chosen at export: lower num_hidden_layers in text_encoder/config.json by clip_skip "
        "and export again, or give prompt_embeds",
        EVERY,
        (None,),
    ),
    "cross_attention_kwargs": Argument(WEIGHTS, EVERY, (None, {})),
    "ip_adapter_image": Argument("bundles hold no IP-Adapter: start from a picture with image", EVERY, (None, [])),
    "ip_adapter_image_embeds": Argument(
        "bundles hold no IP-Adapter: start from a picture with image", EVERY, (None, [])
    ),
    "masked_image_latents": Argument(
        "latents of a masked picture come from image and mask_image, for checkpoints that read them: give both",
        ("inpaint",),
        (None,),
    ),
}

NEGATIVE_ADAPTER = "bundles hold no IP-Adapter: give a negative_prompt"
NORMALIZED = "it measures each prediction, which no step table holds: leave it out"

REFUSED_BY_SOME = {
    "joint_attention_kwargs": Argument(WEIGHTS, EVERY, (None, {})),
    "attention_kwargs": Argument(WEIGHTS, EVERY, (None, {})),
    "text_encoder_out_layers": Argument(
        "the layers that are read are chosen at export, as the checkpoint's pipeline has them: leave it out",
        EVERY,
        (None, (9, 18, 27)),
    ),
    "mu": Argument(
        "the schedule is shifted for the size of the picture, by the bundle's own rule: leave it out", EVERY, (None,)
    ),
    "negative_ip_adapter_image": Argument(NEGATIVE_ADAPTER, EVERY, (None, [])),
    "negative_ip_adapter_image_embeds": Argument(NEGATIVE_ADAPTER, EVERY, (None, [])),
    "image_reference": Argument("bundles hold no encoder of reference pictures: leave it out", ("inpaint",), (None,)),
    "caption_upsample_temperature": Argument(
        "bundles hold no model that writes prompts: write it out, or let another model do it", ("text",), (None,)
    ),
    "cfg_normalization": Argument(NORMALIZED, EVERY, (None, False, 0.0)),
    "cfg_truncation": Argument(
        "guidance is the same at every step, as it is with 1: leave it out", EVERY, (None, 1.0, 1)
    ),
    "original_inference_steps": Argument(
        "it is an option of the scheduler: give it to LCMScheduler.from_config, and set pipe.scheduler to that",
        ("text", "image"),
        (None,),
    ),
}
"""Arguments of some families' pipelines that are refused."""


def read_by(manifest: Manifest, others: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of some arguments that a bundle reads, without those that are None.

    Raises `RequestError`, with the reason, for arguments that latentrt has no equivalent for or that this bundle does
    not read. Values that ask for nothing, such as diffusers' defaults, are taken. Raises `TypeError` for a name that is
    no argument at all.
    """
    taken = {name: value for name, value in others.items() if name in READ_BY_SOME and value is not None}
    layers = taken.get("skip_guidance_layers", ())
    if isinstance(layers, list | tuple) and not layers:  # as in diffusers, the scale and the shares mean nothing then
        taken = {name: value for name, value in taken.items() if not name.startswith("skip_")}
    elif manifest.guidance.skipped is None:
        raise RequestError(
            "skip_guidance_layers is given: all layers of this bundle run in every row; leave it out, or export the "
            "checkpoint again with --skip-layers, where its family takes that"
        )
    asked = None if _reads(manifest, "max_sequence_length") else taken.pop("max_sequence_length", None)
    if asked is not None and asked != (most := _sequence_length(manifest)):
        raise RequestError(f"max_sequence_length is {asked!r}: prompts of this bundle have {most} tokens, and no other")
    for name in taken:
        if not _reads(manifest, name):
            raise RequestError(f"{name} is given: this bundle has nothing that reads it, leave it out")
    for name, value in others.items():
        if name in READ_BY_SOME:
            continue
        argument = (REFUSED | REFUSED_BY_SOME).get(name)
        if argument is None:
            raise TypeError(f"a call of the pipeline has no argument {name!r}: see its documentation for those it has")
        if not _idle(argument, value):
            raise RequestError(f"{name} is not supported: {argument.meaning}")
    return taken


def _idle(argument: Argument, value: Any) -> bool:
    return any(value is idle or (isinstance(value, type(idle)) and value == idle) for idle in argument.idle or ())


def _sequence_length(manifest: Manifest) -> int | None:
    """Return what diffusers' `max_sequence_length` is in a bundle: the tokens of its longest tokenizer.

    Where the denoiser reads more or fewer, the first tokens are the shortest's, and it is the number of all others.
    """
    lengths = [info.max_length for info in manifest.tokenizers]
    graphs = manifest.graphs
    written = {spec.name for graph in graphs if graph.stage == "prompt" for spec in graph.outputs}
    inputs = [spec for spec in conditioning(manifest) if spec.name in written]
    rows = next((spec.shape[1] for spec in inputs if len(spec.shape) == 3), None)
    if not lengths or not isinstance(rows, int) or rows == max(lengths):
        return max(lengths, default=None)
    return rows - min(lengths)


def _reads(manifest: Manifest, name: str) -> bool:
    """Tell whether anything of a bundle reads an argument of some families."""
    if "prompt_embeds" in name or name.startswith("denoising_"):
        return True
    if name == manifest.guidance.scale:
        return True
    if name.startswith("skip_"):
        return manifest.guidance.skipped is not None
    if name == "max_sequence_length":
        return any(info.any_length for info in manifest.tokenizers)
    if "prompt" in name:
        return any(info.source == name.removeprefix("negative_") for info in manifest.tokenizers)
    start = {"original_size": "original_", "crops_coords_top_left": "crop_", "target_size": "target_"}
    start |= {f"negative_{key}": f"negative_{value}" for key, value in start.items()}
    named = {value for info in manifest.inputs for value in (*info.values, *(info.negative or ()))}
    return any(isinstance(value, str) and value.startswith(start.get(name, name)) for value in named)


def check_tensor_inputs(names: Any) -> None:
    """Raise `RequestError` unless a step's callback asks for nothing but latents."""
    names = names or ()
    for name in names if isinstance(names, Iterable) else (names,):
        if name not in STEP_TENSORS:
            raise RequestError(
                f"callback_on_step_end_tensor_inputs has {name!r}: give ['latents'], others stay on the device"
            )
