"""A copy of the working tree, and runs of tests in it: forks of one process that has imported what takes long."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
LAYERS = ("benchmarks", "engines", "export", "runtime")
TESTS = ("tests/engines/", "tests/runtime/")
LEFT_OUT = ("tests/runtime/test_killed.py", "tests/runtime/test_interrupts.py")
"""Tests whose work is done in other processes, which nobody traces."""
PRELOADED = ("torch", "transformers", "diffusers", "onnx.reference", "onnxruntime", "scipy", "hypothesis", "pydantic")
"""What tests import that takes long: it is imported once, and every run of tests is a fork of this process."""
PLUGINS = ("-p", "tracing", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning")


def say(line: str) -> None:
    """Write a line for the one who waits."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def preload() -> None:
    """Import what tests need and nothing of ours; nothing that has threads yet, which a fork would lose."""
    os.environ |= {"OMP_NUM_THREADS": "1", "ORT_DISABLE_TELEMETRY": "1"}
    with suppress(ImportError):  # an extra
        for name in PRELOADED:
            importlib.import_module(name)
        diffusers = sys.modules["diffusers"]
        for name in ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "FluxPipeline", "UniPCMultistepScheduler"):
            getattr(diffusers, name)


class Copy:
    """A copy of the working tree, whose modules are imported in place of the installed ones."""

    def __init__(self, work: Path) -> None:
        """Copy what git tracks or would track."""
        self.tree, self.path = work / "tree", work / "path"
        names = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=True
        ).stdout.decode()
        self.files = sorted(name for name in names.split("\0") if name and (ROOT / name).is_file())
        shutil.rmtree(self.tree, ignore_errors=True)
        for name in self.files:
            (self.tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.tree / name)
        package = self.path / "latentrt"
        package.mkdir(parents=True, exist_ok=True)
        for layer in LAYERS:
            link = package / layer
            link.unlink(missing_ok=True)
            link.symlink_to(self.tree / layer)
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(self.path), str(HERE)]),
            "PYTHONDONTWRITEBYTECODE": "1",  # a change of the same length in the same second would go unseen
            "MUTATION_PACKAGE": str(package),
            "MUTATION_KEPT": str(work / "kept"),
            "MUTATION_MAP": "",
        }
        code = "import latentrt.engines.cache as module; print(module.__file__)"
        found = subprocess.run([sys.executable, "-c", code], env=self.environment, capture_output=True, check=True)
        assert Path(found.stdout.decode().strip()).is_relative_to(package), "the copy is not what is imported"

    def pytest(self, arguments: list[str], timeout: float, **environment: str) -> tuple[int | None, list[str]]:
        """Run tests in the copy; return the exit code, None when they took too long, and the tests that failed."""
        log = self.tree.parent / "pytest.log"
        process = os.fork()  # with what is `PRELOADED`
        if process == 0:
            self._become_pytest([*PLUGINS, *arguments], log, environment)
        ends = time.monotonic() + timeout
        done, status = os.waitpid(process, os.WNOHANG)
        while not done and time.monotonic() < ends:
            time.sleep(0.05)
            done, status = os.waitpid(process, os.WNOHANG)
        if not done:
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
        text = log.read_text(encoding="utf-8", errors="replace")
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+::.+?)(?: - .*)?$", text, re.MULTILINE)
        return os.waitstatus_to_exitcode(status) if done else None, failed

    def _become_pytest(self, arguments: list[str], log: Path, environment: dict[str, str]) -> NoReturn:
        code = 70
        try:
            os.setsid()
            with log.open("wb") as output, Path(os.devnull).open("rb") as nothing:
                for stream, number in ((nothing, 0), (output, 1), (output, 2)):
                    os.dup2(stream.fileno(), number)
            os.chdir(self.tree)
            os.environ.update(self.environment | environment)
            sys.path[:0] = [str(self.tree), *self.environment["PYTHONPATH"].split(os.pathsep)]
            sys.dont_write_bytecode = True
            code = int(pytest.main(arguments))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def tests(self) -> dict[str, Any]:
        """Return what each test runs, how long it takes and whether it passes.

        What is known of a file of tests is kept until that file changes, whatever becomes of the code.
        """
        kept, fresh = self.tree.parent / "tests.json", self.tree.parent / "fresh.json"
        known: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
        wanted = {name: self._digest(name) for name in self.files if name.startswith(TESTS) and "/test_" in name}
        wanted = {name: digest for name, digest in wanted.items() if name not in LEFT_OUT}
        changed = [name for name, digest in wanted.items() if known.get(name, {}).get("digest") != digest]
        if changed:
            say(f"running {len(changed)} files of tests once, to see what each test runs")
            fresh.unlink(missing_ok=True)
            self.pytest(changed, 7200, MUTATION_MAP=str(fresh))
            found: dict[str, Any] = json.loads(fresh.read_text(encoding="utf-8"))
            for name in changed:
                own = {test: facts for test, facts in found.items() if test.startswith(f"{name}::")}
                known[name] = {"digest": wanted[name], "tests": own}
            kept.write_text(json.dumps(known, indent=0), encoding="utf-8")
        every = {test: facts for name in wanted for test, facts in known[name]["tests"].items()}
        return {test: facts for test, facts in every.items() if " at 0x" not in test}  # a name that is never the same

    def _digest(self, name: str) -> str:
        return hashlib.sha256((self.tree / name).read_bytes()).hexdigest()
