"""What Compel's syntax says: fragments of text with weights, blended and put side by side."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...engines.errors import RequestError

STRONGER, WEAKER = 1.1, 0.9
"""What each plus and each minus multiplies by."""

_SYNTAX = r"\s(),\".+=-"
_WORD = re.compile(rf"(?:\\[()\",.+=-]|[+-](?=[^{_SYNTAX}])|[^{_SYNTAX}])+")
_QUOTED = re.compile(r'"((?:\\"|[^"\n])*)"')
_FREE = re.compile(r"\S+")
_SIGNS = re.compile(r"\++|-+")
_OPERATOR = re.compile(r"\++|-+|[+-]?(?:\d+\.\d*|\.\d+)|\d+")
_SPACE = re.compile(r"\s*")
_COMBINED = re.compile(r"\.(blend|and|add)\s*\(([^()]*)\)\s*$")
_UNSUPPORTED = re.compile(r"\.(?:swap|attend)(?=\()|\b(?:with|use)Lora(?=\()")
_MISPLACED = re.compile(r"\)\s*\.(?:blend|and|add)\s*\(")


@dataclass(frozen=True)
class Fragment:
    """A piece of text and its weight."""

    text: str
    weight: float = 1.0


@dataclass(frozen=True)
class Blend:
    """Prompts that are mixed; one of them is no blend."""

    prompts: Sequence[Sequence[Fragment]]
    weights: Sequence[float]
    normalized: bool = True


@dataclass(frozen=True)
class Conjunction:
    """Blends that stand side by side."""

    blends: Sequence[Blend]
    weights: Sequence[float]


def parse(prompt: str) -> Conjunction:
    """Parse a prompt; raises `RequestError` for operators that are not supported, or not written as they should be."""
    if found := _UNSUPPORTED.search(prompt):
        raise RequestError(
            f"prompt {prompt[:60]!r} has {found[0]}(…), which latentrt does not know: prompt_syntax compel takes +, -, "
            ".blend() and .and()"
        )
    text = re.sub(r",(\S)", r", \1", prompt).strip()
    if combined := _COMBINED.search(text):
        prompts = _list_of(text[: combined.start()])
        if prompts is not None:
            return _combined(prompt, combined[1], prompts, combined[2])
    if _MISPLACED.search(text):
        raise RequestError(
            f'prompt {prompt[:60]!r} cannot be read: write ("…", "…").blend(0.5, 0.5) or ("…", "…").and(), and '
            "nothing else"
        )
    return Conjunction([Blend([_fused(_prompt(text))], [1.0])], [1.0])


def _combined(prompt: str, operator: str, prompts: list[list[Fragment]], options: str) -> Conjunction:
    given = [option.strip() for option in options.split(",") if option.strip()]
    normalized = not (operator == "blend" and given[-1:] == ["no_normalize"])
    try:
        weights = [float(option) for option in (given if normalized else given[:-1])] or [1.0] * len(prompts)
    except ValueError:
        weights = []
    if len(weights) != len(prompts) or not all(map(math.isfinite, weights)):
        raise RequestError(
            f"prompt {prompt[:60]!r} has .{operator}({options[:40]}): give a number for each of its "
            f"{len(prompts)} prompts"
        )
    each = [_fused(fragments) for fragments in prompts]
    if operator == "blend":
        return Conjunction([Blend(each, weights, normalized)], [1.0])
    return Conjunction([Blend([fragments], [1.0]) for fragments in each], weights)


def _fused(fragments: Sequence[Fragment]) -> list[Fragment]:
    """Return fragments with neighbours of one weight joined, and never none."""
    fused: list[Fragment] = []
    for fragment in fragments:
        if fused and fused[-1].weight == fragment.weight:
            fused[-1] = replace(fused[-1], text=f"{fused[-1].text} {fragment.text}")
        else:
            fused.append(fragment)
    return fused or [Fragment("")]


def _prompt(text: str) -> list[Fragment]:
    """Parse a whole prompt: what is no syntax is a word as it stands."""
    fragments, at = list[Fragment](), 0
    while (at := _skipped(text, at)) < len(text):
        found = _attention(text, at) or _quoted(text, at) or _bracketed(text, at)
        if found is None:
            word = _FREE.match(text, at)
            assert word is not None
            found = [_plain(word[0])], word.end()
        fragments, at = fragments + found[0], found[1]
    return fragments


Found = tuple[list[Fragment], int]
"""Fragments and the character behind them."""


def _phrase(text: str, at: int) -> Found:
    """Parse as much as stands inside brackets or quotation marks, where syntax must be complete."""
    fragments: list[Fragment] = []
    while True:
        at = _skipped(text, at)
        found = _attention(text, at) or _bracketed(text, at) or _quoted(text, at) or _word(text, at)
        if found is None and text[at : at + 1] in (",", "."):
            found = [Fragment(text[at])], at + 1
        if found is None:
            return fragments, at
        fragments, at = fragments + found[0], found[1]


def _attention(text: str, at: int) -> Found | None:
    """Parse a bracket, a quotation or a word with its weight behind it."""
    grouped = _quoted(text, at) or _bracketed(text, at)
    found = grouped or _word(text, at)
    operator = (_OPERATOR if grouped else _SIGNS).match(text, found[1]) if found else None
    if found is None or operator is None:
        return None
    sign, count = operator[0][0], len(operator[0])
    if operator[0] == sign * count and sign in "+-":
        weight = (STRONGER if sign == "+" else WEAKER) ** count
    else:
        weight = float(operator[0])
    return [replace(each, weight=each.weight * weight) for each in found[0]], operator.end()


def _quoted(text: str, at: int) -> Found | None:
    quoted = _QUOTED.match(text, at)
    if quoted is None:
        return None
    inside = quoted[1].replace('\\"', '"').replace('"', '\\"')
    fragments, end = _phrase(inside, 0)
    return (fragments, quoted.end()) if end == len(inside) else None


def _bracketed(text: str, at: int) -> Found | None:
    if text[at : at + 1] != "(":
        return None
    fragments, end = _phrase(text, at + 1)
    return (fragments, end + 1) if text[end : end + 1] == ")" else None


def _word(text: str, at: int) -> Found | None:
    word = _WORD.match(text, at)
    return None if word is None else ([_plain(word[0])], word.end())


def _plain(text: str) -> Fragment:
    return Fragment(text.replace("\\(", "(").replace("\\)", ")").replace('\\"', '"'))


def _list_of(text: str) -> list[list[Fragment]] | None:
    """Parse prompts between brackets with commas; None for anything else."""
    if text[:1] != "(":
        return None
    prompts, at = [], 1
    while True:
        at = _skipped(text, at)
        found = _quoted(text, at) or _bracketed(text, at) or _word(text, at)
        if found is None and (quoted := _QUOTED.match(text, at)):
            found = _prompt(quoted[1]), quoted.end()
        if found is None:
            return None
        prompts.append(found[0])
        at = _skipped(text, found[1])
        if text[at : at + 1] == ")":
            return prompts if not text[at + 1 :].strip() else None
        if text[at : at + 1] != ",":
            return None
        at += 1


def _skipped(text: str, at: int) -> int:
    space = _SPACE.match(text, at)
    return at if space is None else space.end()
