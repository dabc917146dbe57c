"""The bundle's tokenizer gives the ids that transformers' CLIP tokenizer gives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from latentrt.engines.errors import CheckpointError
from latentrt.export.checkpoints.tokenizer import write_tokenizer

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

TEXTS = [
    "",
    " ",
    "a red circle on the blue background",
    "A RED  Circle\n\ton\u00a0the\u3000background ",
    "don't they're we've I'm he'll she'd it's",
    "1234 3.14 №5 x2",
    "<|endoftext|>",
    "a cat<|endoftext|> <|startoftext|>dog <|END|>",
    "e\u0301 \u00e9 ﬁ \u212b İstanbul ẞ ß",
    "日本語の猫 мышь कुत्ता แมว 🐈‍⬛👩‍👩‍👧 \U0001f1eb\U0001f1f7",
    "null\x00byte \x7f \u200b\u200d\ufeff zero\u00adwidth",
    "a" * 300,
    "!!!??? --- ... (((cat:1.3))) [dog|cat] \\(x\\)",
    "\ud83d".encode("utf-16", "surrogatepass").decode("utf-16", "replace"),
]


@pytest.mark.parametrize("layout", ["merges", "json", "both"])
def test_ids_equal_transformers(tiny_sd15_checkpoint: Path, tmp_path: Path, layout: str) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(tiny_sd15_checkpoint / "tokenizer", folder)
    reference = transformers.CLIPTokenizer.from_pretrained(str(folder))
    if layout != "merges":
        reference.save_pretrained(str(folder))
        assert (folder / "tokenizer.json").is_file()
    if layout == "json":
        (folder / "vocab.json").unlink()
        (folder / "merges.txt").unlink()
    info = write_tokenizer(folder, tmp_path / "tokenizer.json", max_length=77, vocab_size=10**6)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in TEXTS:
        plain = tokenizer.encode(text, add_special_tokens=False).ids
        assert [info.bos_id, *plain, info.eos_id] == reference(text).input_ids, text
        padded = ([info.bos_id, *plain[:75], info.eos_id] + [info.pad_id] * 77)[:77]
        assert padded == reference(text, padding="max_length", truncation=True, max_length=77).input_ids, text


def test_padding_token_of_the_second_version(tiny_sd21_checkpoint: Path, tmp_path: Path) -> None:
    info = write_tokenizer(
        tiny_sd21_checkpoint / "tokenizer", tmp_path / "tokenizer.json", max_length=77, vocab_size=10**6
    )
    assert info.pad_id == 0  # the letter "!"
    assert info.eos_id == info.bos_id + 1


def test_saved_truncation_and_padding_are_dropped(tiny_sd15_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    tokenizer = transformers.CLIPTokenizer.from_pretrained(str(tiny_sd15_checkpoint / "tokenizer"))
    tokenizer("a cat", padding="max_length", truncation=True, max_length=5)
    tokenizer.save_pretrained(str(folder))
    write_tokenizer(folder, tmp_path / "tokenizer.json", max_length=77, vocab_size=10**6)
    written = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert written.truncation is None
    assert written.padding is None


def test_vocabulary_larger_than_the_encoder_is_refused(tiny_sd15_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"token id .* where the text encoder knows 100 tokens"):
        write_tokenizer(tiny_sd15_checkpoint / "tokenizer", tmp_path / "tokenizer.json", max_length=77, vocab_size=100)


def test_damaged_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match="no CLIP tokenizer"):
        write_tokenizer(tmp_path, tmp_path / "out.json", max_length=77, vocab_size=100)


def test_a_padding_token_that_is_set_is_a_special_token(
    tiny_sd15_checkpoint: Path, tiny_sd21_checkpoint: Path, tmp_path: Path
) -> None:
    """A single file of version 2 pads with `!`, which transformers then no longer joins to the word before it."""
    file = tmp_path / "tokenizer.json"
    info = write_tokenizer(tiny_sd15_checkpoint / "tokenizer", file, max_length=77, vocab_size=10**6, pad_id=0)
    reference = transformers.CLIPTokenizer.from_pretrained(str(tiny_sd21_checkpoint / "tokenizer"))
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    assert (info.pad_id, reference.pad_token_id) == (0, 0)
    for text in [*TEXTS, "a cat!", "a cat !", "cat!!dog"]:
        plain = tokenizer.encode(text, add_special_tokens=False).ids
        assert [info.bos_id, *plain, info.eos_id] == reference(text).input_ids, text


@pytest.mark.parametrize("changed", [{"unk_token": "", "pad_token": ""}, {"unk_token": "<none>", "bos_token": "<no>"}])
def test_tokens_that_there_are_not_are_refused_in_one_line(
    tiny_sd15_checkpoint: Path, tmp_path: Path, changed: dict[str, str]
) -> None:
    folder = shutil.copytree(tiny_sd15_checkpoint / "tokenizer", tmp_path / "tokenizer")
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    try:
        write_tokenizer(folder, tmp_path / "tokenizer.json", max_length=77, vocab_size=10**6)
    except CheckpointError as error:
        assert str(error).isprintable() and str(folder) in str(error)
    else:
        assert changed.get("unk_token")  # transformers adds what it does not find


@pytest.mark.parametrize("length", [None, "77", True, 2, -1])
def test_lengths_that_are_none_are_refused_or_left_to_the_encoder(
    tiny_sd15_checkpoint: Path, tmp_path: Path, length: object
) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(tiny_sd15_checkpoint / "tokenizer", folder)
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"model_max_length": length}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if length is None:  # transformers then knows no limit
        info = write_tokenizer(folder, tmp_path / "out.json", max_length=77, vocab_size=10**6)
        assert info.max_length == 77
        return
    with pytest.raises(CheckpointError, match=r"model_max_length is .*; give a number of tokens, such as 77"):
        write_tokenizer(folder, tmp_path / "out.json", max_length=77, vocab_size=10**6)
