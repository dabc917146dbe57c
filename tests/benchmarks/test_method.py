from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrt.benchmarks import contenders
from latentrt.benchmarks.contenders import latentrt as contender_latentrt
from latentrt.benchmarks.contenders import process
from latentrt.benchmarks.contenders.process import Worker, run_process
from latentrt.benchmarks.measure import bench, machine, method, scaling
from latentrt.benchmarks.measure.method import Measured, Plan, groups, measure, paired_ratio
from latentrt.benchmarks.measure.workloads import Model, precision, workload
from latentrt.benchmarks.report import page as report
from latentrt.benchmarks.report import records
from latentrt.engines.bundle import Bundle
from latentrt.engines.errors import EngineError, RequestError
from latentrt.engines.onnxruntime import cpu as onnxruntime_cpu

FAKE = """
import os, sys
from latentrt.benchmarks.contenders import worker

class Contender:
    def __init__(self, variant, options):
        print("noise on standard output")
        if variant == "broken":
            raise RuntimeError("no such luck")
        self.variant, self.runs = variant, 0
        self.facts = {"import": 0.1, "open": 0.2, "build": None, "versions": {}, "options": options}

    def run(self, request):
        self.runs += 1
        if self.variant == "dying" and self.runs == 3:
            sys.stderr.write("out of luck\\n")
            os._exit(9)
        with open(os.environ["FAKE_ORDER"], "a") as file:
            file.write(self.variant + "\\n")
        seconds = {"slow": 2.0}.get(self.variant, 1.0) * request["steps"]
        stages = dict.fromkeys(("tokenize", "encode", "prepare", "denoise", "decode", "png"), seconds / 6)
        return {"stages": stages, "steps": [], "evaluations": request["steps"], "total": seconds}

    def save(self, file, *, latents):
        file.write_bytes(b"answer")

module = type(sys)("fake")
module.Contender = Contender
worker.MODULES["fake"] = "fake"
worker.importlib.import_module = lambda name, package: module
worker.main(sys.argv[1:])
"""


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Make workers start contenders of this module; return the file in which they note their turns."""
    monkeypatch.setattr(process, "worker_command", lambda contender: [sys.executable, "-c", FAKE, contender])
    monkeypatch.setattr(method, "SETTLE_SECONDS", 0.0)
    monkeypatch.setenv("FAKE_ORDER", str(tmp_path / "order"))
    return tmp_path / "order"


def plan(tmp_path: Path, **changes: Any) -> Plan:
    model = Model(tmp_path, tmp_path, "none")
    return Plan(workload("embedded").but(steps=3), model, "cpu", 1, tmp_path, **{"rounds": 3, **changes})


def test_contenders_take_turns_after_their_warm_up(tmp_path: Path, order: Path) -> None:
    closing: list[str] = []
    found = measure(
        ["fake/quick", "fake/slow"], plan(tmp_path, after=lambda worker, measured: closing.append(measured.name))
    )
    warmup = ["quick"] * 2 + ["slow"] * 2  # in each of three processes
    rounds = ["quick", "slow"], ["slow", "quick"], ["quick", "slow"]
    assert order.read_text().split() == [name for each in rounds for name in (*warmup, *each)]
    quick, slow = found.values()
    assert (quick.warmup, slow.seconds) == ([3.0, 3.0], [6.0] * 3)
    assert (paired_ratio(quick), paired_ratio(slow)) == (1.0, 2.0)
    assert slow.launches == [1, 1, 1]
    assert slow.turns_with == ["fake/quick"]
    assert quick.answer is not None
    assert quick.answer.read_bytes() == b"answer"
    assert 0 < quick.peak_bytes < quick.together_bytes
    assert closing == ["fake/quick", "fake/slow"]


def test_a_contender_that_fails_does_not_stop_the_others(tmp_path: Path, order: Path) -> None:
    found = measure(["fake/quick", "fake/broken", "fake/dying"], plan(tmp_path))
    assert found["fake/broken"].failure == "contender fake/broken failed: RuntimeError: no such luck"
    assert found["fake/dying"].failure == "contender fake/dying died with code 9: out of luck"
    assert found["fake/quick"].failure is None
    assert len(found["fake/quick"].seconds) == 3


def test_what_opens_slowly_stays_open(tmp_path: Path, order: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(method, "RELAUNCH_SECONDS", 0.0)
    found = measure(["fake/quick", "fake/slow"], plan(tmp_path))
    rounds = ["quick", "slow", "slow", "quick", "quick", "slow"]
    assert order.read_text().split() == ["quick"] * 2 + ["slow"] * 2 + rounds
    assert found["fake/slow"].launches == [3]


def test_without_memory_for_all_each_takes_turns_with_the_first(tmp_path: Path, order: Path) -> None:
    tight = plan(tmp_path, memory_limit=2 * plan(tmp_path).memory_of_one(), rounds=1, warmup=1)
    names = ["fake/quick", "fake/slow", "fake/third"]
    assert groups(names, tight) == [["fake/quick", "fake/slow"], ["fake/quick", "fake/third"]]
    found = measure(names, tight)
    assert order.read_text().split() == ["quick", "slow"] * 2 + ["quick", "third"] * 2
    assert len(found["fake/quick"].seconds) == 2
    assert [paired_ratio(entry) for entry in found.values()] == [1.0, 2.0, 1.0]
    alone = plan(tmp_path, memory_limit=1)
    assert groups(names, alone) == [[name] for name in names]


def test_memory_estimate_grows_with_pixels_and_weights(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(bytes(1000))
    small = plan(tmp_path)
    large = plan(tmp_path)
    large.work = small.work.but(height=1024, width=1024, batch=2)
    assert large.memory_of_one() - small.memory_of_one() == pytest.approx(2.5 * 2**30 * (8 - 1 / 16))


def test_commands_are_measured_from_outside() -> None:
    done = run_process(
        [sys.executable, "-c", "import time; x = b'x' * (64 << 20); print(len(x)); time.sleep(0.2)"], threads=1
    )
    assert done.output.strip() == str(64 << 20)
    assert done.peak_bytes > 64 << 20
    with pytest.raises(EngineError, match="exit code 3: the reason"):
        run_process([sys.executable, "-c", "import sys; print('the reason', file=sys.stderr); sys.exit(3)"])


def test_every_process_gets_the_same_threads_and_cores() -> None:
    code = "import os; print(os.environ['OMP_NUM_THREADS'], sorted(os.sched_getaffinity(0)))"
    done = run_process([sys.executable, "-c", code], threads=1)
    assert done.output.split(maxsplit=1) == ["1", f"{sorted(os.sched_getaffinity(0))[:1]}\n"]


def test_networks_are_timed_and_drawn_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 1e-3  # a reading takes time, so that waiting ends
        return now[0]

    def run(binding: Any) -> None:
        now[0] += 1.0

    monkeypatch.setattr(contender_latentrt.time, "perf_counter", clock)
    monkeypatch.setattr(onnxruntime_cpu.OnnxRuntimeBinding, "_run", run)
    contender = contender_latentrt.Contender.__new__(contender_latentrt.Contender)
    contender._slow, contender._runs = {"decoder": 0.1}, []
    contender._watch_networks()
    for name in ("decoder", "denoiser", "denoiser"):
        binding = type("Binding", (), {"_engine": type("Engine", (), {"name": name})})
        onnxruntime_cpu.OnnxRuntimeBinding._run(binding)  # type: ignore[arg-type]
    assert contender._network_seconds() == pytest.approx({"decoder": 1.1, "denoiser": 2.0}, abs=5e-3)
    assert now[0] == pytest.approx(3.1, abs=0.02)


def test_latentrt_answers_as_a_worker(tiny_sd15_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTRT_HOME", str(tmp_path / "home"))
    work = workload("embedded").but(height=64, width=64, steps=3, batch=2)
    with Worker("latentrt/onnxruntime-cpu/step", 1) as worker:
        facts = worker.prepare(bundle=str(tiny_sd15_bundle), fresh_cache=str(tmp_path / "fresh"), max_batch=2)
        reply = worker.run(work.as_request(), save=tmp_path / "answer.npz")
    assert facts["build"] > 0
    assert not (tmp_path / "fresh").exists()
    assert reply["evaluations"] == 4  # PNDM's warm-up takes one more
    assert len(reply["steps"]) == 3  # between four ends
    assert set(reply["networks"]) == {"text_encoder", "denoiser", "step", "decoder"}
    assert sum(reply["stages"].values()) <= reply["total"]
    with np.load(tmp_path / "answer.npz") as answer:
        assert answer["latents"].shape == (2, 4, 16, 16)  # the tiny model's latents are a quarter as wide
        assert answer["images"].shape == (2, 64, 64, 3)
    entry = Measured("latentrt/onnxruntime-cpu/step", facts, [1.0], [reply])
    body = bench.describe(entry, work, Bundle.open(tiny_sd15_bundle), {"flops": 1e9, "bytes": 1e9})
    assert body["roofline"]["denoiser"]["runs"] == 4
    limit = body["roofline"]["denoiser"]["limit_seconds"]
    assert body["roofline"]["denoiser"]["share_of_limit"] == pytest.approx(limit * 4 / reply["networks"]["denoiser"])
    assert 0 < body["orchestration"]["p50"] < 1


def test_a_run_leaves_a_record_of_each_contender(
    tiny_sd15_bundle: Path, tmp_path: Path, order: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [contenders.Candidate(f"fake/{name}", name) for name in ("quick", "slow", "broken")]
    found.append(contenders.Candidate("other", "another", "it is not installed"))
    model = Model(tmp_path, tiny_sd15_bundle, "random")
    monkeypatch.setattr(contenders, "choose", lambda device, names: found)
    monkeypatch.setattr(bench, "ensure_model", lambda work, **options: model)
    monkeypatch.setattr(bench, "_ceiling", lambda work, options: {"flops": 1e11, "bytes": 1e10})
    monkeypatch.setattr(bench, "_reference", lambda measured, plan: None)
    options = bench.Options(threads=1, rounds=4, cold=0, command="latentrt bench embedded")
    made = bench.run(workload("embedded").but(height=64, width=64), options, lambda line: None)
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


def test_contenders_are_chosen_by_the_beginning_of_their_names() -> None:
    everyone = contenders.candidates("cpu")
    assert everyone[0].name == "latentrt/onnxruntime-cpu/step"
    assert {"diffusers/eager", "diffusers/compile", "optimum", "openvino"} < {c.name for c in everyone}
    assert [c.name for c in contenders.choose("cpu", ["diffusers"])] == ["diffusers/eager", "diffusers/compile"]
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
    assert (precision(None, "cuda"), precision(None, "cpu"), precision("fp16", "cpu")) == ("fp16", "fp32", "fp16")
    with pytest.raises(RequestError, match="unknown workload 'sd3': choose embedded"):
        workload("sd3")
    with pytest.raises(RequestError, match="precision is 'int8': choose fp32 or fp16"):
        precision("int8", "cpu")


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


def test_machine_slug_and_load() -> None:
    found = machine.describe_machine()
    assert (
        machine.machine_slug(found | {"gpu": None, "processor": "AMD EPYC(TM) 9", "cores": 2}) == "amd-epyc-9-2-cores"
    )
    assert machine.machine_slug(found | {"gpu": {"name": "NVIDIA H200"}}) == "nvidia-h200"
    load = machine.LoadWatch().finish()
    assert load["others_share"] >= 0
    assert load["quiet"] == (load["others_share"] <= machine.QUIET)
