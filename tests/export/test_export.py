"""The export as a whole: all or nothing, the same bytes every time, and nothing heavy until it is called."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrt.engines.bundle import MANIFEST, Bundle
from latentrt.engines.bundle.references import read_reference
from latentrt.engines.errors import CheckpointError, ExportError, StorageError
from latentrt.engines.selfcheck import relative_error
from latentrt.export import export_checkpoint

torch = pytest.importorskip("torch")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("diffusers")

from latentrt.engines.files import sha256_of  # noqa: E402
from latentrt.export import exporter, onnx_writer, parity  # noqa: E402
from latentrt.export.checkpoints.sources import open_checkpoint  # noqa: E402
from latentrt.export.networks.autoencoder import decoder_graph  # noqa: E402
from latentrt.export.networks.clip import text_encoder_graph  # noqa: E402
from latentrt.export.passes import save  # noqa: E402
from latentrt.export.pieces import run_in_pieces  # noqa: E402


def test_importing_the_package_is_cheap() -> None:
    heavy = "{'torch', 'diffusers', 'transformers', 'onnx', 'onnxruntime'}"
    code = f"import latentrt.export, sys; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(("module", "extra"), [("torch", "export"), ("onnxruntime", "cpu")])
def test_missing_libraries_are_named_at_once(tmp_path: Path, module: str, extra: str) -> None:
    code = (
        f"import sys; sys.modules[{module!r}] = None; from latentrt.export import export_checkpoint as e; e('a', 'b')"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    last = result.stderr.splitlines()[-1]
    assert last.startswith("latentrt.engines.errors.MissingExtraError")
    assert f"pip install 'latentrt[{extra}]'" in last


def test_failed_parity_leaves_nothing(
    tiny_sd15_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(parity.EXPORT_BOUND, "fp32", 1e-12)
    with pytest.raises(ExportError, match=r"text_encoder differs .* 1e-12 is allowed for fp32"):
        export_checkpoint(tiny_sd15_checkpoint, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_failed_export_keeps_the_old_bundle(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    old = json.dumps({"format_version": 1, "graphs": [], "files": {}})
    (bundle / MANIFEST).write_text(old)
    with pytest.raises(CheckpointError, match="does not exist"):
        export_checkpoint(tmp_path / "nothing", bundle, replace=True)
    assert [file.name for file in tmp_path.rglob("*")] == ["bundle", MANIFEST]
    assert (bundle / MANIFEST).read_text() == old


def test_existing_output_is_not_replaced_unasked(tiny_sd15_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="already exists"):
        export_checkpoint(tiny_sd15_checkpoint, tmp_path)


def test_progress_and_the_defaults_of_the_index(
    tiny_sd15_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "write_graph", lambda build, folder, *_, **__: [step(folder)])
    step = lambda folder: exporter.write_step_graph(folder, "fp32", 4).model_copy(update={"name": f"graph{len(seen)}"})  # noqa: E731
    seen: list[tuple[str, int, int]] = []
    source = Path(shutil.copytree(tiny_sd15_checkpoint, tmp_path / "source"))
    index = json.loads((source / "model_index.json").read_text())
    table = {"default_guidance_scale": 4.5, "default_num_inference_steps": 20}
    (source / "model_index.json").write_text(json.dumps(index | {"_latentrt": table}))
    out = export_checkpoint(source, tmp_path / "b", progress=lambda *each: seen.append(each))
    assert out == tmp_path / "b"
    assert [done for _, done, _ in seen] == list(range(7))
    assert {total for _, _, total in seen[1:]} == {6}
    assert seen[2][0] == "denoiser"
    manifest = Bundle.open(out).manifest
    assert (manifest.default_guidance_scale, manifest.default_num_inference_steps) == (4.5, 20)


@pytest.mark.parametrize("name", ["text_encoder", "decoder"])
def test_the_same_checkpoint_gives_the_same_bytes(
    tiny_sd15_checkpoint: Path, tiny_sd15_bundle: Path, tmp_path: Path, name: str
) -> None:
    checkpoint = open_checkpoint(tiny_sd15_checkpoint)
    if name == "decoder":
        graph = decoder_graph(checkpoint.load("vae"))
    else:
        graph = text_encoder_graph(checkpoint.load("text_encoder"), 77, "fp32")
    files = save.save_model(onnx_writer.onnx_model(graph), tmp_path / f"{name}.onnx")
    assert [sha256_of(file) for file in files] == [sha256_of(tiny_sd15_bundle / f"{name}.onnx")]


def test_large_weights_are_external(
    tiny_sd15_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(save, "EXTERNAL_BYTES", 1000)
    checkpoint = open_checkpoint(tiny_sd15_checkpoint)
    (graph,) = exporter.write_graph(
        lambda: text_encoder_graph(checkpoint.load("text_encoder"), 77, "fp32"), tmp_path, "fp32", (8, 8)
    )
    assert graph.files == ("text_encoder.onnx", "text_encoder.onnx.data")
    assert (tmp_path / "text_encoder.onnx").stat().st_size < 60_000
    assert graph.parity is not None


class Fixed(torch.nn.Module):
    """A network that fixes the batch of its example."""

    def forward(self, latents):  # type: ignore[no-untyped-def]
        first, second, third = latents.chunk(3)
        return (torch.cat([first, second, third]) > 0).to(torch.uint8), latents


def test_a_fixed_batch_is_an_error(tiny_sd15_checkpoint: Path) -> None:
    graph = decoder_graph(open_checkpoint(tiny_sd15_checkpoint).load("vae"))
    with pytest.raises(ExportError, match="decoder"):
        onnx_writer.onnx_model(replace(graph, module=Fixed()))


def test_a_wrong_number_is_an_error(tiny_sd15_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_sd15_checkpoint)
    graph = text_encoder_graph(checkpoint.load("text_encoder"), 77, "fp32")
    cases = parity.reference_cases(graph)
    file = save.save_model(onnx_writer.onnx_model(graph), tmp_path / "graph.onnx")[0]
    run = partial(run_in_pieces, file)
    assert parity.check_parity("graph", run, cases, "fp32").relative_error < 1e-5
    wrong = [(inputs, [output * 1.001 for output in outputs]) for inputs, outputs in cases]
    with pytest.raises(ExportError, match=r"by 0\.001 \(relative\) where 0\.0001"):
        parity.check_parity("graph", run, wrong, "fp32")
    infinite = [(inputs, [np.full_like(output, np.inf) for output in outputs]) for inputs, outputs in cases]
    with pytest.raises(ExportError, match=r"by (inf|nan)"):
        parity.check_parity("graph", run, infinite, "fp16")


def test_rows_are_recorded_at_a_small_and_at_the_default_size(tiny_sd15_bundle: Path) -> None:
    bundle = Bundle.open(tiny_sd15_bundle)
    latent = bundle.manifest.latent
    cells = latent.default_height // latent.downscale
    for info in bundle.manifest.graphs:
        sizes = [reference.sizes for reference in info.references]
        if info.name in ("denoiser", "decoder", "image_encoder"):
            assert [(s["h"], s["w"]) for s in sizes] == [(9, 13), (cells, cells)]
        assert sizes and all(s.get("R", s.get("B")) in (2, 4) for s in sizes)
        session = onnxruntime.InferenceSession(tiny_sd15_bundle / info.files[0])
        for reference in info.references:
            rows = read_reference(bundle, info, reference)
            outputs = session.run(None, {spec.name: rows[spec.name] for spec in info.inputs})
            for spec, output in zip(info.outputs, outputs, strict=True):
                assert relative_error(output, rows[spec.name]) < 1e-4, (info.name, spec.name)


def test_a_large_row_is_recorded_alone(tiny_sd15_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = decoder_graph(open_checkpoint(tiny_sd15_checkpoint).load("vae"))
    for limit, rows in ((1 << 20, 2), (1 << 10, 1)):
        monkeypatch.setattr(parity, "LARGE_ROW", limit)
        case = parity.native_case(graph, (8, 16))
        assert case is not None
        assert case[0]["latents"].shape == (rows, 4, 8, 16)


@pytest.mark.parametrize("option", ["source", "vae", "tiny_decoder", "textual_inversion"])
def test_what_cannot_be_read_is_not_told_as_a_failure_to_write(
    tiny_sd15_checkpoint: Path, tmp_path: Path, option: str
) -> None:
    """A name that is too long for the system stands for a folder that this user may not enter, which root may."""
    name = "x" * 300
    given: dict[str, Any] = {"source": tiny_sd15_checkpoint, option: [name] if option == "textual_inversion" else name}
    with pytest.raises(CheckpointError, match=r"cannot be read \(.*too long|does not exist|is no embedding file"):
        export_checkpoint(given.pop("source"), tmp_path / "bundle", **given)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_can_no_longer_be_read_is_not_told_as_a_failure_to_write(
    tiny_sd15_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(file: Path) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))

    monkeypatch.setattr(exporter, "sha256_of", denied)
    with pytest.raises(CheckpointError, match=r"^the checkpoint cannot be read \(.*Permission denied: '.*safetensors'"):
        exporter._provenance(open_checkpoint(tiny_sd15_checkpoint), [])
