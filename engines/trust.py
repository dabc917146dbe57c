"""Whether others may have written what is about to be loaded: an engine is code.

A folder of engines and every file in it must belong to this user or to root, and nobody else may write there; the
sticky bit, under which others still add files, does not help. A group may write if it is its owner's alone, as many
systems make one for each user. Folders above are not asked, so that a cache may lie in `/tmp` or on a volume that all
may write: who puts another folder in this one's place owns it, and is found out. Systems that have no such owners and
modes (Windows) are not asked either.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from .errors import StorageError


def check_trusted(root: Path, *folders: Path) -> None:
    """Raise `StorageError` when others may have written to `root`, to one of the `folders` in it, or to their files.

    What does not exist, or cannot be reached, is not looked at. The files beside the folders in `root` are not, either.
    """
    if not hasattr(os, "geteuid"):
        return
    for place in _places(root, folders):
        if facts := _facts(place):
            _check(place, facts)


def _facts(place: Path) -> os.stat_result | None:
    try:
        return place.stat()
    except OSError:
        return None


def _places(root: Path, folders: tuple[Path, ...]) -> Iterator[Path]:
    yield root
    for folder in folders:
        yield folder
        with suppress(OSError):
            yield from sorted(folder.iterdir())


def _check(place: Path, facts: os.stat_result) -> None:
    """Raise `StorageError` when others own a file or folder, or may write to it."""
    user = os.geteuid()
    if facts.st_uid not in (user, 0):
        raise StorageError(
            f"cache {place} belongs to user {facts.st_uid}, and this is {user}: "
            "set LATENTRT_HOME to a folder of your own"
        )
    if facts.st_mode & stat.S_IWOTH:
        who, mode = "everybody", "o-w"
    elif facts.st_mode & stat.S_IWGRP and not _is_private(facts.st_gid, facts.st_uid):
        who, mode = f"group {facts.st_gid}", "g-w"
    else:
        return
    raise StorageError(
        f"cache {place} can be written by {who}: run chmod {mode} on it if you trust what it holds, "
        "else delete it or set LATENTRT_HOME"
    )


def _is_private(group: int, user: int) -> bool:
    """Tell whether a group is a user's own: of the same name and without other members."""
    import grp  # not there on Windows
    import pwd

    try:
        owner, members = pwd.getpwuid(user), grp.getgrgid(group)
    except KeyError:  # the user of a container, whom only a number names
        return group == user
    return owner.pw_gid == group and owner.pw_name == members.gr_name and set(members.gr_mem) <= {owner.pw_name}
