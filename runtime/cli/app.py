"""The commands of `latentrt`, its global options, and the way of one command line."""

from __future__ import annotations

import importlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .errors import outcome
from .interrupts import INTERRUPTED
from .progress import set_verbosity

EXIT_CODES = "Exit codes: 0 done, 1 failed, 2 bad usage or request, 130 interrupted."

log = logging.getLogger(__name__)

STYLE: dict[str, Any] = {"rich_markup_mode": None, "pretty_exceptions_enable": False}
COMMANDS = {
    "generate": (
        "generate:generate",
        "Turn prompts into pictures.",
        'latentrt generate "a red circle on a blue background" -o circle.png',
    ),
    "serve": (
        "serve:serve",
        "Serve bundles over HTTP.",
        "latentrt serve my-bundle --size 512x512 --port 8000",
    ),
    "export": (
        "bundle:export",
        "Turn a checkpoint into a bundle.",
        "latentrt export my-checkpoint/ -o my-bundle --precision fp16",
    ),
    "quantize": (
        "bundle:quantize",
        "Write a bundle with its denoiser in 8 bits.",
        "latentrt quantize my-bundle -o my-bundle-int8 --precision int8 --prompts prompts.txt",
    ),
    "build": (
        "build:build",
        "Build a bundle's engines ahead of time.",
        "latentrt build my-bundle --size 512x512 --batch 1 --batch 4",
    ),
    "inspect": ("env:inspect", "Show and check a bundle.", "latentrt inspect my-bundle"),
    "triton-repository": (
        "serving:triton_repository",
        "Write a model repository for Triton.",
        "latentrt triton-repository my-bundle models --size 512x512",
    ),
    "verify": (
        "bundle:verify",
        "Compare a bundle with its checkpoint.",
        "latentrt verify my-bundle --against my-checkpoint/",
    ),
    "samplers": (
        "env:samplers",
        "List the samplers.",
        'latentrt generate "a red circle" --sampler dpmpp_2m_karras',
    ),
    "backends": (
        "env:backends",
        "List the backends and their options.",
        'latentrt generate "a red circle" --backend onnxruntime-cpu --option threads=2',
    ),
    "plan": (
        "serving:plan",
        "Say how many devices a load needs.",
        "latentrt plan --rate 10 --p99 6 --curve a100-sd15",
    ),
    "env": ("env:env", "Print what is installed and what works.", "latentrt env --json"),
    "cache": ("cache:app", "List or remove the engines that were built.", ""),
    "bench": ("bench:app", "Measure, report and compare.", ""),
}
"""Of every command, in the order of the help: its module and name there, what it does, and an example."""


class _OnDemand(Mapping[str, Any]):
    """The commands by their names, each imported and read when it is asked for: together they take a quarter second."""

    def __init__(self) -> None:
        self._loaded: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._loaded:
            place, summary, example = COMMANDS[name]
            module, _, attribute = place.partition(":")
            found = getattr(importlib.import_module(f".{module}", __package__), attribute)
            if not isinstance(found, typer.Typer):
                function, found = found, typer.Typer(add_completion=False, **STYLE)
                found.command(name, epilog=f"Example: {example}")(function)
            command = typer.main.get_command(found)
            command.name, command.short_help = name, summary
            self._loaded[name] = command
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


class _Commands(TyperGroup):
    """The group of all commands, which loads none before it is asked for."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands: Any = _OnDemand()

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of the commands."""
        return list(self.commands)


app = typer.Typer(cls=_Commands, **STYLE)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"latentrt {metadata.version('latentrt')}")
        raise typer.Exit


@app.callback(invoke_without_command=True, epilog=EXIT_CODES)
def latentrt(
    context: typer.Context,
    verbose: Annotated[
        int,
        typer.Option("--verbose", "-v", count=True, show_default=False, help="Say what is done; twice: everything."),
    ] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say errors only, and show no progress.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Text-to-image latent diffusion without PyTorch: checkpoint to ONNX graphs, prompt to picture."""
    if verbose and quiet:
        raise typer.BadParameter("--verbose and --quiet contradict each other: give one")
    set_verbosity(verbose, quiet)
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def execute(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; only an interrupt is raised, as `KeyboardInterrupt`."""
    warnings.simplefilter("ignore")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a prompt or a path may hold what the console's encoding does not
            stream.reconfigure(errors="backslashreplace")
    words = list(arguments)
    try:
        result = app(args=words, standalone_mode=False, prog_name="latentrt")
        sys.stdout.flush()
    except SystemExit as error:  # Typer's way out of shell completion, and of output that nobody reads
        result = error.code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        log.debug("the traceback of the error below", exc_info=error)
        message, code = outcome(error, words)
        if code == INTERRUPTED:
            raise KeyboardInterrupt from error
        typer.echo(f"latentrt: error: {' '.join(message.split())}", err=True)
        return code
    if result == INTERRUPTED:  # what Typer makes of an interrupt
        raise KeyboardInterrupt
    return result if isinstance(result, int) else 0
