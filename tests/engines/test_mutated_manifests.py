"""Manifests that somebody has changed, by chance or on purpose: an error of ours in one line, or a bundle."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from latentrt.engines.bundle import Bundle
from latentrt.engines.errors import BundleError, LatentRTError
from latentrt.export.embedded import BUNDLE

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

MANIFEST: dict[str, Any] = json.loads((BUNDLE / "manifest.json").read_text(encoding="utf-8"))
ODD = [
    None,
    True,
    -1,
    0,
    2**31,
    2**63,
    10**400,
    -0.5,
    1e308,
    "",
    ".",
    "..",
    "../x",
    "/etc/passwd",
    "a\nb",
    "\0",
    "\ud83d",
]
ODD += ["NaN", "-Infinity", "x" * 300, "C:x", "a//b", [], {}, [[]], {"": {}}]

values = st.sampled_from(ODD) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the way to everything inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, inner in items for place in places(inner, (*path, key)))][0 if path else 1 :]


PLACES = places(MANIFEST)


@st.composite
def manifests(draw: st.DrawFn) -> Any:
    """The embedded model's manifest with a few values replaced, removed, repeated or renamed."""
    manifest = copy.deepcopy(MANIFEST)
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from(PLACES))
        holder: Any = manifest
        try:
            for key in way:
                holder = holder[key]
            old = holder[last]
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change has removed it
        if isinstance(holder, str):
            continue
        change = draw(st.sampled_from(["replace", "replace", "remove", "repeat", "rename"]))
        if change == "replace":
            holder[last] = draw(values)
        elif change == "remove":
            del holder[last]
        elif isinstance(holder, list):
            holder.append(copy.deepcopy(old))
        else:
            holder[str(draw(values))[:400]] = holder.pop(last) if change == "rename" else copy.deepcopy(old)
    return manifest


def use(folder: Path, manifest: bytes) -> None:
    """Open and check a bundle with this manifest; what is raised must be of ours, and one line."""
    (folder / "manifest.json").write_bytes(manifest)
    try:
        bundle = Bundle.open(folder)
        for graph in bundle.manifest.graphs:
            bundle.digest(bundle.graph(graph.name))
        bundle.problems()
        for name in bundle.manifest.files:
            bundle.file(name)
    except LatentRTError as error:
        assert str(error).isprintable() and len(str(error)) < 2000, error


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mutated")


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(manifest=manifests())
def test_changed_manifests_give_one_line_or_a_bundle(folder: Path, manifest: Any) -> None:
    use(folder, json.dumps(manifest).encode())


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(place=st.integers(0, (BUNDLE / "manifest.json").stat().st_size - 1), piece=st.binary(max_size=8))
def test_changed_bytes_give_one_line_or_a_bundle(folder: Path, place: int, piece: bytes) -> None:
    data = (BUNDLE / "manifest.json").read_bytes()
    use(folder, data[:place] + piece + data[place + len(piece) :])


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(manifest=values)
def test_any_json_gives_one_line(folder: Path, manifest: Any) -> None:
    use(folder, json.dumps(manifest).encode())


@pytest.mark.parametrize("where", ["scheduler", "source", "graphs", "latent", "format_version"])
@pytest.mark.parametrize("depth", [20, 500, 100_000])
def test_deep_nesting_is_refused(folder: Path, where: str, depth: int) -> None:
    marked = json.dumps({**MANIFEST, where: {"deep": "MARK"}})
    (folder / "manifest.json").write_text(marked.replace('"MARK"', "[" * depth + "]" * depth))
    with pytest.raises(BundleError) as caught:
        Bundle.open(folder)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "Infinity", "1" * 5000])
def test_numbers_that_json_or_a_machine_cannot_hold_are_refused(folder: Path, number: str) -> None:
    marked = json.dumps({**MANIFEST, "scheduler": {**MANIFEST["scheduler"], "beta_end": "MARK"}})
    (folder / "manifest.json").write_text(marked.replace('"MARK"', number))
    with pytest.raises(BundleError, match="cannot be read as JSON"):
        Bundle.open(folder)


def test_a_manifest_that_is_too_large_is_not_read(folder: Path) -> None:
    (folder / "manifest.json").write_bytes(b" " * (1 << 24) + json.dumps(MANIFEST).encode())
    with pytest.raises(BundleError, match="a manifest has at most"):
        Bundle.open(folder)
