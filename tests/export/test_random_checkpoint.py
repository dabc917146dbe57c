"""Random checkpoints are written where nothing is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from latentrt.engines.errors import RequestError

pytest.importorskip("torch")
pytest.importorskip("diffusers")

import diffusers
import torch
from latentrt.benchmarks.random_checkpoint import write_random_checkpoint
from latentrt.benchmarks.random_checkpoint.architectures import Network
from latentrt.benchmarks.random_checkpoint.weights import write_random_weights
from latentrt.benchmarks.random_checkpoint.writer import shapes, tables
from safetensors.torch import load_file


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


def test_positions_that_a_class_computes_are_not_random(tmp_path: Path) -> None:
    small = {"sample_size": 8, "in_channels": 4, "num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2}
    small |= {"joint_attention_dim": 16, "caption_projection_dim": 16, "pooled_projection_dim": 16}
    network = Network("diffusers", "SD3Transformer2DModel", small | {"pos_embed_max_size": 12})
    write_random_weights(file := tmp_path / "model.safetensors", shapes(network), tables(network))
    written, made = load_file(file), diffusers.SD3Transformer2DModel(**network.config).state_dict()
    assert written.keys() == made.keys()
    positions = "pos_embed.pos_embed"
    assert torch.equal(written[positions], made[positions])
    assert not torch.equal(written["pos_embed.proj.weight"], made["pos_embed.proj.weight"])
