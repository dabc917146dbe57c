"""What decoding in tiles takes and changes: memory, time, and differences from the picture in one piece.

    python -m latentrt.benchmarks.quality.tiles BUNDLE --size 1024x1024 --size 2048x2048 --whole-up-to 1024

Each picture is decoded from the same random latents in a process of its own, which does nothing else. Random latents
are alike all over; pictures that are not differ by more where a decoder normalizes (see the page on options).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...engines.bundle import Bundle
from ...engines.errors import LatentRTError
from ...runtime.sizes import size_of
from ..contenders.process import run_process
from ..report.table import Table

DECODE = """
import sys, time
import numpy as np
from latentrt.runtime import Pipeline
bundle, backend, latents, tiled, out = sys.argv[1:]
with Pipeline.open(bundle, backend, low_memory=True) as pipe:
    began = time.perf_counter()
    picture = pipe.decode(np.load(latents), tiled=tiled == "tiled")[0]
    sys.stdout.write(str(time.perf_counter() - began))
np.save(out, np.asarray(picture))
"""


def measure(
    bundle: Bundle, backend: str, sizes: Sequence[tuple[int, int]], whole_up_to: int | None
) -> Iterator[dict[str, Any]]:
    """Yield what each size (width, height) takes in one piece, up to so many pixels a side, and in tiles."""
    latent = bundle.manifest.latent
    with tempfile.TemporaryDirectory() as folder:
        latents, out = Path(folder) / "latents.npy", Path(folder) / "picture.npy"
        for width, height in sizes:
            cells = (1, latent.channels, height // latent.downscale, width // latent.downscale)
            np.save(latents, np.random.default_rng(0).standard_normal(cells, dtype=np.float32))
            whole: npt.NDArray[np.uint8] | None = None
            for how in ("whole", "tiled"):
                if how == "whole" and whole_up_to is not None and max(width, height) > whole_up_to:
                    continue
                asked = [str(bundle.path), backend, str(latents), how, str(out)]
                done = run_process([sys.executable, "-c", DECODE, *asked])
                found: dict[str, Any] = {"size": f"{width}x{height}", "decoded": how, "seconds": float(done.output)}
                found |= {"peak_bytes": done.peak_bytes, "anonymous_bytes": done.anonymous_bytes}
                picture = np.load(out)
                if how == "whole":
                    whole = picture
                elif whole is not None:
                    found["differences"] = differences(picture, whole)
                yield found


def differences(tiled: npt.NDArray[np.uint8], whole: npt.NDArray[np.uint8]) -> dict[str, float]:
    """Return mean, 99.9th percentile and largest of the absolute differences between two pictures, of 255."""
    apart = np.abs(tiled.astype(np.int16) - whole)
    return {
        "mean": float(apart.mean()),
        "p99.9": float(np.percentile(apart, 99.9)),
        "largest": float(apart.max()),
        "above_2": float((apart > 2).mean()),
    }


def table(found: Sequence[dict[str, Any]]) -> Table:
    """Return what was measured, a row for each picture."""
    rows = []
    for each in found:
        apart = each.get("differences")
        told = [f"{apart[name]:.3g}" for name in ("mean", "p99.9", "largest")] if apart else ["–"] * 3
        gib = (each[name] / 2**30 for name in ("peak_bytes", "anonymous_bytes"))
        rows.append(
            [each["size"], each["decoded"], f"{each['seconds']:.1f}", *(f"{value:.2f}" for value in gib), *told]
        )
    head = ["size", "decoded", "seconds", "GiB", "without files", "mean of 255", "99.9 % within", "largest"]
    return Table("Decoding in tiles", head, rows)


def main() -> None:
    """Measure and print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--backend", default="onnxruntime-cpu")
    parser.add_argument("--size", action="append", metavar="WxH", help="repeatable (default: 1024x1024)")
    parser.add_argument("--whole-up-to", type=int, metavar="PIXELS", help="longest side that is decoded in one piece")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    found = []
    try:
        bundle = Bundle.open(given.bundle)
        sizes = [size_of(text, bundle.manifest.latent) for text in given.size or ["1024x1024"]]
        for each in measure(bundle, given.backend, sizes, given.whole_up_to):
            sys.stderr.write(f"{each['size']}, {each['decoded']}: {each['seconds']:.1f} s\n")
            found.append(each)
    except LatentRTError as error:
        sys.exit(f"error: {error}")
    sys.stdout.write(json.dumps(found, indent=2) + "\n" if given.json else table(found).markdown() + "\n")


if __name__ == "__main__":
    main()
