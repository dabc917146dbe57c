from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from latentrt.engines.bundle import Bundle, TensorInfo, describe_files, write_manifest
from latentrt.export.activations import largest_activation
from latentrt.export.exporter import write_graph
from latentrt.export.graph import Graph
from latentrt.runtime import Pipeline
from latentrt.runtime.cli import run


def test_the_largest_magnitude_is_found_and_nan_is_infinite() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.Tanh())
    torch.nn.init.constant_(module[0].weight, -7.0)
    with largest_activation(module) as peak:
        module(torch.ones(1))
    assert peak() == 7
    with largest_activation(module) as peak:
        module(torch.tensor([float("nan")]))
    assert peak() == float("inf")


class Loud(torch.nn.Module):
    """Gives what it gets, over activations that are `gain` times as large."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False)
        for layer, factor in ((self.up, gain), (self.down, 1 / gain)):
            torch.nn.init.eye_(layer.weight)
            layer.weight.data *= factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x.to(self.up.weight.dtype))).float()


@pytest.mark.parametrize(("gain", "kept"), [(4e5, "fp32"), (10.0, "fp16")])
def test_a_decoder_that_would_overflow_in_half_stays_in_float(
    gain: float, kept: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    inputs, outputs = ((TensorInfo(name=name, dtype="float32", shape=("B", 4)),) for name in "xy")
    with caplog.at_level(logging.WARNING, "latentrt"):
        (info,) = write_graph(
            lambda: Graph("decoder", "end", Loud(gain), inputs, outputs, limits={"x": 1}), tmp_path, "fp16", (8, 8)
        )
    assert info.precision == kept
    assert ("decoder reaches activations" in caplog.text) == (kept == "fp32")
    assert info.parity is not None and info.parity.relative_error < 1e-2


@pytest.mark.long
def test_a_bundle_in_half_runs_with_a_decoder_in_float(
    tiny_sd15_fp16_bundle: Path, tiny_sd15_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(tiny_sd15_fp16_bundle, tmp_path / "bundle")
    half, whole = Bundle.open(folder).manifest, Bundle.open(tiny_sd15_bundle)
    decoder = whole.graph("decoder")
    for name in {*decoder.files, *(reference.file for reference in decoder.references)}:
        shutil.copy(tiny_sd15_bundle / name, folder / name)
    graphs = tuple(decoder if graph.name == "decoder" else graph for graph in half.graphs)
    write_manifest(folder, half.model_copy(update={"graphs": graphs, "files": describe_files(folder)}))
    with Pipeline.open(folder, "onnxruntime-cpu", threads=1) as pipe:
        pixels = pipe("a star", num_inference_steps=1, seed=0, output_type="np").images
    assert np.isfinite(pixels).all() and pixels.std() > 0.01
    assert run(["inspect", str(folder)]) == 0
    assert "fp32 inside" in capsys.readouterr().out
