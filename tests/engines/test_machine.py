"""How many threads this process is worth, on machines that are folders here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from latentrt.engines import options
from latentrt.engines.machine import memory_limit, physical_cores, usable_cores
from latentrt.engines.onnxruntime import cpu


@pytest.fixture(autouse=True)
def eight_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("cpu_max", "cpu.max").replace("cfs", "cpu.cfs")).write_text(text)


def own(tmp_path: Path, text: str) -> Path:
    (tmp_path / "own").write_text(text)
    return tmp_path / "own"


@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000", 8), ("200000 100000", 2), ("150000 100000", 2), ("10000 100000", 1)]
)
@pytest.mark.parametrize("place", ["", "a", "a/b"])
def test_a_quota_of_the_group_or_of_one_around_it_counts(tmp_path: Path, place: str, quota: str, cores: int) -> None:
    root = tmp_path / "cgroup"
    write(root / "a" / "b", cpu_max="max 100000")
    write(root / place, cpu_max=quota + "\n")
    assert usable_cores(root, own(tmp_path, "0::/a/b\n")) == cores


@pytest.mark.parametrize(("quota", "cores"), [("-1", 8), ("300000", 3), ("250001", 3), ("1000", 1)])
def test_a_quota_of_version_1_counts(tmp_path: Path, quota: str, cores: int) -> None:
    root = tmp_path / "cgroup"
    write(root / "cpu,cpuacct" / "a", cfs_quota_us=quota, cfs_period_us="100000")
    write(root / "memory" / "a", cfs_quota_us="1000", cfs_period_us="100000")  # of another controller
    groups = "4:memory:/a\n1:cpu,cpuacct:/a\n0::/\n"
    assert usable_cores(root, own(tmp_path, groups)) == cores


def test_the_root_counts_where_the_path_is_that_of_the_host(tmp_path: Path) -> None:
    write(tmp_path / "cgroup", cpu_max="300000 100000")
    for path in ("/docker/0123", "/../../outside"):
        assert usable_cores(tmp_path / "cgroup", own(tmp_path, f"0::{path}\n")) == 3


def test_without_groups_or_with_a_larger_quota_the_affinity_counts(tmp_path: Path) -> None:
    assert usable_cores(tmp_path / "none", tmp_path / "none") == 8
    write(tmp_path / "cgroup", cpu_max="6400000 100000")
    assert usable_cores(tmp_path / "cgroup", own(tmp_path, "0::/\n")) == 8
    write(tmp_path / "cgroup", cpu_max="nonsense")
    assert usable_cores(tmp_path / "cgroup", own(tmp_path, "0::/\n")) == 8


@pytest.mark.parametrize(
    ("groups", "files", "limit"),
    [
        ("0::/a/b\n", {"": {"memory.max": "max"}, "a": {"memory.max": "4096\n"}, "a/b": {"memory.max": "8192"}}, 4096),
        ("0::/../outside\n", {"": {"memory.max": "4096"}}, 4096),
        ("0::/a\n", {"a": {"memory.max": "max"}}, None),
        ("0::/a\n", {}, None),
        (
            "4:memory:/a\n1:cpu:/a\n",
            {"memory/a": {"memory.limit_in_bytes": "4096"}, "cpu/a": {"memory.max": "1"}},
            4096,
        ),
        ("4:memory:/a\n", {"memory/a": {"memory.limit_in_bytes": str(2**63 - 4096)}}, 2**63 - 4096),
        ("0::/a\n", {"a": {"memory.max": "nonsense"}}, None),
    ],
)
def test_the_smallest_limit_of_memory_counts(
    tmp_path: Path, groups: str, files: dict[str, dict[str, str]], limit: int | None
) -> None:
    for place, each in files.items():
        folder = tmp_path / "cgroup" / place
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in each.items():
            (folder / name).write_text(text)
    assert memory_limit(tmp_path / "cgroup", own(tmp_path, groups)) == limit


def test_hyperthreads_of_one_core_count_once_and_the_quota_holds_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processors, nothing = tmp_path / "cpu", tmp_path / "none"
    for number in range(8):
        write(processors / f"cpu{number}" / "topology", thread_siblings_list=f"{number % 4},{number % 4 + 4}\n")
    assert physical_cores(processors, nothing, nothing) == 4
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 4, 5}, raising=False)
    assert physical_cores(processors, nothing, nothing) == 2
    write(tmp_path / "cgroup", cpu_max="50000 100000")
    assert physical_cores(processors, tmp_path / "cgroup", own(tmp_path, "0::/\n")) == 1


def test_processors_that_the_system_does_not_list_count_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = tmp_path / "none"
    assert physical_cores(nothing, nothing, nothing) == 8
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert (usable_cores(nothing, nothing), physical_cores(nothing, nothing, nothing)) == (3, 3)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores(nothing, nothing) == 1


def test_a_cpu_backend_takes_one_thread_for_each_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "physical_cores", lambda: 3)
    assert (cpu.OnnxRuntimeCpu().threads, cpu.OnnxRuntimeCpu(threads=1).threads) == (3, 1)
