"""Many prompts, each batch written while the next one runs: `python examples/batch_prompts.py [BUNDLE] [FOLDER]`."""

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from latentrt.export.embedded import ensure_bundle
from latentrt.runtime import Pipeline

PROMPTS = ["a red circle", "a yellow star", "a green ring", "a black cross", "a blue square", "a white triangle"]


def main(bundle: Path, folder: Path) -> None:
    """Draw every prompt, four pictures at a time."""
    with ThreadPoolExecutor(1) as writer, Pipeline.open(bundle, max_batch=4) as pipe:

        def write(request: Any, first: int, images: Sequence[Any]) -> None:
            for number, image in enumerate(images, first):
                writer.submit(image.save, folder / f"batch-{number}.png")

        pipe(PROMPTS, num_inference_steps=10, seed=1, on_batch=write)


if __name__ == "__main__":
    given = [Path(argument) for argument in sys.argv[1:]]
    main(*(given + [ensure_bundle(), Path()][len(given) :]))
