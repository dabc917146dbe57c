"""A pytest plugin: which test runs which functions of the package, how long each test takes, and which fail.

Loaded by `mutate.py` with `-p tracing`, in a copy of the tree. What a fixture of a module runs counts for every test
that uses the fixture, not only for the first. Those of the session are not looked at: they export models with PyTorch,
which takes long, so their folders are kept; later runs, with MUTATION_MAP empty, take them as they are.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

ROOT = f"{Path.cwd()}{os.sep}"
PACKAGE = f"{os.environ['MUTATION_PACKAGE']}{os.sep}"
"""The folder of links through which the copy is imported; the paths of its modules begin with it."""

_called: set[CodeType] = set()
_by_fixture: defaultdict[str, set[CodeType]] = defaultdict(set)
_by_test: defaultdict[str, set[CodeType]] = defaultdict(set)
_seconds: defaultdict[str, float] = defaultdict(float)
_failed: set[str] = set()
_map = os.environ["MUTATION_MAP"]
_kept = Path(os.environ["MUTATION_KEPT"])


def _note(frame: FrameType, event: str, argument: object) -> None:
    _called.add(frame.f_code)  # and no more of this frame: lines would take long


if _map:
    threading.settrace(_note)


def _trace(on: bool) -> None:
    sys.settrace(_note if on and _map else None)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: Any, request: Any) -> Iterator[None]:
    global _called
    outer, _called = _called, set()
    _trace(fixturedef.scope != "session")
    try:
        result = yield
        if _map and fixturedef.scope == "session" and isinstance(result, Path) and result.is_dir():
            shutil.copytree(result, _kept / fixturedef.argname / result.name, dirs_exist_ok=True)
        return result
    finally:
        _trace(True)
        _by_fixture[fixturedef.argname] |= _called
        _called |= outer


class _Kept:
    """Folders of session fixtures as the first run left them."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> Path | None:
        folders = list((_kept / fixturedef.argname).glob("*")) if fixturedef.scope == "session" else []
        if not folders:
            return None
        fixturedef.cached_result = (folders[0], fixturedef.cache_key(request), None)
        return folders[0]


def pytest_configure(config: pytest.Config) -> None:
    if not _map:
        config.pluginmanager.register(_Kept())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    global _called
    _called = set()
    _trace(True)
    result = yield
    used = set(_called).union(*(_by_fixture[name] for name in getattr(item, "fixturenames", ())))
    _by_test[item.nodeid] |= used
    return result


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _seconds[report.nodeid] += report.duration
    if not report.passed:
        _failed.add(report.nodeid)


def pytest_sessionfinish() -> None:
    if not _map:
        return
    _trace(False)
    tests = {}
    for name, codes in _by_test.items():
        ours = [code for code in codes if code.co_filename.startswith(PACKAGE)]
        ran = sorted({f"{code.co_filename.removeprefix(PACKAGE)}:{code.co_qualname}" for code in ours})
        tests[name] = {"seconds": round(_seconds[name], 3), "passed": name not in _failed, "ran": ran}
    Path(_map).write_text(json.dumps(tests, indent=0), encoding="utf-8")
