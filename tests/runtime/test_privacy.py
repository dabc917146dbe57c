"""A request tells nobody and writes nothing but its engines and its pictures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

WATCH = """
import socket, sys
calls = []
def hook(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        calls.append((event, arguments))
sys.addaudithook(hook)
from latentrt.runtime.cli import run
code = run(sys.argv[1:])
from time import sleep
sleep(1)  # what reports in the background gets its turn
sys.exit(code or (f"the network was used: {calls}" if calls else 0))
"""


def written(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def environment(**own: str) -> dict[str, str]:
    """Return what a bare shell has, and what is given."""
    return {name: value for name, value in os.environ.items() if name.startswith(("PATH", "PYTHON", "LANG"))} | own


def python(code: str, *arguments: str, folder: Path, env: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_request_leaves_only_engines_and_pictures(tmp_path: Path) -> None:
    home, work, cache = (tmp_path / name for name in ("home", "work", "cache"))
    for folder in (home, work, cache):
        folder.mkdir()
    arguments = ["generate", "a red circle", "--steps", "1", "--seed", "1", "-o", "picture.png"]
    python(WATCH, *arguments, folder=work, env=environment(HOME=str(home), LATENTRT_HOME=str(cache)))
    assert written(home) == [] and written(work) == ["picture.png"]
    assert written(cache) and all(name.startswith("engines/") for name in written(cache))


def test_what_the_user_has_set_stays(tmp_path: Path) -> None:
    code = "import os, latentrt.engines; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    assert python(code, folder=tmp_path, env=environment()) == "1"
    assert python(code, folder=tmp_path, env=environment(ORT_DISABLE_TELEMETRY="0")) == "0"
