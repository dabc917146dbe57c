"""How good pictures are: the oracle's score, and how near contenders that are not exact come to the one that is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..contenders import is_exact
from ..contenders.process import Worker
from ..quality.fidelity import fidelity
from .method import Conditions, Measured
from .workloads import Workload

SCENES, SEEDS = 40, 8
"""Pictures that are drawn of held-out scenes, and of the prompt of a workload that no oracle judges."""


def draw_scenes(worker: Worker, count: int, conditions: Conditions) -> dict[str, Any]:
    """Draw held-out scenes, keep the pictures, and return the share that the oracle finds right, by kind of scene."""
    from ..quality import oracle

    conditions.say(f"oracle score of {worker.contender}")
    drawn: list[Any] = []

    def generate(prompts: list[str], seeds: list[int]) -> Any:
        works = [conditions.work.but(prompt=p, seed=seed, batch=1) for p, seed in zip(prompts, seeds, strict=True)]
        pictures = [_picture(worker, work, conditions) for work in works]
        drawn.extend(pictures)
        return np.stack(pictures)

    score = {kind: oracle.score(generate, kind, count // 2).right for kind in ("single", "pair")}
    np.savez(_file(worker.contender, conditions), images=np.stack(drawn))
    return score | {"count": count}


def draw_seeds(worker: Worker, count: int, conditions: Conditions) -> None:
    """Draw the workload's prompt with so many seeds and keep the pictures."""
    conditions.say(f"pictures of {worker.contender}")
    works = [conditions.work.but(seed=conditions.work.seed + number, batch=1) for number in range(count)]
    np.savez(
        _file(worker.contender, conditions), images=np.stack([_picture(worker, work, conditions) for work in works])
    )


def nearness(measured: Mapping[str, Measured], lead: str, conditions: Conditions) -> dict[str, dict[str, Any]]:
    """Return, for each contender that is not exact, how near its pictures are to those of `lead` with the same noise.

    They are those that both drew, or else their answers to the workload. Nothing where `lead` is not exact itself.
    """
    if lead not in measured or not is_exact(lead):
        return {}
    found = {}
    for name, entry in measured.items():
        pairs = (_file(name, conditions), _file(lead, conditions)), (entry.answer, measured[lead].answer)
        both = next(((a, b) for a, b in pairs if a and b and a.exists() and b.exists()), None)
        if not is_exact(name) and entry.failure is None and both is not None:
            found[name] = {"against": lead, **fidelity(*both).as_record()}
    return found


def _picture(worker: Worker, work: Workload, conditions: Conditions) -> Any:
    file = conditions.folder / "picture.npz"
    worker.run(work.as_request(), save=file, latents=False)
    with np.load(file) as answer:
        return answer["images"][0]


def _file(contender: str, conditions: Conditions) -> Path:
    return conditions.folder / f"{contender.replace('/', '-')}-drawn.npz"
