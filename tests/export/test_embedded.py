"""The bundle that ships is what an export of the checkpoint that ships gives."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest
from latentrt.engines.bundle import Bundle
from latentrt.engines.bundle.references import read_reference
from latentrt.engines.selfcheck import relative_error
from latentrt.export.embedded import BUNDLE, CHECKPOINT, bundle_path, ensure_bundle

pytest.importorskip("diffusers")


def test_the_bundle_that_ships_is_whole_and_used_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LATENTRT_HOME", str(tmp_path))
    assert Bundle.open(ensure_bundle()).problems() == {}
    assert ensure_bundle() == BUNDLE and not list(tmp_path.iterdir())
    assert tmp_path in bundle_path("fp16").parents
    listed = {*Bundle.open(BUNDLE).manifest.files, "manifest.json"}
    assert {file.name for file in BUNDLE.iterdir()} == listed


@pytest.mark.slow
def test_a_fresh_export_gives_the_bundle_that_ships(tmp_path: Path) -> None:
    from latentrt.export import export_checkpoint

    ours = Bundle.open(BUNDLE)
    shipped = ours.manifest
    installed = {tool: metadata.version(tool) for tool in shipped.tools}
    exported = Bundle.open(export_checkpoint(CHECKPOINT, tmp_path / "bundle"))
    fresh = exported.manifest
    assert set(fresh.files) == set(shipped.files)
    for graph in fresh.graphs:
        for reference in graph.references:  # the module's outputs depend on the processor in their last digits
            theirs, rows = (read_reference(each, graph, reference) for each in (exported, ours))
            for name, array in theirs.items():
                assert relative_error(array, rows[name]) < 1e-5, (graph.name, name)
    for graph in fresh.graphs:  # the error itself depends on the processor
        assert graph.model_copy(update={"parity": None}) in [
            g.model_copy(update={"parity": None}) for g in shipped.graphs
        ]
    assert fresh.model_copy(update=dict.fromkeys(("graphs", "files", "tools"))) == shipped.model_copy(
        update=dict.fromkeys(("graphs", "files", "tools"))
    )
    if {**shipped.tools, "torch": ""} == {**installed, "torch": ""}:  # other versions write other graphs
        graphs = {name for name in shipped.files if not name.endswith(".rows")}
        assert {name: fresh.files[name] for name in graphs} == {name: shipped.files[name] for name in graphs}
