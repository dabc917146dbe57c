"""What `manifest.json` says: graphs with their tensors and stages, request inputs, tokenizers, latent geometry, the
scheduler config, and the SHA-256 of every file.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
MAX_PATH = 200

Precision = Literal["fp32", "fp16"]
Stage = Literal["prompt", "image", "step", "end"]
"""When a graph runs: once per prompt, per initial image, per step, or at the end."""
STAGES: tuple[Stage, ...] = get_args(Stage)


NOT_JSON = {"Infinity": float("inf"), "-Infinity": float("-inf"), "NaN": float("nan")}
"""Numbers that JSON cannot hold, by the words that stand for them in a scheduler config."""


Size = Annotated[int, Field(ge=0, le=2**31)]
Symbol = Annotated[str, Field(pattern=r"^([0-9]{1,6}\*)?[A-Za-z_][A-Za-z0-9_]{0,31}(\+[0-9]{1,6})?$")]
"""A size that changes from request to request, such as `R` or `8*h`."""
TensorName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.]{0,63}$")]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]


class _Strict(BaseModel):
    # Scheduler configs hold infinities. JSON has none, and null would be another value: they are written as words.
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class TensorInfo(_Strict):
    """One graph input or output: its name, element type and shape; a string is a symbolic size such as `R` or `8*h`."""

    name: TensorName
    dtype: Literal["float16", "float32", "int64", "int32", "uint8", "bool"]
    shape: tuple[Size | Symbol, ...] = Field(max_length=8)


class Parity(_Strict):
    """How far a graph is from the PyTorch module it came from, on random inputs, as measured at export."""

    max_abs_error: float
    relative_error: float
    """Root-mean-square of the difference over root-mean-square of the reference."""


class GraphInfo(_Strict):
    """One ONNX graph of a bundle; `files` lists the graph file first, then its external data."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")
    stage: Stage
    files: tuple[str, ...] = Field(min_length=1, max_length=1000)
    inputs: tuple[TensorInfo, ...] = Field(max_length=1000)
    outputs: tuple[TensorInfo, ...] = Field(max_length=1000)
    opset: int = Field(ge=1, le=100)
    precision: Precision | None = None
    """Number format inside the graph; an fp16 bundle keeps a VAE that would overflow in fp32."""
    parity: Parity | None = None


class TokenizerInfo(_Strict):
    """One tokenizer file and the fixed-length contract of the text encoder behind it."""

    file: str
    max_length: int = Field(gt=2, le=8192)
    """Tokens of a prompt, begin and end among them."""
    bos_id: TokenId
    """Begins every prompt."""
    eos_id: TokenId
    """Ends every prompt."""
    pad_id: TokenId
    """Fills a prompt up."""
    output: TensorName = "token_ids"
    """The graph input that the token ids feed."""


RequestField = Literal["height", "width", "num_inference_steps", "guidance_scale"]


class NumbersInput(_Strict):
    """Numbers that graphs read and no graph writes: one row [N] for each row of the network, the same for all.

    A value is a constant or a field of the request, such as `("height", "width", 0, 0)` for size conditioning. The
    element type is that of the graph input of this name.
    """

    kind: Literal["numbers"] = "numbers"
    name: TensorName
    values: tuple[RequestField | Annotated[float, Field(allow_inf_nan=False)], ...] = Field(min_length=1, max_length=64)


class LatentInfo(_Strict):
    """Latent geometry: pixels per latent cell and side, channels, and the size that the checkpoint was trained for."""

    channels: int = Field(gt=0, le=4096)
    """Channels of a latent cell."""
    downscale: int = Field(gt=0, le=256)
    """Pixels of a latent cell on each side."""
    size_multiple: int = Field(gt=0, le=4096)
    """Height and width in pixels must be multiples of this."""
    default_height: int = Field(gt=0, le=16384)
    """Pixels, when a request names no size."""
    default_width: int = Field(gt=0, le=16384)
    """Pixels, when a request names no size."""


class FileInfo(_Strict):
    """Size in bytes and SHA-256 of one file."""

    size: int = Field(ge=0, le=2**48)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Manifest(_Strict):
    """The contents of `manifest.json`."""

    format_version: int
    """What this page describes is version 2; others are refused."""
    family: str = Field(max_length=100)
    """The exporter's family; the runtime does not ask."""
    precision: Precision
    """Number format of the networks."""
    graphs: tuple[GraphInfo, ...] = Field(max_length=100)
    """In the order in which a request runs them."""
    tokenizers: tuple[TokenizerInfo, ...] = Field(max_length=16)
    """One for each text encoder."""
    inputs: tuple[NumbersInput, ...] = Field(default=(), max_length=64)
    """What graphs read beside token ids, by kind."""
    latent: LatentInfo
    """Geometry of the latents."""
    scheduler: dict[str, Any]
    """The checkpoint's own diffusers scheduler config, `_class_name` included."""
    default_guidance_scale: float = Field(default=7.5, ge=0, le=1000, allow_inf_nan=False)
    """What a request gets that asks for none."""
    default_num_inference_steps: int = Field(default=50, gt=0, le=100_000)
    """What a request gets that asks for none."""
    files: dict[str, FileInfo] = Field(max_length=10_000)
    """Size and hash of every file but the manifest, by its path in the bundle."""
    source: dict[str, Any] = {}
    """Where the checkpoint came from: name, revision, and the SHA-256 of each source file."""
    tools: dict[str, str] = {}
    """Versions of the libraries that wrote the graphs."""

    @field_validator("scheduler", mode="before")
    @classmethod
    def _infinities(cls, scheduler: Any) -> Any:
        if not isinstance(scheduler, dict):
            return scheduler
        return {
            key: NOT_JSON.get(value, value) if isinstance(value, str) else value for key, value in scheduler.items()
        }

    @field_validator("files")
    @classmethod
    def _inside(cls, files: dict[str, FileInfo]) -> dict[str, FileInfo]:
        for name in files:
            path = PurePosixPath(name)
            outside = path.is_absolute() or {"..", MANIFEST} & set(path.parts) or set(name) & set("\\:")
            if outside or not path.parts:
                raise ValueError(f"file {name[:100]!r} leaves the bundle's folder")
            if path.as_posix() != name or len(name) > MAX_PATH or not name.isprintable() or set(name) & set('*?"<>|'):
                raise ValueError(f"file {name[:100]!r} has a name that not every system takes")
        return files

    def model_post_init(self, _: Any, /) -> None:
        """Check that every file that is named is listed with its hash, and that names agree."""
        named = [f for g in self.graphs for f in g.files] + [t.file for t in self.tokenizers]
        if missing := [f for f in named if f not in self.files]:
            raise ValueError(f"file {missing[0]!r} is used but has no hash in `files`")
        read = {spec.name for graph in self.graphs for spec in graph.inputs}
        if unread := [info.name for info in self.inputs if info.name not in read]:
            raise ValueError(f"input {unread[0]!r} is read by no graph")
        names = [g.name for g in self.graphs]
        if len(set(names)) != len(names):
            raise ValueError(f"two graphs have one name: {names}")
        for graph in self.graphs:
            tensors = [spec.name for spec in graph.inputs + graph.outputs]
            if len(set(tensors)) != len(tensors):
                raise ValueError(f"two tensors of graph {graph.name!r} have one name: {sorted(tensors)[:20]}")
