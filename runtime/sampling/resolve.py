"""From a sampler's name and a scheduler config to a class and its complete, checked options."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from ...engines.errors import SchedulerError
from .catalog import SAMPLERS, VARIANCES, Sampler
from .names import SHORT_NAMES, SUFFIXES, ShortName

__all__ = ["resolved", "suffixes_of"]

# values that another class's config may carry, and what they become
Translation = dict[str, Mapping[Any, str | None]]
TO_MIDPOINT = dict.fromkeys(("logrho", "bh1", "bh2"), "midpoint")
# variances belong to DDPM: the solvers have none, and read the option only to cut learned ones off
NO_VARIANCE: Translation = {"variance_type": dict.fromkeys((*VARIANCES["variance_type"], "learned"))}
FROM_DEIS: Translation = {"algorithm_type": {"deis": "dpmsolver++"}, "solver_type": TO_MIDPOINT}
TRANSLATIONS: Mapping[str, Translation] = {
    # DPM-Solver configs write the unset type down; DDPM then leaves its variance as it is, which is `fixed_small`.
    "DDPMScheduler": {"variance_type": {None: "fixed_small"}},
    "DDPMParallelScheduler": {"variance_type": {None: "fixed_small"}},
    "DPMSolverMultistepScheduler": FROM_DEIS | NO_VARIANCE,
    "DPMSolverSinglestepScheduler": FROM_DEIS | NO_VARIANCE,
    "EDMDPMSolverMultistepScheduler": FROM_DEIS,
    "SASolverScheduler": NO_VARIANCE,
    "UniPCMultistepScheduler": {"solver_type": dict.fromkeys(("midpoint", "heun", "logrho"), "bh2")},
}

TYPES: dict[type, tuple[type, ...]] = {bool: (bool, type(None)), int: (int,), float: (int, float), str: (str,)}
LARGEST = {"sample_max_value": 1e6, "dynamic_thresholding_ratio": 1.0}
ELSEWHERE = {
    "DPMSolverSDEScheduler": ("its noise is a Brownian tree, drawn by torchsde", "dpmpp_2m_sde"),
    "CosineDPMSolverMultistepScheduler": ("its noise is a Brownian tree, drawn by torchsde", "dpmpp_2m_sde"),
    "DPMSolverMultistepInverseScheduler": ("it runs from pictures to noise", "ddim_inverse"),
    "RePaintScheduler": ("it goes back and forth between noise levels", "ddim"),
    "ScoreSdeVeScheduler": ("its corrector measures the norm of each prediction", "euler_a"),
    "VQDiffusionScheduler": ("it steps through tokens, not latents", ""),
    "AmusedScheduler": ("it steps through tokens, not latents", ""),
    "BlockRefinementScheduler": ("it fills in tokens, not latents", ""),
    "DiscreteDDIMScheduler": ("it steps through tokens, not latents", ""),
    "EntropyBoundScheduler": ("it fills in tokens, not latents", ""),
    "HeliosScheduler": ("it changes the size of the latents between its steps", "unipc"),
    "HeliosDMDScheduler": ("it changes the size of the latents between its steps", "flow_euler"),
}
"""Classes without a table: why, and the nearest sampler."""


def resolved(config: Mapping[str, Any], sampler: str | None) -> tuple[str, dict[str, Any]]:
    """Return the class name and the complete options of a sampler for a scheduler config, checked."""
    own = str(config.get("_class_name", ""))
    short = ShortName("", "", None)
    name = sampler or own
    if name not in SAMPLERS:
        short = from_short_name(name)
        name = short.class_name
    chosen = SAMPLERS[name]
    unset = config.get("_use_default_values", ()) if name != own else ()
    given = {key: value for key, value in config.items() if key in chosen.defaults and key not in unset}
    options = {**chosen.defaults, **short.sets_if_silent, **given, **short.sets, **chosen.fixed}
    for key, table in TRANSLATIONS.get(name, {}).items():
        options[key] = table.get(options[key], options[key])
    if options.get("prediction_type") == "original_sample":  # another name of it, in old configs
        options["prediction_type"] = "sample"
    check(name, options, chosen)
    return name, options


def suffixes_of(class_name: str) -> tuple[str, ...]:
    """Return the suffixes that the short names of a class take."""
    return tuple(suffix for suffix, option in SUFFIXES.items() if option in SAMPLERS[class_name].defaults)


def from_short_name(name: str) -> ShortName:
    """Return what a short name stands for; raises SchedulerError if it is unknown."""
    if name in SHORT_NAMES:
        return SHORT_NAMES[name]
    base, _, suffix = name.rpartition("_")
    if base in SHORT_NAMES and suffix in SUFFIXES:
        found = SHORT_NAMES[base]
        taken = suffixes_of(found.class_name)
        if suffix in taken:
            return found._replace(sets={**found.sets, **{SUFFIXES[each]: each == suffix for each in taken}})
        allowed = f"takes {', '.join(f'_{each}' for each in taken)}" if taken else "has no sigmas to space"
        raise SchedulerError(f"sampler {name!r} is not known: {base} {allowed}")
    raise unknown(name)


def unknown(name: str) -> SchedulerError:
    """Return the error for a name of no sampler, with the nearest ones."""
    if name in ELSEWHERE:
        why, nearest = ELSEWHERE[name]
        return SchedulerError(
            f"{name} is not supported: {why}" + (f"; the nearest sampler is {nearest}" if nearest else "")
        )
    if not name:
        return SchedulerError("the scheduler config names no class (_class_name): choose a sampler, such as ddim")
    spaced = (f"{short}_{suffix}" for short, found in SHORT_NAMES.items() for suffix in suffixes_of(found.class_name))
    known = [*SHORT_NAMES, *spaced, *SAMPLERS]
    near = get_close_matches(name[:100].lower(), known, 3, 0.5) or get_close_matches(name[:100], known, 3, 0.5)
    near = near or ["ddim", "euler_a", "dpmpp_2m_karras"]
    shown = repr(name if len(name) <= 60 else f"{name[:60]}…")
    return SchedulerError(f"sampler {shown} is not known: near are {', '.join(near)}; see latentrt samplers")


def check(name: str, options: Mapping[str, Any], chosen: Sampler) -> None:
    """Raise SchedulerError for option values that this sampler's table does not express."""

    def refuse(key: str, advice: str) -> SchedulerError:
        given = " ".join(repr(options[key])[:200].split())
        given = given if len(given) <= 60 else f"{given[:60]}…"
        return SchedulerError(f"{name} with {key}={given} is not supported: {advice}, or choose another sampler")

    if options.get("thresholding"):
        for key, most in LARGEST.items():
            if not isinstance(options[key], int | float) or not 0 < options[key] <= most:
                raise refuse(key, f"give a number above 0, {most:g} at most")
    if options.get("variance_type") == "learned" and chosen.choices["variance_type"] != (None,):
        raise refuse("variance_type", "it takes roots of what the network gives; use 'learned_range', or ddim")
    for key, default in chosen.defaults.items():
        if default is not None and not isinstance(options[key], TYPES.get(type(default), object)):
            raise refuse(key, f"give a value like {default!r}")
    for key, allowed in chosen.choices.items():
        if options[key] not in allowed:
            raise refuse(key, f"use {', '.join(repr(value) for value in allowed)}")
    if options.get("prediction_type") == "flow_prediction" and not options["use_flow_sigmas"]:
        raise refuse("prediction_type", "set use_flow_sigmas")
    if options.get("final_sigmas_type", "zero") not in ("zero", "sigma_min"):
        raise refuse("final_sigmas_type", "use 'zero' or 'sigma_min'")
    if options.get("algorithm_type") in ("dpmsolver", "sde-dpmsolver") and options["final_sigmas_type"] == "zero":
        raise refuse("algorithm_type", "set final_sigmas_type='sigma_min'")
