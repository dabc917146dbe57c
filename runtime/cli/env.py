"""`latentrt env`, `samplers`, `backends`, `inspect`: what works here, what there is to choose, what is in a bundle."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from ...engines.backends import names, option_help, unavailable_reasons
from ...engines.bundle import Bundle, TokenizerInfo
from ...engines.cache import EngineCache, home
from ...engines.cuda.device import CudaDevice
from ...engines.cuda.driver import load_driver, unavailable_reason
from ...engines.errors import LatentRTError
from ...engines.machine import has_bf16, processor_name, usable_cores
from .bundle import readable_size
from .options import opened_bundle
from .progress import progress_bar

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_PACKAGES = ["latentrt", "numpy", "pillow", "tokenizers", "pydantic", "typer"]
_PACKAGES += ["onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "openvino", "cuda-bindings"]
_PACKAGES += ["onnx", "onnxscript", "torch", "diffusers", "transformers", "safetensors", "polygraphy"]


def env(as_json: AsJson = False) -> None:
    """Print the machine, its GPUs, versions, the backends that work here and why others do not."""
    report = _report()
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    typer.echo(f"{report['system']}, Python {report['python']}, {report['cores']} cores: {report['processor']}")
    bf16 = "multiplies in bf16: see `--backend openvino --option precision=bf16`"
    typer.echo(f"the processor {bf16 if report['bf16'] else 'names no instructions for bf16'}")
    for gpu in report["gpus"]:
        typer.echo(f"GPU {gpu['number']}: {gpu.get('error') or _gpu_text(gpu)}")
    if report["cache"] is None:
        typer.echo(f"no cache: {report['cache_error']}")
    else:
        typer.echo(f"cache {report['cache']}: {report['engines']} engines, {readable_size(report['engine_bytes'])}")
    typer.echo(f"LATENTRT_HOME {report['latentrt_home'] or 'is not set'}")
    for name, version in report["packages"].items():
        typer.echo(f"  {name} {version or 'not installed'}")
    for name, reason in report["backends"].items():
        typer.echo(f"  backend {name}: {'works' if reason is None else reason}")


def _report() -> dict[str, Any]:
    return {
        "system": platform.platform(),
        "libc": " ".join(filter(None, platform.libc_ver())) or None,
        "python": platform.python_version(),
        "processor": processor_name(),
        "cores": usable_cores(),
        "bf16": has_bf16(),
        "gpus": gpus(),
        **_cache(),
        "latentrt_home": os.environ.get("LATENTRT_HOME"),
        "packages": {name: _version(name) for name in _PACKAGES},
        "backends": unavailable_reasons(),
    }


def _cache() -> dict[str, Any]:
    """Return where the cache is and what it holds, or why this user has none."""
    try:
        folder, engines = str(home()), EngineCache().entries()
    except LatentRTError as error:
        return {"cache": None, "cache_error": str(error), "engines": 0, "engine_bytes": 0}
    size = sum(entry["bytes"] for entry in engines)
    return {"cache": folder, "cache_error": None, "engines": len(engines), "engine_bytes": size}


def gpus() -> list[dict[str, Any]]:
    """Return name, architecture, memory, CUDA and driver of every GPU; one that does not open has an `error`."""
    if unavailable_reason() is not None:
        return []
    return [{"number": number, **_gpu(number)} for number in range(load_driver().cuDeviceGetCount())]


def _gpu(number: int) -> dict[str, Any]:
    try:
        gpu = CudaDevice(number)
    except LatentRTError as error:
        return {"error": str(error)}
    try:
        return {
            "name": gpu.name,
            "compute_capability": gpu.compute_capability,
            "memory_bytes": gpu.memory_free()[1],
            "cuda": gpu.driver_version,
            "driver": _kernel_driver(),
        }
    finally:
        gpu.close()


def _kernel_driver() -> str | None:
    """Return the version of NVIDIA's kernel module, as nvidia-smi shows it."""
    try:
        return Path("/sys/module/nvidia/version").read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _gpu_text(gpu: dict[str, Any]) -> str:
    return (
        f"{gpu['name']}, compute capability {gpu['compute_capability']}, {readable_size(gpu['memory_bytes'])}, "
        f"driver {gpu['driver'] or 'of unknown version'}, CUDA up to {gpu['cuda']}"
    )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def samplers(as_json: AsJson = False) -> None:
    """List the samplers: name, diffusers class, method and source; a * marks names that take a suffix."""
    from ..sampling.catalog import SAMPLERS
    from ..sampling.registry import describe

    found = describe()
    if as_json:
        typer.echo(json.dumps([asdict(sampler) for sampler in found], indent=2))
        return
    for sampler in found:
        mark = "*" if sampler.suffixes else ""
        typer.echo(f"{sampler.name + mark:<14}{sampler.class_name:<34}{sampler.meaning}")
    unnamed = sorted({*SAMPLERS} - {sampler.class_name for sampler in found})
    typer.echo("* also with _karras, _exponential or _beta behind it, which space the sigmas: dpmpp_2m_karras.")
    typer.echo(f"Class names are taken as well. Without a short name: {', '.join(unnamed)}.")


def backends(as_json: AsJson = False) -> None:
    """List the backends: whether each works on this machine, or why not, and the options it takes."""
    reasons = unavailable_reasons()
    found: dict[str, dict[str, Any]] = {
        name: {"unavailable": reasons[name], "options": _options(name)} for name in names()
    }
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    for name, backend in found.items():
        typer.echo(f"{name}: {backend['unavailable'] or 'works'}")
        for option, facts in backend["options"].items():
            default = "" if facts["default"] is None else f" (default: {_text(facts['default'])})"
            typer.echo(f"    {option:<20}{facts['type']}: {facts['meaning']}{default}")
    typer.echo("An option is given as --option NAME=VALUE.")


def _options(name: str) -> dict[str, dict[str, Any]]:
    return {
        option: {"type": kind, "default": default, "meaning": meaning}
        for option, (kind, default, meaning) in option_help(name).items()
    }


def _text(default: Any) -> str:
    return {True: "yes", False: "no"}[default] if isinstance(default, bool) else str(default)


def inspect(
    bundle: Annotated[Path, typer.Argument(help="A bundle.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest and what is wrong as JSON.")] = False,
) -> None:
    """Show a bundle's graphs, tensors, sizes and sampler, and check every file's hash."""
    opened = opened_bundle(bundle)
    manifest = opened.manifest
    with progress_bar("checking") as progress:
        done = iter(range(len(manifest.files)))
        problems = opened.problems(lambda name: progress(name, next(done), len(manifest.files)))
    if as_json:
        typer.echo(json.dumps({"manifest": manifest.model_dump(mode="json"), "problems": problems}, indent=2))
    else:
        typer.echo("\n".join(_lines(opened)))
        for name, problem in problems.items():
            typer.echo(f"  {name} {problem}")
        typer.echo("every file matches its hash" if not problems else "do not use this bundle: export it again")
    if problems:
        raise typer.Exit(1)


def _lines(bundle: Bundle) -> list[str]:
    manifest, latent = bundle.manifest, bundle.manifest.latent
    source = manifest.source.get("name", "unknown")
    replaced = manifest.source.get("replaced")
    for component, origin in replaced.items() if isinstance(replaced, dict) else ():
        source += f", {component} of {origin.get('name') if isinstance(origin, dict) else origin}"
    if isinstance(tiny := manifest.source.get("tiny_decoder"), dict):
        source += f", tiny decoder of {tiny.get('name')}"
    lines = [
        f"{bundle.path}: {manifest.family}, {manifest.precision}, from {source}",
        f"  size {latent.default_width}x{latent.default_height}, multiples of {latent.size_multiple};"
        f" latents {latent.channels} channels, 1/{latent.downscale} of the pixels",
        f"  sampler {manifest.scheduler.get('_class_name')}, prediction {_prediction(manifest.scheduler)}, default "
        f"{manifest.default_num_inference_steps} steps, guidance {manifest.default_guidance_scale:g}",
        *(f"  {info.source} of {_tokens(info)} tokens" for info in manifest.tokenizers),
    ]
    if (skipped := manifest.guidance.skipped) is not None:
        lines.append(f"  requests may skip layers {', '.join(map(str, skipped.layers))}")
    if moved := manifest.bytes_of("request"):
        steps = readable_size(manifest.bytes_of("step"))
        lines.append(f"  {steps} of graphs and weights for every step, {readable_size(moved)} once for a request")
    for graph in manifest.graphs:
        size = readable_size(sum(manifest.files[name].size for name in graph.files))
        inside = f", {graph.precision} inside" if graph.precision not in (None, manifest.precision) else ""
        parity = f", error against PyTorch {graph.parity.relative_error:.1e}" if graph.parity else ""
        lines.append(f"  {graph.name} (once per {_STAGES[graph.stage]}): {size}, opset {graph.opset}{inside}{parity}")
        if graph.winograd:
            lines.append(f"    {graph.winograd} convolutions in half the products")
        if graph.quantization is not None:
            lines.append(f"    {graph.quantization}; not {', '.join(graph.quantization.kept)}")
        for arrow, tensors in (("<-", graph.inputs), ("->", graph.outputs)):
            lines += [f"    {arrow} {t.name} {t.dtype}[{', '.join(map(str, t.shape))}]" for t in tensors]
        lines += [f"    {name} sha256 {manifest.files[name].sha256}" for name in graph.files]
    return lines


def _prediction(scheduler: Mapping[str, Any]) -> str:
    """Return what the denoiser predicts: schedulers of flows do not say it."""
    flow = str(scheduler.get("_class_name")).startswith("FlowMatch")
    return "flow" if flow else str(scheduler.get("prediction_type", "epsilon"))


def _tokens(info: TokenizerInfo) -> str:
    """Return how many tokens the rows of a tokenizer have."""
    shorter = "".join(f"{length}, " for length in info.lengths)
    return f"up to {info.max_length}" if info.any_length else f"{shorter}{info.max_length}"


_STAGES: dict[str, Any] = {
    "prompt": "prompt",
    "image": "initial picture",
    "request": "request",
    "step": "step",
    "end": "picture",
}
