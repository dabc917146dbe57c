"""What a wheel and a source distribution hold."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib  # type: ignore[no-redef]

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = ("benchmarks", "engines", "export", "runtime")
SETUP = "import setuptools; setuptools.setup()"


@dataclass(frozen=True)
class Built:
    """The files of a source distribution, those of a wheel, and what their making said."""

    source: set[str]
    wheel: set[str]
    said: str


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """What setuptools would pack, without compressing it."""
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip(f"building needs setuptools 77 or later, here is {setuptools.__version__}")
    folder = tmp_path_factory.mktemp("build")
    for path in ROOT.iterdir():  # a build writes into its source: it gets a folder of links
        if path.name in {*FOLDERS, "deploy", "docs", "examples", "tests", ".ci", ".github"} or path.is_file():
            (folder / path.name).symlink_to(path)
    command = [sys.executable, "-c", SETUP, "egg_info", "build_py", "--build-lib", "lib"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    source = (folder / "latentrt.egg-info" / "SOURCES.txt").read_text(encoding="utf-8").splitlines()
    wheel = {path.relative_to(folder / "lib").as_posix() for path in (folder / "lib").rglob("*") if path.is_file()}
    return Built(set(source), wheel, done.stderr)


def test_every_package_is_listed() -> None:
    found = {path.parent.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("__init__.py")}
    names = {f"latentrt.{'.'.join(path.parts)}" for path in found}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == names - {"latentrt.benchmarks.training"}


def test_the_wheel_holds_modules_types_the_page_and_the_embedded_model(built: Built) -> None:
    packaged = {f"latentrt/{folder}/py.typed" for folder in FOLDERS}
    packaged |= {f"latentrt/export/embedded/{file}" for file in ("bundle/manifest.json", "checkpoint/model_index.json")}
    packaged |= {f"latentrt/runtime/page/files/{path.name}" for path in (ROOT / "runtime/page/files").iterdir()}
    assert packaged <= built.wheel
    modules = {path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    shipped = {name.removeprefix("latentrt/") for name in built.wheel if name.endswith(".py")}
    assert shipped == {name for name in modules if not name.startswith("benchmarks/training/")}


def test_the_wheel_holds_nothing_else(built: Built) -> None:
    kinds = {".py", ".typed", ".json", ".onnx", ".safetensors", ".txt", ".rows", ".html", ".css", ".js"}
    assert [name for name in built.wheel if PurePosixPath(name).suffix not in kinds or name[:9] != "latentrt/"] == []


def test_the_build_warns_of_nothing(built: Built) -> None:
    assert "absent from the `packages` configuration" not in built.said


def test_the_source_distribution_can_be_tested(built: Built) -> None:
    wanted = {"Makefile", "constraints.txt", "zensical.toml", "CHANGELOG.md", ".ci/run", ".ci/reference.py"}
    wanted |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py")}
    for folder in ("deploy", "docs", "examples"):
        wanted |= {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*.??*")}
    assert {name for name in wanted - built.source if "__pycache__" not in name} == set()


def test_urls_and_python_versions_are_given() -> None:
    project = PROJECT["project"]
    assert {"Homepage", "Documentation", "Changelog", "Issues"} <= set(project["urls"])
    versions = {line.rsplit(" ", 1)[1] for line in project["classifiers"] if ":: Python :: 3." in line}
    assert f"3.{project['requires-python'].rpartition('.')[2]}" == min(versions, key=lambda v: int(v[2:]))
