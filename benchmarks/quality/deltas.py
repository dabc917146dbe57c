"""What modes that are not exact cost on a list of prompts: their pictures and scores beside those of the exact run."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from ...engines.backends import names
from ...engines.errors import CheckpointError, MissingExtraError, RequestError
from ..contenders import LOSSY, precision_apart
from .fidelity import Fidelity, compare_pictures
from .scores import Floats, Pictures, Score

RESAMPLES = 2_000


@dataclass(frozen=True)
class Mode:
    """Where and how pictures are drawn: a backend with options, and arguments of the request."""

    backend: str
    options: Mapping[str, Any]
    request: Mapping[str, Any]


@dataclass(frozen=True)
class Change:
    """The mean of paired differences, and an interval that holds it with 95 %."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Cost:
    """What one mode costs: how near its pictures are, their mean LPIPS distance, and how every score changed."""

    mode: str
    near: Fidelity
    lpips: float | None
    changes: Mapping[str, Change]


def mode_named(text: str) -> Mode:
    """Return the mode called `MODE`, `BACKEND`, `BACKEND-bf16` or one of the latter with `+MODE`.

    Raises `RequestError` for any other name.
    """
    where, plus, lossy = ("", "", text) if text in LOSSY else text.partition("+")
    backend, inside = precision_apart(where)
    if (text not in LOSSY and backend not in names()) or (plus and lossy not in LOSSY):
        raise RequestError(
            f"mode {text!r} is not known: choose {', '.join(LOSSY)}, a backend (openvino), one with -bf16 "
            "(openvino-bf16), or a backend and a mode (openvino-bf16+taylor)"
        )
    return Mode(backend or "auto", {} if inside is None else {"precision": inside}, LOSSY.get(lossy, {}))


def costs(
    drawn: Mapping[str, Pictures],
    exact: Pictures,
    prompts: Sequence[str],
    scores: Mapping[str, Score],
    distance: Callable[[Pictures, Pictures], float] | None = None,
) -> list[Cost]:
    """Return what each mode costs, given its pictures and the exact ones of the same prompts and noise."""
    before = {name: score(exact, prompts) for name, score in scores.items()}
    return [
        Cost(
            mode,
            compare_pictures(np.stack(pictures), np.stack(exact)),
            None if distance is None else distance(pictures, exact),
            {name: change(score(pictures, prompts) - before[name]) for name, score in scores.items()},
        )
        for mode, pictures in drawn.items()
    ]


def change(differences: Floats) -> Change:
    """Return mean and percentile bootstrap interval of paired differences [N] (Efron 1979): pairs are drawn again."""
    chosen = np.random.default_rng(0).integers(0, len(differences), (RESAMPLES, len(differences)))
    low, high = np.quantile(np.asarray(differences, np.float64)[chosen].mean(1), (0.025, 0.975))
    return Change(float(np.mean(differences)), float(low), float(high))


def lpips_distance(weights: Path) -> Callable[[Pictures, Pictures], float]:
    """Return a function from two lists of pictures to their mean LPIPS distance (Zhang et al. 2018), AlexNet's.

    `weights` is AlexNet's file as torchvision downloads it; the layers' own weights come with the package `lpips`.
    Raises `CheckpointError` where the file holds no AlexNet.
    """
    try:
        import torch

        lpips: Any = import_module("lpips")
    except ModuleNotFoundError as error:
        raise MissingExtraError("quality", "LPIPS") from error
    network = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
        features = {name: state[f"features.{name.partition('.')[2]}"] for name in network.net.state_dict()}
        network.net.load_state_dict(features)
    except (OSError, KeyError, TypeError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{weights} holds no AlexNet: give torchvision's alexnet-*.pth") from error

    def run(pictures: Pictures, exact: Pictures) -> float:
        found = []
        for pair in zip(pictures, exact, strict=True):
            a, b = (torch.from_numpy(picture.transpose(2, 0, 1)[None] / np.float32(127.5) - 1) for picture in pair)
            with torch.no_grad():
                found.append(float(network(a, b)))
        return float(np.mean(found))

    return run
