"""Ctrl-C at any moment: one line and exit code 130, or the finished work; never a traceback or another error."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="signals are POSIX's")

START = """
import runpy, signal
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
print("ready", flush=True)
from latentrt.runtime.cli import interrupts
watch = interrupts.watch
def watch_from_here():
    watch()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
interrupts.watch = watch_from_here
runpy.run_module("latentrt.runtime", run_name="__main__", alter_sys=True)
"""
"""Runs the command; an interrupt while Python itself starts, which is not ours to handle, waits until it is watched."""

INSIDE_AN_IMPORT = """
import pathlib, signal, sys
pathlib.Path("onnxruntime.py").write_text('''
import signal
signal.raise_signal(signal.SIGINT)
for _ in range(1000):
    pass
raise ImportError("no library")
''')
sys.path.insert(0, "")
print("ready", flush=True)
from latentrt.runtime.cli import main
main()
"""
"""An onnxruntime that is interrupted inside its import, and would then fail."""

DROPPED = """
import signal
from latentrt.runtime.cli import app, main
class Noisy:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
        for _ in range(1000):
            pass
def execute(arguments):
    noisy = Noisy()
    del noisy
    while True:
        pass
app.execute = execute
print("ready", flush=True)
main()
"""
"""An interrupt inside a finalizer, where Python prints exceptions and goes on."""


INSIDE_TEXT = """
from latentrt.runtime.cli import app, main
def execute(arguments):
    exec("import signal; signal.raise_signal(signal.SIGINT); [None for _ in range(1000)]")
app.execute = execute
print("ready", flush=True)
main()
"""
"""An interrupt inside text that is executed, after which Python ends a process by the signal."""


def start(folder: Path, *arguments: str, delay: float | None = None) -> tuple[int, str]:
    """Start Python, send SIGINT some seconds after it printed a line, and return its exit code and standard error."""
    command = [sys.executable, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        if delay is not None:
            time.sleep(delay)
            process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=300)
    return process.returncode, err


DELAYS = [0.0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.1]


@pytest.mark.parametrize("delay", DELAYS)
def test_an_interrupt_is_one_line_at_any_moment(tmp_path: Path, delay: float) -> None:
    code, err = start(
        tmp_path, "-c", START, "--quiet", "generate", "a star", "--steps", "2", "-o", "star.png", delay=delay
    )
    assert (code, err) in ((130, "latentrt: error: interrupted\n"), (0, "")), (delay, code, err)
    assert code == 130 or (tmp_path / "star.png").stat().st_size > 0
    assert [path.name for path in tmp_path.iterdir()] in ([], ["star.png"])


def test_an_interrupt_inside_an_import_is_not_the_library_s_error(tmp_path: Path) -> None:
    code, err = start(tmp_path, "-c", INSIDE_AN_IMPORT, "generate", "a star", "-o", "star.png")
    assert (code, err) == (130, "latentrt: error: interrupted\n")


def test_an_interrupt_inside_executed_text_has_the_exit_code(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(INSIDE_TEXT)  # only what runs by -m ends so
    assert start(tmp_path, "-m", "program") == (130, "latentrt: error: interrupted\n")


def test_an_interrupt_inside_a_finalizer_is_not_lost(tmp_path: Path) -> None:
    code, err = start(tmp_path, "-c", DROPPED)
    assert (code, err) == (130, "latentrt: error: interrupted\n")
