"""`latentrt env`: what is installed and what works, ready to paste into a report."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from ...engines.backends import unavailable_reasons
from ...engines.cache import EngineCache, home
from ...engines.cuda.device import CudaDevice
from ...engines.cuda.driver import load_driver, unavailable_reason
from ...engines.errors import LatentRTError
from ...engines.machine import has_bf16, processor_name, usable_cores
from .bundle import readable_size

_PACKAGES = ["latentrt", "numpy", "pillow", "tokenizers", "pydantic", "typer"]
_PACKAGES += ["onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "openvino", "cuda-bindings"]
_PACKAGES += ["onnx", "onnxscript", "torch", "diffusers", "transformers", "safetensors", "polygraphy"]


def env(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
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
