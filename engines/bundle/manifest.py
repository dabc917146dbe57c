"""The bundle: a folder with everything the runtime needs and nothing tied to one machine.

`manifest.json` names the graphs, their tensors and stages, the tokenizers, the latent geometry, the scheduler config
and the SHA-256 of every file. Files are checked against it when they are read, not when the bundle is opened: a warm
engine cache never reads the graphs' weights, and hashing gigabytes on every start would cost seconds.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ..errors import BundleError, StorageError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"

Precision = Literal["fp32", "fp16"]
Stage = Literal["prompt", "image", "schedule", "step", "end"]
"""When a graph runs: once per prompt, per initial image, per schedule, per step, or at the end."""


class _Strict(BaseModel):
    # Infinity is written as such: scheduler configs hold it, and null would be another value.
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")


class TensorInfo(_Strict):
    """One graph input or output: its name, element type and shape; a string is a symbolic size such as `R` or `8*h`."""

    name: str
    dtype: Literal["float16", "float32", "int64", "int32", "uint8", "bool"]
    shape: tuple[int | str, ...]


class Parity(_Strict):
    """How far a graph is from the PyTorch module it came from, on random inputs, as measured at export."""

    max_abs_error: float
    relative_error: float
    """Root-mean-square of the difference over root-mean-square of the reference."""


class GraphInfo(_Strict):
    """One ONNX graph of a bundle; `files` lists the graph file first, then its external data."""

    name: str
    stage: Stage
    files: tuple[str, ...] = Field(min_length=1)
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    opset: int
    precision: Precision | None = None
    """Number format inside the graph; an fp16 bundle keeps a VAE that would overflow in fp32."""
    parity: Parity | None = None


class TokenizerInfo(_Strict):
    """One tokenizer file and the fixed-length contract of the text encoder behind it."""

    file: str
    max_length: int = Field(gt=2)
    bos_id: int
    eos_id: int
    pad_id: int
    output: str = "token_ids"
    """The graph input that the token ids feed."""


class LatentInfo(_Strict):
    """Latent geometry: pixels per latent cell and side, channels, and the size that the checkpoint was trained for."""

    channels: int = Field(gt=0)
    downscale: int = Field(gt=0)
    size_multiple: int = Field(gt=0)
    """Height and width in pixels must be multiples of this."""
    default_height: int = Field(gt=0)
    default_width: int = Field(gt=0)


class FileInfo(_Strict):
    """Size in bytes and SHA-256 of one file."""

    size: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Manifest(_Strict):
    """The contents of `manifest.json`."""

    format_version: int
    family: str
    precision: Precision
    graphs: tuple[GraphInfo, ...]
    tokenizers: tuple[TokenizerInfo, ...]
    latent: LatentInfo
    scheduler: dict[str, Any]
    """The checkpoint's own diffusers scheduler config, `_class_name` included."""
    default_guidance_scale: float = 7.5
    default_num_inference_steps: int = Field(default=50, gt=0)
    files: dict[str, FileInfo]
    source: dict[str, Any] = {}
    """Where the checkpoint came from: name, revision, and the SHA-256 of each source file."""
    tools: dict[str, str] = {}
    """Versions of the libraries that wrote the graphs."""

    @field_validator("files")
    @classmethod
    def _inside(cls, files: dict[str, FileInfo]) -> dict[str, FileInfo]:
        for name in files:
            parts = PurePosixPath(name).parts
            if not parts or name.startswith("/") or "\\" in name or ":" in name or ".." in parts or MANIFEST in parts:
                raise ValueError(f"file {name!r} leaves the bundle's folder")
        return files

    def model_post_init(self, _: Any, /) -> None:
        """Check that every file a graph or tokenizer names is listed with its hash."""
        named = [f for g in self.graphs for f in g.files] + [t.file for t in self.tokenizers]
        if missing := [f for f in named if f not in self.files]:
            raise ValueError(f"file {missing[0]!r} is used but has no hash in `files`")
        names = [g.name for g in self.graphs]
        if len(set(names)) != len(names):
            raise ValueError(f"two graphs have one name: {names}")


class Bundle:
    """A bundle opened for reading: its folder and its validated manifest."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._checked: set[str] = set()

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Read and validate a bundle's manifest.

        Raises `BundleError` when the folder is no bundle, is of another format version, or names files outside itself.
        """
        path = Path(path)
        file = path / MANIFEST
        if not path.exists():
            raise BundleError(f"bundle {path} does not exist: give the folder that `latentrt export` wrote")
        if not file.is_file():
            raise BundleError(
                f"{path} is not a bundle: it has no {MANIFEST}; run `latentrt export CHECKPOINT -o BUNDLE`"
            )
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BundleError(f"{file} cannot be read as JSON ({error}): export the checkpoint again") from error
        version = data.get("format_version") if isinstance(data, dict) else None
        if version != FORMAT_VERSION:
            raise BundleError(
                f"{file} has format version {version!r}, this latentrt reads {FORMAT_VERSION}: export again"
            )
        try:
            return cls(path, Manifest.model_validate(data))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "manifest"
            raise BundleError(f"{file} is not valid at {where}: {first['msg']}") from error

    def graph(self, name: str) -> GraphInfo:
        """Return the graph called `name`, or raise `BundleError`."""
        for graph in self.manifest.graphs:
            if graph.name == name:
                return graph
        names = ", ".join(g.name for g in self.manifest.graphs)
        raise BundleError(f"bundle {self.path} has no graph {name!r}: it has {names}")

    def has_graph(self, name: str) -> bool:
        """Tell whether the bundle has a graph called `name`."""
        return any(graph.name == name for graph in self.manifest.graphs)

    def digest(self, graph: GraphInfo) -> str:
        """Return one SHA-256 over the hashes of a graph's files: what an engine of it is keyed by."""
        return hashlib.sha256("".join(self.manifest.files[f].sha256 for f in graph.files).encode()).hexdigest()

    def file(self, name: str) -> Path:
        """Return the path of a listed file after checking its size and hash (once per opened bundle).

        Raises `BundleError` when the file is missing, was changed, or is a link out of the bundle.
        """
        path = self.path / name
        if name in self._checked:
            return path
        problem = self._problem(name)
        if problem:
            raise BundleError(f"{path} {problem}: export the checkpoint again or restore the file")
        self._checked.add(name)
        return path

    def _problem(self, name: str) -> str | None:
        if name not in self.manifest.files:
            return "is not listed in the manifest"
        info, path = self.manifest.files[name], self.path / name
        if not path.is_file():
            return "is missing"
        if not path.resolve().is_relative_to(self.path.resolve()):
            return "is a link that leaves the bundle's folder"
        if path.stat().st_size != info.size:
            return f"has {path.stat().st_size} bytes where the manifest says {info.size}"
        if sha256_of(path) != info.sha256:
            return "does not match its SHA-256 in the manifest"
        return None

    def problems(self, progress: Callable[[str], None] = lambda name: None) -> dict[str, str]:
        """Check every listed file; return what is wrong with each bad one, by name (empty when all is well)."""
        found = {}
        for name in self.manifest.files:
            progress(name)
            if problem := self._problem(name):
                found[name] = problem
        return found


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def describe_files(folder: Path) -> dict[str, FileInfo]:
    """Return size and hash of every file below `folder` but the manifest, by its POSIX path relative to it."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    return {p.relative_to(folder).as_posix(): FileInfo(size=p.stat().st_size, sha256=sha256_of(p)) for p in files}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` into `folder`."""
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")


@contextmanager
def atomic_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `target` that becomes `target` when the block ends without an error.

    An existing `target` is kept until the new folder is complete. Without `replace` it is an error, raised before any
    work is done. Raises `StorageError` when the disk is full or the place cannot be written.
    """
    target = Path(target)
    if target.exists() and not replace:
        raise StorageError(f"{target} already exists: choose another output or allow replacing it with --force")
    if replace and target.exists() and not ((target / MANIFEST).is_file() or not any(target.iterdir())):
        raise StorageError(f"{target} exists and is no bundle: it is not replaced; choose another output")
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        yield temporary
        temporary.chmod(0o755)
        old = temporary.with_name(temporary.name + ".old")
        if target.exists():
            target.rename(old)
        temporary.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(
            f"cannot write {target}: {error.strerror or error}; free space or choose another place"
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
