"""Conditioning of prompts that are written in a syntax with weights, of any length."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ...engines.bundle import Bundle
from ...engines.device import Array
from ...engines.errors import RequestError
from ..loop.hoisted import conditioning
from ..request import GenerationRequest
from .a1111 import A1111Prompt
from .chunks import Chunk, ParsedPrompt, Tokens, takes_chunks
from .compel import CompelPrompt
from .embeddings import Conditioning, conditioning_tensor
from .syntax import PromptSyntax
from .tokenizer import Tokenizer

SYNTAXES: Mapping[PromptSyntax, Callable[[str, Tokens], ParsedPrompt]] = {"a1111": A1111Prompt, "compel": CompelPrompt}


class WeightedPrompts:
    """The prompts of a request that are written in a syntax, parsed: how long they are, and what they become."""

    def __init__(self, bundle: Bundle, request: GenerationRequest, tokenizers: Sequence[Tokenizer]) -> None:
        """Parse all prompts.

        Raises `RequestError` for one that the syntax does not allow, and for a bundle whose text encoders or whose
        denoiser cannot take it.
        """
        spec = conditioning_tensor(bundle)
        if len(tokenizers) != 1 or not takes_chunks(tokenizers[0].info) or request.prompt_syntax is None:
            raise RequestError(
                f"prompt_syntax is {request.prompt_syntax!r}: it is for bundles with one CLIP text encoder, and this "
                "one has others; leave it out"
            )
        self._request, self._spec, self._input = request, spec, tokenizers[0].info.output
        guided = len(request.weights(bundle.manifest.guidance)) == 2
        self._negatives = request.texts("prompt", negative=True) if guided else ()
        tokens, syntax = Tokens(tokenizers[0]), SYNTAXES[request.prompt_syntax]
        texts = dict.fromkeys([*request.prompt, *self._negatives])
        self._parsed: dict[str, ParsedPrompt] = {text: syntax(text, tokens) for text in texts}
        self._empty = tokens.weighted().chunk
        self._parts = max(prompt.parts for prompt in self._parsed.values())
        if self._parts > 1 and not isinstance(spec.shape[1], str):
            raise RequestError(
                f"a prompt of this request has {self._parts} parts, and this bundle's denoiser takes 1: "
                "export the checkpoint again, or shorten the prompt"
            )
        self.blank = blank_parts(bundle, self._parts)

    def conditioning(self, rows: int, encode: Callable[[Mapping[str, Array]], Mapping[str, Array]]) -> Conditioning:
        """Return the request's conditioning.

        `encode` returns what the prompt graphs write for token ids [rows, L], the number that a batch has engines for.
        All prompts get as many chunks as the longest, those of an empty one behind their own. Raises `RequestError`
        for weights that leave no finite numbers.
        """
        chunks = list(dict.fromkeys([self._empty, *(c for prompt in self._parsed.values() for c in prompt.chunks)]))
        encoded: dict[Chunk, Array] = {}
        for first in range(0, len(chunks), rows):
            group = chunks[first : first + rows]
            ids = np.array(group + [self._empty] * (rows - len(group)), np.int64)
            values = encode({self._input: ids})[self._spec.name].astype(np.float32)
            encoded |= dict(zip(group, values[: len(group)], strict=True))
        found = {text: self._whole(text, prompt, encoded) for text, prompt in self._parsed.items()}
        prompt, negative = (
            {self._spec.name: np.stack([found[text] for text in texts]).astype(self._spec.dtype)} if texts else {}
            for texts in (self._request.prompt, self._negatives)
        )
        return Conditioning(prompt, negative, self._request.num_images_per_prompt)

    def _whole(self, text: str, prompt: ParsedPrompt, encoded: Mapping[Chunk, Array]) -> Array:
        with np.errstate(all="ignore"):  # what is not finite is refused here
            own = prompt.conditioning(encoded)
            if not np.isfinite(own.astype(self._spec.dtype)).all():
                raise RequestError(
                    f"the weights of prompt {text[:60]!r} leave no finite numbers: give weights nearer to 1"
                )
        return np.concatenate([own, *[encoded[self._empty]] * (self._parts - prompt.parts)])


def takes_long_prompts(bundle: Bundle) -> bool:
    """Tell whether prompts of several parts can be drawn: with one text encoder, and a denoiser for every length."""
    read = [spec for spec in conditioning(bundle.manifest) if len(spec.shape) == 3]
    tokenizers = bundle.manifest.tokenizers
    whole = len(tokenizers) == 1 == len(read) and takes_chunks(tokenizers[0])
    return whole and isinstance(read[0].shape[1], str)


def blank_parts(bundle: Bundle, count: int) -> Conditioning:
    """Return the conditioning of prompts of `count` parts, in shape and type alone.

    Raises `RequestError` where a bundle takes no more than one.
    """
    if count > 1 and not takes_long_prompts(bundle):
        raise RequestError(f"bundle {bundle.path} takes prompts of one part: export the checkpoint again for more")
    spec = conditioning_tensor(bundle)
    length, width = count * bundle.manifest.tokenizers[0].max_length, int(spec.shape[2])
    return Conditioning({spec.name: np.zeros((1, length, width), spec.dtype)}, {}, 1)
