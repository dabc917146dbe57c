"""`latentrt env`: what is installed and what works, ready to paste into a report."""

from __future__ import annotations

import json
import platform
from importlib import metadata
from typing import Annotated, Any

import typer

from ...engines.backends import unavailable_reasons
from ...engines.cache import EngineCache, home
from ...engines.machine import processor_name, usable_cores

_PACKAGES = ["latentrt", "numpy", "pillow", "tokenizers", "pydantic", "typer"]
_PACKAGES += ["onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "cuda-bindings"]
_PACKAGES += ["onnx", "onnxscript", "torch", "diffusers", "transformers", "safetensors", "polygraphy"]


def env(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Print versions, the backends that work here and why others do not."""
    report = _report()
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    typer.echo(f"{report['system']}, Python {report['python']}, {report['cores']} cores: {report['processor']}")
    typer.echo(f"cache {report['cache']}: {report['engines']} engines, {report['engine_bytes'] / 2**20:.0f} MiB")
    for name, version in report["packages"].items():
        typer.echo(f"  {name} {version or 'not installed'}")
    for name, reason in report["backends"].items():
        typer.echo(f"  backend {name}: {'works' if reason is None else reason}")


def _report() -> dict[str, Any]:
    engines = EngineCache().entries()
    return {
        "system": platform.platform(),
        "python": platform.python_version(),
        "processor": processor_name(),
        "cores": usable_cores(),
        "cache": str(home()),
        "engines": len(engines),
        "engine_bytes": sum(entry["bytes"] for entry in engines),
        "packages": {name: _version(name) for name in _PACKAGES},
        "backends": unavailable_reasons(),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
