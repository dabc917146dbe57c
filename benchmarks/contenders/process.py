"""Processes that are measured: one worker per contender, and whole commands from shell to exit."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from ...engines.errors import EngineError

POLL_SECONDS = 0.02


def thread_environment(threads: int) -> dict[str, str]:
    """Return an environment that gives every library the same number of threads and no way to a network."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
    fixed = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONHASHSEED": "0"}
    return {**os.environ, **{name: str(threads) for name in names}, **fixed}


def cores(threads: int) -> list[int]:
    """Return the processor cores that a contender with so many threads is pinned to."""
    return sorted(os.sched_getaffinity(0))[:threads]


def peak_bytes(pid: int | str = "self") -> int:
    """Return the most resident memory that a process has held so far, or 0 where the system does not say.

    `ru_maxrss` would be wrong here: a child inherits the parent's high-water mark through vfork.
    """
    return _status(pid, "VmHWM:")


def resident_bytes(pid: int | str = "self") -> int:
    """Return the resident memory of a process now, or 0 where the system does not say."""
    return _status(pid, "VmRSS:")


def _status(pid: int | str, field: str) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), 0)


def _seconds_used(pid: int) -> float:
    """Return the processor time that a process has used, 0 when it has ended or the system does not say."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Finished:
    """A command that ended well: wall seconds from start to exit, peaks of its resident bytes, standard output."""

    seconds: float
    peak_bytes: int
    anonymous_bytes: int
    """Without what is mapped from files, which the system may drop; the most that was seen, many times a second."""
    output: str


def run_process(command: Sequence[str], *, threads: int | None = None) -> Finished:
    """Run a command and measure it from outside; raises `EngineError` with its last line when it fails."""
    pinned = cores(threads) if threads else None
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            env=thread_environment(threads) if threads else None,
            preexec_fn=(lambda: os.sched_setaffinity(0, pinned)) if pinned else None,
        )
        peak = anonymous = 0
        try:
            while True:
                peak = max(peak, peak_bytes(process.pid))
                anonymous = max(anonymous, _status(process.pid, "RssAnon:"))
                try:
                    code = process.wait(POLL_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    continue
        except BaseException:
            process.kill()
            process.wait()
            raise
        seconds = time.perf_counter() - start
        errors.seek(0)
        if code:
            raise EngineError(f"`{_shown(command)}` failed with exit code {code}: {_last_line(errors.read())}")
        output.seek(0)
        return Finished(seconds, peak, anonymous, output.read().decode(errors="replace"))


def interpreter(contender: str) -> str | None:
    """Return the interpreter that the environment names for a contender, such as `LATENTRT_BENCH_PYTHON_OPTIMUM`.

    For contenders whose packages want other versions than ours. latentrt must be installed there as well.
    """
    return os.environ.get(f"LATENTRT_BENCH_PYTHON_{contender.partition('/')[0].upper()}")


def worker_command(contender: str) -> list[str]:
    """Return the command that starts a contender's worker, in an interpreter of its own where one is named."""
    return [interpreter(contender) or sys.executable, "-m", "latentrt.benchmarks.contenders.worker", contender]


class Worker:
    """A contender in a process of its own, commanded with JSON lines; a context manager."""

    def __init__(self, contender: str, threads: int) -> None:
        self.contender = contender
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            worker_command(contender),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=thread_environment(threads),
            text=True,
            encoding="utf-8",
        )
        self._facts = {"threads": threads, "cores": cores(threads)}

    def prepare(self, **options: Any) -> dict[str, Any]:
        """Import, open and (where the contender compiles) build; returns the seconds of each and versions."""
        return self._ask({"do": "prepare", **self._facts, **options})

    def run(self, request: Mapping[str, Any], *, save: Path | None = None, latents: bool = True) -> dict[str, Any]:
        """Answer one request; returns its stages in seconds and memory in bytes.

        `save` names an .npz file for `images` uint8 [B, H, W, 3] and, when wanted, `latents` [B, C, h, w].
        """
        saved = {"save": None if save is None else str(save), "latents": latents}
        return self._ask({"do": "run", "request": dict(request), **saved})

    def settle(self, pause: float, most: int) -> None:
        """Pause until the worker used no processor time during a pause, or `most` times."""
        used = _seconds_used(self._process.pid)
        for _ in range(most):
            time.sleep(pause)
            before, used = used, _seconds_used(self._process.pid)
            if used == before:
                return

    def _ask(self, command: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            raise EngineError(f"contender {self.contender} died with code {code}: {_last_line(self._errors.read())}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise EngineError(f"contender {self.contender} failed: {reply['error']}")
        return reply

    def close(self) -> None:
        """End the process; calling it again does nothing."""
        assert self._process.stdin and self._process.stdout
        with contextlib.suppress(BrokenPipeError):  # it may have died with a command unread
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _shown(command: Sequence[str]) -> str:
    """Return a command's first words as one line, with programs that are given as text left out."""
    return " ".join("…" if "\n" in word else word for word in command)[:120]


def _last_line(text: bytes) -> str:
    lines = text.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no message"
