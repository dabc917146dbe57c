"""What a single file says about its training: metadata in its header, and tensors that are there as a mark.

diffusers reads none of it but the training step. The rest means what the programs that write and read it take it for:
the model specification of Stability AI (`modelspec.*`), and `v_pred` and `ztsnr` as in ComfyUI and Forge.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ...engines.errors import CheckpointError, UnsupportedModelError
from ..checkpoints.configs import shown
from ..checkpoints.weights import Weights

PREDICTIONS = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
ARCHITECTURES = {"stable-diffusion-v2-512": "epsilon", "stable-diffusion-v2-768-v": "v_prediction"}
BASE_STEPS = 875_000
"""Training steps of the second version's first half, which predicts noise; later steps predict v."""


@dataclass(frozen=True)
class Said:
    """What a file says: its prediction type, where it says one, and whether its last step is pure noise."""

    prediction_type: str | None
    zero_terminal_snr: bool


EDM = "edm_vpred."
"""How the sigmas are named in files of CosXL, which predict v at EDM's sigmas (Karras et al. 2022)."""


def chosen(file: Path, weights: Weights, prediction_type: str | None) -> Said:
    """Return what a file says about its training, with the prediction type that is asked for in place of its own.

    Raises `CheckpointError` as `said` does, `UnsupportedModelError` for a model of EDM's sigmas.
    """
    if edm := [name for name in weights if name.startswith(EDM)]:
        raise UnsupportedModelError(
            f"{file} has {sorted(edm)[0]}: it predicts v at EDM's sigmas, as CosXL does, which no family here draws"
        )
    return said(file, weights) if prediction_type is None else Said(prediction_type, "ztsnr" in weights)


def said(file: Path, weights: Weights) -> Said:
    """Return what a file says about its training.

    Raises `CheckpointError` when it says two things, or a prediction type that is not known.
    """
    found = _from_metadata(file, weights.metadata())
    if "v_pred" in weights:
        found["the tensor v_pred"] = "v_prediction"
    if _step(weights) == BASE_STEPS:
        found[f"global_step {BASE_STEPS}"] = "epsilon"
    if len(set(found.values())) > 1:
        both = ", ".join(f"{value} by {sign}" for sign, value in found.items())
        raise CheckpointError(f"{file} says that it predicts two things ({both}): choose with --prediction-type")
    return Said(next(iter(found.values()), None), "ztsnr" in weights)


def _from_metadata(file: Path, metadata: Mapping[str, str]) -> dict[str, str]:
    found = {}
    if architecture := ARCHITECTURES.get(metadata.get("modelspec.architecture", "")):
        found[f"modelspec.architecture {metadata['modelspec.architecture']}"] = architecture
    if (prediction := metadata.get("modelspec.prediction_type")) is not None:
        if prediction not in PREDICTIONS:
            raise CheckpointError(
                f"{file} says modelspec.prediction_type {shown(prediction)}, where {', '.join(PREDICTIONS)} are known: "
                "choose with --prediction-type"
            )
        found["modelspec.prediction_type"] = PREDICTIONS[prediction]
    return found


def _step(weights: Weights) -> int | None:
    """Return the training step that some files hold; the tensor is no weight, and may be an integer."""
    if "global_step" not in weights or weights.shape("global_step") not in ((), (1,)):
        return None
    value: torch.Tensor = weights.raw("global_step")
    return int(value.item())
