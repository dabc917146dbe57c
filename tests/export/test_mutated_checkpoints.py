"""A sample of mutated checkpoints; the soak tests go through ten thousand."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("diffusers")

from .mutated_checkpoints import make_folder, mutated, use

SAMPLE = 150


@pytest.mark.filterwarnings("ignore")
def test_mutated_checkpoints_give_one_line_or_a_description(tiny_sd15_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    data = make_folder(tiny_sd15_checkpoint, folder)
    files = sorted(folder.rglob("*"))
    refused = sum(bool(use(folder, *mutated(data, seed), tmp_path)) for seed in range(SAMPLE))
    assert SAMPLE // 4 < refused < SAMPLE
    assert sorted(folder.rglob("*")) == files
