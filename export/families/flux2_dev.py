"""FLUX.2-dev: hidden states of Mistral's language model as the conditioning, klein's transformer with a scale."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from ...engines.bundle import GuidanceInfo, Precision
from ...engines.errors import UnsupportedModelError
from ..checkpoints.checkpoint import Checkpoint, Part
from ..checkpoints.configs import shown
from ..checkpoints.tokenizer import MISTRAL, TokenizerKind
from ..graph import Graph
from ..networks.conversation import Conversation, conversation
from ..networks.mistral import MISTRAL3, text_encoder_graph
from .flux2 import TOKENS, Flux2

SYSTEM = (
    "You are an AI that reasons about image descriptions. You give structured responses focusing on object "
    "relationships, object\nattribution and actions without speculation."
)
"""What diffusers' pipeline tells the language model before a prompt."""


class Flux2Dev(Flux2):
    """FLUX.2-dev for pictures from text."""

    name = "flux2-dev"
    title = "FLUX.2-dev"
    pipelines = ("Flux2Pipeline",)
    reference = "Flux2Pipeline"
    parts: ClassVar[Mapping[str, Part]] = {**Flux2.parts, "text_encoder": MISTRAL3}
    tokenizers: ClassVar[Mapping[str, TokenizerKind]] = {"tokenizer": replace(MISTRAL, masked=True, any_length=True)}
    layers: ClassVar[tuple[int, ...]] = (10, 20, 30)
    guided: ClassVar[bool] = True

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise `UnsupportedModelError` for networks of other forms, `CheckpointError` for parts of others."""
        super().check(checkpoint)
        window = checkpoint.config("text_encoder").get("sliding_window")
        if window is not None and window < TOKENS:
            raise UnsupportedModelError(
                f"{checkpoint.components['text_encoder'].where}: sliding_window is {shown(window)}, and attention in "
                f"windows of less than {TOKENS} tokens is not supported"
            )

    def tokenizer_kinds(self, checkpoint: Checkpoint) -> Mapping[str, TokenizerKind]:
        """Return the tokenizer with the template of a conversation that ends with the prompt."""
        template, _, begins = self._conversation(checkpoint)
        if not begins:  # diffusers' processor of texts and pictures would put its begin token there
            raise UnsupportedModelError(
                f"{checkpoint.tokenizers['tokenizer'].folder}: its chat template does not begin with its begin token: "
                f"{shown(template)}"
            )
        return {"tokenizer": replace(self.tokenizers["tokenizer"], template=template)}

    def text_encoder(self, checkpoint: Checkpoint, precision: Precision, length: int) -> Callable[[], Graph]:
        """Return what loads the text encoder as a graph."""
        side = self._conversation(checkpoint).side
        return lambda: text_encoder_graph(checkpoint.load("text_encoder"), self.layers, precision, length, side)

    def guidance(self, checkpoint: Checkpoint) -> GuidanceInfo:
        """Return none: the transformer reads the scale."""
        return GuidanceInfo(above=None)

    def defaults(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Return the defaults of diffusers' pipeline."""
        return {"default_guidance_scale": 4.0, "default_num_inference_steps": 50}

    def _conversation(self, checkpoint: Checkpoint) -> Conversation:
        def messages(prompt: str) -> list[dict[str, Any]]:
            said = (("system", SYSTEM), ("user", prompt))
            return [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in said]

        folder = checkpoint.tokenizers["tokenizer"].folder
        return conversation(folder, MISTRAL.classes[-1], messages, add_generation_prompt=False)


FAMILY = Flux2Dev()
