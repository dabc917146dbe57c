"""The checkpoint's CLIP tokenizer as one `tokenizers` file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from ...engines.bundle import TokenizerInfo
from ...engines.errors import CheckpointError
from .configs import said_by, shown
from .textual_inversion import LearnedWord, add_words


def write_tokenizer(
    folder: Path,
    file: Path,
    *,
    max_length: int,
    vocab_size: int,
    pad_id: int | None = None,
    output: str = "token_ids",
    words: Sequence[LearnedWord] = (),
) -> TokenizerInfo:
    """Write the tokenizer of a checkpoint's `tokenizer` folder and return the contract of its text encoder.

    Reads `tokenizer.json`, or `vocab.json` with `merges.txt`. `pad_id` replaces the tokenizer's own padding token, as
    `pad_token` in its config does: the token becomes a special one. `output` is the graph input that the ids feed.
    `words` are added behind all other tokens.
    Raises `CheckpointError` when the files cannot be read or have more tokens than the encoder's `vocab_size`.
    """
    from transformers import CLIPTokenizerFast

    try:
        source = CLIPTokenizerFast.from_pretrained(str(folder), local_files_only=True)
        if pad_id is not None:
            pad = source.convert_ids_to_tokens(pad_id)
            source = CLIPTokenizerFast.from_pretrained(str(folder), local_files_only=True, pad_token=pad)
    except Exception as error:  # tokenizers and transformers raise many kinds
        raise CheckpointError(f"{folder} holds no CLIP tokenizer that can be read ({said_by(error)})") from error
    ids = {"bos_token": source.bos_token_id, "eos_token": source.eos_token_id, "pad_token": source.pad_token_id}
    if missing := [name for name, number in ids.items() if not isinstance(number, int) or number < 0]:
        raise CheckpointError(f"{folder} has no {missing[0]} among its tokens: give a CLIP tokenizer")
    longest = source.model_max_length
    if isinstance(longest, bool) or not isinstance(longest, int | float) or not longest > 2:
        raise CheckpointError(f"{folder}: model_max_length is {shown(longest)}; give a number of tokens, such as 77")
    largest = max(source.get_vocab().values())
    if largest >= vocab_size:
        raise CheckpointError(f"{folder} has token id {largest} where the text encoder knows {vocab_size} tokens")
    add_words(source, words)
    tokenizer = Tokenizer.from_str(source.backend_tokenizer.to_str())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.save(str(file))
    return TokenizerInfo(
        file=file.name,
        output=output,
        max_length=int(min(max_length, longest)),
        bos_id=ids["bos_token"],
        eos_id=ids["eos_token"],
        pad_id=ids["pad_token"],
    )
