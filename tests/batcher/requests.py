"""Unlike requests for small pictures."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from latentrt.engines.device import Array
from latentrt.runtime.batcher import Batcher
from latentrt.runtime.sampling import names

PROMPTS = ("a red circle on a blue background", "two green stars", "a small yellow cross", "", "a big square")
SMALL: dict[str, Any] = {"height": 64, "width": 64, "output_type": "np"}


def mixed(count: int, most_steps: int, seed: int) -> list[dict[str, Any]]:
    """Return unlike requests."""
    choose = random.Random(seed)
    return [
        {
            **SMALL,
            "prompt": choose.choice(PROMPTS),
            "negative_prompt": choose.choice((None, "blurry")),
            "sampler": choose.choice(names()),
            "num_inference_steps": choose.randint(min(4, most_steps), most_steps),
            "guidance_scale": choose.choice((1.0, 2.0, 4.0, 7.5)),
            "seed": choose.randrange(2**32),
        }
        for _ in range(count)
    ]


def alone(batcher: Batcher, requests: Sequence[dict[str, Any]]) -> list[Array]:
    """Draw requests one after the other."""
    return [batcher.submit(**request).result(300).images for request in requests]
