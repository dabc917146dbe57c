"""What `manifest.json` says: graphs with their tensors and stages, request inputs, tokenizers, latent geometry, the
scheduler config, and the SHA-256 of every file.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator

from .records import GuidanceInfo, LatentInfo, NumbersInput, ScheduleRule, Strict, TensorName, TokenizerInfo

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
MAX_PATH = 200

Precision = Literal["fp32", "fp16", "bf16"]
"""A number format that networks compute in. The inputs and outputs of a bf16 graph are float32, as numpy lacks bf16."""
EightBits = Literal["int8", "fp8"]
"""What layers are quantized to: whole numbers, or floating point of the format E4M3."""
Stage = Literal["prompt", "image", "request", "step", "end"]
"""When a graph runs: once per prompt, per initial image, per request before its steps, per step, or at the end."""
STAGES: tuple[Stage, ...] = get_args(Stage)


NOT_JSON = {"Infinity": float("inf"), "-Infinity": float("-inf"), "NaN": float("nan")}
"""Numbers that JSON cannot hold, by the words that stand for them in a scheduler config."""


Size = Annotated[int, Field(ge=0, le=2**31)]
Symbol = Annotated[str, Field(pattern=r"^([0-9]{1,6}\*)?[A-Za-z_][A-Za-z0-9_]{0,31}(\+[0-9]{1,6})?$")]
"""A size that changes from request to request, such as `R` or `8*h`."""


class TensorInfo(Strict):
    """One graph input or output: its name, element type and shape; a string is a symbolic size such as `R` or `8*h`."""

    name: TensorName
    dtype: Literal["float16", "float32", "int64", "int32", "uint8", "bool"]
    shape: tuple[Size | Symbol, ...] = Field(max_length=8)


class Parity(Strict):
    """How far a graph is from the PyTorch module it came from, on random inputs, as measured at export.

    Of a bf16 graph it is that of the same graph in fp32: no CPU kernels run it in bf16 where it is exported.
    """

    max_abs_error: float
    relative_error: float
    """Root-mean-square of the difference over root-mean-square of the reference."""
    layers: int | None = Field(default=None, ge=1)
    """How many of a network's layers were compared, the first and the last with their true weights; None: all."""


LayerName = Annotated[str, Field(max_length=200)]


class Quantization(Strict):
    """What a denoiser with layers in 8 bits has lost, measured against the bundle that it was made from.

    Measured on prompts that took no part in the calibration, on the CPU, each with the same noise in both.
    """

    precision: EightBits
    """What its layers multiply in; fp8 is E4M3, and was simulated where it was measured."""
    layers: int = Field(ge=1)
    """How many convolutions and matrix products have weights and inputs in 8 bits."""
    kept: tuple[LayerName, ...] = Field(max_length=10_000)
    """The layers that were left as they are: the first and the last, those that lost most, and those asked for."""
    tool: str = Field(max_length=100)
    """What chose the scales, with its version."""
    samples: int = Field(ge=1)
    """Calls of the network that it was calibrated on."""
    relative_error: float
    """Of predictions: root-mean-square of the difference over root-mean-square of what the other bundle gives."""
    psnr: float | None
    """Peak signal-to-noise ratio of the finished pictures, in decibels; null: they are equal."""

    def __str__(self) -> str:
        """Return what was done and what it costs, in one line."""
        pictures = "equal pictures" if self.psnr is None else f"pictures {self.psnr:.1f} dB"
        return (
            f"{self.precision} in {self.layers} of {self.layers + len(self.kept)} layers by {self.tool} on "
            f"{self.samples} samples: error {self.relative_error:.1e}, {pictures} from what it was made from"
        )


Letter = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,31}$")]


class ReferenceInfo(Strict):
    """Inputs of a graph and the right outputs for them, which an engine must give before it is used.

    The file holds nothing but numbers: every input, then every output, in the order of the manifest, in C order and
    little-endian, with one byte for a bool.
    """

    file: str
    sizes: dict[Letter, Annotated[int, Field(ge=1, le=2**31)]] = Field(max_length=32)
    """The value of every symbol in the shapes of the graph."""


class GraphInfo(Strict):
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
    quantization: Quantization | None = None
    """Of a graph whose layers are in 8 bits; its parity is that of the graph before."""
    winograd: int = Field(default=0, ge=0, le=100_000)
    """Convolutions over 3x3 that are computed in half the products, with twice the weights."""
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


class FileInfo(Strict):
    """Size in bytes and SHA-256 of one file."""

    size: int = Field(ge=0, le=2**48)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Manifest(Strict):
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
    masked_input: TensorName | None = None
    """The graph input [R, 1 + C, h, w] of an inpainting checkpoint: where a picture is repainted, 1, and the latents of
    what is left of it. null: requests need no picture."""
    latent: LatentInfo
    """Geometry of the latents."""
    scheduler: dict[str, Any]
    """The checkpoint's own diffusers scheduler config, `_class_name` included."""
    schedule: ScheduleRule | None = None
    """What the checkpoint's pipeline hands to its scheduler; null: nothing but the number of steps."""
    guidance: GuidanceInfo = GuidanceInfo()
    """How predictions are combined; left out: classifier-free guidance."""
    default_guidance_scale: float = Field(default=7.5, ge=0, le=1000, allow_inf_nan=False)
    """What a request gets that asks for none."""
    default_num_inference_steps: int = Field(default=50, gt=0, le=100_000)
    """What a request gets that asks for none."""
    default_strength: float = Field(default=0.8, gt=0, le=1)
    """What a request with a picture gets that asks for none."""
    default_inpainting_strength: float = Field(default=1.0, gt=0, le=1)
    """What a request with a picture and a mask gets that asks for none."""
    files: dict[str, FileInfo] = Field(max_length=10_000)
    """Size and hash of every file but the manifest, by its path in the bundle."""
    source: dict[str, Any] = Field(default={})
    """Where the checkpoint came from: name, revision, and the SHA-256 of each source file."""
    tools: dict[str, str] = Field(default={})
    """Versions of the libraries that wrote the graphs."""

    def bytes_of(self, stage: Stage) -> int:
        """Return the bytes of the graphs of a stage with their weights, each file counted once."""
        return sum(self.files[name].size for name in {f for g in self.graphs if g.stage == stage for f in g.files})

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
        if self.masked_input is not None:
            for graph_name, tensor in (("denoiser", self.masked_input), ("image_encoder", "kept")):
                if tensor not in {spec.name for g in self.graphs if g.name == graph_name for spec in g.inputs}:
                    raise ValueError(f"masked_input is given, and no graph {graph_name!r} reads {tensor!r}")
        if (skipped := self.guidance.skipped) is not None:
            of_rows = [spec for g in self.graphs if g.name == "denoiser" for spec in g.inputs if len(spec.shape) == 1]
            if skipped.input not in {spec.name for spec in of_rows}:
                raise ValueError(f"guidance skips layers, and no graph 'denoiser' reads {skipped.input!r} of each row")
        names = [g.name for g in self.graphs]
        if len(set(names)) != len(names):
            raise ValueError(f"two graphs have one name: {names}")
        for graph in self.graphs:
            tensors = [spec.name for spec in graph.inputs + graph.outputs]
            if len(set(tensors)) != len(tensors):
                raise ValueError(f"two tensors of graph {graph.name!r} have one name: {sorted(tensors)[:20]}")
