"""Which layers cost most: groups of them quantized alone, and the worst group halved again and again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .layers import Layer

OUTLIER = 4.0
"""How many times the mean squared error of a layer one must add to be kept."""

MOST_KEPT = 1 / 8
"""Share of the layers that are kept at most."""


def sensitive(layers: Sequence[Layer], error: Callable[[Sequence[Layer]], float], tries: int) -> list[Layer]:
    """Return the layers whose quantization costs far more than others', the costliest first.

    `error` returns the relative error of the network's output with these layers alone quantized. Errors of groups add
    up in squares, nearly; so the group with the largest is halved, and both halves are measured, until `tries` of them
    are spent; with less than three no layer is found. One that was found alone is kept when its squared error is above
    `OUTLIER` times the mean.
    """
    if not layers or tries < 3:
        return []
    groups = [(error(layers) ** 2, list(layers))]
    for _ in range((tries - 1) // 2):
        splittable = [group for group in groups if len(group[1]) > 1]
        if not splittable:
            break
        worst = max(splittable, key=lambda group: group[0])
        groups.remove(worst)
        middle = len(worst[1]) // 2
        groups += [(error(half) ** 2, half) for half in (worst[1][:middle], worst[1][middle:])]
    mean = sum(squared for squared, _ in groups) / len(layers)
    alone = sorted((group for group in groups if len(group[1]) == 1), key=lambda group: -group[0])
    return [group[0] for squared, group in alone if squared > OUTLIER * mean][: int(len(layers) * MOST_KEPT)]
