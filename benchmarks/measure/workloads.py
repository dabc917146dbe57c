"""What is measured: named workloads, and the checkpoint and bundle that each of them needs."""

from __future__ import annotations

import hashlib
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

from ...engines.bundle import Precision
from ...engines.cache import home
from ...engines.errors import RequestError
from ..contenders.process import run_process

Say = Callable[[str], None]
"""Called with one line about what happens now."""


@dataclass(frozen=True)
class Workload:
    """One request, and the model that it goes to; sizes are pixels, the sampler is the checkpoint's own."""

    name: str
    family: str
    height: int
    width: int
    steps: int
    guidance: float
    prompt: str
    latency_bound: float
    """Seconds within which 99 of 100 requests of the Server scenario must be answered."""
    batch: int = 1
    seed: int = 0
    precision: Precision = "fp32"

    def but(self, **changes: Any) -> Workload:
        """Return the workload with some fields changed; None leaves a field as it is."""
        return replace(self, **{name: value for name, value in changes.items() if value is not None})

    def as_request(self) -> dict[str, Any]:
        """Return the fields as JSON values, the form in which workers get them."""
        return asdict(self)


_SCENE = "a red circle on a blue background"
_PHOTO = "a photograph of an astronaut riding a horse"
SDXL_LATENCY_BOUND = 20.0
"""MLPerf Inference's bound for its text-to-image Server scenario."""

WORKLOADS = {
    w.name: w
    for w in (
        Workload("embedded", "embedded", 128, 128, 20, 4.0, _SCENE, 2.0),
        Workload("sd15-512", "sd15", 512, 512, 20, 7.5, _PHOTO, SDXL_LATENCY_BOUND),
        Workload("sd15-768", "sd15", 768, 768, 20, 7.5, _PHOTO, SDXL_LATENCY_BOUND),
        Workload("sd21-768", "sd21", 768, 768, 20, 7.5, _PHOTO, SDXL_LATENCY_BOUND),
        Workload("sdxl-1024", "sdxl", 1024, 1024, 20, 5.0, _PHOTO, SDXL_LATENCY_BOUND),
        Workload("sd35-1024", "sd35-medium", 1024, 1024, 28, 4.5, _PHOTO, SDXL_LATENCY_BOUND),
        Workload("zimage-1024", "z-image-turbo", 1024, 1024, 9, 0.0, _PHOTO, SDXL_LATENCY_BOUND),
        Workload("klein-1024", "flux2-klein-4b", 1024, 1024, 4, 1.0, _PHOTO, SDXL_LATENCY_BOUND),
        Workload("flux1-1024", "flux1-dev", 1024, 1024, 28, 3.5, _PHOTO, SDXL_LATENCY_BOUND),
    )
}


PUBLISHED_IN_BF16 = ("z-image-turbo", "flux2-klein-4b", "flux1-dev")
"""Architectures that overflow in fp16, or may."""
BYTES_OF_A_WEIGHT: dict[Precision, int] = {"fp32": 4, "fp16": 2, "bf16": 2}


def workload(name: str) -> Workload:
    """Return the workload called `name`, or raise `RequestError`."""
    if name not in WORKLOADS:
        raise RequestError(f"unknown workload {name!r}: choose {', '.join(WORKLOADS)}")
    return WORKLOADS[name]


def precision(given: str | None, device: str, family: str) -> Precision:
    """Return the precision to measure in: as given, or what device and family are made for; raises `RequestError`."""
    if given is None and device == "cpu":
        return "fp32"
    if given is None:
        return "bf16" if family in PUBLISHED_IN_BF16 else "fp16"
    if given not in get_args(Precision):
        raise RequestError(f"precision is {given!r}: choose {' or '.join(get_args(Precision))}")
    return cast(Precision, given)


@dataclass(frozen=True)
class Model:
    """A checkpoint and the bundle exported from it; `weights` says whose they are."""

    checkpoint: Path
    bundle: Path
    weights: str
    export_seconds: float | None = None
    """None when the bundle was there already."""
    export_peak_bytes: int | None = None

    @property
    def weight_bytes(self) -> int:
        """Bytes of the bundle's graphs and weights."""
        return sum(f.stat().st_size for f in self.bundle.iterdir() if f.is_file())


def check_memory(w: Workload, memory: int) -> None:
    """Raise `RequestError` when a random model's weights do not fit into so many bytes, before anything is written."""
    if w.family == "embedded":
        return
    from ..random_checkpoint.writer import architecture, weight_count

    need = weight_count(architecture(w.family)) * BYTES_OF_A_WEIGHT[w.precision]
    if need > memory:
        raise RequestError(
            f"{w.name} in {w.precision} has {need / 2**30:.0f} GiB of weights, and there are {memory / 2**30:.0f} GiB "
            "of memory here: give a smaller --precision, or run it on a larger machine"
        )


EXPORT = """
import sys
from latentrt.engines.errors import LatentRTError
from latentrt.export import export_checkpoint
try:
    export_checkpoint(sys.argv[1], sys.argv[2], precision=sys.argv[3], replace=True)
except LatentRTError as error:
    sys.exit(str(error))
"""
"""Run in a process of its own, so that what an export takes can be measured from outside."""


def ensure_model(w: Workload, *, checkpoint: Path | None = None, fresh: bool = False, say: Say) -> Model:
    """Return the workload's model, writing random weights and exporting at first use.

    A user's own `checkpoint` (a diffusers folder) replaces the random weights. `fresh` exports once more, into a
    temporary name that then replaces the bundle, so that the export is timed. Both steps run in processes of their own.
    """
    if w.family == "embedded" and checkpoint is None:
        from ...export.embedded import CHECKPOINT, bundle_path

        checkpoint, bundle, weights = CHECKPOINT, bundle_path(w.precision), "trained, embedded"
    elif checkpoint is not None:
        if not checkpoint.is_dir():
            raise RequestError(f"checkpoint {checkpoint} is no folder: give a diffusers checkpoint")
        bundle = home() / "bundles" / f"{checkpoint.name}-{w.precision}-{_state(checkpoint)}"
        weights = checkpoint.name
    else:
        checkpoint = home() / "checkpoints" / f"{w.family}-random"
        bundle = home() / "bundles" / f"{w.family}-random-{w.precision}"
        weights = f"random, {w.family} architecture"
        if not checkpoint.exists():
            say(f"writing random weights of the {w.family} architecture, once: {checkpoint}")
            write_random(w.family, checkpoint)
    if bundle.exists() and not fresh:
        return Model(checkpoint, bundle, weights)
    say(f"exporting {checkpoint.name} to {bundle}")
    done = run_process([sys.executable, "-c", EXPORT, str(checkpoint), str(bundle), w.precision])
    say(f"exported in {done.seconds:.0f} s, peak memory {done.peak_bytes / 2**30:.2f} GiB")
    return Model(checkpoint, bundle, weights, done.seconds, done.peak_bytes)


def write_random(family: str, checkpoint: Path) -> None:
    """Write an architecture with random weights; a killed run leaves no half checkpoint under its name."""
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{checkpoint.name}-", dir=checkpoint.parent) as folder:
        written = Path(folder) / checkpoint.name
        run_process([sys.executable, "-m", "latentrt.benchmarks.random_checkpoint", family, str(written)])
        written.rename(checkpoint)


def _state(folder: Path) -> str:
    """Return a digest of names, sizes and times of a folder's files: reading gigabytes of weights would take long."""
    digest = hashlib.sha256()
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(f"{file.relative_to(folder)} {file.stat().st_size} {file.stat().st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]
