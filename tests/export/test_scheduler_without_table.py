"""A checkpoint whose scheduler no step table holds is refused before anything is exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")

from latentrt.engines.errors import UnsupportedModelError
from latentrt.export import export_checkpoint, exporter


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"_class_name": "DDPMScheduler", "variance_type": "learned_range"}, "and the denoiser gives none"),
        ({"_class_name": "DDPMScheduler", "variance_type": "learned"}, "use 'learned_range', or ddim"),
        ({"_class_name": "DPMSolverSDEScheduler"}, "the nearest sampler is dpmpp_2m_sde"),
    ],
)
def test_refused_at_export_with_the_nearest_sampler(
    options: dict[str, Any], message: str, tiny_sd15_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(tiny_sd15_checkpoint, tmp_path / "checkpoint")
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(options))
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", options["_class_name"]]
    (folder / "model_index.json").write_text(json.dumps(index))
    monkeypatch.setattr(exporter, "write_graph", lambda *_, **__: pytest.fail("a graph was exported"))
    with pytest.raises(UnsupportedModelError) as caught:
        export_checkpoint(folder, tmp_path / "bundle")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "bundle").exists()
