"""One pipeline behind several threads: `python examples/serve_with_threads.py [BUNDLE] [FOLDER]`.

Calls wait for each other, so every thread gets its own picture. More at a time takes one process for each pipeline.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from latentrt.export.embedded import ensure_bundle
from latentrt.runtime import Pipeline

PROMPTS = ["a red circle", "a yellow star", "a green ring", "a black cross"]


def main(bundle: Path, folder: Path) -> None:
    """Answer four requests that arrive together."""
    with Pipeline.open(bundle) as pipe, ThreadPoolExecutor(4) as threads:

        def answer(prompt: str) -> None:
            picture = pipe(prompt, num_inference_steps=10, seed=1).images[0]
            picture.save(folder / f"{prompt.replace(' ', '-')}.png")

        list(threads.map(answer, PROMPTS))


if __name__ == "__main__":
    given = [Path(argument) for argument in sys.argv[1:]]
    main(*(given + [ensure_bundle(), Path()][len(given) :]))
