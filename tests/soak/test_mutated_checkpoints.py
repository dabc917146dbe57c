"""Ten thousand mutated checkpoints: each is one clear line, or a checkpoint that can be described."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("diffusers")

from ..export.mutated_checkpoints import make_folder, mutated, use

CASES, PIECES = 10_000, 20


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("piece", range(PIECES))
def test_mutated_checkpoints(tiny_sd15_checkpoint: Path, tmp_path: Path, piece: int) -> None:
    folder = tmp_path / "checkpoint"
    data = make_folder(tiny_sd15_checkpoint, folder)
    files = sorted(folder.rglob("*"))
    step = CASES // PIECES
    refused = sum(bool(use(folder, *mutated(data, seed), tmp_path)) for seed in range(piece * step, (piece + 1) * step))
    assert step // 4 < refused < step
    assert sorted(folder.rglob("*")) == files
