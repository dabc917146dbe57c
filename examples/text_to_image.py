"""One prompt, one picture, of the embedded model or a bundle: `python examples/text_to_image.py [BUNDLE] [FOLDER]`."""

import sys
from pathlib import Path

from latentrt.export.embedded import ensure_bundle
from latentrt.runtime import Pipeline


def main(bundle: Path, folder: Path) -> None:
    """Draw one picture and tell where the time went."""
    with Pipeline.open(bundle) as pipe:
        result = pipe("a red circle on a blue background", num_inference_steps=20, seed=1)
    result.images[0].save(folder / "text_to_image.png")
    sys.stdout.write(f"seed {result.seeds[0]}, {result.timings.total:.2f} s\n")


if __name__ == "__main__":
    given = [Path(argument) for argument in sys.argv[1:]]
    main(*(given + [ensure_bundle(), Path()][len(given) :]))
