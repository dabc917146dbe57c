"""Unlike requests for small pictures."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from latentrt.engines.device import Array
from latentrt.runtime.batcher import Batcher
from latentrt.runtime.sampling import names
from PIL import Image

PROMPTS = ("a red circle on a blue background", "two green stars", "a small yellow cross", "", "a big square")
SMALL: dict[str, Any] = {"height": 64, "width": 64, "output_type": "np"}
IN_PART: tuple[dict[str, Any], ...] = ({}, {"guidance_interval": (0.3, 0.7)}, {"guidance_interval": (0.0, 0.4)})
PICTURES = [Image.new("RGB", (64, 64), color) for color in ("orange", "green")]
MASK = Image.fromarray(np.pad(np.full((32, 64), 255, np.uint8), ((0, 32), (0, 0))))


def mixed(count: int, most_steps: int, seed: int, *, pictures: bool = False) -> list[dict[str, Any]]:
    """Return unlike requests; with `pictures` some start from one, repaint a part of it, or are for several images."""
    choose, part = random.Random(seed), random.Random(seed)
    found = []
    for _ in range(count):
        request = {
            **SMALL,
            "prompt": choose.choice(PROMPTS),
            "negative_prompt": choose.choice((None, "blurry")),
            "sampler": choose.choice(names()),
            "num_inference_steps": choose.randint(min(4, most_steps), most_steps),
            "guidance_scale": choose.choice((1.0, 2.0, 4.0, 7.5)),
            "seed": choose.randrange(2**32),
        }
        if request["guidance_scale"] > 1:
            request |= part.choice(IN_PART)
        kind = choose.random() if pictures else 1.0
        if kind < 0.3:
            request |= {"image": choose.choice(PICTURES), "strength": choose.choice((0.5, 0.8))}
        if kind < 0.15:
            request["mask_image"] = MASK
        if 0.3 <= kind < 0.5:
            request["num_images_per_prompt"] = 2
        found.append(request)
    return found


def alone(batcher: Batcher, requests: Sequence[dict[str, Any]]) -> list[Array]:
    """Draw requests one after the other."""
    return [batcher.submit(**request).result(300).images for request in requests]
