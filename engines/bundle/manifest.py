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

Precision = Literal["fp32", "fp16", "bf16"]
"""A number format that networks compute in. The inputs and outputs of a bf16 graph are float32, as numpy lacks bf16."""
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
    layers: int | None = Field(default=None, ge=1)
    """How many of a network's layers were compared, the first and the last with their true weights; None: all."""


Letter = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,31}$")]


class ReferenceInfo(_Strict):
    """Inputs of a graph and the right outputs for them, which an engine must give before it is used.

    The file holds nothing but numbers: every input, then every output, in the order of the manifest, in C order and
    little-endian, with one byte for a bool.
    """

    file: str
    sizes: dict[Letter, Annotated[int, Field(ge=1, le=2**31)]] = Field(max_length=32)
    """The value of every symbol in the shapes of the graph."""


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
    """None for a graph that comes from no module."""
    references: tuple[ReferenceInfo, ...] = Field(default=(), max_length=16)
    """Rows by which every engine of the graph is checked once; none in bundles of early exports."""
    limits: dict[TensorName, Letter | Annotated[float, Field(ge=1, allow_inf_nan=False)]] = Field(
        default={}, max_length=1000
    )
    """Inputs whose values lie in [0, limit); a symbol is its size. The others take any number."""

    @property
    def letters(self) -> list[str]:
        """The symbols that the shapes are made of, in the order of their first use."""
        return _letters(self.inputs + self.outputs)

    def model_post_init(self, _: Any, /) -> None:
        """Check that references and limits speak of this graph's sizes and inputs."""
        letters, names, known = set(self.letters), {spec.name for spec in self.inputs}, _letters(self.inputs)
        for reference in self.references:
            if set(reference.sizes) != letters:
                raise ValueError(f"the sizes of {reference.file!r} are not those of graph {self.name!r}")
        for name, limit in self.limits.items():
            if name not in names or (isinstance(limit, str) and limit not in known):
                raise ValueError(f"the limit of {name!r} is of no input and no size of graph {self.name!r}")


def _letters(specs: tuple[TensorInfo, ...]) -> list[str]:
    sizes = [size for spec in specs for size in spec.shape if isinstance(size, str)]
    return list(dict.fromkeys(size.rpartition("*")[2].partition("+")[0] for size in sizes))


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


class ShiftLine(_Strict):
    """A line that gives the shift of a schedule for the size of a picture: mu = slope * tokens**power + offset."""

    slope: float = Field(allow_inf_nan=False)
    """Shift for a token, or for a token to the rule's power."""
    offset: float = Field(allow_inf_nan=False)
    """Shift without tokens."""
    steps: int = Field(default=1, gt=0, le=100_000)
    """The number of steps that the line is for, where a rule has two."""


class ScheduleRule(_Strict):
    """What the checkpoint's pipeline hands to its scheduler for a number of steps and a size."""

    sigmas: Literal["scheduler", "even", "whole"] = "scheduler"
    """The scheduler's own; even, from 1 to 1/steps; or whole timesteps, even from the last training timestep to 1."""
    lines: tuple[ShiftLine, ...] = Field(default=(), max_length=2)
    """None: no shift. Of two, the shift is linear in the number of steps between them."""
    power: float = Field(default=1.0, gt=0, le=4)
    """Of the number of tokens."""
    pixels_per_token: int = Field(default=16, gt=0, le=4096)
    """Side of the square of pixels that is one token."""
    tokens: int | None = Field(default=None, gt=0, le=2**31)
    """The number of tokens for any size, where the pipeline does not count them."""
    last_line_above: int | None = Field(default=None, ge=0, le=2**31)
    """The last line holds alone for more tokens than this."""

    def model_post_init(self, _: Any, /) -> None:
        """Check that two lines are for different numbers of steps."""
        if len({line.steps for line in self.lines}) < len(self.lines):
            raise ValueError("two lines of a schedule are for one number of steps")


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
    """Number format of the networks; a graph's own stands with it."""
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
    schedule: ScheduleRule | None = None
    """What the checkpoint's pipeline hands to its scheduler; null: nothing but the number of steps."""
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
        named = [f for g in self.graphs for f in (*g.files, *(reference.file for reference in g.references))]
        named += [t.file for t in self.tokenizers]
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
