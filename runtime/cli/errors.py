"""What an exception is on the command line: one line in the words of its options, and an exit code."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import typer

from ...engines.errors import LatentRTError, MissingExtraError, RequestError, is_out_of_memory, reason
from ...engines.files import DISK_FULL
from . import interrupts
from .interrupts import INTERRUPTED

UsageError: type[Exception] = typer.BadParameter.__mro__[1]
"""Typer's base of all usage errors; releases differ in where it can be imported from."""

OPTION_NAMES = {
    "num_images_per_prompt": "--count",
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "guidance_interval": "--guidance-interval",
    "guidance_reuse": "--guidance-reuse",
    "skip_guidance_layers": "--skip-layers",
    "skip_layer_guidance_scale": "--skip-layer-scale",
    "skip_layer_guidance_start": "the start of --skip-layer-interval",
    "skip_layer_guidance_stop": "the end of --skip-layer-interval",
    "skip_layers": "--skip-layers",
    "negative_prompt": "--negative",
    "prediction_type": "--prediction-type",
    "mask_image": "--mask",
    "padding_mask_crop": "--mask-padding",
    "memory_budget": "--memory-budget",
    "drain_timeout": "--drain-timeout",
    "step_timeout": "--step-timeout",
    "body_timeout": "--body-timeout",
    "send_timeout": "--send-timeout",
    "max_body": "--max-body",
    "max_connections": "--max-connections",
    "max_failures": "--max-failures",
}
"""What the Python API calls an argument, and the option that gives it: anywhere in a message."""

SUBJECTS = {
    "image": "--init-image",
    "strength": "--strength",
    "seed": "--seed",
    "timesteps": "--timesteps",
    "sigmas": "--sigmas",
    "eta": "--eta",
    "size": "--size",
    "width": "the width of --size",
    "height": "the height of --size",
    "sampler": "--sampler",
    "decoder": "--decoder",
    "tiled": "--tiled",
    "tokenizer": "--tokenizer",
    "variant": "--variant",
}
"""The same for words that also mean something else: only where a message begins with them."""

GLOBAL_OPTIONS = ("-v", "-vv", "--verbose", "-q", "--quiet", "--version")

_NAMES = re.compile(rf"\b({'|'.join(OPTION_NAMES)})\b")
_SUBJECT = re.compile(rf"^({'|'.join(SUBJECTS)})\b(?!_)")


def outcome(error: BaseException, words: Sequence[str]) -> tuple[str, int]:
    """Return the line that an exception deserves, and the exit code; `words` is the command line."""
    if interrupts.asked() or isinstance(error, typer.Abort):
        return "interrupted", INTERRUPTED
    if isinstance(error, UsageError):
        return _usage(error, words), 2
    if isinstance(error, RequestError):
        return in_options(str(error)), 2
    if isinstance(error, LatentRTError):
        return str(error), 1
    if is_out_of_memory(error):
        return "out of memory: use a smaller size, a smaller --count, or a machine with more memory", 1
    if isinstance(error, OSError):
        advice = "free space or choose another place" if error.errno in DISK_FULL else ""
        return ": ".join(filter(None, (error.strerror or str(error), str(error.filename or ""), advice))), 1
    return f"{type(error).__name__}: {reason(error)} (a bug: run with -vv for the traceback)", 1


def in_options(message: str) -> str:
    """Return a message about a request with the command line's options in place of the Python API's arguments."""
    message = _SUBJECT.sub(lambda match: SUBJECTS[match[1]], message)
    message = _NAMES.sub(lambda match: OPTION_NAMES[match[1]], message)
    message = message.replace("was given without image", "was given without --init-image")
    return message.replace(": input should be ", ": it should be ")


def _usage(error: Any, words: Sequence[str]) -> str:
    """Return a usage error's text with the value that was given, which Typer leaves out, and where to read more."""
    names = getattr(getattr(error, "param", None), "opts", [])
    given = [value for name, value in pairwise(words) if name in names]
    command = getattr(getattr(error, "ctx", None), "command_path", "latentrt")
    if getattr(error, "option_name", None) in GLOBAL_OPTIONS:
        return f"{error.option_name} stands before the command: latentrt {error.option_name} {command.split()[-1]} ..."
    return f"{error.format_message()}{f' from {given[-1]!r}' if given else ''} (see `{command} --help`)"


@contextmanager
def bench_extra() -> Iterator[None]:
    """Turn a missing package into the command that installs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("latentrt"):
            raise
        raise MissingExtraError("cpu,export,bench", "a benchmark") from error
