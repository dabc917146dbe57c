"""What an export of a full-size architecture takes: time and memory, as records.

    python -m latentrt.benchmarks.measure.exports sdxl --precision fp16
    python -m latentrt.benchmarks.measure.exports flux1-dev --precision bf16 --graphs denoiser --hoist

A checkpoint of the architecture with random weights is written first, and with the bundle deleted afterwards unless
`--keep` names a folder for both. The export runs in a process of its own. Of its memory two peaks are told: all of it,
and without the pages of weight files, which the system drops when it needs the room.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...engines.cache import home
from ...engines.errors import LatentRTError, RequestError
from ..contenders.process import run_process
from ..random_checkpoint import architecture
from ..report import records
from .machine import LoadWatch, describe_machine, stamp
from .workloads import write_random

EXPORT = """
import json, sys
from dataclasses import replace
from pathlib import Path
from latentrt.engines.bundle import Bundle
from latentrt.export import export_checkpoint
from latentrt.export.checkpoints.sources import open_checkpoint
from latentrt.export.exporter import write_network, write_tokenizers
from latentrt.export.families import family_named
source, out, precision, hoist, *names = sys.argv[1:]
out, hoist = Path(out), hoist == "hoist"
if names:
    out.mkdir(parents=True)
    checkpoint = open_checkpoint(source, None)
    family = family_named(checkpoint.family)
    family.check(checkpoint)
    checkpoint = replace(checkpoint, skip_layers=family.skip_layers(checkpoint))
    lengths = {name: info.max_length for name, info in write_tokenizers(family, checkpoint, out).items()}
    graphs = []
    for name in names:
        graphs += write_network(family, checkpoint, lengths, name, out, precision, hoist=hoist)
else:
    graphs = Bundle.open(export_checkpoint(source, out, precision=precision, hoist=hoist)).manifest.graphs
for info in graphs:
    size = sum((out / file).stat().st_size for file in info.files)
    parity = info.parity and info.parity.model_dump(mode="json")
    told = {"graph": info.name, "stage": info.stage, "bytes": size, "precision": info.precision, "parity": parity}
    sys.stdout.write(json.dumps(told) + chr(10))
"""
"""A whole export, or some networks of a checkpoint alone; one line of JSON for each graph."""


def bundle_in(folder: Path, name: str, precision: str, hoist: bool) -> Path:
    """Return where the bundle of an architecture is written."""
    return folder / f"{name}-random-{precision}{'-hoisted' if hoist else ''}"


def measure(name: str, precision: str, graphs: Sequence[str], folder: Path, *, hoist: bool) -> dict[str, Any]:
    """Write the checkpoint below `folder`, export it, and return what a record says of that."""
    checkpoint = folder / f"{name}-random"
    if not checkpoint.exists():
        sys.stderr.write(f"writing random weights of {name}: {checkpoint}\n")
        write_random(name, checkpoint)
    bundle = bundle_in(folder, name, precision, hoist)
    sys.stderr.write(f"exporting to {bundle}\n")
    asked = [str(checkpoint), str(bundle), precision, "hoist" if hoist else "whole", *graphs]
    done = run_process([sys.executable, "-c", EXPORT, *asked])
    return {
        "architecture": name,
        "stored": architecture(name).stored,
        "precision": precision,
        "hoist": hoist,
        "seconds": done.seconds,
        "peak_bytes": done.peak_bytes,
        "anonymous_bytes": done.anonymous_bytes,
        "graphs": [json.loads(line) for line in done.output.splitlines()],
    }


def main() -> None:
    """Measure one export and append its record to this machine's file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architecture")
    parser.add_argument("--precision", choices=["fp32", "fp16", "bf16"], default="fp16")
    parser.add_argument("--graphs", nargs="*", default=[], help="graphs to export, by default all")
    parser.add_argument("--hoist", action="store_true", help="the denoiser in parts: what steps share runs once")
    parser.add_argument("--keep", type=Path, help="folder in which checkpoint and bundle stay")
    parser.add_argument("--output", type=Path, help="file of records (default: this machine's own)")
    given = parser.parse_args()
    try:
        architecture(given.architecture)
        machine = describe_machine()
        output = given.output or records.default_file(machine)
        records.check_writable(output)
        if given.keep and bundle_in(given.keep, given.architecture, given.precision, given.hoist).exists():
            raise RequestError(f"{given.keep} holds such an export already: give another folder to --keep")
        watch = LoadWatch()
        (home() / "exports").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home() / "exports") as temporary:
            folder = given.keep or Path(temporary)
            found = measure(given.architecture, given.precision, given.graphs, folder, hoist=given.hoist)
        command = f"python -m latentrt.benchmarks.measure.exports {shlex.join(sys.argv[1:])}"
        record = {"kind": "export", "run": uuid.uuid4().hex[:12], **stamp(watch, command, "cpu"), **found}
        records.append(output, [record], show=lambda line: sys.stdout.write(line + "\n"))
    except LatentRTError as error:
        sys.exit(f"error: {error}")
    sys.stdout.write(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
