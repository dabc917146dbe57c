"""A bundle's tokenizer and text encoder as Compel and recipes for long prompts use those of a diffusers pipeline.

Tensors come back as what was given: numpy for numpy, PyTorch's for PyTorch's, by the caller's own import of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ...engines.device import Array
from ...engines.errors import RequestError
from .tokenizer import Tokenizer

__all__ = ["TextEncoderHandle", "TokenizerHandle"]

NO_MASK = (
    "attention_mask leaves tokens out, which the bundle's text encoder cannot: give Compel "
    "downweight_mode=DownweightMode.REMOVE, or the prompt itself with prompt_syntax='compel'"
)
IDLE = {"return_dict": True, "return_attention_mask": True, "padding_side": "right"}
"""Keywords of transformers' tokenizers and encoders that ask for what is done anyway."""
NO_LAYERS = "hidden states are asked for: the bundle's text encoder ends at the layer that its pipeline reads"


class Output(dict[str, Any]):
    """Named values that can be read as items, by number and as attributes."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(f"there is no {name}: there are {', '.join(self)}")
        return self[name]

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, int):
            return super().__getitem__(key)
        if not -len(self) <= key < len(self):
            raise RequestError(f"there is no [{key}]: there is {', '.join(self)}, and nothing behind it in a bundle")
        return list(self.values())[key]


class TokenizerHandle:
    """What a CLIP tokenizer of transformers does, as far as programs around a pipeline ask for it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, info = tokenizer, tokenizer.info
        self.model_max_length = info.max_length
        self.bos_token_id, self.eos_token_id, self.pad_token_id = info.bos_id, info.eos_id, info.pad_id

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        truncation: bool = False,
        padding: bool | str = False,
        max_length: int | None = None,
        add_special_tokens: bool = True,
        return_tensors: str | None = None,
        **others: Any,
    ) -> Output:
        """Return `input_ids` and `attention_mask` of a text, or of each; `return_tensors` is None, "np" or "pt".

        Raises `RequestError` for other keywords that ask for something.
        """
        _refuse("tokenizer", others)
        texts, length = [text] if isinstance(text, str) else list(text), max_length or self.model_max_length
        ends = [each if add_special_tokens else None for each in (self.bos_token_id, self.eos_token_id)]
        framed = sum(each is not None for each in ends)
        rows = []
        for each in texts:
            found = self._tokenizer.text_ids(each)
            found = found[: length - framed] if truncation else found
            rows.append([number for number in (ends[0], *found, ends[1]) if number is not None])
        masks = [[1] * len(row) for row in rows]
        if padding and padding != "do_not_pad":
            width = length if padding == "max_length" else max(map(len, rows))
            masks = [mask + [0] * (width - len(mask)) for mask in masks]
            rows = [row + [self.pad_token_id] * (width - len(row)) for row in rows]
        if return_tensors is not None:
            made = [_tensors(values, return_tensors) for values in (rows, masks)]
            return Output(input_ids=made[0], attention_mask=made[1])
        if isinstance(text, str):
            return Output(input_ids=rows[0], attention_mask=masks[0])
        return Output(input_ids=rows, attention_mask=masks)

    def tokenize(self, text: str) -> list[str]:
        """Return the tokens of a text."""
        return self.convert_ids_to_tokens(self._tokenizer.text_ids(text))

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        """Return the tokens of ids."""
        return [self._tokenizer.token(int(number)) for number in ids]


class TextEncoderHandle:
    """What a text encoder of transformers does with token ids: `encode` runs the bundle's on [1, L]."""

    def __init__(self, encode: Callable[[Array], Array], length: int, device: str, dtype: str) -> None:
        self._encode, self._length, self._dtype = encode, length, dtype
        self.device = device
        self.config = Output(max_position_embeddings=length)

    @property
    def dtype(self) -> Any:
        """The number format of what it returns: PyTorch's object for it, where that is loaded, else its name."""
        torch = sys.modules.get("torch")
        return getattr(torch, self._dtype) if torch is not None else self._dtype

    def __call__(
        self, input_ids: Any, attention_mask: Any = None, *, output_hidden_states: bool = False, **others: Any
    ) -> Output:
        """Return `last_hidden_state` [N, L, E] of token ids [N, L]; raises `RequestError` for what it cannot give."""
        _refuse("text encoder", others)
        ids = _on_the_host(input_ids)
        if ids.ndim != 2 or ids.shape[1] != self._length:
            raise RequestError(f"token ids are of shape {list(ids.shape)}: the text encoder takes [n, {self._length}]")
        if attention_mask is not None and not _on_the_host(attention_mask).all():
            raise RequestError(NO_MASK)
        if output_hidden_states:
            raise RequestError(NO_LAYERS)
        states = np.concatenate([self._encode(row[None].astype(np.int64)) for row in ids])
        if isinstance(input_ids, np.ndarray):
            return Output(last_hidden_state=states)
        tensor = sys.modules["torch"].from_numpy(states)
        return Output(last_hidden_state=tensor.to(input_ids.device) if hasattr(input_ids, "device") else tensor)


def _refuse(reader: str, given: Mapping[str, Any]) -> None:
    """Raise `RequestError` for a keyword that nothing reads, unless its value asks for nothing."""
    for name, value in given.items():
        idle = value is None or (value is False and name != "return_dict")
        if not (idle or (isinstance(value, bool | str) and value == IDLE.get(name))):
            raise RequestError(f"{name} is given: the bundle's {reader} has nothing that reads it, leave it out")


def _on_the_host(values: Any) -> Array:
    """Return numbers as an array; a tensor may be on a GPU, or be part of a computation."""
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)


def _tensors(rows: Sequence[Sequence[int]], kind: str) -> Any:
    if kind not in ("np", "pt") or (kind == "pt" and "torch" not in sys.modules):
        raise RequestError(f"return_tensors is {kind!r}: give None, 'np', or 'pt' once PyTorch is imported")
    if len(set(map(len, rows))) > 1:
        raise RequestError("texts of several lengths make no tensor: give padding='max_length'")
    array = np.array(rows, np.int64)
    return array if kind == "np" else sys.modules["torch"].from_numpy(array)


def handles(
    tokenizers: Sequence[Tokenizer], encode: Callable[[Mapping[str, Array]], Array], device: str
) -> tuple[TokenizerHandle, TextEncoderHandle]:
    """Return both for a bundle with one tokenizer; `encode` returns the conditioning [1, L, E] of its graph input."""
    (tokenizer,) = tokenizers
    name = tokenizer.info.output
    encoder = TextEncoderHandle(lambda ids: encode({name: ids}), tokenizer.info.max_length, device, "float32")
    return TokenizerHandle(tokenizer), encoder
