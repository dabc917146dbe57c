"""What a pipeline hands to its scheduler: sigmas of its own, and a shift for the size of the picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ...engines.bundle import ScheduleRule
from ...engines.errors import RequestError

__all__ = ["applied", "shift_of"]


def applied(
    rule: ScheduleRule, options: Mapping[str, Any], steps: int | None, size: tuple[int, int] | None, *, on_flow: bool
) -> dict[str, Any]:
    """Return the options mu, timesteps and sigmas as the rule sets them; what the request gives stays.

    `on_flow`: the sampler runs on shares of noise, and takes sigmas. `size` is (width, height) in pixels.
    """
    result = {"mu": options["mu"], "timesteps": options["timesteps"], "sigmas": options["sigmas"]}
    custom = next((len(each) for each in (options["timesteps"], options["sigmas"]) if each is not None), None)
    count = steps if steps is not None else custom
    if count is None:
        return result
    if rule.lines and result["mu"] is None and options.get("use_dynamic_shifting"):
        if size is None:
            raise RequestError("the schedule depends on the size of the picture: give width and height")
        result["mu"] = shift_of(rule, count, size)
    if custom is None and on_flow and "time_shift_type" in options:
        train = int(options["num_train_timesteps"])
        if rule.sigmas == "even":
            result["sigmas"] = np.linspace(1, 1 / count, count)
        elif rule.sigmas == "whole":
            result["timesteps"] = np.trunc(np.linspace(train, 1, count))
            result["sigmas"] = result["timesteps"] / train
    return result


def shift_of(rule: ScheduleRule, steps: int, size: tuple[int, int]) -> float:
    """Return mu = slope * tokens**power + offset, between two lines by the number of steps.

    Tokens are the cells of `pixels_per_token` on each side that the picture has, or `tokens` of them at any size.
    """
    side = rule.pixels_per_token
    tokens = rule.tokens if rule.tokens is not None else (size[0] // side) * (size[1] // side)
    shifts = [line.slope * tokens**rule.power + line.offset for line in rule.lines]
    if len(shifts) == 1 or (rule.last_line_above is not None and tokens > rule.last_line_above):
        return shifts[-1]
    (few, first), (many, last) = ((line.steps, shift) for line, shift in zip(rule.lines, shifts, strict=True))
    slope = (last - first) / (many - few)
    return slope * steps + (last - many * slope)
