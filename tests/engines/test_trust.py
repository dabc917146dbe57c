"""Who may have written an engine: owners and modes of folders, files and what lies above them."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from latentrt.engines import trust
from latentrt.engines.cache import EngineCache
from latentrt.engines.errors import StorageError

pytestmark = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="owners and modes are POSIX's")

KEY = {"graph": "g"}
ME, OTHER = 1000, 1234
Pretend = Callable[..., None]


def build(folder: Path) -> dict[str, Any]:
    (folder / "plan").write_bytes(b"plan")
    return {}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    EngineCache(tmp_path / "home" / "engines").get("denoiser", KEY, build)
    return tmp_path / "home" / "engines"


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Pretend:
    """Return what gives a path another owner, group or mode: everything else belongs to user 1000, who runs this."""
    changed: dict[Path, dict[str, int]] = {}
    see = Path.stat

    def facts(path: Path) -> os.stat_result | None:
        try:
            values = list(see(path))
        except OSError:
            return None
        for name, value in ({"st_uid": ME, "st_gid": ME} | changed.get(path, {})).items():
            index = {"st_mode": stat.ST_MODE, "st_uid": stat.ST_UID, "st_gid": stat.ST_GID}[name]
            values[index] = value if name != "st_mode" else stat.S_IFMT(values[index]) | value
        return os.stat_result(values)

    monkeypatch.setattr(trust, "_facts", facts)
    monkeypatch.setattr(os, "geteuid", lambda: ME)
    return lambda path, **values: changed.update({path: values})


def engine(root: Path) -> Path:
    return next(root.glob("denoiser-*"))


PLACES: list[Callable[[Path], Path]] = [
    lambda root: root,
    engine,
    lambda root: engine(root) / "plan",
    lambda root: engine(root) / "engine.json",
]


@pytest.mark.parametrize("place", PLACES, ids=["cache", "engine", "file", "description"])
@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"st_uid": OTHER}, "belongs to user 1234, and this is 1000: set LATENTRT_HOME"),
        ({"st_mode": 0o666}, "can be written by everybody: run chmod o-w"),
        ({"st_mode": 0o1777}, "can be written by everybody: run chmod o-w"),
        ({"st_mode": 0o664, "st_gid": 50}, "can be written by group 50: run chmod g-w"),
    ],
    ids=["owner", "everybody", "sticky", "group"],
)
def test_what_others_may_have_written_is_refused(
    root: Path, pretend: Pretend, place: Callable[[Path], Path], facts: dict[str, int], message: str
) -> None:
    assert EngineCache(root).find("denoiser", KEY)
    pretend(place(root), **facts)
    with pytest.raises(StorageError, match=message):
        EngineCache(root).find("denoiser", KEY)
    if place(root) != root:
        with pytest.raises(StorageError, match=message):
            EngineCache(root).verify()


def test_what_root_has_written_into_an_image_is_used_by_its_user(root: Path, pretend: Pretend) -> None:
    for path in (root, engine(root), *engine(root).iterdir()):
        pretend(path, st_uid=0, st_gid=0, st_mode=0o755 if path.is_dir() else 0o644)
    assert EngineCache(root).find("denoiser", KEY) == engine(root)


@pytest.mark.parametrize("mode", [0o777, 0o1777], ids=["emptyDir", "tmp"])
def test_folders_above_may_be_anybodys(root: Path, pretend: Pretend, mode: int) -> None:
    pretend(root.parent, st_mode=mode, st_uid=OTHER)
    assert EngineCache(root).find("denoiser", KEY)


@pytest.mark.parametrize(
    ("user", "group", "private"),
    [
        (("alice", 1000), ("alice", []), True),
        (("alice", 1000), ("alice", ["alice"]), True),
        (("alice", 1000), ("alice", ["bob"]), False),
        (("alice", 1000), ("users", []), False),
        (("alice", 100), ("alice", []), False),
        (None, None, True),
    ],
    ids=["own", "own with the owner", "with a member", "shared", "not the first", "numbers alone"],
)
def test_a_group_of_the_owner_alone_may_write(
    root: Path, pretend: Pretend, monkeypatch: pytest.MonkeyPatch, user: Any, group: Any, private: bool
) -> None:
    import grp
    import pwd

    def look_up(found: Any) -> Any:
        if found is None:
            raise KeyError
        return found

    names = user and pwd.struct_passwd((user[0], "x", ME, user[1], "", "/", "/bin/sh"))
    members = group and grp.struct_group((group[0], "x", ME, group[1]))
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: look_up(names))
    monkeypatch.setattr(grp, "getgrgid", lambda gid: look_up(members))
    pretend(root, st_mode=0o770)
    if private:
        assert EngineCache(root).find("denoiser", KEY)
    else:
        with pytest.raises(StorageError, match="can be written by group 1000"):
            EngineCache(root).find("denoiser", KEY)


def test_engines_are_written_for_their_owner_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        folder = EngineCache(tmp_path / "engines").get("denoiser", KEY, build)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.iterdir())}
    assert not any(mode & 0o022 for mode in modes.values()), modes
