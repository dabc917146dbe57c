"""The documentation says only what the program does: commands, links, generated tables, tutorials."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from latentrt.runtime.sampling import catalog, k_diffusion, registry

from .documents import PAGES, ROOT, blocks, commands, dead_links, missing_from_help, named_in_prose, page_name

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib  # type: ignore[no-redef]

DOCS = ROOT / "docs"
SAID = sorted({(page_name(page), line) for page in PAGES for line in commands(page) + named_in_prose(page)})


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"loaded_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("page", "line"), SAID)
def test_commands_and_options_exist(page: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert missing_from_help(line, capsys) == []


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_somewhere(page: Path) -> None:
    assert dead_links(page) == []


def test_every_page_is_in_the_navigation_once() -> None:
    def files(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [file for value in (entry.values() if isinstance(entry, dict) else entry) for file in files(value)]

    navigation = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]["nav"]
    assert sorted(files(navigation)) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def test_generated_tables_are_what_the_code_says() -> None:
    reference = load(ROOT / ".ci" / "reference.py")
    stale = [
        page
        for page in reference.PAGES
        if reference.written(page, text := (DOCS / page).read_text(encoding="utf-8")) != text
    ]
    assert stale == [], "run `make docs` and commit what it writes"


def test_python_of_the_page_on_running_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    (example,) = blocks(DOCS / "run.md", "python")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(example, "run.md", "exec"), names)
    assert names["result"].seeds == [1] and names["varied"].size == names["result"].images[0].size


def test_the_sampler_of_the_tutorial_has_order_two(monkeypatch: pytest.MonkeyPatch) -> None:
    function, entry, short = blocks(DOCS / "extend" / "sampler.md", "python")
    methods = dict(vars(k_diffusion))
    exec(compile(function, "sampler.md", "exec"), methods)
    monkeypatch.setattr(k_diffusion, "ralston", methods["ralston"], raising=False)
    monkeypatch.setattr(catalog, "SAMPLERS", catalog.SAMPLERS)
    for table, text in ((catalog.SAMPLERS, entry), (catalog.SHORT_NAMES, short)):
        for name, value in eval(f"{{{text}}}", dict(vars(catalog))).items():
            monkeypatch.setitem(table, name, value)  # type: ignore[arg-type]
    assert "ralston" in registry.names()

    convergence = load(Path(inspect.getfile(inspect.currentframe())).parent / "runtime" / "test_convergence.py")  # type: ignore[arg-type]
    monkeypatch.setattr(convergence, "IN_SIGMA", (*convergence.IN_SIGMA, "Ralston"))
    for config in (convergence.EXPONENTIAL, convergence.KARRAS):
        assert convergence.order_of("Ralston", config) == pytest.approx(2, abs=0.1)
    run = registry.step_table({"_class_name": "EulerDiscreteScheduler"}, 20, sampler="ralston_karras")
    assert (len(run), run.history) == (39, 2)
