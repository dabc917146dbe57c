"""Every graph of bundles as a TensorRT-RTX plan, built on the processor alone: time, memory and size, as records.

    python -m latentrt.benchmarks.measure.rtx_compile BUNDLE... [--compute-capability 8.6 12.0] [--size WxH] [--batch 1]

Each plan is built in a process of its own with an empty cache: static for the first size and batch, then dynamic over
half, once and one and a half times the size. A plan that builds has not run: that takes a GPU.
"""

from __future__ import annotations

import argparse
import logging
import resource
import shlex
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ...engines.bundle import Bundle
from ...engines.cache import EngineCache
from ...engines.errors import LatentRTError
from ...engines.tensorrt.child import end_all
from ...engines.tensorrt.plan import profile_for
from ...engines.tensorrt.planner import Planner, target_of_compute_capability
from ...runtime.shapes import requested_shapes
from ...runtime.sizes import parse_size
from ..report import records
from .machine import LoadWatch, describe_machine, stamp

log = logging.getLogger(__name__)

Size = tuple[int, int]


def measure(bundle: Path, graph: str, capability: str, sizes: list[Size], batch: int) -> dict[str, Any]:
    """Build one plan and return seconds, peak resident bytes of what builds it, plan bytes and layers, or the error."""
    opened = Bundle.open(bundle)
    shapes = [requested_shapes(opened, width, height, batch)[graph] for width, height in sizes]
    start = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as folder:
            planner = Planner(
                "tensorrt-rtx",
                target_of_compute_capability("tensorrt-rtx", capability),
                cache=EngineCache(Path(folder)),
            )
            facts = planner.build(opened, opened.graph(graph), profile_for(opened.graph(graph), *shapes)).facts
    except LatentRTError as error:
        return {"error": str(error)}
    end_all()
    return {
        "seconds": time.perf_counter() - start,
        "build_seconds": facts["build_seconds"],
        "peak_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
        "plan_bytes": facts["plan_bytes"],
        "layers": facts["layers"],
        "library": facts["key"]["version"],
    }


def sizes_around(bundle: Bundle, size: Size) -> list[Size]:
    """Return a size, its half and its one and a half, rounded to what the bundle can do: the most used one first."""
    multiple = bundle.manifest.latent.size_multiple

    def scaled(factor: float) -> Size:
        width, height = (max(multiple, round(side * factor / multiple) * multiple) for side in size)
        return width, height

    return [scaled(1), scaled(0.5), scaled(1.5)]


def compile_bundle(
    path: Path, capabilities: list[str], size: Size | None, batch: int, command: str
) -> list[dict[str, Any]]:
    """Build every graph of a bundle, static and dynamic, for each compute capability; return one record a plan."""
    bundle = Bundle.open(path)
    latent = bundle.manifest.latent
    name = "embedded" if path.name.startswith("embedded-") else bundle.manifest.source.get("name")
    sizes = sizes_around(bundle, size or (latent.default_width, latent.default_height))
    found = []
    for capability in capabilities:
        for graph in bundle.manifest.graphs:
            for kind, chosen in (("static", sizes[:1]), ("dynamic", sizes)):
                watch = LoadWatch()
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                    try:
                        result = pool.submit(measure, path, graph.name, capability, chosen, batch).result()
                    except (
                        Exception
                    ) as error:  # the process died: the library crashed, or the machine ran out of memory
                        result = {"error": f"the build ended without an answer ({error})"}
                record = {
                    "kind": "rtx-compile",
                    **stamp(watch, command, "cpu"),
                    "bundle": {"name": name, "precision": bundle.manifest.precision},
                    "graph": graph.name,
                    "profile": kind,
                    "sizes": [f"{width}x{height}" for width, height in chosen],
                    "batch": batch,
                    "compute_capability": capability,
                    **result,
                }
                log.info("%s", _line(record))
                found.append(record)
    return found


def _line(record: dict[str, Any]) -> str:
    what = f"{record['graph']:14} {record['profile']:8} {record['compute_capability']:5}"
    if "error" in record:
        return f"{what} {record['error']}"
    mib = 2**20
    return (
        f"{what} {record['build_seconds']:7.1f} s {record['plan_bytes'] / mib:8.1f} MiB plan"
        f" {record['peak_bytes'] / mib:8.0f} MiB peak {record['layers']:6} layers"
    )


def main(arguments: list[str] | None = None) -> int:
    """Build, print one line a plan, and append the records; return 1 when a plan could not be built."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--compute-capability", nargs="+", default=["8.6", "12.0"], metavar="X.Y")
    parser.add_argument("--size", metavar="WxH")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--output", type=Path, help="File of records (default: this machine's own).")
    given = parser.parse_args(arguments)
    words = sys.argv[1:] if arguments is None else arguments
    paths = {str(path): path.name for path in given.bundles}
    command = f"python -m latentrt.benchmarks.measure.rtx_compile {shlex.join(paths.get(word, word) for word in words)}"
    try:
        size = parse_size(given.size) if given.size else None
    except LatentRTError as error:
        parser.error(str(error))
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stdout)
    output = given.output or records.default_file(describe_machine())
    records.check_writable(output)
    failed = 0
    for path in given.bundles:
        log.info("%s", path)
        built = compile_bundle(path, given.compute_capability, size, given.batch, command)
        failed += sum("error" in record for record in built)
        records.append(output, built)
    log.info("%s", output)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
