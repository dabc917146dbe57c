"""The command line: `latentrt generate | export | build | inspect | verify | bench | env`.

Every error is one line on standard error. Exit codes: 0 done, 1 failed, 2 bad usage or request, 130 interrupted.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import typer

from ...engines.errors import LatentRTError, RequestError
from . import bench, build, bundle, env, generate, verify

UsageError: type[Exception] = typer.BadParameter.__mro__[1]
"""Typer's base of all usage errors; releases differ in where it can be imported from."""

app = typer.Typer(
    help="Text-to-image latent diffusion without PyTorch: checkpoint to ONNX graphs, prompt to picture.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("generate")(generate.generate)
app.command("export")(bundle.export)
app.command("build")(build.build)
app.command("inspect")(bundle.inspect)
app.command("verify")(verify.verify)
app.add_typer(bench.app, name="bench")
app.command("env")(env.env)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    logging.basicConfig(format="latentrt: %(message)s", level=logging.WARNING, stream=sys.stderr)
    warnings.simplefilter("ignore")
    try:
        result = app(args=None if arguments is None else list(arguments), standalone_mode=False, prog_name="latentrt")
        if result == 130:  # what Typer makes of an interrupt
            raise KeyboardInterrupt
        return result if isinstance(result, int) else 0
    except UsageError as error:
        return _fail(f"{_describe(error, arguments)} (see `latentrt --help`)", 2)
    except RequestError as error:
        return _fail(str(error), 2)
    except LatentRTError as error:
        return _fail(str(error), 1)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", 130)
    except typer.Exit as error:
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except MemoryError:
        return _fail("out of memory: use a smaller size, a smaller --count, or a machine with more memory", 1)
    except OSError as error:
        return _fail(f"{error.strerror or error}: {error.filename or ''}".rstrip(": "), 1)


def _describe(error: Any, arguments: Sequence[str] | None) -> str:
    """Return a usage error's text with the value that was given, which Typer leaves out."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    names = getattr(getattr(error, "param", None), "opts", [])
    given = [value for name, value in pairwise(words) if name in names]
    return error.format_message() + (f" from {given[-1]!r}" if given else "")


def _fail(message: str, code: int) -> int:
    typer.echo(f"latentrt: error: {' '.join(message.split())}", err=True)
    return code


def main() -> None:
    """Run the command line of this process."""
    sys.exit(run())
