"""Engines that a disk, a crash or another program has damaged, at random: the next request is right by itself."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrt.engines.bundle import Bundle
from latentrt.engines.cache import EngineCache
from latentrt.export.embedded import BUNDLE
from latentrt.runtime import Pipeline

from ..engines.simulated_backends import tensorrt_backend

pytestmark = pytest.mark.slow

REQUEST: dict[str, Any] = {"prompt": "a red circle", "seed": 1, "num_inference_steps": 1, "height": 32, "width": 32}


def truncated(file: Path, generator: random.Random) -> None:
    os.truncate(file, generator.randrange(file.stat().st_size + 1))


def zero_filled(file: Path, generator: random.Random) -> None:
    data = bytearray(file.read_bytes())
    begin = generator.randrange(len(data) + 1)
    end = generator.randrange(begin, len(data) + 1)
    data[begin:end] = bytes(end - begin)
    file.write_bytes(bytes(data))


def flipped(file: Path, generator: random.Random) -> None:
    data = bytearray(file.read_bytes())
    for _ in range(generator.choice((1, 8, 64)) if data else 0):
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    file.write_bytes(bytes(data))


def longer(file: Path, generator: random.Random) -> None:
    with file.open("ab") as stream:
        stream.write(generator.randbytes(generator.choice((1, 5000))))


def gone(file: Path, generator: random.Random) -> None:
    file.unlink()


def a_folder(file: Path, generator: random.Random) -> None:
    file.unlink()
    file.mkdir()


DAMAGE: list[Callable[[Path, random.Random], None]] = [truncated, zero_filled, flipped, longer, gone, a_folder]


def damaged(root: Path, generator: random.Random) -> str:
    """Damage one to three files of the cache and return what was done."""
    done = []
    for _ in range(generator.choice((1, 1, 2, 3))):
        files = sorted(file for file in root.glob("*-*/*") if file.is_file())
        file, damage = generator.choice(files), generator.choice(DAMAGE)
        damage(file, generator)
        done.append(f"{damage.__name__} {file.relative_to(root)}")
    return ", ".join(done)


def draw(pipe: Pipeline) -> Any:
    return np.asarray(pipe(**REQUEST).images[0])


@pytest.mark.parametrize("name", ["onnxruntime-cpu", "simulated tensorrt"])
def test_the_next_request_is_right(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator, bundle = random.Random(1), Bundle.open(BUNDLE)

    def drawn(root: Path) -> Any:
        if name == "onnxruntime-cpu":
            with Pipeline.open(bundle, name, threads=1, cache=EngineCache(root)) as pipe:
                return draw(pipe)
        with (
            pytest.MonkeyPatch.context() as patch,
            Pipeline(bundle, tensorrt_backend(patch, EngineCache(root))) as pipe,
        ):
            return draw(pipe)

    whole = tmp_path / "whole"
    expected = drawn(whole)
    for number in range(25):
        root = shutil.copytree(whole, tmp_path / str(number))
        what = damaged(root, generator)
        assert np.array_equal(drawn(root), expected), what
        assert np.array_equal(drawn(root), expected), what  # on what the first one mended
        assert EngineCache(root).verify() == {}, what
        shutil.rmtree(root)
