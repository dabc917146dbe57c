"""A checkpoint's tokenizer as one `tokenizers` file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer

from ...engines.bundle import TokenizerInfo
from ...engines.errors import CheckpointError
from .configs import said_by, shown
from .textual_inversion import LearnedWord, add_words


@dataclass(frozen=True)
class TokenizerKind:
    """A kind of tokenizer that checkpoints hold, and what a family does with it.

    classes   its class names in `model_index.json`, with and without Fast
    title     what messages call it
    begins    whether its begin token stands before every prompt
    ends      whether its end token stands behind every prompt
    template  what is tokenized, with the prompt in place of `{}`
    source    the text of a request that it reads
    lengths   shorter lengths that prompts are filled up to where they fit
    masked    whether a graph reads which ids are tokens
    any_length  whether rows may have any number of tokens up to the most
    """

    classes: tuple[str, ...]
    title: str
    begins: bool = True
    ends: bool = True
    template: str = "{}"
    source: Literal["prompt", "prompt_2", "prompt_3"] = "prompt"
    lengths: tuple[int, ...] = ()
    masked: bool = False
    any_length: bool = False


CLIP = TokenizerKind(("CLIPTokenizer", "CLIPTokenizerFast"), "CLIP")
T5 = TokenizerKind(("T5Tokenizer", "T5TokenizerFast"), "T5", begins=False)
QWEN = TokenizerKind(("Qwen2Tokenizer", "Qwen2TokenizerFast"), "Qwen", begins=False, ends=False)
MISTRAL = TokenizerKind(
    ("PixtralProcessor", "AutoProcessor", "TokenizersBackend", "PreTrainedTokenizerFast"),
    "Mistral",
    begins=False,
    ends=False,
)


def write_tokenizer(
    folder: Path,
    file: Path,
    *,
    max_length: int,
    vocab_size: int,
    pad_id: int | None = None,
    output: str = "token_ids",
    words: Sequence[LearnedWord] = (),
    kind: TokenizerKind = CLIP,
) -> TokenizerInfo:
    """Write the tokenizer of a checkpoint's `tokenizer` folder and return the contract of its text encoder.

    Reads `tokenizer.json`, or what a tokenizer of this kind was saved as before there was one. `pad_id` replaces the
    tokenizer's own padding token, as `pad_token` in its config does: the token becomes a special one. `output` is the
    graph input that the ids feed. `words` are added behind all other tokens.
    Raises `CheckpointError` when the files cannot be read or have more tokens than the encoder's `vocab_size`.
    """
    import transformers

    try:
        load = getattr(transformers, kind.classes[-1]).from_pretrained
        source: Any = load(str(folder), local_files_only=True)
        if pad_id is not None:
            source = load(str(folder), local_files_only=True, pad_token=source.convert_ids_to_tokens(pad_id))
        ids = {"pad_token": source.pad_token_id}  # a token that there is not is looked up as the unknown one, for ever
        ids |= {"bos_token": source.bos_token_id} if kind.begins else {}
        ids |= {"eos_token": source.eos_token_id} if kind.ends else {}
        largest = max(source.get_vocab().values())
    except Exception as error:  # tokenizers and transformers raise many kinds
        raise CheckpointError(
            f"{folder} holds no {kind.title} tokenizer that can be read ({said_by(error)})"
        ) from error
    if missing := [name for name, number in ids.items() if not isinstance(number, int) or number < 0]:
        raise CheckpointError(f"{folder} has no {missing[0]} among its tokens: give a {kind.title} tokenizer")
    longest = source.model_max_length
    if isinstance(longest, bool) or not isinstance(longest, int | float) or not longest > 2:
        raise CheckpointError(f"{folder}: model_max_length is {shown(longest)}; give a number of tokens, such as 77")
    if largest >= vocab_size:
        raise CheckpointError(f"{folder} has token id {largest} where the text encoder knows {vocab_size} tokens")
    add_words(source, words)
    tokenizer = Tokenizer.from_str(source.backend_tokenizer.to_str())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.save(str(file))
    most = int(min(max_length, longest))
    return TokenizerInfo(
        file=file.name,
        output=output,
        mask_output=output.replace("ids", "mask") if kind.masked else None,
        max_length=most,
        lengths=tuple(length for length in kind.lengths if length < most),
        any_length=kind.any_length,
        bos_id=ids.get("bos_token"),
        eos_id=ids.get("eos_token"),
        pad_id=ids["pad_token"],
        template=kind.template,
        source=kind.source,
    )
