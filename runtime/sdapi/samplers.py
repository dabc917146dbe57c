"""Samplers and schedulers by the names that the web UI gives them, and those that are served here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..sampling.names import SHORT_NAMES, SUFFIXES
from ..sampling.resolve import suffixes_of
from ..service.errors import RefusedError


@dataclass(frozen=True)
class Named:
    """A sampler of the web UI."""

    name: str
    short: str
    """The short name here."""
    automatic: str = ""
    """How the web UI spaces its sigmas when nobody says: a suffix, or as the checkpoint has it."""
    aliases: tuple[str, ...] = ()


SAMPLERS: tuple[Named, ...] = (
    Named("DPM++ 2M", "dpmpp_2m", "karras", ("k_dpmpp_2m",)),
    Named("DPM++ 2M SDE", "dpmpp_2m_sde", "exponential", ("k_dpmpp_2m_sde",)),
    Named("DPM++ 3M SDE", "dpmpp_3m_sde", "exponential", ("k_dpmpp_3m_sde",)),
    Named("Euler a", "euler_a", "", ("k_euler_a", "k_euler_ancestral")),
    Named("Euler", "euler", "", ("k_euler",)),
    Named("LMS", "lms", "", ("k_lms",)),
    Named("Heun", "heun", "", ("k_heun",)),
    Named("DPM2", "dpm_2", "karras", ("k_dpm_2",)),
    Named("DPM2 a", "dpm_2_a", "karras", ("k_dpm_2_a",)),
    Named("DDIM", "ddim"),
    Named("PLMS", "plms"),
    Named("UniPC", "unipc"),
    Named("LCM", "lcm"),
    Named("TCD", "tcd"),
    Named("DDPM", "ddpm"),
    Named("DEIS", "deis"),
    Named("PNDM", "pndm"),
    Named("SA Solver", "sa_solver"),
    Named("DPM++ 3M", "dpmpp_3m"),
    Named("DPM++ 2S", "dpmpp_2s"),
    Named("DPM++ 3S", "dpmpp_3s"),
)
"""The first group is the web UI's, with its own spacing; those from TCD on it does not have, or not under this name."""

ON_FLOWS = {"euler": "flow_euler", "heun": "flow_heun", "lcm": "flow_lcm"}
"""What samplers are called that follow a flow: one name there, two here."""

MISSING = {
    "dpm++ sde": "its noise is a Brownian tree; the nearest is DPM++ 2M SDE",
    "dpm++ 2s a": "the nearest is DPM++ 2S, or Euler a for fresh noise",
    "dpm++ 2m sde heun": "the nearest is DPM++ 2M SDE",
    "dpm fast": "the nearest is DPM++ 2M",
    "dpm adaptive": "it takes no number of steps; the nearest is DPM++ 2M",
    "restart": "it goes back and forth between noise levels; the nearest is Heun",
    "ddim cfg++": "the nearest is DDIM",
}
"""Samplers of the web UI that are not here, and what to take."""

SCHEDULERS: Mapping[str, tuple[str, str]] = {
    "automatic": ("Automatic", ""),
    "uniform": ("Uniform", ""),
    "normal": ("Normal", ""),
    "karras": ("Karras", "karras"),
    "exponential": ("Exponential", "exponential"),
    "polyexponential": ("Polyexponential", "exponential"),
    "beta": ("Beta", "beta"),
}
"""Names, labels and suffixes. There too normal is uniform, and polyexponential, whose exponent is 1, exponential."""

AUTOMATIC = ("", "automatic", "use same scheduler", "none", "default")
SIDES = ("karras", "exponential", "beta")


def listed() -> list[dict[str, Any]]:
    """Return what /sdapi/v1/samplers says."""
    return [
        {
            "name": each.name,
            "aliases": [*each.aliases, each.short],
            "options": {"scheduler": each.automatic} if each.automatic else {},
        }
        for each in SAMPLERS
    ]


def schedulers() -> list[dict[str, Any]]:
    """Return what /sdapi/v1/schedulers says."""
    return [
        {"name": name, "label": label, "aliases": None, "default_rho": -1.0, "need_inner_model": False}
        for name, (label, _) in SCHEDULERS.items()
    ]


def sampler_of(name: str | None, scheduler: str | None, config: Mapping[str, Any]) -> str | None:
    """Return the sampler of a request by its name here, None for the bundle's own.

    `config` is the bundle's scheduler config. Raises `RefusedError` for what is not served.
    """
    given = " ".join((name or "").split())
    spacing = _spacing(scheduler)
    if given.lower() in ("", "automatic", "default"):
        if spacing:
            raise RefusedError(f"scheduler is {_quoted(scheduler)} without sampler_name: give one", "sampler_name")
        return None
    found, said = _found(given)
    if found is None:
        return _own(given, spacing)
    if said and spacing is None:
        spacing = said
    if str(config.get("_class_name", "")).startswith("Flow") and found.short in ON_FLOWS:
        return _spaced(ON_FLOWS[found.short], found.name, spacing)
    return _spaced(found.short, found.name, found.automatic if spacing is None else spacing)


def name_of(short: str) -> tuple[str, str]:
    """Return the web UI's names of a sampler and its scheduler; the name here where it has none."""
    base, _, suffix = short.rpartition("_")
    if base in SHORT_NAMES and suffix in SUFFIXES:
        return name_of(base)[0], next((label for label, own in SCHEDULERS.values() if own == suffix), suffix)
    flows = {own: name for name, own in ON_FLOWS.items()}
    named = next((each.name for each in SAMPLERS if each.short == flows.get(short, short)), None)
    if named is None:  # a class of diffusers
        classes = {known.class_name: name for name, known in reversed(SHORT_NAMES.items())}
        return name_of(classes[short]) if short in classes else (short, "Automatic")
    return named, "Uniform"


def _found(given: str) -> tuple[Named | None, str]:
    """Return a sampler by a name of the web UI, and the scheduler in an older name, such as DPM++ 2M Karras."""
    lower = given.lower()
    for each in SAMPLERS:
        names = (each.name.lower(), *each.aliases)
        if lower in names:
            return each, ""
        for side in SIDES:
            if lower in {f"{name} {side}" for name in names} | {f"{name}_{side[:2]}" for name in each.aliases}:
                return each, side
    if why := MISSING.get(re.sub(r" (karras|exponential|beta)$", "", lower)):
        raise RefusedError(f"sampler_name is {_quoted(given)}, which is not served here: {why}", "sampler_name")
    return None, ""


def _own(given: str, spacing: str | None) -> str:
    """Return a sampler by its short name here; others are for the pipeline to refuse."""
    return f"{given}_{spacing}" if spacing and given in SHORT_NAMES else given


def _spacing(scheduler: str | None) -> str | None:
    """Return the suffix of a scheduler's name or label, None for the sampler's own."""
    name = (scheduler or "").strip().lower().replace(" ", "_")
    if name.replace("_", " ") in AUTOMATIC:
        return None
    if name not in SCHEDULERS:
        labels = ", ".join(label for label, _ in SCHEDULERS.values())
        raise RefusedError(f"scheduler is {_quoted(scheduler)}: choose {labels}", "scheduler")
    return SCHEDULERS[name][1]


def _spaced(short: str, name: str, spacing: str | None) -> str:
    if not spacing:
        return short
    taken = suffixes_of(SHORT_NAMES[short].class_name)
    if spacing not in taken:
        labels = [label for label, own in SCHEDULERS.values() if own in taken and own]
        can = f"Automatic, {', '.join(labels)}" if labels else "Automatic: it has no sigmas to space"
        raise RefusedError(f"scheduler is {spacing.title()}, which {name} does not take: choose {can}", "scheduler")
    return f"{short}_{spacing}"


def _quoted(text: str | None) -> str:
    return repr((text or "")[:60])
