"""A family whose U-Net gives, behind its prediction, what it says of the noise's variance."""

from __future__ import annotations

from typing import Any

from ...engines.bundle import LatentInfo
from ...engines.errors import UnsupportedModelError
from ..checkpoints.checkpoint import Checkpoint
from .stable_diffusion import StableDiffusion


class Variances(StableDiffusion):
    """Stable Diffusion with a U-Net of twice the channels, as DeepFloyd IF has one."""

    name = "variances"
    title = "Variances"
    pipelines = ("VariancesPipeline",)

    def check(self, checkpoint: Checkpoint) -> None:
        """Take every checkpoint."""

    def latent(self, checkpoint: Checkpoint) -> LatentInfo:
        """Return the geometry of the VAE and the channels that the U-Net reads."""
        return super().latent(checkpoint).model_copy(update={"channels": checkpoint.config("unet")["in_channels"]})

    def scheduler(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Return the scheduler's config as it is: no pipeline mends it."""
        return dict(checkpoint.scheduler)

    def learned_variance(self, checkpoint: Checkpoint) -> bool:
        """Tell whether the U-Net gives twice what it reads."""
        config = checkpoint.config("unet")
        return bool(config["out_channels"] == 2 * config["in_channels"])

    def pipeline(self, checkpoint: Checkpoint) -> Any:
        """Refuse: diffusers has no pipeline of this family."""
        raise UnsupportedModelError("diffusers has no pipeline of this family: it cannot be verified")


FAMILY = Variances()
