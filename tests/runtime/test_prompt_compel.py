"""Compel's prompt syntax against Compel 2.5.1, whose results were recorded by running this file where it is installed.

Both get a text encoder in closed form in place of CLIP's. Compel ran as
`Compel(truncate_long_prompts=False, downweight_mode=DownweightMode.REMOVE)`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrt.engines.bundle import Bundle
from latentrt.engines.errors import RequestError
from latentrt.export.embedded import BUNDLE
from latentrt.runtime.prompt.chunks import Tokens
from latentrt.runtime.prompt.compel import CompelPrompt
from latentrt.runtime.prompt.compel_parser import parse
from latentrt.runtime.prompt.tokenizer import Tokenizer

RECORDED = Path(__file__).parent / "compel.json"
PROMPTS = [
    "",
    "  a   red  ",
    "a red++ (blue square)-- cat",
    "(a red circle)1.3 on the blue-",
    'a "red circle"+ cat',
    "a (red (blue)+ star)1.2, small cat-",
    "low-poly cat+, star",
    r"a \(red\) cat+ , dog. star",
    r"C\+\+ cat+",
    "((a red)+ cat)0.5 star",
    "(red",
    "a (= b)+ cat",
    "1,000 cats+ (a,b)+",
    "word (cat)-0.5 x",
    "cat+dog star+-",
    "a (red)1 (blue)1. (cat).5",
    "(a)+(b)-c",
    "a(red)+ cat",
    "cat (a red ((star)+)+)-",
    r'a "red \"cat\" star"+ b',
    "(red. blue, cat)+",
    '("a red circle", "blue square").blend(0.7, 0.3)',
    '("a red+ circle", "blue square-").blend(1, -0.5, no_normalize)',
    "(cat, star).blend()",
    '("a red circle", "blue square+").and()',
    '("a red circle", "blue square", cat).and(1, 0.5, 1.2)',
    '("a (= b)+ red", star).and()',
    "a red circle, small star. " * 12 + "blue+ cat " * 5,
    "red blue " * 60 + "cat+",
    "a red circle on the blue background, " * 20 + "(small star)0.4",
]


def closed_form(ids: Any) -> Any:
    """Return what stands for a text encoder's output [L, 2] of token ids [L]: what is at a place and before it."""
    ids = np.asarray(ids, np.float64)
    return np.stack([np.sin(ids + np.arange(len(ids))), np.cos(np.cumsum(ids))], axis=1).astype(np.float32)


def summary(conditioning: Any) -> list[float]:
    """Return the length of a conditioning and three of its projections."""
    values = np.asarray(conditioning, np.float64).reshape(-1, 2)
    places = np.arange(values.size).reshape(values.shape)
    return [float(len(values)), *(float((values * np.sin(k * places + k)).sum()) for k in (0.1, 1, 3))]


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    bundle = Bundle.open(BUNDLE)
    info = bundle.manifest.tokenizers[0]
    return Tokens(Tokenizer(bundle.file(info.file), info))


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: prompt[:30])
def test_conditioning_is_compel_s(tokens: Tokens, prompt: str) -> None:
    parsed = CompelPrompt(prompt, tokens)
    encoded = {chunk: closed_form(chunk) for chunk in [tokens.weighted().chunk, *parsed.chunks]}
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))[prompt]
    np.testing.assert_allclose(summary(parsed.conditioning(encoded)), recorded, atol=1e-3)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a cat.swap(dog)", r"has \.swap\(…\), which latentrt does not know: prompt_syntax compel takes \+, -,"),
        ("a withLora(cat, 0.5) star", r"has withLora\(…\)"),
        ('("a", "b").blend(1)', r"has \.blend\(1\): give a number for each of its 2 prompts"),
        ('("a", "b").and(x, y)', r"has \.and\(x, y\): give a number"),
        ('("a", "b").and() and more', r"cannot be read: write \("),
        ('more ("a", "b").blend(1, 1)', r"cannot be read: write \("),
    ],
)
def test_other_operators_are_refused_by_name(prompt: str, message: str) -> None:
    with pytest.raises(RequestError, match=message) as refused:
        parse(prompt)
    assert "\n" not in str(refused.value)


def record() -> None:
    """Write what Compel gives for every prompt."""
    import torch
    from compel import Compel, DownweightMode  # type: ignore[import-not-found]
    from latentrt.export.embedded import CHECKPOINT
    from transformers import CLIPTextModel, CLIPTokenizerFast

    class Encoder(CLIPTextModel):  # type: ignore[misc]
        def forward(self, ids: Any, *_: Any, **__: Any) -> Any:
            found = torch.from_numpy(np.stack([closed_form(row) for row in ids.numpy()]))
            return type("Output", (), {"last_hidden_state": found})

    tokenizer = CLIPTokenizerFast.from_pretrained(CHECKPOINT / "tokenizer")
    encoder = Encoder.from_pretrained(CHECKPOINT / "text_encoder")
    compel = Compel(tokenizer, encoder, truncate_long_prompts=False, downweight_mode=DownweightMode.REMOVE)
    found = {prompt: summary(compel.build_conditioning_tensor(prompt)[0].detach().numpy()) for prompt in PROMPTS}
    RECORDED.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    record()
