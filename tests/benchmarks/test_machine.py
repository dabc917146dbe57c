from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from latentrt.benchmarks.measure import machine


def test_the_share_of_others_is_what_they_used_of_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, others = [100.0], [5000.0]
    monkeypatch.setattr(machine, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(machine, "_seconds_of_others", lambda: others[0])
    monkeypatch.setattr(machine.psutil, "cpu_count", lambda: 4)
    watch = machine.LoadWatch()
    clock[0], others[0] = 110.0, 5003.0  # 3 of 40 seconds
    assert (watch.finish()["others_share"], watch.finish()["quiet"]) == (0.075, True)
    others[0] = 5020.0
    assert (watch.finish()["others_share"], watch.finish()["quiet"]) == (0.5, False)


def test_what_another_process_uses_is_others_and_what_a_child_uses_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    times = type("Times", (tuple,), {"idle": 50.0, "iowait": 5.0, "guest": 1.0})((100.0, 50.0, 5.0, 1.0))
    ours = {"cpu_times": lambda _: (7.0, 3.0, 0.0), "children": lambda _, recursive: [process(), process()]}
    process: Any = type("Process", (), ours)
    usage = type("Usage", (), {"ru_utime": 2.0, "ru_stime": 1.0})
    monkeypatch.setattr(machine.psutil, "cpu_times", lambda: times)
    monkeypatch.setattr(machine.psutil, "Process", process)
    monkeypatch.setattr(machine.resource, "getrusage", lambda who: usage)
    assert machine._seconds_of_others() == 100 - 3 * 10 - 3  # busy; this process and two children; those that ended


def test_records_begin_with_how_they_were_made() -> None:
    made = machine.stamp(machine.LoadWatch(), "latentrt bench", "cpu", 3, warmup=2)
    assert set(made) == {"date", "command", "source", "machine", "conditions"}
    assert made["command"] == "latentrt bench"
    assert [made["conditions"][name] for name in ("threads", "device", "warmup")] == [3, "cpu", 2]
    assert machine.stamp(machine.LoadWatch(), "", "cpu")["conditions"]["threads"] == machine.usable_cores()


class Nvml:
    """Two GPUs and a part of one, as NVML names them."""

    UUIDS = ("GPU-8932f937-d72c", "GPU-51e2a0b4-0000", "MIG-7f3b")

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return range(2)[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        return self.UUIDS.index(uuid)

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return self.UUIDS[handle]


@pytest.mark.parametrize(
    ("visible", "handle"),
    [("0", 0), ("1,0", 1), (" 1 ", 1), ("GPU-51e2a0b4-0000", 1), ("GPU-51", 1), ("MIG-7f3b,0", 2)],
)
def test_the_first_visible_gpu_is_metered(visible: str, handle: int) -> None:
    assert machine.first_visible(Nvml(), visible) == handle


@pytest.mark.parametrize("visible", ["", "-1", "GPU-9", "none"])
def test_no_gpu_is_metered_where_none_is_visible(visible: str) -> None:
    with pytest.raises(LookupError, match=f"CUDA_VISIBLE_DEVICES is '{visible}'"):
        machine.first_visible(Nvml(), visible)
