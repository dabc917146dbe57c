"""Mixes of requests: what users of a server ask for, drawn from a seed."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...engines.errors import LatentRTError, RequestError, reason
from ...runtime.sampling import step_table

STEPS = 20
"""In which samplers are tried."""
MOST_STEPS = 1000

Weight = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]


@dataclass(frozen=True)
class Work:
    """What one request asks of a network: evaluations with one sampler, with guidance on two rows, without on one."""

    steps: int
    sampler: str
    guided: bool

    @property
    def rows(self) -> int:
        """Network rows of its image."""
        return 1 + self.guided


class Mix(BaseModel):
    """Shares of steps and samplers, which need not add up to 1, and who has guidance."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, max_length=100)
    steps: Mapping[Annotated[int, Field(ge=1, le=MOST_STEPS)], Weight] = Field(min_length=1, max_length=MOST_STEPS)
    samplers: Mapping[str, Weight] = Field(default={"dpmpp_2m_karras": 1.0}, min_length=1, max_length=100)
    """By names that evaluate the network once a step."""
    guided: float = Field(default=1.0, ge=0, le=1)
    """Share of requests with guidance, of those that may have it."""
    unguided_steps: int = Field(default=0, ge=0)
    """Requests of so many steps or fewer have no guidance: few-step models are distilled."""

    def draw(self, count: int, seed: int) -> list[Work]:
        """Return requests; the same seed gives the same ones, and a longer list begins like a shorter one."""
        rng = random.Random(f"{self.name} {seed}")
        steps, of_steps = list(self.steps), list(self.steps.values())
        samplers, of_samplers = list(self.samplers), list(self.samplers.values())
        drawn = []
        for _ in range(count):
            (number,), (sampler,) = rng.choices(steps, of_steps), rng.choices(samplers, of_samplers)
            wanted = rng.random() < self.guided
            drawn.append(Work(number, sampler, wanted and number > self.unguided_steps))
        return drawn


EVEN = dict.fromkeys(("dpmpp_2m_karras", "euler_a", "unipc", "ddim"), 0.25)
MIXES = {
    mix.name: mix
    for mix in (
        Mix(name="draft", steps=dict.fromkeys(range(10, 51), 1.0), samplers=EVEN, guided=0.75),
        Mix(
            name="typical",
            steps={4: 0.2, 8: 0.1, 20: 0.3, 25: 0.15, 30: 0.15, 50: 0.1},
            samplers=dict(zip(EVEN, (0.5, 0.3, 0.15, 0.05), strict=True)),
            unguided_steps=8,
        ),
        Mix(name="equal", steps={20: 1.0}),
    )
}


def mix(given: str) -> Mix:
    """Return a mix by its name, or from a JSON file with the fields of `Mix`; raises `RequestError` for others."""
    if given in MIXES:
        return MIXES[given]
    path = Path(given)
    try:
        found = Mix.model_validate({"name": path.stem, **json.loads(path.read_text(encoding="utf-8"))})
    except OSError as error:
        raise RequestError(f"mix is {given!r}: choose {', '.join(MIXES)}, or give a JSON file") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise RequestError(f"mix {given}: {where}: {first['msg'][0].lower()}{first['msg'][1:]}") from error
    except (ValueError, TypeError) as error:
        raise RequestError(f"mix {given} is no JSON object ({error}): give steps, samplers, guided") from error
    for sampler in found.samplers:
        _check_sampler(sampler, f"mix {given}")
    return found


def _check_sampler(name: str, where: str) -> None:
    """Raise `RequestError` for what is no sampler, and for one that does not evaluate the network once a step."""
    try:
        calls = len(step_table({}, STEPS, sampler=name))
    except LatentRTError as error:
        raise RequestError(f"{where}: {reason(error)}") from error
    if calls != STEPS:
        raise RequestError(
            f"{where}: sampler {name} evaluates the network {calls} times in {STEPS} steps: choose one that does so "
            "once a step, and give it as many steps as evaluations"
        )
