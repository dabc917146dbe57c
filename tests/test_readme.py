"""The README says only what the program does, and what it prints runs."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from latentrt.engines.bundle import Bundle, GraphInfo

from .documents import ROOT, blocks, commands, listed, run

README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")


def test_it_is_short() -> None:
    assert len(TEXT.encode()) <= 9000


def test_the_first_block_clones_and_makes() -> None:
    first = blocks(README, "sh")[0].splitlines()
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert first[0].startswith("git clone https://")
    for line, target in zip(first[1:], ("demo", "test"), strict=True):
        assert line.startswith(f"make {target} ") and re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_every_command_is_shown_here_or_on_the_page_of_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    shown = {line.split()[1] for line in commands(README) + commands(ROOT / "docs" / "run.md")}
    assert listed(capsys.readouterr().out) - shown == set()
    assert len({line.split()[1] for line in commands(README)}) == 6


def test_the_python_block_runs_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    (example,) = blocks(README, "python")
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    assert (tmp_path / "circle.png").stat().st_size > 0
    assert capsys.readouterr().out.startswith("[1] ")


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_the_commands_run_as_printed(
    tiny_sd15_checkpoint: Path,
    tiny_sd15_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In their order, but for `bench embedded` and the server, with a tiny checkpoint in place of the hub's.

    Graphs of the tiny checkpoint that are there already are not traced again.
    """
    pytest.importorskip("tensorrt_rtx")
    from latentrt.export import exporter

    made = {graph.name: graph for graph in Bundle.open(tiny_sd15_bundle).manifest.graphs}

    def copied(build: Callable[[], Any], folder: Path, precision: str, *_: object, **__: object) -> list[GraphInfo]:
        assert precision == "fp32"
        graph = made[build().name]
        for name in (*graph.files, *(reference.file for reference in graph.references)):
            shutil.copy(tiny_sd15_bundle / name, folder / name)
        return [graph]

    monkeypatch.setattr(exporter, "write_graph", copied)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "stable-diffusion-v1-5").mkdir()
    (tmp_path / "stable-diffusion-v1-5" / "stable-diffusion-v1-5").symlink_to(tiny_sd15_checkpoint)
    for line in commands(README):
        if line not in ("latentrt bench embedded", "latentrt serve sd15"):
            assert run(shlex.split(line)[1:]) == 0, (line, capsys.readouterr().err)
    assert len(list(tmp_path.glob("latentrt-*.png"))) == 2


def test_the_place_of_the_summary() -> None:
    assert TEXT.count("<!-- summary:begin -->") == TEXT.count("<!-- summary:end -->") == 1


def test_numbers_beside_others_are_those_of_the_generated_table() -> None:
    rows = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8").splitlines()
    quoted = re.findall(r"\[(\d\.\d\d ×), (\d+ MiB)\]", TEXT)
    assert len(quoted) == 4
    assert [pair for pair in quoted if not any(all(number in row for number in pair) for row in rows)] == []
