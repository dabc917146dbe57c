"""Tiny random checkpoints and their bundles, made once per test session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep engines, bundles and records of tests out of the user's folders, and those of the user out of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LATENTRT_HOME", str(tmp_path_factory.mktemp("home")))
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
