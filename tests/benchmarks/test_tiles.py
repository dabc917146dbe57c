"""What decoding in tiles takes, measured in processes of their own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from latentrt.benchmarks.quality import tiles

pytest.importorskip("onnxruntime")
pytest.importorskip("psutil")


def test_differences_are_those_of_the_pictures() -> None:
    whole = np.zeros((10, 10, 3), np.uint8)
    tiled = whole.copy()
    tiled[0, 0], tiled[0, 1, 0] = 255, 2
    found = tiles.differences(tiled, whole)
    assert found == {"mean": (3 * 255 + 2) / 300, "p99.9": 255, "largest": 255, "above_2": 3 / 300}
    assert tiles.differences(whole, tiled) == found


@pytest.mark.long
def test_sizes_are_decoded_in_one_piece_and_in_tiles(
    tiny_sd15_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(tiny_sd15_bundle), "--size", "384x256", "--size", "512x256", "--whole-up-to", "400"]
    monkeypatch.setattr(sys, "argv", ["tiles", *given, "--json"])
    tiles.main()
    found = json.loads(capsys.readouterr().out)
    assert [(each["size"], each["decoded"]) for each in found] == [
        ("384x256", "whole"),
        ("384x256", "tiled"),
        ("512x256", "tiled"),
    ]
    assert ["differences" in each for each in found] == [False, True, False]
    assert 0 < found[1]["differences"]["mean"] < 20 and all(each["peak_bytes"] > 2**25 for each in found)
    assert [row[:2] for row in tiles.table(found).rows] == [
        ["384x256", "whole"],
        ["384x256", "tiled"],
        ["512x256", "tiled"],
    ]


@pytest.mark.parametrize(
    ("given", "said"), [(["--size", "big"], "size is 'big'"), (["--size", "130x128"], "width is 130")], ids=str
)
def test_what_is_no_size_is_refused(
    tiny_sd15_bundle: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], said: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["tiles", str(tiny_sd15_bundle), *given])
    with pytest.raises(SystemExit, match=said):
        tiles.main()
