"""A look at every fifth step, and an early end: `python examples/preview_callback.py [BUNDLE] [FOLDER]`."""

import sys
from pathlib import Path
from typing import Any

from latentrt.export.embedded import ensure_bundle
from latentrt.runtime import Pipeline


class Enough(Exception):
    """What the callback raises to end a request; the pipeline can be used again."""


def main(bundle: Path, folder: Path) -> None:
    """Save previews, and stop after the eleventh step."""

    def look(pipe: Pipeline, step: int, timestep: float, tensors: dict[str, Any]) -> None:
        if step % 5 == 0:
            pipe.decode(tensors["latents"])[0].save(folder / f"preview-{step:02}.png")
        if step == 10:
            raise Enough

    with Pipeline.open(bundle) as pipe:
        try:
            pipe("a red circle", num_inference_steps=20, seed=1, callback_on_step_end=look)
        except Enough:
            sys.stdout.write("ended after 11 steps\n")


if __name__ == "__main__":
    given = [Path(argument) for argument in sys.argv[1:]]
    main(*(given + [ensure_bundle(), Path()][len(given) :]))
