"""Small vocabularies in the layouts of real tokenizers: every text can be written with them, in more tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

WORDS = ("a", "red", "green", "blue", "circle", "square", "star", "on", "the", "background", "small", "large", "cat")
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
"""Qwen3's chat template for a text alone."""


def write_tokenizer(folder: Path, *, pad_token: str = EOS) -> int:
    """Write a byte-level CLIP vocabulary of the letters and a few words; return its size."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    other = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + n) for n in range(len(other))]  # GPT-2's alphabet
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        head, *tail = [*word[:-1], word[-1] + "</w>"]
        for part in tail:
            merges.append((head, part))
            head += part
    merges = list(dict.fromkeys(merges))
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges), BOS, EOS]
    folder.mkdir(parents=True)
    _write(folder / "vocab.json", {token: number for number, token in enumerate(dict.fromkeys(tokens))})
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": pad_token}
    config = special | {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    _write(folder / "tokenizer_config.json", config)
    return len(set(tokens))


def write_t5(folder: Path) -> int:
    """Write a unigram model of the letters and a few words, in T5's layout; return its size."""
    import tokenizers
    import transformers

    letters = [chr(code) for code in range(33, 127)]
    pieces = ["▁", *letters, *(f"▁{word}" for word in WORDS)]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((piece, -float(len(pieces))) for piece in pieces)]
    model = tokenizers.Tokenizer(tokenizers.models.Unigram(vocabulary, unk_id=2))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    model.decoder = tokenizers.decoders.Metaspace()
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer = transformers.T5TokenizerFast(tokenizer_object=model, extra_ids=0, model_max_length=512)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def write_qwen(folder: Path) -> int:
    """Write a byte-level vocabulary of letters alone, with Qwen's marks of a conversation; return its size."""
    import tokenizers
    import transformers

    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.Tokenizer(tokenizers.models.BPE({letter: n for n, letter in enumerate(letters)}, []))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = transformers.Qwen2TokenizerFast(
        tokenizer_object=model,
        unk_token=None,
        eos_token="<|im_end|>",
        pad_token=EOS,
        additional_special_tokens=["<|im_start|>"],
        model_max_length=131072,
    )
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


WRITERS: dict[str, Callable[[Path], int]] = {
    "clip": write_tokenizer,
    "clip!": lambda folder: write_tokenizer(folder, pad_token="!"),
    "t5": write_t5,
    "qwen": write_qwen,
}
"""What writes a tokenizer, by its kind in `Architecture.tokenizers`."""


def _write(file: Path, data: Any) -> None:
    file.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
