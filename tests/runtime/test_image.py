from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from latentrt.engines.errors import StorageError
from latentrt.engines.files import write_atomically
from latentrt.runtime.cli import pictures
from latentrt.runtime.cli.pictures import write_numbered
from latentrt.runtime.pictures.load import image_pixels, latent_mask, load_image
from latentrt.runtime.pictures.png import TEXT_KEY, encode_png, grid
from PIL import Image


def test_png_holds_the_pixels_and_the_request(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3)).astype(np.uint8)
    request = {"prompt": "ein größerer Kreis 円", "seed": 2**64 - 1}
    path = tmp_path / "a.png"
    path.write_bytes(encode_png(Image.fromarray(pixels), request))
    assert np.array_equal(np.asarray(Image.open(path)), pixels)
    assert json.loads(Image.open(path).text[TEXT_KEY]) == request


def test_the_same_picture_loads_from_path_pil_and_arrays(tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(pixels), pixels, pixels / 255):
        assert np.array_equal(np.asarray(load_image(source)), pixels)


def test_masks_are_binary_and_nearest() -> None:
    gray = np.zeros((32, 32), np.uint8)
    gray[:, 16:] = 127
    gray[16:, 16:] = 128
    mask = latent_mask(Image.fromarray(gray), 32, 32, 8)
    assert mask.shape == (1, 4, 4) and mask.dtype == bool
    assert mask[0].tolist() == [[False] * 4] * 2 + [[False, False, True, True]] * 2


def test_resizing_reaches_the_wanted_size() -> None:
    assert image_pixels(Image.new("RGB", (10, 20)), 16, 24).shape == (16, 24, 3)


def test_a_grid_shows_every_picture_and_label() -> None:
    images = [Image.new("RGB", (64, 64), color) for color in ("red", "lime", "blue")]
    sheet = grid(images, ["a red picture with a long label", "green", "blue"], columns=2)
    colors = {color for _, color in sheet.getcolors(1 << 24) or []}
    assert {(255, 0, 0), (0, 255, 0), (0, 0, 255)} <= colors
    assert min(sum(color) for color in colors) < 30  # the labels' ink
    assert sheet.width > 128 and sheet.height > 128


def test_new_pictures_never_take_an_old_name(tmp_path: Path) -> None:
    assert [write_numbered(tmp_path, seed, b"x").name for seed in (5, 6)] == [
        "latentrt-0001-seed5.png",
        "latentrt-0002-seed6.png",
    ]
    write_atomically(tmp_path / "latentrt-9999-seed5.png", b"x")
    assert [write_numbered(tmp_path, 5, b"x").name[:14] for _ in range(2)] == ["latentrt-10000", "latentrt-10001"]


def test_two_processes_never_write_the_same_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, quicker = pictures.write_new, tmp_path / "latentrt-0001-seed5.png"

    def late(path: Path, data: bytes) -> bool:
        if path == quicker:
            quicker.write_bytes(b"theirs")
        return write(path, data)

    monkeypatch.setattr(pictures, "write_new", late)
    assert write_numbered(tmp_path, 5, b"ours").name == "latentrt-0002-seed5.png"
    assert quicker.read_bytes() == b"theirs" and len(list(tmp_path.iterdir())) == 2


def test_writing_below_a_file_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="cannot write"):
        write_atomically(tmp_path / "file" / "a.png", b"x")
    with pytest.raises(StorageError, match="cannot write"):
        write_numbered(tmp_path / "file", 5, b"x")
