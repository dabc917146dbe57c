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
import os
import random
import resource
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from copies import Copy, preload, say
from operators import sites
from planted import PLANTED

MUTATED = ("engines", "runtime")
ELSEWHERE = {
    "engines/tensorrt/worker.py": ("tests/engines/test_child.py", "tests/engines/test_tensorrt_build.py"),
    "engines/tensorrt/child.py": ("tests/engines/test_child.py",),
}
"""Modules whose work is done in other processes, and the tests of them."""
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
