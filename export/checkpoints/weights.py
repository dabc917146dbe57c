"""Safetensors weights, read one tensor at a time, and modules built from them without a second copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ...engines.errors import CheckpointError, UnsupportedModelError

PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")
PICKLE_REASON = (
    "pickled weights are refused because opening a pickle runs the code inside it: convert them to .safetensors first"
)

Find = Callable[[str], "torch.Tensor | None"]
"""Returns the tensor for a parameter name of a module, or None when the checkpoint has none."""


class Weights:
    """The tensors of one or several safetensors files, memory-mapped and read by name.

    A file is mapped when it is first needed and until `close`, or as long as a tensor of it is alive.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        """List the tensors of the files; raises `CheckpointError` for a damaged one."""
        self.files = tuple(files)
        self._opened: dict[Path, Any] = {}
        self._file_of = {name: file for file in files for name in self._open(file).keys()}  # noqa: SIM118
        self.close()

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def close(self) -> None:
        """Unmap the files; reading maps them again."""
        self._opened.clear()

    def get(self, name: str) -> torch.Tensor | None:
        """Return a tensor by its name in the file, or None."""
        return self._open(self._file_of[name]).get_tensor(name) if name in self._file_of else None

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it; raises `CheckpointError` when there is none of that name."""
        if name not in self._file_of:
            raise CheckpointError(f"{self.files[0]} has no tensor {name!r}: it is incomplete or of another layout")
        return tuple(self._open(self._file_of[name]).get_slice(name).get_shape())

    def _open(self, file: Path) -> Any:
        if file not in self._opened:
            try:
                self._opened[file] = safe_open(str(file), framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{file} is truncated or not a safetensors file ({error}): download or convert it again"
                ) from error
        return self._opened[file]


def load_module(build: Callable[[], torch.nn.Module], find: Find, where: str) -> torch.nn.Module:
    """Build a module in float32 for inference, its parameters taken from `find`.

    Nothing is initialized or, in float32, copied: parameters begin on the meta device and are replaced. `where` names
    the source in errors. Raises `CheckpointError` when a weight is missing or has the wrong shape.
    """
    with torch.device("meta"):
        module = build()
    state = {}
    for name, slot in module.state_dict().items():
        tensor = find(name)
        if tensor is None:
            raise CheckpointError(f"{where} has no weight {name!r}: the file is incomplete or does not fit its config")
        if tensor.shape != slot.shape:
            raise CheckpointError(
                f"{where}: weight {name!r} has shape {list(tensor.shape)} where its config asks for {list(slot.shape)}"
            )
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise UnsupportedModelError(
                f"{where}: weight {name!r} is {tensor.dtype}; quantized weights are not exported, only floating point"
            )
        state[name] = tensor.to(torch.float32)
    module.load_state_dict(state, assign=True)
    for child in module.modules():  # the one buffer that is not in the file
        with suppress(AttributeError):
            if (positions := child.get_buffer("position_ids")).is_meta:
                child.position_ids = torch.arange(positions.shape[-1]).expand(1, -1)
    return module.eval().requires_grad_(False)
