from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrt.benchmarks import contenders
from latentrt.benchmarks.contenders import latentrt as contender_latentrt
from latentrt.benchmarks.contenders.process import Worker, run_process
from latentrt.benchmarks.measure import bench, method
from latentrt.benchmarks.measure.method import Conditions, Measured, groups, measure, paired_ratio, turns
from latentrt.benchmarks.measure.workloads import Model, workload
from latentrt.engines.bundle import Bundle
from latentrt.engines.errors import EngineError
from latentrt.engines.onnxruntime import cpu as onnxruntime_cpu


def conditions(tmp_path: Path, **changes: Any) -> Conditions:
    model = Model(tmp_path, tmp_path, "none")
    return Conditions(
        workload("embedded").but(steps=3), model, "cpu", 1, **{"rounds": 3, "folder": tmp_path, **changes}
    )


def test_contenders_take_turns_after_their_warm_up(tmp_path: Path, order: Path) -> None:
    closing: list[str] = []
    found = measure(
        ["fake/quick", "fake/slow"], conditions(tmp_path, after=lambda worker, measured: closing.append(measured.name))
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
    found = measure(["fake/quick", "fake/broken", "fake/dying"], conditions(tmp_path))
    assert found["fake/broken"].failure == "contender fake/broken failed: RuntimeError: no such luck"
    assert found["fake/dying"].failure == "contender fake/dying died with code 9: out of luck"
    assert found["fake/quick"].failure is None
    assert len(found["fake/quick"].seconds) == 3


def test_what_opens_slowly_stays_open(tmp_path: Path, order: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(method, "RELAUNCH_SECONDS", 0.0)
    found = measure(["fake/quick", "fake/slow"], conditions(tmp_path))
    rounds = ["quick", "slow", "slow", "quick", "quick", "slow"]
    assert order.read_text().split() == ["quick"] * 2 + ["slow"] * 2 + rounds
    assert found["fake/slow"].launches == [3]


def test_without_memory_for_all_each_takes_turns_with_the_first(tmp_path: Path, order: Path) -> None:
    tight = conditions(tmp_path, memory_limit=2 * conditions(tmp_path).memory_of_one(), rounds=1, warmup=1)
    names = ["fake/quick", "fake/slow", "fake/third"]
    assert groups(names, tight) == [["fake/quick", "fake/slow"], ["fake/quick", "fake/third"]]
    assert turns(names, tight) == "each with the first"
    found = measure(names, tight)
    assert order.read_text().split() == ["quick", "slow"] * 2 + ["quick", "third"] * 2
    assert len(found["fake/quick"].seconds) == 2
    assert [paired_ratio(entry) for entry in found.values()] == [1.0, 2.0, 1.0]
    alone = conditions(tmp_path, memory_limit=1)
    assert groups(names, alone) == [[name] for name in names]
    assert (turns(names, conditions(tmp_path)), turns(names, alone)) == ("all contenders", "none: alone")


def test_memory_estimate_grows_with_pixels_and_weights(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(bytes(1000))
    small = conditions(tmp_path)
    large = conditions(tmp_path)
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
    assert set(reply["stages"]) == set(contenders.STAGES)
    assert reply["networks"]["denoiser"] < reply["stages"]["denoise"]  # which holds the steps between as well
    assert reply["networks"]["decoder"] < reply["stages"]["decode"]
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
    entry = replace(entry, name="latentrt/openvino-bf16/step")
    body = bench.describe(entry, work, Bundle.open(tiny_sd15_bundle), {"flops": 1e9, "bytes": 1e12, "flops_bf16": 4e9})
    assert body["roofline"]["denoiser"]["limit_seconds"] == pytest.approx(limit / 4)
    body = bench.describe(entry, work, Bundle.open(tiny_sd15_bundle), {"flops": 1e9, "bytes": 1e9})
    assert body["roofline"]["denoiser"]["share_of_limit"] is None  # nobody measured what it could do
