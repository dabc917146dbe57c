from __future__ import annotations

import errno
import json
import multiprocessing
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from latentrt.engines.cache import EngineCache, home
from latentrt.engines.errors import StorageError
from latentrt.engines.files import locked

NEEDS_FORK = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
KEY = {"backend": "b", "graph": "g", "version": "1", "gpu": "x", "profile": [1, 64, 64], "flags": {"level": 3}}


def build(folder: Path) -> dict[str, Any]:
    (folder / "plan").write_bytes(b"plan")
    return {"tensors": []}


def test_the_same_key_is_a_hit_and_builds_once(tmp_path: Path) -> None:
    calls = []
    cache = EngineCache(tmp_path)
    first = cache.get("denoiser", KEY, lambda out: calls.append(out) or build(out))
    again = EngineCache(tmp_path).get(
        "denoiser", json.loads(json.dumps(KEY)), lambda out: calls.append(out) or build(out)
    )
    assert first == again and len(calls) == 1
    assert (first / "plan").read_bytes() == b"plan"
    assert json.loads((first / "engine.json").read_text())["key"] == KEY


@pytest.mark.parametrize(
    "change",
    [
        {"graph": "h"},
        {"version": "2"},
        {"gpu": "y"},
        {"profile": [1, 64, 65]},
        {"flags": {"level": 4}},
        {"backend": "c"},
        {"extra": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_any_change_of_the_key_is_a_miss(tmp_path: Path, change: dict[str, Any]) -> None:
    cache = EngineCache(tmp_path)
    cache.get("denoiser", KEY, build)
    assert cache.find("denoiser", KEY) is not None
    assert cache.find("denoiser", {**KEY, **change}) is None
    assert cache.find("decoder", KEY) is None


def test_a_key_that_cannot_be_written_as_json_is_an_error_not_a_hit(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        EngineCache(tmp_path).find("denoiser", {"graph": object()})


def test_a_damaged_sidecar_is_a_miss_and_is_rebuilt(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path)
    folder = cache.get("denoiser", KEY, build)
    (folder / "engine.json").write_text("{")
    assert cache.find("denoiser", KEY) is None
    assert cache.get("denoiser", KEY, build) == folder
    assert cache.find("denoiser", KEY) == folder


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> dict[str, Any]:
        (folder / "half").write_bytes(b"x")
        raise RuntimeError("no")

    cache = EngineCache(tmp_path)
    with pytest.raises(RuntimeError):
        cache.get("denoiser", KEY, fail)
    assert cache.entries() == [] and not list((tmp_path / ".building").iterdir())


def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    def full(folder: Path) -> dict[str, Any]:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(StorageError, match="No space left"):
        EngineCache(tmp_path).get("denoiser", KEY, full)


def _build_slowly(root: str, started: Any) -> None:
    def slow(folder: Path) -> dict[str, Any]:
        (folder / "half").write_bytes(b"x")
        started.set()
        time.sleep(60)
        return {}

    EngineCache(Path(root)).get("denoiser", KEY, slow)


@NEEDS_FORK
def test_a_killed_build_leaves_nothing_behind(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    started = context.Event()
    process = context.Process(target=_build_slowly, args=(str(tmp_path), started))
    process.start()
    assert started.wait(30)
    leftover = tmp_path / ".building"
    EngineCache(tmp_path).sweep()
    assert list(leftover.iterdir()), "a build in progress must not be swept away"
    process.kill()
    process.join()
    cache = EngineCache(tmp_path)
    assert cache.find("denoiser", KEY) is None
    cache.sweep()
    assert not list(leftover.iterdir()) and cache.entries() == []


def _count_build(root: str, log: str) -> None:
    def counted(folder: Path) -> dict[str, Any]:
        with Path(log).open("a") as file:
            file.write("built\n")
        time.sleep(0.3)
        return build(folder)

    EngineCache(Path(root)).get("denoiser", KEY, counted)


def test_two_threads_build_once(tmp_path: Path) -> None:
    cache, started, again, go = EngineCache(tmp_path), *(threading.Event() for _ in range(3))

    def first(folder: Path) -> dict[str, Any]:
        started.set()
        assert go.wait(30)
        return build(folder)

    def second(folder: Path) -> dict[str, Any]:
        again.set()
        return build(folder)

    with ThreadPoolExecutor(2) as pool:
        found = [pool.submit(cache.get, "denoiser", KEY, first)]
        assert started.wait(30)
        found.append(pool.submit(cache.get, "denoiser", KEY, second))
        assert not again.wait(0.3)  # it waits for the first
        go.set()
        assert found[0].result() == found[1].result()
    assert not again.is_set()


@NEEDS_FORK
def test_two_processes_build_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    log = tmp_path / "log"
    processes = [context.Process(target=_count_build, args=(str(tmp_path / "cache"), str(log))) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert log.read_text() == "built\n"


def test_home_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LATENTRT_HOME", str(tmp_path / "a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert home() == tmp_path / "a"
    monkeypatch.delenv("LATENTRT_HOME")
    assert home() == tmp_path / "b" / "latentrt"


@pytest.mark.parametrize("variables", [{}, {"LATENTRT_HOME": "~/x"}, {"LATENTRT_HOME": "~nobody-of-this-name/x"}])
def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    def none(*_: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("LATENTRT_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(Path, "home", none)
    monkeypatch.setattr(Path, "expanduser", none)
    with pytest.raises(StorageError, match="set LATENTRT_HOME"):
        EngineCache()


def test_a_relative_cache_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LATENTRT_HOME", "home")
    caches = [EngineCache(), EngineCache(Path("engines"))]
    monkeypatch.chdir("elsewhere")
    found = [cache.get("denoiser", KEY, build).parent for cache in caches]
    assert found == [tmp_path / "home" / "engines", tmp_path / "engines"]


@pytest.mark.skipif(os.name == "nt", reason="modes are POSIX's")
def test_a_new_cache_is_of_its_owner_alone(tmp_path: Path) -> None:
    root = EngineCache(tmp_path / "home" / "engines").get("denoiser", KEY, build).parent
    assert root.stat().st_mode & 0o777 == 0o700


def test_damage_that_keeps_size_and_time_is_a_miss(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path)
    file = cache.get("denoiser", KEY, build) / "plan"
    time.sleep(0.05)  # file systems tell times apart by some milliseconds
    before = file.stat()
    file.write_bytes(b"PLAN")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert cache.find("denoiser", KEY) is None
    assert (cache.get("denoiser", KEY, build) / "plan").read_bytes() == b"plan"


def test_a_sidecar_of_another_engine_is_not_listed_and_removed_on_request(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path)
    folder = cache.get("denoiser", KEY, build)
    data = json.loads((folder / "engine.json").read_text())
    (folder / "engine.json").write_text(json.dumps({**data, "key": {**KEY, "profile": [9, 9, 9]}}))
    assert cache.entries() == []
    assert cache.verify() == {folder: "its description cannot be read"} and not folder.exists()


def test_verifying_touches_nothing_but_engines_that_nobody_builds(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path)
    folder = cache.get("denoiser", KEY, build)
    (tmp_path / "timings-1.2-gpu.cache").write_bytes(b"timings")
    (tmp_path / "my-notes").mkdir()
    (folder / "plan").write_bytes(b"PLAN")
    with locked(tmp_path / ".locks" / folder.name):
        assert cache.verify() == {}
    (folder / "engine.json").unlink()
    assert list(cache.verify()) == [folder]
    assert {path.name for path in tmp_path.iterdir()} >= {"timings-1.2-gpu.cache", "my-notes"}


def test_everything_is_on_the_disk_before_the_engine_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Any] = []
    flush, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append(os.fstat(handle).st_ino), flush(handle)))
    monkeypatch.setattr(Path, "rename", lambda self, other: (events.append("rename"), rename(self, other))[1])
    folder = EngineCache(tmp_path).get("denoiser", KEY, build)
    flushed = set(events[: events.index("rename")])
    assert {path.stat().st_ino for path in (folder, *folder.iterdir())} <= flushed
    assert tmp_path.stat().st_ino in events[events.index("rename") :]
