"""What programs written for diffusers do to a pipeline beside calling it: read its state, move it, set switches."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, TypeVar

from ..engines.backends import Backend
from ..engines.bundle import Bundle
from ..engines.errors import RequestError
from ..engines.host import HostDevice

log = logging.getLogger(__name__)

Self = TypeVar("Self", bound="DiffusersHabits")

LORA = "merge the LoRA into the checkpoint with diffusers' fuse_lora and save_pretrained, and export that"
OFFLOAD = "give low_memory=True when the pipeline is opened: one stage's weights are in memory at a time"
DRAWS_OTHERWISE = "it changes the network, which is fixed at export"

SWITCHES = (
    "attention_slicing",
    "vae_slicing",
    "vae_tiling",
    "xformers_memory_efficient_attention",
)
"""Switches of diffusers that change memory, and here nothing: engines plan theirs when they are built."""

MISSING = {
    "enable_model_cpu_offload": OFFLOAD,
    "enable_sequential_cpu_offload": OFFLOAD,
    "enable_freeu": DRAWS_OTHERWISE,
    "load_lora_weights": LORA,
    "fuse_lora": LORA,
    "set_adapters": LORA,
    "load_ip_adapter": "bundles hold no IP-Adapter",
    "load_textual_inversion": "embeddings are part of a bundle: see latentrt export --help",
    "encode_prompt": "give the prompt to the call, or prompt_embeds that diffusers or Compel made",
    "save_pretrained": "a pipeline is a bundle: copy its folder",
    **dict.fromkeys(
        ("vae", "unet", "text_encoder", "tokenizer"), "the bundle holds graphs, not modules: export another"
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
    _guidance_scale: float | None = None
    _num_timesteps: int | None = None
    _interrupt: bool = False
    guidance_rescale = 0.0
    clip_skip: None = None
    cross_attention_kwargs: None = None

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

    def set_progress_bar_config(self, **options: Any) -> None:
        """Do nothing: a call shows no bar of its own, and `progress=` hears of every step."""

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Name the equivalent of what diffusers' pipelines have; accept switches that only change memory."""
            _, _, switch = name.partition("_")
            if name.startswith(("enable_", "disable_")) and switch in SWITCHES:
                return lambda *_, **__: log.info("%s changes nothing: engines plan their memory when built", name)
            if name in MISSING:
                raise AttributeError(f"the pipeline has no {name}: {MISSING[name]}")
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
