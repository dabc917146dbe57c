"""A picture to start from, then a part of it painted anew: `python examples/image_to_image.py [BUNDLE] [FOLDER]`."""

import sys
from pathlib import Path

from latentrt.export.embedded import ensure_bundle
from latentrt.runtime import Pipeline
from PIL import Image, ImageDraw


def main(bundle: Path, folder: Path) -> None:
    """Draw a picture, vary it, and repaint its left half."""
    with Pipeline.open(bundle) as pipe:
        first = pipe("a red circle on a blue background", seed=1).images[0]
        varied = pipe("a yellow star on a blue background", image=first, strength=0.7, seed=2).images[0]
        mask = Image.new("L", first.size)  # white is repainted, black is kept
        ImageDraw.Draw(mask).rectangle((0, 0, first.width // 2, first.height), fill="white")
        repainted = pipe("a green ring on a blue background", image=first, mask_image=mask, seed=3).images[0]
    varied.save(folder / "image_to_image.png")
    repainted.save(folder / "repainted.png")


if __name__ == "__main__":
    given = [Path(argument) for argument in sys.argv[1:]]
    main(*(given + [ensure_bundle(), Path()][len(given) :]))
