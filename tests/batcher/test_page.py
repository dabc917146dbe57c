"""What the page on batching shows runs as printed."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..documents import ROOT, blocks


def test_the_example_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    (example,) = blocks(ROOT / "docs" / "batching.md", "python")
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "batching.md", "exec"), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.png", "2.png", "3.png"]
