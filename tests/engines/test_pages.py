"""Pages of mapped files are given back while they are read, and nothing that was written is."""

from __future__ import annotations

import mmap
import os
import sys
import time
from pathlib import Path

import pytest
from latentrt.engines.openvino import pages
from latentrt.engines.openvino.pages import letting_go_of_pages

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux alone")
SIZE = 1 << 24


@pytest.fixture
def file(tmp_path: Path) -> Path:
    folder = tmp_path / "a folder"
    folder.mkdir()
    (folder / "model.bin").write_bytes(b"weights " * (SIZE // 8))
    return folder / "model.bin"


def mapped(file: Path, access: int = mmap.PROT_READ) -> mmap.mmap:
    """Return a private mapping of a file."""
    with file.open("rb") as opened:
        return mmap.mmap(opened.fileno(), SIZE, flags=mmap.MAP_PRIVATE, prot=access)


def resident(file: Path) -> int:
    """Return how many bytes of a mapped file are in memory, as the system counts them."""
    lines = iter(Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines())
    starts = (line for line in lines if line.endswith(f" {os.path.realpath(file)}"))
    return sum(int(next(each for each in lines if each.startswith("Rss:")).split()[1]) << 10 for _ in starts)


@pytest.mark.parametrize("place", ["file", "folder", "link"])
def test_what_was_read_of_a_file_is_given_back_and_can_be_read_again(file: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "link").symlink_to(file)
    given = {"file": file, "folder": file.parent, "link": tmp_path / "link"}[place]
    with mapped(file) as there:
        before = bytes(there)
        assert resident(file) == SIZE
        with letting_go_of_pages(given):
            pass
        assert resident(file) == 0
        assert bytes(there) == before


def test_pages_are_given_back_while_work_goes_on(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "EVERY", 0.001)
    with mapped(file) as there, letting_go_of_pages(file):
        for _ in range(2):  # of what is read again, too
            assert bytes(there)
            until = time.monotonic() + 60
            while resident(file) and time.monotonic() < until:
                time.sleep(0.001)
            assert resident(file) == 0


def test_other_files_and_what_was_written_stay(file: Path) -> None:
    other = file.parent / "model.bin.data"
    other.write_bytes(file.read_bytes())
    with mapped(other) as beside, mapped(file, mmap.PROT_READ | mmap.PROT_WRITE) as written:
        assert bytes(beside)
        written[:4] = b"mine"
        with letting_go_of_pages(file):
            pass
        assert written[:8] == b"minehts "
        assert resident(other) == SIZE


def test_what_fails_meanwhile_is_what_is_raised(file: Path) -> None:
    with mapped(file) as there:
        assert bytes(there)
        with pytest.raises(ValueError, match="of the work"), letting_go_of_pages(file, file.parent / "nowhere"):
            raise ValueError("of the work")
        assert resident(file) == 0
