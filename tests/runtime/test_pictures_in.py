"""Pictures as they are meant: turned upright, in all their bits, not too large, and masks as diffusers reads them."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from latentrt.engines.errors import RequestError
from latentrt.runtime.pictures.load import latent_mask, load_image
from PIL import Image

ORIENTATION = 0x0112
"""The EXIF tag that says how a camera was held."""


@pytest.mark.parametrize(("orientation", "corner"), [(1, (0, 0)), (3, (5, 3)), (6, (3, 0)), (8, (0, 5))])
def test_a_file_is_turned_as_its_camera_was_held(tmp_path: Path, orientation: int, corner: tuple[int, int]) -> None:
    picture = Image.new("RGB", (6, 4))
    picture.putpixel((0, 0), (255, 0, 0))
    exif = picture.getexif()
    exif[ORIENTATION] = orientation
    picture.save(tmp_path / "a.png", exif=exif)
    turned = load_image(tmp_path / "a.png")
    assert turned.size == ((4, 6) if orientation > 4 else (6, 4))
    assert turned.getpixel(corner) == (255, 0, 0)


def test_a_picture_that_would_fill_the_memory_is_not_decoded(tmp_path: Path) -> None:
    Image.new("1", (8193, 8192)).save(tmp_path / "large.png")
    assert (tmp_path / "large.png").stat().st_size < 1 << 16
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RequestError, match=r"is 8193x8192: at most 64 Mpixels are read; shrink it$"):
            load_image(tmp_path / "large.png")


def test_sixteen_bits_become_eight(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16)).save(tmp_path / "deep.png")
    assert np.asarray(load_image(tmp_path / "deep.png"))[0, :, 0].tolist() == [0, 100, 255]


@pytest.mark.parametrize("place", [(0, 0), (7, 7), (4, 4), (3, 0)])
def test_a_cell_is_repainted_where_diffusers_would_repaint_it(place: tuple[int, int]) -> None:
    torch = pytest.importorskip("torch")
    gray = np.zeros((16, 24), np.uint8)
    gray[place[0] :: 8, place[1] :: 8] = 255
    white = torch.from_numpy(gray[None, None] / 255).float()
    expected = torch.nn.functional.interpolate(white, size=(2, 3)) >= 0.5
    assert np.array_equal(latent_mask(Image.fromarray(gray), 16, 24, 8), expected[0].numpy())


@pytest.mark.parametrize(("level", "white"), [(127, False), (128, True)])
def test_a_mask_is_white_from_the_middle_on(level: int, white: bool) -> None:
    assert latent_mask(Image.new("L", (16, 16), level), 16, 16, 8).all() == white


def test_a_name_that_would_break_the_line_is_quoted(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"^image 'no\\nsuch\.png' does not exist: ") as error:
        load_image("no\nsuch.png")
    assert "\n" not in str(error.value)
