"""Records of a manifest that say what a request becomes."""

from __future__ import annotations

from typing import Any

import pytest
from latentrt.engines.bundle import Branch, GuidanceInfo, NumbersInput, TokenizerInfo
from pydantic import ValidationError

TOKENIZER: dict[str, Any] = {"file": "t.json", "max_length": 77, "bos_id": 0, "eos_id": 1, "pad_id": 1}
FROM_PROMPT = GuidanceInfo(
    above=0, branches=(Branch(text="negative", scale=-1), Branch(text="prompt", constant=1, scale=1))
)


@pytest.mark.parametrize(
    ("guidance", "scale", "negative", "weights"),
    [
        (GuidanceInfo(), 7.5, False, (-6.5, 7.5)),
        (GuidanceInfo(), 1.0, True, (1.0,)),  # 1 is no guidance
        (GuidanceInfo(), 1.001, True, (1 - 1.001, 1.001)),
        (GuidanceInfo(above=None), 7.5, True, (1.0,)),
        (GuidanceInfo(needs_negative=True), 4.0, False, (1.0,)),
        (GuidanceInfo(needs_negative=True), 4.0, True, (-3.0, 4.0)),
        (FROM_PROMPT, 0.0, False, (1.0,)),
        (FROM_PROMPT, 0.5, False, (-0.5, 1.5)),
    ],
)
def test_weights_of_branches(guidance: GuidanceInfo, scale: float, negative: bool, weights: tuple[float, ...]) -> None:
    assert guidance.weights(scale, negative_given=negative) == pytest.approx(weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"template": "no place"}, "has no one place"),
        ({"template": "{} and {}"}, "has no one place"),
        ({"lengths": (64, 32)}, "do not rise"),
        ({"lengths": (32, 77)}, "do not rise"),
        ({"lengths": (32, 128)}, "do not rise"),
        ({"max_length": 2}, "greater than 2"),
    ],
)
def test_tokenizers_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TokenizerInfo(**{**TOKENIZER, **change})


def test_room_between_begin_and_end() -> None:
    ends = [(0, 1), (None, 1), (None, None)]
    assert [TokenizerInfo(**{**TOKENIZER, "bos_id": b, "eos_id": e}).room for b, e in ends] == [75, 76, 77]


def test_branches_and_rows_that_cannot_be() -> None:
    with pytest.raises(ValidationError, match="other branches"):
        GuidanceInfo(branches=(Branch(text="prompt", scale=1), Branch(text="negative", constant=1)))
    with pytest.raises(ValidationError, match="rows of 2 and of 1 numbers"):
        NumbersInput(name="x", values=("height", "width"), negative=(0.0,))
