"""The loop between two steps: nothing is allocated, and the benchmark that times it can tell when something is."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from latentrt.benchmarks.measure import replay
from latentrt.benchmarks.measure.replay import measure, null_loop, traced
from latentrt.benchmarks.report import page as report
from latentrt.benchmarks.report import records
from latentrt.engines.cuda.device import CudaDevice
from latentrt.engines.cuda.driver import Driver
from latentrt.engines.host import HostDevice
from latentrt.runtime.loop.denoise import Mode

from ..engines.simulated_cuda import SimulatedDriver

MODES = [mode for mode in get_args(Mode) if mode != "request"]


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_allocated_from_step_to_step(mode: Mode) -> None:
    """A few objects live while a call lasts; none stays, and more steps hold no more of them."""
    found = [measure(HostDevice(), mode, steps, 3) for steps in (10, 400)]
    for result in found:
        assert result["device_bytes_taken"] == 0
        assert result["python_bytes_left"] < 100
        assert result["python_bytes_at_most"] < 1000
        assert result["seconds_per_step"]["count"] == 3
    few, many = (result["python_bytes_at_most"] for result in found)
    assert many - few < 100


def test_what_stays_is_seen() -> None:
    kept: list[bytearray] = []
    left, most = traced(lambda: kept.append(bytearray(5000)))
    assert left >= 5000 and most >= 5000
    left, most = traced(lambda: bytearray(5000))
    assert left < 1000 and most >= 5000


def test_a_replay_on_a_gpu_makes_its_context_current_and_launches_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    call = Driver._call

    def noted(driver: Driver, name: str, function: Any, *arguments: Any) -> Any:
        calls.append(name)
        return call(driver, name, function, *arguments)

    monkeypatch.setattr(Driver, "_call", noted)
    device = CudaDevice(0, Driver(SimulatedDriver()))
    loop, engine = null_loop(device)
    stream = device.stream()
    for _ in range(3):  # as it is, captured, replayed
        loop.run(4, stream)
    calls.clear()
    loop.run(6, stream)
    assert calls == ["cuCtxSetCurrent", "cuGraphLaunch"] * 6
    loop.close()
    engine.close()


def test_records_of_the_loop_and_of_builds_become_tables(tmp_path: Path) -> None:
    file = tmp_path / "machine.jsonl"
    assert replay.main(["--requests", "5", "--steps", "4", "--output", str(file)]) == 0
    found = records.read(file)
    assert [record["mode"] for record in found] == ["eager", "step", "loop"]
    plan = {"build_seconds": 1.25, "plan_bytes": 3 << 20, "peak_bytes": 5 << 30}
    common = {name: found[0][name] for name in ("format", "date", "source", "machine", "command", "conditions")}
    for profile, result in (("static", plan), ("dynamic", {"error": "no memory"})):
        named = {"graph": "decoder", "profile": profile, "compute_capability": "8.9"}
        found.append({"kind": "rtx-compile", **common, **named, "bundle": {"name": "m", "precision": "fp16"}, **result})
    text = report.text(found)
    assert f"{found[1]['seconds_per_step']['p50'] * 1e6:.1f} |" in text and "| cpu, loop  |" in text
    row = next(line for line in text.splitlines() if line.startswith("| m fp16, decoder"))
    assert [cell.strip() for cell in row.split("|")[2:-1]] == ["1.25", "failed", "3.0 MiB", "5.00 GiB"]
    assert "pinned" not in text
    assert report.write_plots(found, tmp_path) == []
