"""Tables and arguments by themselves: what one row says is no other's, and nothing passes in silence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from latentrt.engines.bundle import Bundle
from latentrt.engines.errors import RequestError, SchedulerError
from latentrt.export.embedded import BUNDLE
from latentrt.runtime.arguments import read_by
from latentrt.runtime.sampling.step_table import StepTable, TableBuilder


def built(scale: float = 1.0) -> StepTable:
    builder = TableBuilder(history=1)
    clipped = builder.clip(builder.prediction, 0.5)
    builder.row(3, clipped * scale, [builder.prediction], original=(0.1, 0.9))
    builder.row(2, builder.prediction, original=(0.5, 0.5), draw=1)
    builder.row(1, builder.latents, original=(0.9, 0.1))
    return builder.table()


def test_a_clip_is_of_its_own_row() -> None:
    table, x = built(), np.array([-2.0, 0.25, 2.0])
    assert table.clip_limits.tolist() == [0.5, 0.0, 0.0] and not table.clip_weights[1:].any()
    latents, (history,) = table.apply(0, x, x, [x])
    assert latents.tolist() == [-0.5, 0.25, 0.5] and history.tolist() == x.tolist()
    latents, (history,) = table.apply(1, 0 * x, x, [x])
    assert latents.tolist() == x.tolist() and not history.any()  # a slot that is not given is empty


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_the_first_rows_keep_the_state_that_they_end_in(rows: int) -> None:
    cut = built().cut(rows)
    assert len(cut) == rows and cut.draw_count == min(rows - 1, 1)
    assert cut.original.tolist() == [[0.1, 0.9], [0.5, 0.5], [0.9, 0.1], [1.0, 0.0]][: rows + 1]
    for part in (cut.weights, cut.clip_weights, cut.clip_limits, cut.draws, cut.input_scales):
        assert len(part) == rows


@pytest.mark.parametrize("scale", [np.inf, np.nan])
def test_numbers_that_are_not_finite_are_no_table(scale: float) -> None:
    with np.errstate(invalid="ignore"), pytest.raises(SchedulerError, match="divide by zero for 3 rows"):
        built(scale)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"original_size": (64, 64)}, "original_size is given: this bundle has nothing that reads it"),
        ({"prompt_2": "a"}, "prompt_2 is given: this bundle has nothing"),
        ({"guidance_rescale": False}, "guidance_rescale is not supported"),  # equals 0.0, and is another thing
        ({"guidance_rescale": 0.5}, "guidance_rescale is not supported"),
    ],
    ids=str,
)
def test_what_a_bundle_does_not_read_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        read_by(Bundle.open(BUNDLE).manifest, given)


def test_what_asks_for_nothing_is_taken() -> None:
    nothing = {"original_size": None, "prompt_2": None, "guidance_rescale": 0.0, "ip_adapter_image": None}
    assert read_by(Bundle.open(BUNDLE).manifest, nothing) == {}
