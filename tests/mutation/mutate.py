"""Whether the tests would see a fault: changes the source in a copy of the tree and runs the tests that concern it.

    python tests/mutation/mutate.py                      # every planted fault and 60 random ones
    python tests/mutation/mutate.py --random 200 --seed 7 --only runtime/loop
    python tests/mutation/mutate.py --random 0 --only "cache key"

A fault is caught when a test fails that passes without it, or hangs. The tests of a fault are those that run the
function that it is in, found by running the suite once under `tracing`; those that run little else come first. What
nobody caught is printed as a diff. The exit code is 1 when a planted fault was not caught, or less than nine of ten
random ones. Needs Python 3.11 or newer.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import hashlib
import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest
from operators import sites
from planted import PLANTED

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
LAYERS = ("benchmarks", "engines", "export", "runtime")
MUTATED = ("engines", "runtime")
TESTS = ("tests/engines/", "tests/runtime/")
LEFT_OUT = ("tests/runtime/test_killed.py", "tests/runtime/test_interrupts.py")
"""Tests whose work is done in other processes, which nobody traces."""
ELSEWHERE = {
    "engines/tensorrt/worker.py": ("tests/engines/test_child.py", "tests/engines/test_tensorrt_build.py"),
    "engines/tensorrt/child.py": ("tests/engines/test_child.py",),
}
"""Modules whose work is done in other processes, and the tests of them."""
PRELOADED = ("torch", "transformers", "diffusers", "onnx.reference", "onnxruntime", "scipy", "hypothesis", "pydantic")
"""What tests import that takes long: it is imported once, and every run of tests is a fork of this process."""
PLUGINS = ("-p", "tracing", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning")
SECONDS = 30.0
"""Of tests that are run for one fault, as they were traced: enough for all but those that every test runs."""
ENOUGH = 0.9


@dataclass(frozen=True)
class Mutant:
    """A changed module: its path, the line of the change, and what it is called."""

    name: str
    path: str
    line: int
    source: bytes
    planted: bool


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


def planted(tree: Path) -> Iterator[Mutant]:
    """Yield the faults of the list; of one that does not fit the source any more the source is empty."""
    for name, path, old, new in PLANTED:
        source = (tree / path).read_text(encoding="utf-8") if (tree / path).exists() else ""
        if source.count(old) != 1:
            yield Mutant(name, path, 0, b"", True)
            continue
        line = source[: source.index(old)].count("\n") + 1 + (len(old) - len(old.lstrip("\n")))
        yield Mutant(name, path, line, source.replace(old, new).encode(), True)


def drawn(tree: Path, count: int, seed: int, only: str) -> Iterator[Mutant]:
    """Yield random changes, as many of each kind as there are, each module as often as any."""
    generator = random.Random(seed)
    by_kind: defaultdict[str, list[Mutant]] = defaultdict(list)
    for layer in MUTATED:
        for file in sorted((tree / layer).rglob("*.py")):
            path = file.relative_to(tree).as_posix()
            if only not in path:
                continue
            source = file.read_text(encoding="utf-8")
            for site in sites(source):
                by_kind[site.kind].append(Mutant(site.kind, path, site.line, site.applied(source.encode()), False))
    for mutants in by_kind.values():
        generator.shuffle(mutants)
    kinds = sorted(by_kind)
    generator.shuffle(kinds)
    seen: set[tuple[str, int]] = set()
    while count > 0 and kinds:
        for kind in list(kinds):
            while by_kind[kind]:
                mutant = by_kind[kind].pop()
                if (mutant.path, mutant.line) not in seen:
                    break
            else:
                kinds.remove(kind)
                continue
            seen.add((mutant.path, mutant.line))
            yield mutant
            count -= 1
            if count == 0:
                return


def function_at(source: str, line: int) -> str | None:
    """Return the qualified name of the innermost function around a line; None outside of all."""
    best = None
    inside: list[tuple[ast.AST, str]] = [(ast.parse(source), "")]
    while inside:
        node, prefix = inside.pop()
        for child in ast.iter_child_nodes(node):
            name = prefix
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                begins = min([child.lineno, *(decorator.lineno for decorator in child.decorator_list)])
                if not begins <= line <= (child.end_lineno or 0):
                    continue
                name = f"{prefix}{child.name}."
                if isinstance(child, ast.FunctionDef):
                    best, name = f"{prefix}{child.name}", f"{name}<locals>."
            inside.append((child, name))
    return best


def concerned(tests: dict[str, Any], source: str, mutant: Mutant) -> list[str]:
    """Return the tests that run the changed function, or the changed module where no function holds the change."""
    function = function_at(source, mutant.line)
    found = []
    for name, facts in tests.items():
        inside = [place for place in facts["ran"] if place.startswith(f"{mutant.path}:")]
        elsewhere = name.partition("::")[0] in ELSEWHERE.get(mutant.path, ())
        if facts["passed"] and (elsewhere or (f"{mutant.path}:{function}" in inside if function else inside)):
            found.append((facts["seconds"] * len(facts["ran"]) / max(len(inside), 1), name))
    chosen, total = [], 0.0
    for _, name in sorted(found):  # quick ones first that run little else
        total += tests[name]["seconds"]
        if chosen and total > SECONDS:
            break
        chosen.append(name)
    return chosen


class Trial:
    """Runs the tests of mutants, and believes a test that failed only if it passes in the same company unchanged."""

    def __init__(self, copy: Copy, tests: dict[str, Any]) -> None:
        self._copy, self._tests = copy, dict(tests)
        self._trusted: set[str] = set()

    def of(self, mutant: Mutant) -> tuple[str, str]:
        """Return what became of a mutant, and the test that failed.

        Beside `caught` and `survived`: `not run`, where no test comes that way, and `stale`, where the source of a
        planted fault has changed, so that the list needs care.
        """
        if not mutant.source:
            return "stale", ""
        file = self._copy.tree / mutant.path
        original = file.read_bytes()
        while names := concerned(self._tests, original.decode(), mutant):
            file.write_bytes(mutant.source)
            try:
                code, failed = self._run(names)
            finally:
                file.write_bytes(original)
            if code == 0:
                return "survived", ""
            first = failed[0] if failed and failed[0] in names else ""
            if first in self._trusted:
                return "caught", first
            code, failed = self._run(names[: names.index(first) + 1] if first else names)
            if code == 0:
                self._trusted |= {first} - {""}
                return "caught", first or "it hangs, or cannot be imported"
            if not set(failed) & set(names):
                sys.exit(f"the tests do not run on the unchanged source: see {self._copy.tree.parent / 'pytest.log'}")
            for name in set(failed) & set(names):
                say(f"    {name} fails by itself: it is left out")
                self._tests.pop(name)
        return "not run", ""

    def _run(self, names: list[str]) -> tuple[int | None, list[str]]:
        listed = self._copy.tree.parent / "chosen.txt"
        listed.write_text("\n".join(names), encoding="utf-8")
        seconds = sum(self._tests[name]["seconds"] for name in names)
        return self._copy.pytest(["-x", "-rfE", "--tb=no", f"@{listed}"], 60 + 4 * seconds)


def diff(copy: Copy, mutant: Mutant) -> str:
    """Return what a mutant changes."""
    before, after = (copy.tree / mutant.path).read_text(encoding="utf-8"), mutant.source.decode()
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), mutant.path, mutant.name, n=2, lineterm="")
    return "\n".join(lines)


def main() -> int:
    """Run the faults that were asked for and print what became of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", type=int, default=60, help="how many random faults (default: 60)")
    parser.add_argument("--seed", type=int, default=1, help="which ones (default: 1)")
    parser.add_argument("--only", default="", help="a part of the path, or of the name of a planted fault")
    parser.add_argument("--skip", type=int, default=0, help="how many faults to leave out (default: 0)")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "latentrt-mutation")
    given = parser.parse_args()
    os.nice(10)
    preload()
    copy = Copy(given.work)
    tests = copy.tests()
    failing = [name for name, facts in tests.items() if not facts["passed"]]
    say(f"{len(tests)} tests, of which {len(failing)} do not pass unchanged and are left out")
    mutants = [m for m in planted(copy.tree) if given.only in m.path or given.only in m.name]
    mutants += drawn(copy.tree, given.random, given.seed, given.only)
    mutants = mutants[given.skip :]
    counts: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    survivors, trial = [], Trial(copy, tests)
    for number, mutant in enumerate(mutants, 1):
        result, test = trial.of(mutant)
        counts[mutant.planted][result] += 1
        say(f"{number}/{len(mutants)} {result:9} {mutant.name}  {mutant.path}:{mutant.line}  {test}")
        if result in ("survived", "not run"):
            survivors.append(mutant)
    for mutant in survivors:
        say(f"\n{diff(copy, mutant)}")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    for kind, title in ((True, "planted"), (False, "random")):
        total = sum(counts[kind].values())
        say(f"{title}: {counts[kind]['caught']} of {total} caught, {dict(counts[kind])}")
    say(f"{(used.ru_utime + used.ru_stime) / 60:.1f} minutes of processor time")
    planted_missed = sum(counts[True].values()) - counts[True]["caught"]
    return int(planted_missed > 0 or counts[False]["caught"] < ENOUGH * sum(counts[False].values()))


if __name__ == "__main__":
    sys.exit(main())
