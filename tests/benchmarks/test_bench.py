from __future__ import annotations

from pathlib import Path

import pytest
from latentrt.benchmarks import contenders
from latentrt.benchmarks.measure import bench, scaling
from latentrt.benchmarks.measure.workloads import Model, ensure_model, precision, workload
from latentrt.benchmarks.report import page as report
from latentrt.benchmarks.report import records
from latentrt.engines.bundle import Bundle
from latentrt.engines.errors import EngineError, RequestError

pytestmark = pytest.mark.long


def test_a_run_leaves_a_record_of_each_contender(
    tiny_sd15_bundle: Path, tmp_path: Path, order: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [contenders.Candidate(f"fake/{name}", name) for name in ("quick", "slow", "broken")]
    found.append(contenders.Candidate("other", "another", "it is not installed"))
    model = Model(tmp_path, tiny_sd15_bundle, "random")
    monkeypatch.setattr(contenders, "choose", lambda device, names, **_: found)
    monkeypatch.setattr(bench, "ensure_model", lambda work, **options: model)
    monkeypatch.setattr(bench, "_ceiling", lambda work, options: {"flops": 1e11, "bytes": 1e10})
    monkeypatch.setattr(bench, "_reference", lambda measured, conditions: None)
    options = bench.Options(threads=1, rounds=4, cold=0, command="latentrt bench embedded")
    kept: list[records.Record] = []
    made = bench.run(workload("embedded").but(height=64, width=64), options, lambda line: None, kept.append)
    assert [r["contender"]["name"] for r in kept] == ["fake/quick", "fake/slow"]
    assert [r["samples"] for r in kept] == [r["samples"] for r in made[:2]]
    assert [(r["kind"], r["contender"]["name"]) for r in made] == [
        ("latency", "fake/quick"),
        ("latency", "fake/slow"),
        ("missing", "fake/broken"),
        ("missing", "other"),
    ]
    assert made[1]["samples"]["total"] == [40.0] * 4
    assert made[1]["ratio_to_first"] == 2
    assert made[1]["scenarios"]["Offline"]["images_per_second"] == 1 / 40
    assert made[2]["reason"].endswith("no such luck")
    assert len({r["run"] for r in made}) == 1
    text = report.text(made)
    assert "Not measured: broken: contender fake/broken failed: RuntimeError: no such luck; another: it is" in text
    records.append(tmp_path / "r.jsonl", made)
    assert report.text(records.read(tmp_path / "r.jsonl")) == text
    assert report.write_page(made, tmp_path / "r.html").stat().st_size > 10_000


@pytest.mark.parametrize("extra", ["_scenarios", "_reference", "measure_cold"])
def test_an_extra_that_fails_does_not_lose_what_was_measured(
    tiny_sd15_bundle: Path, tmp_path: Path, order: Path, monkeypatch: pytest.MonkeyPatch, extra: str
) -> None:
    def fail(*_: object) -> None:
        raise EngineError("no such luck")

    model = Model(tmp_path, tiny_sd15_bundle, "random")
    monkeypatch.setattr(contenders, "choose", lambda device, names, **_: [contenders.Candidate("fake/quick", "quick")])
    monkeypatch.setattr(bench, "ensure_model", lambda work, **options: model)
    monkeypatch.setattr(bench, "_ceiling", lambda work, options: {"flops": 1e11, "bytes": 1e10})
    monkeypatch.setattr(bench, "_reference", lambda measured, conditions: None)
    monkeypatch.setattr(bench, "measure_cold", lambda *_: {})
    monkeypatch.setattr(bench, extra, fail)
    said: list[str] = []
    options = bench.Options(threads=1, rounds=2, cold=1)
    (made,) = bench.run(workload("embedded").but(height=64, width=64), options, said.append)
    assert made["kind"] == "latency" and len(made["samples"]["total"]) == 2
    assert any(line.endswith("left out: no such luck") for line in said)


def test_a_graph_that_cannot_be_slowed_is_refused_before_measuring(
    tiny_sd15_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contenders, "choose", lambda device, names, **_: [contenders.Candidate("fake/quick", "quick")])
    monkeypatch.setattr(
        bench, "ensure_model", lambda work, **options: Model(tiny_sd15_bundle, tiny_sd15_bundle, "none")
    )
    monkeypatch.setattr(bench, "_ceiling", lambda work, options: pytest.fail("it measures already"))
    with pytest.raises(RequestError, match="slow is 'unet': the bundle has no such graph; choose text_encoder"):
        bench.run(workload("embedded"), bench.Options(slow={"unet": 5.0}), lambda line: None)
    with pytest.raises(RequestError, match="slow is 'decoder' on cuda: only engines on the CPU"):
        bench.run(workload("embedded"), bench.Options(slow={"decoder": 0.1}, device="cuda"), lambda line: None)


@pytest.mark.slow
def test_a_model_is_exported_in_a_process_of_its_own(
    tiny_sd15_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LATENTRT_HOME", str(tmp_path))
    said: list[str] = []
    work = workload("sd15-512")
    model = ensure_model(work, checkpoint=tiny_sd15_checkpoint, say=said.append)
    assert Bundle.open(model.bundle).manifest.precision == "fp32"
    assert model.export_seconds and model.export_peak_bytes
    assert [line.split()[0] for line in said] == ["exporting", "exported"]
    again = ensure_model(work, checkpoint=tiny_sd15_checkpoint, say=said.append)
    assert (again.bundle, again.export_seconds, len(said)) == (model.bundle, None, 2)
    (tmp_path / "empty").mkdir()
    with pytest.raises(EngineError, match=r"failed with exit code 1: .*empty") as caught:
        ensure_model(work, checkpoint=tmp_path / "empty", say=said.append)
    assert "\n" not in str(caught.value)


def test_contenders_are_chosen_by_the_beginning_of_their_names() -> None:
    everyone = contenders.candidates("cpu")
    assert everyone[0].name == "latentrt/onnxruntime-cpu/step"
    assert {"diffusers/eager", "diffusers/compile", "optimum", "openvino"} < {c.name for c in everyone}
    chosen = [c.name for c in contenders.choose("cpu", ["diffusers"])]
    assert chosen == [f"diffusers/{how}" for how in ("eager", "compile", "eager-bf16", "compile-bf16")]
    cuda = [c.name for c in contenders.candidates("cuda")]
    assert all("cpu" not in name for name in cuda) and "latentrt/tensorrt/request" in cuda
    assert [name for name in cuda if "onnxruntime" in name] == [
        "latentrt/onnxruntime-cuda/eager",
        "latentrt/onnxruntime-cuda/own-graphs",
    ]
    with pytest.raises(RequestError, match="unknown contender 'pytorch': choose from latentrt"):
        contenders.choose("cpu", ["pytorch"])


def test_workloads_and_precision() -> None:
    assert workload("sd15-512").but(steps=2, batch=None).steps == 2
    found = [precision(None, "cuda", "sd15"), precision(None, "cpu", "sd15"), precision("fp16", "cpu", "sd15")]
    assert found == ["fp16", "fp32", "fp16"]
    with pytest.raises(RequestError, match="unknown workload 'sd3': choose embedded"):
        workload("sd3")
    with pytest.raises(RequestError, match="precision is 'int8': choose fp32 or fp16"):
        precision("int8", "cpu", "sd15")


def test_points_of_a_scaling_study() -> None:
    work = workload("embedded")
    assert [x for x, _ in scaling.points(work, "pixels")] == [64**2, 128**2, 192**2, 256**2]
    sweep = list(scaling.points(work, "prompts × seeds"))
    assert [x for x, _ in sweep] == [1, 2, 4, 8]
    assert (len(sweep[-1][1]["prompt"]), sweep[-1][1]["batch"]) == (4, 2)


def test_growth_is_fitted_above_the_opened_process() -> None:
    measured = [
        {"x": x, "seconds": 0.5 * x, "stages": {"denoise": 0.1 * x**2}, "peak_bytes": 1000 + 10 * x} for x in (1, 2, 4)
    ]
    found = scaling.fits(measured, 1000)
    assert [round(found[name]["exponent"], 6) for name in ("request", "denoise", "memory")] == [1, 2, 1]  # type: ignore[index]
    assert scaling.fits(measured, 2000)["memory"] is None
