"""A request as the system sees it: no name looked up, no connection, nothing written but engines and pictures."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

CALLS = "trace=%network,open,openat,creat,mkdir,mkdirat,rename,renameat,renameat2,unlink,unlinkat,link,linkat,symlink"
LOOKUPS = re.compile(r'"/etc/(resolv\.conf|hosts|nsswitch\.conf|host\.conf|gai\.conf)"')
WRITING = re.compile(r"O_WRONLY|O_RDWR|O_CREAT|O_TRUNC|O_APPEND|^(creat|mkdir|rename|unlink|link|symlink)")


def traced(arguments: list[str], work: Path, log: Path, environment: dict[str, str]) -> list[str]:
    """Run a command under strace and return the system calls that were made and did not fail, of all its processes."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed")
    command = [strace, "-f", "-qq", "-e", CALLS, "-e", "signal=none", "-o", str(log)]
    done = subprocess.run(
        [*command, *arguments], cwd=work, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    if "ptrace" in done.stderr:
        pytest.skip(f"strace may not trace here: {done.stderr.splitlines()[0]}")
    assert done.returncode == 0, done.stderr
    calls = [line.partition(" ")[2].strip() for line in log.read_text(errors="replace").splitlines()]
    return [call for call in calls if " = -1 " not in call]


def test_a_request_looks_nothing_up_and_writes_only_engines_and_pictures(tmp_path: Path) -> None:
    home, work, cache, out = (tmp_path / name for name in ("home", "work", "cache", "out"))
    for folder in (home, work, out):
        folder.mkdir()
    environment = {name: value for name, value in os.environ.items() if name.startswith(("PATH", "PYTHON", "LANG"))}
    environment |= {"HOME": str(home), "LATENTRT_HOME": str(cache), "PYTHONDONTWRITEBYTECODE": "1"}
    generate = [sys.executable, "-m", "latentrt.runtime", "generate", "a red circle"]
    calls = traced([*generate, "--steps", "1", "-o", str(out)], work, tmp_path / "log", environment)
    assert any(call.startswith("openat") for call in calls)
    assert [call for call in calls if LOOKUPS.search(call)] == []
    assert [call for call in calls if re.match(r"(connect|bind|listen|accept|sendto|sendmsg)\w*\(", call)] == []
    assert [call for call in calls if re.match(r"socket\(AF_(INET|NETLINK|PACKET)", call)] == []
    written = {path for call in calls if WRITING.search(call) for path in re.findall(r'"([^"]*)"', call)}
    places = [Path(os.path.normpath(work / path)) for path in written]
    allowed = (cache, out, Path("/dev"), Path("/proc/self"))
    assert [place for place in places if not any(place.is_relative_to(each) for each in allowed)] == []
    assert list(home.iterdir()) == [] and list(work.iterdir()) == []
    assert len(list(out.iterdir())) == 1 and [path.name for path in cache.iterdir()] == ["engines"]
