"""The tensors of weight files, read one at a time."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ...engines.errors import CheckpointError, UnsupportedModelError
from .configs import said_by
from .refused import REMEDY, refuse_weights

PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")
PICKLE_REASON = (
    "pickled weights are refused because opening a pickle runs the code inside it: convert them to .safetensors first"
)
PLAIN = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
"""Element types whose numbers are the weights themselves."""


class Weights:
    """The tensors of one or several files, memory-mapped and read by name.

    A file is mapped when it is first needed and until `close`, or as long as a tensor of it is alive. Files are
    safetensors, or PyTorch's `.bin`, of which tensors are read and nothing else.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        """List the tensors of the files; raises `CheckpointError` for one that is damaged, quantized or an adapter."""
        self.files = tuple(files)
        self._opened: dict[Path, Any] = {}
        self._file_of: dict[str, Path] = {}
        self._finite: set[str] = set()
        self.read: set[str] = set()
        """The tensors that were asked for so far."""
        for file in files:
            names = list(self._open(file).keys())
            refuse_weights(file, names)
            self._file_of |= dict.fromkeys(names, file)
        self.close()

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def close(self) -> None:
        """Unmap the files; reading maps them again."""
        self._opened.clear()

    def metadata(self) -> dict[str, str]:
        """Return what the first file says about itself; only safetensors files can."""
        says: dict[str, str] = self._open(self.files[0]).metadata() or {}
        self.close()
        return says

    def get(self, name: str) -> torch.Tensor | None:
        """Return a tensor by its name in the file, or None.

        Raises `CheckpointError` for one with numbers that are not finite, `UnsupportedModelError` for one that is not
        plain floating point.
        """
        if name not in self._file_of:
            return None
        self.read.add(name)
        file, tensor = self._file_of[name], self.raw(name)
        if tensor.dtype not in PLAIN:
            raise UnsupportedModelError(f"{file}: tensor {name!r} is {tensor.dtype}, which is quantized: {REMEDY}")
        if name in self._finite:
            return tensor
        numbers = tensor.float() if tensor.element_size() == 1 else tensor
        if not bool((finite := torch.isfinite(numbers)).all()):
            count = finite.numel() - int(finite.sum())
            raise CheckpointError(
                f"{file}: tensor {name!r} holds NaN or infinity in {count} of {finite.numel()} numbers: the weights "
                "themselves are damaged, in every precision; download or train them again"
            )
        self._finite.add(name)
        return tensor

    def raw(self, name: str) -> torch.Tensor:
        """Return a tensor of the files whatever it holds; raises `CheckpointError` when it cannot be read."""
        file = self._file_of[name]
        try:
            tensor: torch.Tensor = self._open(file).get_tensor(name)
        except (SafetensorError, OSError, AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{file}: tensor {name!r} cannot be read ({said_by(error)})") from error
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it; raises `CheckpointError` when there is none of that name."""
        if name not in self._file_of:
            raise CheckpointError(f"{self.files[0]} has no tensor {name!r}: it is incomplete or of another layout")
        return tuple(self._open(self._file_of[name]).get_slice(name).get_shape())

    def _open(self, file: Path) -> Any:
        if file not in self._opened:
            self._opened[file] = _Pickle(file) if file.suffix == ".bin" else _safetensors(file)
        return self._opened[file]


def _safetensors(file: Path) -> Any:
    try:
        return safe_open(str(file), framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is truncated or not a safetensors file ({said_by(error)}): download or convert it again"
        ) from error


class _Pickle:
    """A `.bin` file with the face of a safetensors file, read by PyTorch's loader that runs no code."""

    def __init__(self, file: Path) -> None:
        try:
            found = _load(file)
        except Exception as error:  # damaged pickles raise every kind
            unsafe = "Weights only load failed" in str(error)
            what = "asks for more than tensors, which would run code" if unsafe else f"is damaged ({said_by(error)})"
            raise CheckpointError(f"{file} {what}: it is not opened; give .safetensors weights") from error
        if not isinstance(found, dict):
            raise CheckpointError(f"{file} holds no table of tensors: give .safetensors weights")
        self._tensors = {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}

    def keys(self) -> list[str]:
        return [name for name in self._tensors if isinstance(name, str)]

    def metadata(self) -> None:
        return None

    def get_tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name].detach()

    def get_slice(self, name: str) -> _Shape:
        return _Shape(self._tensors[name])


class _Shape:
    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)


def _load(file: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about protocols; what cannot be read is an error
        try:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            return torch.load(file, map_location="cpu", weights_only=True)  # the format before PyTorch 1.6
