from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from latentrt.engines.bundle import Bundle
from latentrt.export import export_checkpoint
from latentrt.export.activations import largest_activation
from latentrt.runtime import Pipeline
from latentrt.runtime.cli import run
from safetensors.numpy import load_file, save_file


def test_the_largest_magnitude_is_found_and_nan_is_infinite() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.Tanh())
    torch.nn.init.constant_(module[0].weight, -7.0)
    with largest_activation(module) as peak:
        module(torch.ones(1))
    assert peak() == 7
    with largest_activation(module) as peak:
        module(torch.tensor([float("nan")]))
    assert peak() == float("inf")


@pytest.mark.filterwarnings("ignore")
def test_a_vae_that_would_overflow_in_half_stays_in_float(
    tiny_sd15_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny_sd15_checkpoint, checkpoint)
    (weights,) = (checkpoint / "vae").glob("*.safetensors")
    tensors = load_file(weights)
    tensors["decoder.conv_in.weight"] = (tensors["decoder.conv_in.weight"].astype(np.float32) * 2e6).astype(np.float32)
    save_file(tensors, weights)
    with caplog.at_level(logging.WARNING, "latentrt"):
        bundle = Bundle.open(export_checkpoint(checkpoint, tmp_path / "bundle", precision="fp16"))
    assert "decoder reaches activations" in caplog.text
    precisions = {graph.name: graph.precision for graph in bundle.manifest.graphs}
    assert precisions["decoder"] == "fp32" and precisions["image_encoder"] == precisions["denoiser"] == "fp16"
    with Pipeline.open(bundle, "onnxruntime-cpu", threads=1) as pipe:
        pixels = pipe("a star", num_inference_steps=1, seed=0, output_type="np").images
    assert np.isfinite(pixels).all() and pixels.std() > 0.01
    assert run(["inspect", str(bundle.path)]) == 0
    assert "fp32 inside" in capsys.readouterr().out
