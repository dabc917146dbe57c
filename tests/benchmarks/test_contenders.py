"""Who is measured on which machine, and what is too large for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from latentrt.benchmarks import contenders
from latentrt.benchmarks.measure import workloads
from latentrt.engines.bundle import Bundle
from latentrt.engines.bundle.manifest import EightBits, Quantization
from latentrt.engines.errors import RequestError
from latentrt.export.embedded import ensure_bundle
from latentrt.runtime.cli import run

IN_BF16 = {"latentrt/openvino-bf16/step", "diffusers/eager-bf16", "diffusers/compile-bf16", "openvino/bf16"}


@pytest.mark.parametrize("able", [True, False])
def test_contenders_in_bf16_are_there_where_the_processor_has_it(able: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "has_bf16", lambda: able)
    found = {each.name: each.missing for each in contenders.candidates("cpu")}
    assert set(found) >= IN_BF16 | {"latentrt/openvino/step", "openvino", "diffusers/eager"}
    reasons = {found[name] for name in IN_BF16}
    assert ("this processor has no bf16 units" in reasons) == (not able)
    assert found["diffusers/eager"] != "this processor has no bf16 units"


def test_modes_that_are_not_exact_are_measured_when_asked_for() -> None:
    exact = [each.name for each in contenders.choose("cpu", ["latentrt/onnxruntime-cpu/step", "diffusers/eager"])]
    assert exact[0] == "latentrt/onnxruntime-cpu/step" and not [name for name in exact if "+" in name]
    more = contenders.choose("cpu", ["latentrt/onnxruntime-cpu/step"], lossy=True)
    names = ["taylor", "spectrum", "guided-half", "guidance-kept", "tiny-decoder", "tiled"]
    assert [each.name.partition("+")[2] for each in more] == ["", *names]
    assert [contenders.is_exact(each.name) for each in more] == [True, *[False] * len(names)]
    assert more[1].title == "latentrt (onnxruntime-cpu, step, forecast taylor)"


def test_bf16_is_not_exact_beside_what_was_asked_for() -> None:
    rounded = {each.name for each in contenders.candidates("cpu") if not contenders.is_exact(each.name)}
    assert {name for name in rounded if "+" not in name} == IN_BF16


def test_decoders_that_a_bundle_lacks_and_tiles_that_are_the_picture_are_missing() -> None:
    bundle = Bundle.open(ensure_bundle())
    found = contenders.choose("cpu", ["latentrt/onnxruntime-cpu/step"], lossy=True)
    for side, tiles in ((128, "128x128 fits in one tile"), (1024, None)):
        missing = {c.name.partition("+")[2]: c.missing for c in contenders.of_bundle(found, bundle, side, side)}
        assert missing["tiny-decoder"] == "the bundle has no tiny decoder" and missing["tiled"] == tiles
        assert missing[""] is None and missing["taylor"] is None


def other(
    path: str,
    *,
    parts: bool = False,
    winograd: bool = False,
    quantized: EightBits | None = None,
    weights: str | None = None,
) -> Bundle:
    """Return the embedded bundle as it would be with its denoiser made another way, or of another checkpoint."""
    bundle = Bundle.open(ensure_bundle())
    told = (
        Quantization(
            precision=quantized, layers=1, kept=(), tool="a tool 1.0", samples=1, relative_error=0.1, psnr=40.0
        )
        if quantized
        else None
    )
    graphs = tuple(
        graph.model_copy(
            update={"quantization": told, "stage": "request" if parts else graph.stage, "winograd": int(winograd)}
        )
        if graph.name == "denoiser"
        else graph
        for graph in bundle.manifest.graphs
    )
    files = dict.fromkeys(bundle.manifest.source["files"], weights) if weights else bundle.manifest.source["files"]
    update = {"graphs": graphs, "source": {"name": "copied-elsewhere", "files": files}}
    return Bundle(Path(path), bundle.manifest.model_copy(update=update))


def test_further_bundles_of_a_checkpoint_are_contenders_beside_each_exact_one() -> None:
    bundle = Bundle.open(ensure_bundle())
    found = contenders.choose("cpu", ["latentrt/onnxruntime-cpu/step", "latentrt/openvino", "diffusers/eager"])
    bundles = [other("a", parts=True), other("b", quantized="int8"), other("c", parts=True, quantized="fp8")]
    bundles.append(other("d", winograd=True))
    every = contenders.beside(found, bundle, bundles)
    assert every[: len(found)] == found and len(every) == len(found) + 4 * 3
    added = {each.name: each for each in every[len(found) :]}
    assert {name.removeprefix("latentrt/") for name in added if "onnxruntime" in name} == {
        "onnxruntime-cpu/step-parts",
        "onnxruntime-cpu/step+int8",
        "onnxruntime-cpu/step-parts+fp8",
        "onnxruntime-cpu/step-winograd",
    }
    assert added["latentrt/openvino-bf16/step-winograd"].title == "latentrt (openvino, bf16, step, winograd)"
    assert added["latentrt/openvino/step+int8"].bundle is bundles[1]
    assert added["latentrt/onnxruntime-cpu/step-parts+fp8"].title == "latentrt (onnxruntime-cpu, step, in parts, fp8)"
    assert contenders.is_exact("latentrt/onnxruntime-cpu/step-parts") and not contenders.is_exact(
        "latentrt/a/step+int8"
    )
    lossy = contenders.choose("cpu", ["latentrt/onnxruntime-cpu/step"], lossy=True)
    assert len(contenders.beside(lossy, bundle, bundles[:1])) == len(lossy) + 1


def test_bundles_that_would_not_differ_are_refused() -> None:
    bundle = Bundle.open(ensure_bundle())
    found = contenders.choose("cpu", ["latentrt/onnxruntime-cpu/step"])
    with pytest.raises(RequestError, match="is not quantized, in parts or winograd"):
        contenders.beside(found, bundle, [bundle])
    with pytest.raises(RequestError, match=r"a and b are alike \(int8\): give one of them"):
        contenders.beside(found, bundle, [other("a", quantized="int8"), other("b", quantized="int8")])
    with pytest.raises(RequestError, match="b comes from another checkpoint"):
        contenders.beside(found, bundle, [other("b", parts=True, weights="others")])


def test_a_whole_name_is_that_contender_alone() -> None:
    assert [each.name for each in contenders.choose("cpu", ["diffusers/eager", "openvino"])] == [
        "diffusers/eager",
        "openvino",
    ]
    assert len(contenders.choose("cpu", ["diffusers"])) == 4


def test_backends_of_processors_are_not_measured_on_a_gpu() -> None:
    names = [each.name for each in contenders.candidates("cuda")]
    assert not [name for name in names if "openvino" in name or "bf16" in name or "cpu" in name]


def test_a_precision_in_a_name_becomes_an_option() -> None:
    assert contenders.precision_apart("openvino-bf16") == ("openvino", "bf16")
    assert contenders.precision_apart("onnxruntime-cpu") == ("onnxruntime-cpu", None)


@pytest.mark.parametrize(
    ("name", "precision", "gib", "fits"),
    [("sdxl-1024", "fp32", 14, True), ("sdxl-1024", "fp32", 12, False), ("sdxl-1024", "fp16", 7, True)],
)
def test_a_model_whose_weights_do_not_fit_is_refused_before_it_is_written(
    name: str, precision: str, gib: int, fits: bool
) -> None:
    pytest.importorskip("diffusers")
    work = workloads.workload(name).but(precision=precision)
    if fits:
        workloads.check_memory(work, gib * 2**30)
        return
    with pytest.raises(RequestError, match=rf"sdxl-1024 in fp32 has 13 GiB of weights, and there are {gib} GiB"):
        workloads.check_memory(work, gib * 2**30)


def test_the_embedded_model_fits_everywhere() -> None:
    workloads.check_memory(workloads.workload("embedded"), 0)


@pytest.mark.parametrize(
    ("given", "device", "family", "expected"),
    [
        (None, "cpu", "flux1-dev", "fp32"),
        (None, "cuda", "sdxl", "fp16"),
        (None, "cuda", "flux1-dev", "bf16"),
        ("bf16", "cpu", "sdxl", "bf16"),
    ],
)
def test_the_precision_follows_device_and_family(given: str, device: str, family: str, expected: str) -> None:
    assert workloads.precision(given, device, family) == expected


def test_a_further_bundle_that_is_not_there_is_a_wrong_word(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "embedded", "--beside", "nowhere"]) == 2
    assert "bundle nowhere does not exist" in capsys.readouterr().err
