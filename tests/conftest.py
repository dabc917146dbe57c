"""Tiny random checkpoints and their bundles, made once per test session."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import threading
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: over tiny models threads wait for each other

IN_EXTRAS = (
    *("diffusers", "fastapi", "huggingface_hub", "httptools", "httpx2", "matplotlib", "openai", "prometheus_client"),
    *("psutil", "safetensors", "schemathesis", "torch", "transformers", "uvicorn"),
)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Skip, with a reason, a test module that imports what only an extra brings and is not installed."""
    report = yield
    missing = re.search(r"No module named '(\w+)", str(report.longrepr)) if report.failed else None
    if missing and missing[1] in IN_EXTRAS and importlib.util.find_spec(missing[1]) is None:
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 0, f"Skipped: {missing[1]} is not installed")  # type: ignore[assignment]
    return report


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep engines, bundles and records of tests out of the user's folders, and those of the user out of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LATENTRT_HOME", str(tmp_path_factory.mktemp("home")))
        yield


def turns_held() -> AbstractContextManager[threading.Event]:
    """Hold the turns of all batchers until the event is set, or the block ends."""
    from latentrt.runtime.batcher.pool import Pool

    return calls_held(Pool, "turn")


class Gate(threading.Event):
    """Set: calls go on."""

    def __init__(self) -> None:
        super().__init__()
        self.reached = threading.Event()
        """Set once a call waits."""


@contextmanager
def calls_held(owner: type, name: str) -> Iterator[Gate]:
    """Hold the calls of a method until the event is set, or the block ends."""
    method, free = getattr(owner, name), Gate()

    def waiting(*given: Any, **named: Any) -> Any:
        free.reached.set()
        assert free.wait(120)
        return method(*given, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, waiting)
        try:
            yield free
        finally:
            free.set()


@pytest.fixture
def held() -> Iterator[threading.Event]:
    with turns_held() as free:
        yield free


@contextmanager
def levels_restored() -> Iterator[None]:
    """Give loggers their levels back, which the command line sets for its process: tests may run in any order."""
    levels = [(logger, logger.level) for logger in (logging.getLogger(), logging.getLogger("latentrt"))]
    yield
    for logger, level in levels:
        logger.setLevel(level)


@pytest.fixture(scope="module", autouse=True)
def own_levels_of_modules() -> Iterator[None]:
    """Do so for what fixtures of modules run, before any test."""
    with levels_restored():
        yield


@pytest.fixture(autouse=True)
def own_levels() -> Iterator[None]:
    with levels_restored():
        yield


@pytest.fixture(scope="session")
def tiny_sd15_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _checkpoint("tiny-sd15", tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_sd21_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _checkpoint("tiny-sd21", tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_sd15_bundle(tiny_sd15_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _bundle(tiny_sd15_checkpoint, tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_sd21_bundle(tiny_sd21_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _bundle(tiny_sd21_checkpoint, tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_sd15_fp16_bundle(tiny_sd15_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _bundle(tiny_sd15_checkpoint, tmp_path_factory, precision="fp16")


def _checkpoint(family: str, factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("diffusers")
    from latentrt.benchmarks.random_checkpoint import write_random_checkpoint

    return write_random_checkpoint(family, factory.mktemp("checkpoints") / family)  # type: ignore[arg-type]


def _bundle(checkpoint: Path, factory: pytest.TempPathFactory, **options: str) -> Path:
    from latentrt.export import export_checkpoint

    return export_checkpoint(checkpoint, factory.mktemp("bundles") / checkpoint.name, **options)  # type: ignore[arg-type]


@pytest.fixture
def branches_asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return of how many branches of guidance the steps of the loop run the rows from now on."""
    from latentrt.runtime.loop.denoise import DenoiseLoop

    found: list[int] = []
    ordinary = DenoiseLoop._enqueue_step

    def enqueue(self: Any, parity: int, branches: int, stream: Any) -> None:
        found.append(branches)
        ordinary(self, parity, branches, stream)

    monkeypatch.setattr(DenoiseLoop, "_enqueue_step", enqueue)
    return found
