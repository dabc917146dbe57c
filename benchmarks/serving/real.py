"""Real engines: their step-time curve, which says what a request takes alone, and the place to put load on."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from pathlib import Path
from statistics import fmean

from ...engines.backends import open_backend, resolve
from ...engines.bundle import Bundle
from ...engines.errors import EngineError, RequestError
from ...engines.files import write_atomically
from ...export.embedded import ensure_bundle
from ...runtime import Batcher, Pipeline
from ...runtime.sizes import size_of
from ..measure import machine
from .curve import Curve, parse
from .mixes import Work
from .process import Place
from .servers import arguments

FEW, MANY = 10, 40
"""Steps of the two requests between which a step's time is taken."""
ROUNDS, CALLS = 10, 3
"""Times are means over rounds of all widths, each of so many calls: virtual machines change their speed in seconds."""


def measure(
    bundle: str | Path | None, backend: str, threads: int | None, rows: int, *, name: str, size: str = ""
) -> Curve:
    """Return the curve of a bundle (None: the embedded model) on a backend, for up to so many rows.

    Pictures are of a size WIDTHxHEIGHT, of no text the bundle's own. Raises `RequestError` for a size that it has not.
    One and two rows are the pipeline's own calls, alone and without what a request needs once; wider steps are timed in
    a batcher. What is left of a call without its steps is encoding and decoding.
    """
    opened = Bundle.open(bundle or ensure_bundle())
    sides = size_of(size, opened.manifest.latent)
    options = {} if threads is None else {"threads": threads}
    with Pipeline(opened, open_backend(backend, **options), max_batch=rows) as pipe:
        calls = {guided: _Calls(pipe, guided, sides) for guided in (False, True)}
        with Batcher(pipe, slots=max(1, rows // 2), rows=rows) as batcher:
            wide: dict[int, list[float]] = {}
            for _ in range(ROUNDS):
                for each in calls.values():
                    each.add(CALLS)
                batcher.warm_up([sides], pictures=False)
                for bucket, step in batcher.stats().curve.items():
                    wide.setdefault(bucket, []).append(step)
        known = {1 + guided: each.step for guided, each in calls.items()}
        known |= {bucket: fmean(steps) for bucket, steps in wide.items() if bucket > max(known)}
        dynamic = pipe.backend.dynamic
        ran = f"{pipe.backend.name}, {getattr(pipe.backend, 'threads', None) or 'all'} threads"
    for smaller, larger in itertools.pairwise(sorted(known)):
        known[larger] = max(known[larger], known[smaller])  # noise: a wider step takes no less
    about = machine.describe_machine()
    decode = fmean(calls[True].decode)
    model, pixels = opened.path.name if bundle else "the embedded model", "{}×{}".format(*sides)
    found = {
        "title": f"{model}, {pixels}, {opened.manifest.precision}, {ran}",
        "kind": "measured",
        "source": f"latentrt {machine.source_version()} on {about['processor']}, {about['cores']} cores, "
        f"{about['gpu']['name'] if about['gpu'] else 'no GPU'}, {date.today()}; `latentrt bench serve --save-curve`.",
        "step_seconds": dict(sorted(known.items())),
        "encode_seconds": max(0.0, calls[True].rest - decode),
        "decode_seconds": decode,
        "dynamic": dynamic,
    }
    return parse(name, json.dumps(found))


class _Calls:
    """Seconds of a pipeline's calls with few and with many steps, by turns."""

    def __init__(self, pipe: Pipeline, guided: bool, size: tuple[int, int]) -> None:
        self._pipe, self._guided, self._size = pipe, guided, size
        self._seconds: dict[int, list[float]] = {FEW: [], MANY: []}
        self.decode: list[float] = []
        """Seconds of the decoder."""
        self.add(1)  # the first calls bind and capture
        for times in (*self._seconds.values(), self.decode):
            times.clear()

    def add(self, count: int) -> None:
        """Make so many calls of each kind."""
        for number in range(count):
            for steps, into in self._seconds.items():
                given = arguments(Work(steps, "dpmpp_2m_karras", self._guided), number, self._size)
                timings = self._pipe(**given).timings
                into.append(timings.total)
                self.decode.append(timings.decode)

    @property
    def step(self) -> float:
        """Seconds of a step; raises `EngineError` where more steps took no longer."""
        step = (fmean(self._seconds[MANY]) - fmean(self._seconds[FEW])) / (MANY - FEW)
        if step <= 0:
            raise EngineError(f"{MANY} steps took no longer than {FEW}: measure on a quiet machine")
        return step

    @property
    def rest(self) -> float:
        """Seconds of a call without its steps."""
        return max(0.0, fmean(self._seconds[FEW]) - FEW * self.step)


def save(curve: Curve, path: Path) -> Path:
    """Write a curve as the file that `curves.curve` reads, and return its path."""
    found = {
        "title": curve.title,
        "kind": curve.kind,
        "source": curve.source,
        "step_seconds": {str(rows): float(f"{seconds:.4g}") for rows, seconds in curve.known.items()},
        "encode_seconds": float(f"{curve.encode:.4g}"),
        "decode_seconds": float(f"{curve.decode:.4g}"),
        "dynamic": curve.dynamic,
    }
    write_atomically(path, (json.dumps(found, indent=2, ensure_ascii=False) + "\n").encode())
    return path


@contextmanager
def measured(place: Place, say: Callable[[str], object]) -> Iterator[Place]:
    """Return a place with the curve of its engines, which is measured first; a paced one as it is.

    Raises `RequestError` for a scale of real engines: their time is what it is.
    """
    if place.paced:
        yield place
        return
    if place.scale != 1:
        raise RequestError(f"scale is {place.scale:g}: real engines take their own time; give --curve to pace a device")
    with tempfile.TemporaryDirectory() as folder:
        say("measuring the step-time curve")
        found = measure(place.bundle, place.backend, place.threads, place.rows, name="here", size=place.size)
        path = save(found, Path(folder) / "here.json")
        say(", ".join(f"{each} rows {1e3 * seconds:.3g} ms" for each, seconds in found.known.items()))
        yield replace(place, curve=str(path), backend=resolve(place.backend))
