"""Folders that appear whole or not at all, and what they may replace: a bundle and nothing else."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from latentrt.engines.bundle import atomic_folder
from latentrt.engines.errors import StorageError


def fill(folder: Path, content: str, version: int = 2) -> None:
    """Write what counts as a bundle of any format version, with one file in a folder."""
    (folder / "parts").mkdir(parents=True)
    (folder / "parts" / "weights").write_text(content)
    manifest = {"format_version": version, "graphs": [], "files": {"parts/weights": {"size": 1}}}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def content(target: Path) -> str:
    return (target / "parts" / "weights").read_text()


def export(target: Path, text: str = "new", *, replace: bool = True, then: Callable[[], object] = lambda: None) -> None:
    """Put a bundle at `target`, as an export does; `then` happens while it works."""
    with atomic_folder(target, replace=replace) as folder:
        fill(folder, text)
        then()


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(RuntimeError), atomic_folder(target) as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    export(target, replace=False)
    assert content(target) == "new" and list(tmp_path.iterdir()) == [target]


def test_an_existing_bundle_is_kept_unless_replacing_is_asked_for(tmp_path: Path) -> None:
    target = tmp_path / "out"
    fill(target, "old", version=1)
    with pytest.raises(StorageError, match="already exists"), atomic_folder(target):
        pass
    with pytest.raises(RuntimeError), atomic_folder(target, replace=True):
        raise RuntimeError
    assert content(target) == "old"
    export(target)
    assert content(target) == "new" and list(tmp_path.iterdir()) == [target]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    export(tmp_path / "out")
    assert content(tmp_path / "out") == "new"


def photos(target: Path) -> None:
    target.mkdir()
    (target / "mine").write_text("mine")


def web_app(target: Path) -> None:
    photos(target)
    (target / "manifest.json").write_text(json.dumps({"format_version": 1, "name": "app", "files": {"mine": {}}}))


def broken(target: Path) -> None:
    photos(target)
    (target / "manifest.json").write_text("[" * 100_000)


def thesis_in_a_bundle(target: Path) -> None:
    fill(target, "old")
    (target / "parts" / "mine").write_text("mine")


def empty_folder_in_a_bundle(target: Path) -> None:
    fill(target, "old")
    (target / "mine").mkdir()


def link_to_a_bundle(target: Path) -> None:
    fill(target.with_name("mine"), "old")
    target.symlink_to(target.with_name("mine"))


FOREIGN: dict[Callable[[Path], None], str] = {
    photos: "exists and is no bundle",
    web_app: "exists and is no bundle",
    broken: "exists and is no bundle",
    thesis_in_a_bundle: "holds 'parts/mine', which is not of the bundle there",
    empty_folder_in_a_bundle: "holds 'mine', which is not of the bundle there",
    link_to_a_bundle: "no bundle but a link or a file",
    lambda target: target.write_text("mine"): "no bundle but a link or a file",  # type: ignore[dict-item, return-value]
}


@pytest.mark.parametrize(("make", "message"), FOREIGN.items())
def test_what_is_more_than_a_bundle_is_never_replaced(
    tmp_path: Path, make: Callable[[Path], None], message: str
) -> None:
    target, worked = tmp_path / "out", []
    make(target)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(StorageError, match=message) as caught:
        export(target, then=lambda: worked.append(1))
    assert not worked and "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("make", [photos, thesis_in_a_bundle])
def test_what_appears_meanwhile_is_not_replaced(tmp_path: Path, make: Callable[[Path], None], replace: bool) -> None:
    target = tmp_path / "out"
    with pytest.raises(StorageError, match="is not replaced" if replace else "already exists"):
        export(target, replace=replace, then=lambda: make(target))
    assert [path.name for path in target.rglob("mine")] == ["mine"] and list(tmp_path.iterdir()) == [target]


def test_a_bundle_that_appears_meanwhile_is_replaced_only_when_asked(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(StorageError, match="already exists"):
        export(target, replace=False, then=lambda: fill(target, "theirs"))
    assert content(target) == "theirs"
    export(target)
    assert content(target) == "new"


def test_the_old_bundle_is_put_back_when_the_new_one_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, ordinary, renamed = tmp_path / "out", Path.rename, []
    fill(target, "old")

    def failing(self: Path, other: Path) -> Path:
        renamed.append(other)
        if len(renamed) == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return ordinary(self, other)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(StorageError, match="Input/output error"):
        export(target)
    assert content(target) == "old" and list(tmp_path.iterdir()) == [target] and len(renamed) == 3


def test_every_file_is_on_the_disk_before_the_folder_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Any] = []
    flush, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append(os.fstat(handle).st_ino), flush(handle)))
    monkeypatch.setattr(Path, "rename", lambda self, other: (events.append("rename"), rename(self, other))[1])
    target = tmp_path / "out"
    export(target)
    flushed = set(events[: events.index("rename")])
    assert {path.stat().st_ino for path in (target, *target.rglob("*"))} <= flushed
    assert tmp_path.stat().st_ino in events[events.index("rename") :]


def test_a_relative_target_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    export(Path("out"), then=lambda: os.chdir("elsewhere"))
    assert content(tmp_path / "out") == "new"


def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No space left"), atomic_folder(tmp_path / "out"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []
