"""What programs written for diffusers do to a pipeline beside calling it: read its state, move it, set switches."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ..engines.backends import Backend
from ..engines.bundle import Bundle
from ..engines.device import Array
from ..engines.errors import RequestError
from ..engines.host import HostDevice
from .batches import Batches
from .loop.session import Session
from .prompt.chunks import takes_chunks
from .prompt.embeddings import conditioning_tensor
from .prompt.handles import TextEncoderHandle, TokenizerHandle, handles

log = logging.getLogger(__name__)

Self = TypeVar("Self", bound="DiffusersHabits")

LORA = "merge the LoRA into the checkpoint with diffusers' fuse_lora and save_pretrained, and export that"
DRAWS_OTHERWISE = "it changes the network, which is fixed at export"

SWITCHES = (
    "attention_slicing",
    "vae_slicing",
    "vae_tiling",
    "xformers_memory_efficient_attention",
)
"""Switches of diffusers that change memory, and here nothing: engines plan theirs when they are built."""

OFFLOADS = ("enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload")
"""Switches that keep weights out of a GPU's memory: here a choice when a pipeline is opened."""

IDLE = (
    *("maybe_free_model_hooks", "remove_all_hooks", "reset_device_map"),
    *("fuse_qkv_projections", "unfuse_qkv_projections", "upcast_vae"),
    *("unload_lora_weights", "disable_lora", "disable_freeu", "unload_ip_adapter"),
)
"""Calls that leave every picture as it is, here by doing nothing."""

ONE_ENCODER = "only a bundle with one CLIP text encoder has it to itself: give prompt_embeds that diffusers made"

MISSING = {
    "enable_freeu": DRAWS_OTHERWISE,
    "load_lora_weights": LORA,
    "fuse_lora": LORA,
    "set_adapters": LORA,
    "load_ip_adapter": "bundles hold no IP-Adapter",
    "load_textual_inversion": "embeddings are part of a bundle: see latentrt export --help",
    "encode_prompt": "give the prompt to the call, or prompt_embeds that diffusers or Compel made",
    "save_pretrained": "a pipeline is a bundle: copy its folder",
    "components": "a pipeline makes pictures from texts, pictures and masks alike: use it itself, or from_pipe",
    **dict.fromkeys(("text_encoder", "tokenizer"), ONE_ENCODER),
    **dict.fromkeys(
        ("vae", "unet", "transformer", "text_encoder_2", "tokenizer_2"),
        "the bundle holds graphs, not modules: export another",
    ),
}
"""What diffusers' pipelines have and this one does not: why, or what to do."""


class SchedulerConfig:
    """Stands for diffusers' scheduler: its config, from which another class can be made."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def __repr__(self) -> str:
        return f"SchedulerConfig({self.config.get('_class_name')!r})"


class DiffusersHabits:
    """The part of a pipeline that only has to be there for programs that were written for diffusers."""

    bundle: Bundle
    backend: Backend
    session: Session
    _batches: Batches
    _guidance_scale: float | None = None
    _num_timesteps: int | None = None
    _interrupt: bool = False
    guidance_rescale = 0.0
    clip_skip: None = None
    cross_attention_kwargs: None = None

    @property
    def safety_checker(self) -> None:
        """None: bundles hold no safety checker. Setting it to None is taken; raises `RequestError` for another."""
        return None

    @safety_checker.setter
    def safety_checker(self, checker: Any) -> None:
        if checker is not None:
            raise RequestError("safety_checker cannot be set: bundles hold none, check result.images yourself")

    @property
    def vae_scale_factor(self) -> int:
        """How many pixels a latent cell covers on each side."""
        return self.bundle.manifest.latent.downscale

    @property
    def tokenizer(self) -> TokenizerHandle:
        """The tokenizer of a bundle with one CLIP text encoder, for Compel and recipes for long prompts."""
        return self._handles("tokenizer")[0]

    @property
    def text_encoder(self) -> TextEncoderHandle:
        """The text encoder of such a bundle, to be called with token ids."""
        return self._handles("text_encoder")[1]

    def _handles(self, name: str) -> tuple[TokenizerHandle, TextEncoderHandle]:
        tokenizers = self._batches.tokenizers
        if len(tokenizers) != 1 or not takes_chunks(tokenizers[0].info):
            raise AttributeError(name)  # and so it is looked up below, which says why
        conditioning = conditioning_tensor(self.bundle)

        def encode(inputs: Mapping[str, Array]) -> Array:
            with self.session.turn():
                return self.session.encode_prompt(inputs)[conditioning.name].astype(np.float32)

        return handles(tokenizers, encode, self.device)

    @property
    def guidance_scale(self) -> float | None:
        """The guidance scale of the running request, or of the last one."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the running request, or the last one, is guided."""
        return (self._guidance_scale or 0.0) > 1

    @property
    def num_timesteps(self) -> int | None:
        """How many times the running request, or the last one, evaluates the denoiser for a batch."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the running request was told to end; see `stop`."""
        return self._interrupt

    def stop(self) -> None:
        """End the running request after its step, from a callback or another thread: it returns what there is.

        The same as diffusers' `pipe._interrupt = True`. Steps that are captured as one run to their end.
        """
        self._interrupt = True

    @property
    def device(self) -> str:
        """`cpu` or `cuda`."""
        return "cpu" if isinstance(self.backend.device, HostDevice) else "cuda"

    @property
    def dtype(self) -> str:
        """The number format of the networks: `float32`, `float16` or `bfloat16`."""
        return {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[self.bundle.manifest.precision]

    def to(self: Self, *places: Any, **named: Any) -> Self:
        """Return the pipeline, where it is on this device and of this type already; raises `RequestError` else."""
        for place in (*places, *named.values()):
            text = str(place).removeprefix("torch.")
            kind = text.partition(":")[0]
            if place is None or kind == self.device or text == self.dtype or isinstance(place, bool):
                continue
            if kind in ("cpu", "cuda"):
                raise RequestError(
                    f"the pipeline runs on {self.device}, by backend {self.backend.name}, and cannot move to {text}: "
                    "open it with another backend, see latentrt backends"
                )
            raise RequestError(
                f"the pipeline cannot move to {text}: it is on {self.device} in {self.dtype}; "
                "its precision is chosen at export"
            )
        return self

    @classmethod
    def from_pipe(cls, pipeline: Self, **named: Any) -> Self:
        """Return the pipeline itself: it starts from texts, from pictures, and from pictures with masks.

        Raises `RequestError` for keywords, which would make another one, and for pipelines of other kinds.
        """
        if not isinstance(pipeline, cls):
            raise RequestError(
                f"from_pipe was given a {type(pipeline).__name__}: give a latentrt pipeline, or open the checkpoint "
                "with from_pretrained"
            )
        if named:
            raise RequestError(f"{next(iter(named))} is given: from_pipe returns the same pipeline, leave it out")
        return pipeline

    def set_progress_bar_config(self, **options: Any) -> None:
        """Do nothing: a call shows no bar of its own, and `progress=` hears of every step."""

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Name the equivalent of what diffusers' pipelines have; accept switches that only change memory."""
            _, _, switch = name.partition("_")
            if name.startswith(("enable_", "disable_")) and switch in SWITCHES:
                return lambda *_, **__: log.info("%s changes nothing: engines plan their memory when built", name)
            if name in OFFLOADS:
                return lambda *_, **__: log.warning(
                    "%s changes nothing: to have one stage's weights in memory at a time, open with low_memory=True",
                    name,
                )
            if name in IDLE:
                return lambda *_, **__: log.info("%s changes nothing", name)
            if name in MISSING:
                raise AttributeError(f"the pipeline has no {name}: {MISSING[name]}")
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
