from __future__ import annotations

from pathlib import Path

import pytest
from latentrt.engines.bundle import Bundle

from .small_bundles import linear_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return linear_bundle(tmp_path / "bundle")
