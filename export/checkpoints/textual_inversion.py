"""Textual inversion: words that a text encoder learned from pictures, added to a checkpoint when it is exported.

A word is one or several vectors of the embedding table. The first is the token that prompts use, the others are
`<token>_1`, `<token>_2`, …, as diffusers' `load_textual_inversion` names them; the runtime puts them behind the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from ...engines.errors import CheckpointError, UnsupportedModelError
from ...engines.files import sha256_of
from .checkpoint import Checkpoint
from .configs import reading, said_by

TABLE = "embeddings.token_embedding.weight"
"""How the name of a text encoder's embedding table ends."""
ENDINGS = (".safetensors", ".pt", ".bin")
UNNAMED = ("emb_params", "clip_l")
"""Keys of files that do not name their token: the web UI's, and those for two text encoders."""


@dataclass(frozen=True)
class LearnedWord:
    """A token with its vectors [n, E]."""

    token: str
    vectors: torch.Tensor
    file: Path

    @property
    def tokens(self) -> list[str]:
        """The token of each vector."""
        return [self.token, *(f"{self.token}_{number}" for number in range(1, len(self.vectors)))]


@reading("the embedding")
def open_words(given: Sequence[str | Path]) -> list[LearnedWord]:
    """Read embedding files, each given as `FILE` or `TOKEN=FILE`.

    Without a token it is the one that the file names, or else the file's own name. Raises `CheckpointError` for a file
    that cannot be read or holds no embedding.
    """
    return [_open(each) for each in given]


def _open(given: str | Path) -> LearnedWord:
    token, equals, name = str(given).partition("=")
    file = Path(given) if Path(given).is_file() or not equals else Path(name)
    if not file.is_file() or file.suffix not in ENDINGS:
        raise CheckpointError(
            f"textual inversion {given} is no embedding file: give a .safetensors, .pt or .bin file, or TOKEN=FILE"
        )
    named, vectors = _named_vectors(file, _contents(file))
    token = token if file != Path(given) else named
    if not token.strip() or token != token.strip() or not token.isprintable() or len(token) > 100:
        raise CheckpointError(f"textual inversion {given} has the token {token[:40]!r}: give a word, as TOKEN=FILE")
    if vectors.ndim == 1:
        vectors = vectors[None]
    if vectors.ndim != 2 or not len(vectors) or not vectors.is_floating_point() or not torch.isfinite(vectors).all():
        raise CheckpointError(
            f"{file}: the embedding is {vectors.dtype} of shape {list(vectors.shape)}: give finite numbers "
            "[vectors, width]"
        )
    return LearnedWord(token, vectors.detach().float(), file)


def _contents(file: Path) -> Any:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise every kind
        raise CheckpointError(
            f"{file} cannot be read as tensors ({said_by(error)}): nothing else is opened; give a .safetensors file"
        ) from error


def _named_vectors(file: Path, found: Any) -> tuple[str, torch.Tensor]:
    """Return the token that a file names, or the file's own name, and its vectors."""
    name, vectors = file.stem, found
    if isinstance(found, dict):
        known = [key for key in UNNAMED if key in found]
        parameters = found.get("string_to_param")
        if known:
            vectors = found[known[0]]
        elif isinstance(parameters, dict) and len(parameters) == 1:
            name, vectors = str(found.get("name") or name), next(iter(parameters.values()))
        elif len(found) == 1:
            name, vectors = next(iter(found.items()))
    if not isinstance(vectors, torch.Tensor) or not isinstance(name, str):
        keys = ", ".join(map(str, found))[:100] if isinstance(found, dict) else type(found).__name__
        raise CheckpointError(
            f"{file} holds no embedding but {keys}: give one with a token, string_to_param or emb_params"
        )
    return name, vectors


def check_words(checkpoint: Checkpoint, words: Sequence[LearnedWord]) -> None:
    """Raise `CheckpointError` for words that a checkpoint's text encoder cannot take."""
    if words and set(checkpoint.tokenizers) != {"tokenizer"}:
        raise UnsupportedModelError("textual inversion is for checkpoints with one text encoder")
    for word in words:
        width, own = word.vectors.shape[1], checkpoint.config("text_encoder")["hidden_size"]
        if width != own:
            raise CheckpointError(
                f"{word.file}: the embedding is {width} wide and the text encoder {own}: "
                "it was learned on another model"
            )


def add_words(tokenizer: Any, words: Sequence[LearnedWord]) -> None:
    """Add the tokens of words to transformers' tokenizer; raises `CheckpointError` for one that it has."""
    for word in words:
        if taken := [token for token in word.tokens if token in tokenizer.get_vocab()]:
            raise CheckpointError(
                f"{word.file}: the tokenizer has a token {taken[0]!r} already: give another, as TOKEN=FILE"
            )
        tokenizer.add_tokens(word.tokens)


def with_words(checkpoint: Checkpoint, words: Sequence[LearnedWord], tokenizer: Path) -> Checkpoint:
    """Return a checkpoint whose embedding table has the vectors of words, at their ids in the written tokenizer."""
    if not words:
        return checkpoint
    written: Any = Tokenizer.from_file(str(tokenizer))
    encoder = checkpoint.components["text_encoder"]
    rows = {written.token_to_id(t): v for word in words for t, v in zip(word.tokens, word.vectors, strict=True)}
    count = max(encoder.config["vocab_size"], max(rows) + 1)

    def find(name: str) -> torch.Tensor | None:
        tensor = encoder.find(name)
        if tensor is None or not name.endswith(TABLE):
            return tensor
        table = torch.zeros(count, tensor.shape[1])
        table[: len(tensor)] = tensor
        for number, vector in rows.items():
            table[number] = vector
        return table

    grown = replace(encoder, config={**encoder.config, "vocab_size": count}, find=find)
    return replace(checkpoint, components={**checkpoint.components, "text_encoder": grown})


def provenance(words: Sequence[LearnedWord]) -> Mapping[str, Any]:
    """Return what the manifest says of words, by token."""
    return {
        word.token: {"file": word.file.name, "sha256": sha256_of(word.file), "vectors": len(word.vectors)}
        for word in words
    }
