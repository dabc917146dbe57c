"""Random checkpoints are written where nothing is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from latentrt.engines.errors import RequestError

pytest.importorskip("torch")
pytest.importorskip("diffusers")

from latentrt.benchmarks.random_checkpoint import write_random_checkpoint


def test_what_is_there_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert (write_random_checkpoint("tiny-sd15", tmp_path / "empty") / "model_index.json").is_file()
    (tmp_path / "file").write_text("mine")
    for name in ("empty", "file"):
        with pytest.raises(RequestError, match=f"{name} is there already: name a folder that is not, or an empty one"):
            write_random_checkpoint("tiny-sd15", tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine"


def test_the_command_says_so_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    command = [sys.executable, "-m", "latentrt.benchmarks.random_checkpoint", "tiny-sd15", str(tmp_path / "mine")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "is there already" in done.stderr and "Traceback" not in done.stderr
