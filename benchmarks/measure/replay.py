"""What the host does between two steps: the denoising loop over engines that compute nothing, as records.

    python -m latentrt.benchmarks.measure.replay [--device cpu] [--steps 50] [--requests 10000]

Each step's two engines copy four bytes. So the time from one step to the next is the loop's own; on a GPU, where steps
are captured, it is what the host needs to launch one.
"""

from __future__ import annotations

import argparse
import gc
import logging
import shlex
import sys
import time
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...engines.bundle import GraphInfo, TensorInfo
from ...engines.device import Array, Device, Stream, Tensor
from ...engines.host import HostDevice
from ...runtime.loop.denoise import DenoiseLoop, Mode
from ..report import records
from .machine import LoadWatch, describe_machine, stamp
from .statistics import summarize

LATENTS = (1, 4, 64, 64)
WARMUP = 20

log = logging.getLogger(__name__)


class NullEngine:
    """Stands where a network would; binds anything."""

    nbytes = 0

    def __init__(self, device: Device) -> None:
        self.name = "null"
        self.inputs: Mapping[str, TensorInfo] = {}
        self.outputs: Mapping[str, TensorInfo] = {}
        self._tensor = device.empty((1,), np.int32)

    def bind(self, tensors: Mapping[str, Tensor]) -> NullBinding:
        """Return the same work for any tensors."""
        return NullBinding(self._tensor)

    def close(self) -> None:
        """Free the four bytes."""
        self._tensor.close()


class NullBinding:
    """Copies four bytes to the device."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._bytes = np.zeros(1, np.int32)

    def enqueue(self, stream: Stream) -> None:
        """Enqueue the copy."""
        self._tensor.write(self._bytes, stream)


def null_loop(device: Device) -> tuple[DenoiseLoop, NullEngine]:
    """Return a loop over null engines, bound, with the buffers of a Stable Diffusion request at 512x512."""
    arrays: dict[str, Array] = {
        "latents": np.zeros(LATENTS, np.float32),
        "history": np.zeros((1, *LATENTS), np.float32),
        "model_input": np.zeros((2, *LATENTS[1:]), np.float16),
        "timestep": np.zeros(2, np.float32),
        "row": np.zeros(1, np.int64),
    }
    prediction = TensorInfo(name="prediction", dtype="float16", shape=("R", 4, "h", "w"))
    info = GraphInfo(name="denoiser", stage="step", files=("none",), opset=20, inputs=(), outputs=(prediction,))
    step = info.model_copy(update={"name": "step"})
    loop = DenoiseLoop(device, info, arrays, {})
    engine = NullEngine(device)
    loop.bind(lambda graph, shapes: engine, info, step)
    return loop, engine


def measure(device: Device, mode: Mode, steps: int, requests: int) -> dict[str, Any]:
    """Run the loop and return seconds a step, and the bytes that tracing finds left over or taken in between.

    Times and allocations come from separate runs: tracing is slow.
    """
    loop, engine = null_loop(device)
    stream = device.stream()
    try:
        for _ in range(WARMUP):
            loop.run(steps, stream, mode=mode)
        seconds = []
        for _ in range(requests):
            start = time.perf_counter()
            loop.run(steps, stream, mode=mode)
            seconds.append((time.perf_counter() - start) / steps)
            stream.synchronize()
        left, most = traced(lambda: loop.run(steps, stream, mode=mode))
        held = device.tensor_bytes()
        loop.run(steps, stream, mode=mode)
        return {
            "seconds_per_step": summarize(seconds),
            "python_bytes_left": left,
            "python_bytes_at_most": most,
            "device_bytes_taken": device.tensor_bytes() - held,
        }
    finally:
        loop.close()
        engine.close()
        stream.close()


def traced(work: Any) -> tuple[int, int]:
    """Return the bytes of Python objects that work leaves behind, and the most that it held at a time."""
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        work()  # what is made once
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        work()
        after, most = tracemalloc.get_traced_memory()
        return after - before, most - before
    finally:
        tracemalloc.stop()
        gc.enable()


def main(arguments: list[str] | None = None) -> int:
    """Measure every mode, print a line each, and append the records."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--output", type=Path, help="File of records (default: this machine's own).")
    words = sys.argv[1:] if arguments is None else arguments
    given = parser.parse_args(words)
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stdout)
    device: Device = HostDevice()
    if given.device == "cuda":
        from ...engines.cuda.device import CudaDevice

        device = CudaDevice()
    output = given.output or records.default_file(describe_machine())
    records.check_writable(output)
    found, watch = [], LoadWatch()
    modes: tuple[Mode, ...] = ("step", "loop") if given.device == "cuda" else ("eager", "step", "loop")
    for mode in modes:
        result = measure(device, mode, given.steps, given.requests)
        found.append({"kind": "replay", "device": device.name, "mode": mode, "steps": given.steps, **result})
        times = result["seconds_per_step"]
        log.info(
            "%-6s %6.1f µs from step to step (p99 %.1f), %d bytes left, %d at most",
            *(mode, times["p50"] * 1e6, times["p99"] * 1e6),
            *(result["python_bytes_left"], result["python_bytes_at_most"]),
        )
    common = stamp(watch, f"python -m latentrt.benchmarks.measure.replay {shlex.join(words)}".strip(), given.device)
    records.append(output, [common | record for record in found])
    log.info("%s", output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
