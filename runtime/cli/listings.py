"""`latentrt samplers` and `latentrt backends`: what there is to choose from."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer

from ...engines.backends import names, option_help, unavailable_reasons

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


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
