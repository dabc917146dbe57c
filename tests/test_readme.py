"""The README says only what the program does."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from pathlib import Path

import pytest
from latentrt.runtime import Pipeline
from latentrt.runtime.cli import run

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


COMMANDS = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("latentrt ")]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_and_options_exist(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(line, comments=True)[1:]
    command = words[: 2 if words[0] == "bench" and len(words) > 1 and words[1] in ("report", "compare") else 1]
    assert run([*command, "--help"]) == 0
    text = capsys.readouterr().out
    for option in (word for word in words if word.startswith("-") and word != "-"):
        assert re.search(rf"(^|[\s,]){re.escape(option)}\b", text, re.MULTILINE), f"{option} is not in the help"


def test_every_command_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    listed = re.findall(r"^  (\w+)  ", capsys.readouterr().out.partition("Commands:")[2], re.MULTILINE)
    assert set(listed) == {line.split()[1] for line in COMMANDS}


def test_python_examples_use_arguments_that_exist() -> None:
    (example,) = blocks("python")
    calls = [node for node in ast.walk(ast.parse(example)) if isinstance(node, ast.Call)]
    used = {
        k.arg for call in calls if isinstance(call.func, ast.Name) and call.func.id == "pipe" for k in call.keywords
    }
    assert used and used <= set(inspect.signature(Pipeline.__call__).parameters)
    assert len(example.strip().splitlines()) <= 8


def test_the_two_commands_come_first_and_exist() -> None:
    first = blocks("sh")[0]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in ("demo", "test"):
        assert f"make {command}" in first and re.search(rf"^{command}:", makefile, re.MULTILINE)


def test_linked_files_exist() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert links and [link for link in links if not (ROOT / link).exists()] == []
