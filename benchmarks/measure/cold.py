"""Cold processes: from the shell to a PNG on disk, as a user of each library would do it."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..contenders import precision_apart
from ..contenders.process import run_process
from .method import Conditions
from .statistics import summarize

SCRIPT = """
import sys, torch
from diffusers import StableDiffusionPipeline
checkpoint, output, prompt, device, dtype, steps, guidance, height, width, seed = sys.argv[1:]
torch.set_num_threads({threads})
pipe = StableDiffusionPipeline.from_pretrained(checkpoint, torch_dtype=getattr(torch, dtype), local_files_only=True)
image = pipe.to(device)(
    prompt, num_inference_steps=int(steps), guidance_scale=float(guidance), height=int(height), width=int(width),
    generator=torch.Generator("cpu").manual_seed(int(seed)),
).images[0]
image.save(output)
"""
"""The shortest script that does with diffusers what `latentrt generate` does."""


def commands(names: Sequence[str], conditions: Conditions, output: Path) -> dict[str, list[str]]:
    """Return whole commands: that of the first of latentrt's contenders in `names`, and that of diffusers."""
    work, model, threads = conditions.work, conditions.model, conditions.threads
    latentrt = Path(sys.executable).with_name("latentrt")
    entry = [str(latentrt)] if latentrt.exists() else [sys.executable, "-m", "latentrt.runtime"]
    ours = [*entry, "generate", work.prompt, "--bundle", str(model.bundle), "--output", str(output)]
    ours += ["--seed", str(work.seed), "--steps", str(work.steps), "--guidance", str(work.guidance)]
    ours += ["--size", f"{work.width}x{work.height}", "--threads", str(threads)]
    dtype = "float16" if work.precision == "fp16" else "float32"
    theirs = [sys.executable, "-c", SCRIPT.format(threads=threads), str(model.checkpoint), str(output), work.prompt]
    theirs += [
        conditions.device,
        dtype,
        str(work.steps),
        str(work.guidance),
        str(work.height),
        str(work.width),
        str(work.seed),
    ]
    found = {}
    if first := next((name for name in names if name.startswith("latentrt/") and "+" not in name), None):
        backend, inside = precision_apart(first.split("/")[1])
        found[first] = [*ours, "--backend", backend, *(["--option", f"precision={inside}"] if inside else [])]
    if "diffusers/eager" in names:
        found["diffusers/eager"] = theirs
    return found


def measure_cold(names: Sequence[str], conditions: Conditions, repeats: int) -> dict[str, dict[str, Any]]:
    """Run whole commands by turns; return seconds from shell to PNG and peak resident bytes for each contender.

    Files are in the page cache after a first run of each, which is not counted.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "picture.png"
        chosen = commands(names, conditions, output)
        seconds: dict[str, list[float]] = {name: [] for name in chosen}
        peaks = dict.fromkeys(chosen, 0)
        for turn in range(-1, repeats):
            for name, command in chosen.items():
                done = run_process(command, threads=conditions.threads)
                if turn >= 0:
                    seconds[name].append(done.seconds)
                    peaks[name] = max(peaks[name], done.peak_bytes)
                output.unlink()
    return {
        name: {"seconds": summarize(values), "samples": values, "peak_bytes": peaks[name]}
        for name, values in seconds.items()
    }
