"""The web UI's prompt syntax, against a restatement of it on transformers' text encoder.

The restatement weighs characters one by one and cuts parts out of whole lists of tokens, where the module walks over
brackets and tokens. The first examples are those that the web UI documents.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import numpy as np
import pytest
from latentrt.engines.bundle import Bundle
from latentrt.runtime.prompt.a1111 import A1111Prompt, _pieces
from latentrt.runtime.prompt.chunks import Tokens
from latentrt.runtime.prompt.tokenizer import Tokenizer

DOCUMENTED: dict[str, list[tuple[str | None, float]]] = {
    "normal text": [("normal text", 1.0)],
    "an (important) word": [("an ", 1.0), ("important", 1.1), (" word", 1.0)],
    "(unbalanced": [("unbalanced", 1.1)],
    r"\(literal\]": [("(literal]", 1.0)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        *(("a ", 1.0), ("house", 1.573), (" ", 1.1), ("on", 1.0), (" a ", 1.1), ("hill", 0.55)),
        *((", sun, ", 1.1), ("sky", 1.4641), (".", 1.1)),
    ],
    "a cat BREAK (on: 0.9 )": [("a cat", 1.0), (None, 1.0), ("on", 0.9)],
}
LONG = ", ".join(["a red circle on the blue background"] * 8 + ["(small:1.4) square"] * 12)
PROMPTS = [
    "",
    "a (red) circle",
    "a [[red]] circle, (on the (blue:1.5) background)",
    r"a \(red\) circle \\ (on (the",
    "a red circle BREAK (blue:0.4) square BREAK",
    "(red circle BREAK small cat:1.2)",
    LONG,
    "(large " + "red blue green " * 20 + "cat, " + "small star " * 7 + ": 1.3) cat",
    "red " * 75 + ", blue " * 3,
    "red " * 54 + ", " + "blue " * 21,
    "red " * 55 + ", " + "blue " * 21,
]


@pytest.mark.parametrize("prompt", DOCUMENTED)
def test_weights_are_those_that_the_web_ui_documents(prompt: str) -> None:
    found = [(piece.text, piece.weight) for piece in _pieces(prompt) if piece.text != ""]
    assert [text for text, _ in found] == [text for text, _ in DOCUMENTED[prompt]]
    np.testing.assert_allclose([w for _, w in found], [w for _, w in DOCUMENTED[prompt]], rtol=1e-12)


def weighed(prompt: str) -> list[list[tuple[str, float]]]:
    """Return, for each stretch between BREAKs, its texts and weights, from a weight for every character."""
    stack: dict[str, list[int]] = {"(": [], "[": []}
    kept: list[list[Any]] = []  # character, weight
    rest = prompt
    while rest:
        one, rest = rest[0], rest[1:]
        if one == "\\":
            if rest and rest[0] in "()[]\\":
                kept.append([rest[0], 1.0])
                rest = rest[1:]
        elif one in "([":
            stack[one].append(len(kept))
        elif one in ")]" and stack["(" if one == ")" else "["]:
            factor, first = (1.1 if one == ")" else 1 / 1.1), stack["(" if one == ")" else "["].pop()
            said = "".join(each for each, _ in kept[first:]).rpartition(":")
            if one == ")" and said[1] and said[2].strip().replace(".", "", 1).isdigit():
                factor = float(said[2])
                del kept[len(kept) - len(said[2]) - 1 :]
            for each in kept[first:]:
                each[1] *= factor
        else:
            kept.append([one, 1.0])
    for bracket, factor in (("(", 1.1), ("[", 1 / 1.1)):
        for first in stack[bracket]:
            for each in kept[first:]:
                each[1] *= factor
    stretches: list[list[Any]] = [[]]
    while kept:
        if "".join(each for each, _ in kept[:5]) == "BREAK":
            stretches.append([])
            del kept[:5]
        else:
            stretches[-1].append(kept.pop(0))
    runs = [[(w, "".join(c for c, _ in run)) for w, run in groupby(s, key=lambda each: each[1])] for s in stretches]
    return [[(text, weight) for weight, text in stretch] for stretch in runs]


def reference(prompt: str, tokenizer: Any, encoder: Any) -> Any:
    """Return the conditioning [n·77, E] of a prompt, in torch."""
    import torch

    comma, parts = tokenizer.get_vocab().get(",</w>"), []
    for stretch in weighed(prompt):
        ids: list[tuple[int, float]] = []
        for text, weight in stretch:
            ids += [(token, weight) for token in tokenizer(text, add_special_tokens=False).input_ids]
        while len(ids) > 75:
            cut = 75
            commas = [i for i in range(55, 75) if ids[i][0] == comma]
            if commas and ids[75][0] != comma:
                cut = commas[-1] + 1
            parts.append(ids[:cut])
            ids = ids[cut:]
        parts.append(ids)
    if len(parts) > 1 and not parts[-1]:
        parts.pop()
    out = []
    for part in parts:
        text = [token for token, _ in part]
        row = [tokenizer.bos_token_id, *text, tokenizer.eos_token_id]
        row += [tokenizer.pad_token_id] * (77 - len(row))
        weights = torch.tensor([1.0, *(weight for _, weight in part)] + [1.0] * (76 - len(part)))
        with torch.no_grad():
            z = encoder(torch.tensor([row]))[0][0]
        emphasized = z * weights[:, None]
        out.append(emphasized * (z.mean() / emphasized.mean()))
    return torch.cat(out).numpy()


@pytest.fixture(scope="module", params=["tiny_sd15", pytest.param("tiny_sd21", marks=pytest.mark.long)])
def tiny(request: pytest.FixtureRequest) -> tuple[Any, Any, Tokens]:
    transformers = pytest.importorskip("transformers")
    checkpoint = request.getfixturevalue(f"{request.param}_checkpoint")
    bundle = Bundle.open(request.getfixturevalue(f"{request.param}_bundle"))
    info = bundle.manifest.tokenizers[0]
    return (
        transformers.CLIPTokenizerFast.from_pretrained(checkpoint / "tokenizer"),
        transformers.CLIPTextModel.from_pretrained(checkpoint / "text_encoder"),
        Tokens(Tokenizer(bundle.file(info.file), info)),
    )


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: prompt[:30])
def test_conditioning_is_the_web_ui_s(tiny: tuple[Any, Any, Tokens], prompt: str) -> None:
    import torch

    tokenizer, encoder, tokens = tiny
    parsed = A1111Prompt(prompt, tokens)
    with torch.no_grad():
        encoded = {chunk: encoder(torch.tensor([chunk]))[0][0].numpy() for chunk in parsed.chunks}
    expected = reference(prompt, tokenizer, encoder)
    ours = parsed.conditioning(encoded)
    assert ours.shape == expected.shape
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)
