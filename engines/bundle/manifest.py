"""What `manifest.json` says: graphs with their tensors and stages, request inputs, tokenizers, latent geometry, the
scheduler config, and the SHA-256 of every file.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator

FORMAT_VERSION = 2
MANIFEST = "manifest.json"

Precision = Literal["fp32", "fp16"]
Stage = Literal["prompt", "image", "step", "end"]
"""When a graph runs: once per prompt, per initial image, per step, or at the end."""
STAGES: tuple[Stage, ...] = get_args(Stage)


NOT_JSON = {"Infinity": float("inf"), "-Infinity": float("-inf"), "NaN": float("nan")}
"""Numbers that JSON cannot hold, by the words that stand for them in a scheduler config."""


class _Strict(BaseModel):
    # Scheduler configs hold infinities. JSON has none, and null would be another value: they are written as words.
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


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
    """Tokens of a prompt, begin and end among them."""
    bos_id: int
    """Begins every prompt."""
    eos_id: int
    """Ends every prompt."""
    pad_id: int
    """Fills a prompt up."""
    output: str = "token_ids"
    """The graph input that the token ids feed."""


RequestField = Literal["height", "width", "num_inference_steps", "guidance_scale"]


class NumbersInput(_Strict):
    """Numbers that graphs read and no graph writes: one row [N] for each row of the network, the same for all.

    A value is a constant or a field of the request, such as `("height", "width", 0, 0)` for size conditioning. The
    element type is that of the graph input of this name.
    """

    kind: Literal["numbers"] = "numbers"
    name: str
    values: tuple[RequestField | float, ...] = Field(min_length=1)


class LatentInfo(_Strict):
    """Latent geometry: pixels per latent cell and side, channels, and the size that the checkpoint was trained for."""

    channels: int = Field(gt=0)
    """Channels of a latent cell."""
    downscale: int = Field(gt=0)
    """Pixels of a latent cell on each side."""
    size_multiple: int = Field(gt=0)
    """Height and width in pixels must be multiples of this."""
    default_height: int = Field(gt=0)
    """Pixels, when a request names no size."""
    default_width: int = Field(gt=0)
    """Pixels, when a request names no size."""


class FileInfo(_Strict):
    """Size in bytes and SHA-256 of one file."""

    size: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Manifest(_Strict):
    """The contents of `manifest.json`."""

    format_version: int
    """What this page describes is version 2; others are refused."""
    family: str
    """The exporter's family; the runtime does not ask."""
    precision: Precision
    """Number format of the networks."""
    graphs: tuple[GraphInfo, ...]
    """In the order in which a request runs them."""
    tokenizers: tuple[TokenizerInfo, ...]
    """One for each text encoder."""
    inputs: tuple[NumbersInput, ...] = ()
    """What graphs read beside token ids, by kind."""
    latent: LatentInfo
    """Geometry of the latents."""
    scheduler: dict[str, Any]
    """The checkpoint's own diffusers scheduler config, `_class_name` included."""
    default_guidance_scale: float = 7.5
    """What a request gets that asks for none."""
    default_num_inference_steps: int = Field(default=50, gt=0)
    """What a request gets that asks for none."""
    files: dict[str, FileInfo]
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
            parts = PurePosixPath(name).parts
            if not parts or name.startswith("/") or "\\" in name or ":" in name or ".." in parts or MANIFEST in parts:
                raise ValueError(f"file {name!r} leaves the bundle's folder")
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
