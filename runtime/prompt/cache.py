"""What prompts were encoded to, kept, so that their text encoders need not run again, or be loaded."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping

from ...engines.bundle import Bundle
from ...engines.device import Array
from ...engines.errors import RequestError

MOST_BYTES = 128 << 20
"""Of a pipeline that is told no number: 500 pairs of 77 rows of 768 numbers in fp16, or 16 of 512 by 4096 in fp32."""

Kept = Mapping[str, Array]
"""What later graphs read of those that run once for each prompt, [R, …], by tensor."""


class PromptCache:
    """Conditioning by all that the prompt graphs read for it, the least recently used let go of first.

    The rows of a batch are kept together, and found again for a batch of the same rows: what an engine gives for a row
    may depend, in its last bits, on how many there are. So a picture is the same bit for bit with the cache or without.
    For one thread at a time.
    """

    def __init__(self, bundle: Bundle, most_bytes: int | None = None) -> None:
        """Keep up to so many bytes; 0 for nothing. Raises `RequestError` for other numbers."""
        most_bytes = MOST_BYTES if most_bytes is None else most_bytes
        if isinstance(most_bytes, bool) or not isinstance(most_bytes, int) or most_bytes < 0:
            raise RequestError(f"prompt_cache is {most_bytes!r}: give bytes, 0 for none, or leave it out")
        graphs = bundle.manifest.graphs
        written = {spec.name for graph in graphs if graph.stage == "prompt" for spec in graph.outputs}
        read = [spec.name for graph in graphs if graph.stage == "prompt" for spec in graph.inputs]
        self._read = sorted({*read} - written)
        later = {spec.name for graph in graphs if graph.stage != "prompt" for spec in graph.inputs}
        self.names = sorted(written & later)
        """The tensors that are kept."""
        self._most = most_bytes
        self._entries: OrderedDict[bytes, dict[str, Array]] = OrderedDict()
        self.bytes = 0
        """Bytes that are kept."""
        self.hits = self.misses = 0

    @property
    def on(self) -> bool:
        """Whether anything is kept."""
        return self._most > 0

    def get(self, inputs: Mapping[str, Array]) -> Kept | None:
        """Return what the prompt graphs write for all rows of some inputs, or None where that is not known."""
        key = self._key(inputs)
        if key is None:
            return None
        found = self._entries.get(key)
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        self._entries.move_to_end(key)
        return found

    def put(self, inputs: Mapping[str, Array], tensors: Mapping[str, Array]) -> None:
        """Keep what the prompt graphs wrote for some inputs, where there is room for it."""
        key = self._key(inputs)
        size = sum(tensors[name].nbytes for name in self.names)
        if key is None or key in self._entries or size > self._most:
            return
        self._entries[key] = {name: tensors[name] for name in self.names}
        for array in self._entries[key].values():
            array.flags.writeable = False
        self.bytes += size
        while self.bytes > self._most:
            self.bytes -= sum(array.nbytes for array in self._entries.popitem(last=False)[1].values())

    def clear(self) -> None:
        """Let go of everything."""
        self._entries.clear()
        self.bytes = 0

    def _key(self, inputs: Mapping[str, Array]) -> bytes | None:
        """Return what stands for the inputs of the prompt graphs; None where these do not run, or nothing is kept."""
        if not self.on or not self._read or not all(name in inputs for name in self._read):
            return None
        digest = hashlib.blake2b(digest_size=32)
        for name in self._read:
            array = inputs[name]
            digest.update(repr((name, array.shape, array.dtype.str)).encode())
            digest.update(array.tobytes())
        return digest.digest()
