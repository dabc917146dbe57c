"""Which pictures of which contenders are compared, and what the oracle is given to judge."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrt.benchmarks.measure import quality
from latentrt.benchmarks.measure.method import Conditions, Measured
from latentrt.benchmarks.measure.workloads import Model, workload
from latentrt.benchmarks.quality.scenes import draw, held_out_scenes

EXACT, LOSSY = "latentrt/onnxruntime-cpu/step", "latentrt/onnxruntime-cpu/step+taylor"


class Drawer:
    """Answers with the scene that a prompt asks for, `off` levels darker; a gray picture for any other prompt."""

    def __init__(self, contender: str, off: int = 0) -> None:
        self.contender, self.off = contender, off
        self.asked: list[tuple[str, int]] = []
        self.scenes = {scene.prompt: scene for kind in ("single", "pair") for scene in held_out_scenes(kind, 3)}

    def run(self, request: Mapping[str, Any], *, save: Path, latents: bool) -> dict[str, Any]:
        self.asked.append((request["prompt"], request["seed"]))
        scene = self.scenes.get(request["prompt"])
        picture = np.full((1, 32, 32, 3), 128, np.uint8) if scene is None else draw([scene])
        np.savez(save, images=np.maximum(picture, self.off) - np.uint8(self.off))
        return {}


@pytest.fixture
def conditions(tmp_path: Path) -> Conditions:
    work = workload("embedded").but(batch=2)
    return Conditions(work, Model(tmp_path, tmp_path, "none"), "cpu", 1, folder=tmp_path)


def test_scenes_are_judged_kept_and_compared(conditions: Conditions) -> None:
    exact, lossy = Drawer(EXACT), Drawer(LOSSY, off=3)
    scores = [quality.draw_scenes(each, 6, conditions) for each in (exact, lossy)]  # type: ignore[arg-type]
    assert scores == [{"single": 1.0, "pair": 1.0, "count": 6}] * 2
    assert exact.asked == lossy.asked and len(exact.asked) == 6
    found = quality.nearness({name: Measured(name) for name in (EXACT, LOSSY)}, EXACT, conditions)
    assert list(found) == [LOSSY]
    near = found[LOSSY]
    assert (near["against"], near["pictures"], near["max_pixel_difference"]) == (EXACT, 6, 3)
    assert near["psnr"] == pytest.approx(20 * np.log10(255 / 3))


def test_other_prompts_are_drawn_with_several_seeds(conditions: Conditions) -> None:
    worker = Drawer(LOSSY)
    quality.draw_seeds(worker, 3, conditions)  # type: ignore[arg-type]
    assert worker.asked == [(conditions.work.prompt, seed) for seed in range(3)]


def test_answers_are_compared_where_nothing_else_was_drawn(conditions: Conditions, tmp_path: Path) -> None:
    measured = {}
    for name, value in ((EXACT, 10), (LOSSY, 13), ("diffusers/eager-bf16", 10), ("diffusers/eager", 200)):
        measured[name] = entry = Measured(name)
        entry.answer = tmp_path / f"{value}.npz"
        np.savez(entry.answer, images=np.full((2, 16, 16, 3), value, np.uint8))
    found = quality.nearness(measured, EXACT, conditions)
    assert set(found) == {LOSSY, "diffusers/eager-bf16"}  # who is exact has no quality to speak of
    assert found[LOSSY]["psnr"] == pytest.approx(20 * np.log10(255 / 3)) and found[LOSSY]["pictures"] == 2
    assert found["diffusers/eager-bf16"]["psnr"] is None
    measured[LOSSY].failure = "no such luck"
    assert set(quality.nearness(measured, EXACT, conditions)) == {"diffusers/eager-bf16"}
    assert quality.nearness(measured, LOSSY, conditions) == {}  # there is no exact run to compare with
