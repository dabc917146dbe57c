"""Requests to a bundle and to diffusers' pipeline of its checkpoint, opened by diffusers' own loader."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from latentrt.export import export_checkpoint
from latentrt.runtime import Pipeline
from PIL import Image

LARGEST = 2
"""Of 255: how far a pixel may be off."""
RELATIVE = 1e-3
"""How far latents may be off, as a share of their size."""


RECORD = "LATENTRT_FAMILIES"
"""The variable that names a file to record in what was compared: docs/families.json, of which the table is made."""

OF_A_FLUX2: list[dict[str, Any]] = [
    {},
    {"guidance_scale": 1.0, "height": 64, "width": 24},
    {"guidance_scale": 7.5, "height": 20, "width": 36, "num_images_per_prompt": 2},
    {"prompt": ["a star", "a blue square of glass, " * 60], "num_inference_steps": 12},
]
"""What requests of both kinds of FLUX.2 change."""

_opened: list[str] = [""]


def opened(kind: Any, folder: Any, **options: Any) -> Any:
    """Return diffusers' pipeline of a folder, or of a single file."""
    open_it = kind.from_single_file if Path(folder).is_file() else kind.from_pretrained
    _opened.append(kind.__name__)
    pipeline = open_it(str(folder), **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def picture(width: int = 64, height: int = 64) -> Image.Image:
    """Return a picture of random colors."""
    return Image.fromarray((np.random.RandomState(0).rand(height, width, 3) * 255).astype(np.uint8))


def mask(width: int = 64, height: int = 64) -> Image.Image:
    """Return a mask whose upper part, but for a quarter on the left, is to be repainted."""
    white = np.zeros((height, width), np.uint8)
    white[: height // 2, width // 4 :] = 255
    return Image.fromarray(white)


@torch.no_grad()
def check(
    pipe: Pipeline, reference: Any, *, seed: int = 5, sampler: str | None = None, **request: Any
) -> tuple[float, float]:
    """Draw a request on both sides; return the largest difference of a pixel, of 255, and that of the latents."""
    count = request.get("num_images_per_prompt", 1) * (
        1 if isinstance(request["prompt"], str) else len(request["prompt"])
    )
    found = []
    for output_type in ("np", "latent"):
        generators = [torch.Generator().manual_seed(seed + i) for i in range(count)]
        wanted = reference(
            **request, generator=generators if count > 1 else generators[0], output_type=output_type
        ).images
        ours = pipe(**request, seed=seed, sampler=sampler, output_type=output_type).images
        found.append((np.asarray(ours), np.asarray(wanted)))
    (pixels, wanted_pixels), (latents, wanted_latents) = found
    assert pixels.shape == wanted_pixels.shape
    difference = float(np.abs(pixels - wanted_pixels).max() * 255)
    wanted_latents = wanted_latents.reshape(latents.shape)
    relative = float(np.linalg.norm(latents - wanted_latents) / np.linalg.norm(wanted_latents))
    assert difference <= LARGEST and relative <= RELATIVE, (difference, relative)
    _record(pipe.bundle.manifest.family, difference, relative)
    return difference, relative


def check_seen(pipe: Pipeline, request: dict[str, Any], *changes: dict[str, Any]) -> Any:
    """Check that each change to a request changes its latents, which are returned.

    Or else the other comparisons would agree for the wrong reason.
    """
    request = {**request, "seed": 1, "output_type": "latent"}
    plain = pipe(**request).images
    for change in changes:
        assert np.abs(pipe(**{**request, **change}).images - plain).max() > 1e-3, change
    return plain


def check_refused(
    checkpoint: Path, copy: Path, file: str, old: str, new: str, error: type[Exception], says: str
) -> None:
    """Check that a copy of a checkpoint with another text in one of its files is refused, in a line."""
    changed = shutil.copytree(checkpoint, copy) / file
    assert old in changed.read_text()
    changed.write_text(changed.read_text().replace(old, new))
    with pytest.raises(error, match=says) as caught:
        export_checkpoint(copy, copy.with_name("refused"))
    assert "\n" not in str(caught.value)


def _record(family: str, difference: float, relative: float) -> None:
    """Note a comparison under its family and diffusers' pipeline, where a file for it is named."""
    known = _known().get(family, {}).get(_opened[-1], {"requests": 0, "pixel": 0.0, "latents": 0.0})
    largest = {"pixel": max(known["pixel"], difference), "latents": max(known["latents"], relative)}
    note(family, _opened[-1], {"requests": known["requests"] + 1, **largest})


def note(section: str, name: str, facts: dict[str, Any]) -> None:
    """Add facts to what is known of something, where a file for them is named."""
    if file := os.environ.get(RECORD):
        known = _known()
        known.setdefault(section, {}).setdefault(name, {}).update(facts)
        Path(file).write_text(json.dumps(known, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _known() -> dict[str, Any]:
    file = Path(os.environ.get(RECORD, ""))
    known: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return known
