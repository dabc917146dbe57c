"""The checkpoint's CLIP tokenizer as one `tokenizers` file."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from ...engines.bundle import TokenizerInfo
from ...engines.errors import CheckpointError


def write_tokenizer(
    folder: Path, file: Path, *, max_length: int, vocab_size: int, pad_id: int | None = None, output: str = "token_ids"
) -> TokenizerInfo:
    """Write the tokenizer of a checkpoint's `tokenizer` folder and return the contract of its text encoder.

    Reads `tokenizer.json`, or `vocab.json` with `merges.txt`. `pad_id` replaces the tokenizer's own padding token,
    `output` is the graph input that the ids feed.
    Raises `CheckpointError` when the files cannot be read or have more tokens than the encoder's `vocab_size`.
    """
    from transformers import CLIPTokenizerFast

    try:
        source = CLIPTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # tokenizers and transformers raise many kinds
        raise CheckpointError(f"{folder} holds no CLIP tokenizer that can be read ({error})") from error
    tokenizer = Tokenizer.from_str(source.backend_tokenizer.to_str())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        raise CheckpointError(f"{folder} has token id {largest} where the text encoder knows {vocab_size} tokens")
    tokenizer.save(str(file))
    return TokenizerInfo(
        file=file.name,
        output=output,
        max_length=min(max_length, source.model_max_length),
        bos_id=source.bos_token_id,
        eos_id=source.eos_token_id,
        pad_id=source.pad_token_id if pad_id is None else pad_id,
    )
