"""What `serve run latentrt.runtime.ray.app:build NAME=VALUE ...` takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ..loop.widths import SLOTS, check_numbers
from ..service import Limits, ModelSettings
from ..service.names import named_aliases
from ..service.work import MOST_SECONDS
from ..sizes import parse_size

ON_PROCESSORS = ("onnxruntime-cpu", "openvino")
"""Backends that use no GPU."""

Seconds = Annotated[float, Field(gt=0, le=MOST_SECONDS)]
Delay = Annotated[float, Field(ge=0, le=MOST_SECONDS)]
"""Seconds that may be none."""


def _parts(value: Any) -> Any:
    """Return the texts between commas: on a command line every value is a text."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _sizes(value: Any) -> Any:
    return [parse_size(each) if isinstance(each, str) else each for each in _parts(value)]


def _names(value: Any) -> Any:
    return named_aliases(_parts(value)) if isinstance(value, str) else value


def _options(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


class RaySettings(BaseModel):
    """Everything of an application; every node that runs a replica needs the bundles at the same paths."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bundles: Annotated[list[str], BeforeValidator(_parts)] = Field(min_length=1)
    """PATH or NAME=PATH, the first is the default one."""
    aliases: Annotated[dict[str, str], BeforeValidator(_names)] = {}
    """NAME=MODEL."""
    backend: str = "auto"
    options: Annotated[dict[str, Any], BeforeValidator(_options)] = {}
    """Of the backend, JSON."""
    slots: int = Field(default=SLOTS, ge=1)
    rows: int | None = None
    fixed_rows: bool = False
    max_waiting: int = Field(default=64, ge=0)
    """Requests that a replica takes beyond one for each of its slots."""
    max_wait: Seconds | None = None
    """Seconds that what waits in a replica may take, above which it takes nothing more; None: any."""
    max_queued: int = Field(default=64, ge=1)
    """Requests that may wait in the ingress for a replica with room, beside those in the batchers' own queues."""
    sizes: Annotated[list[tuple[int, int]], BeforeValidator(_sizes)] = []
    sizes_only: bool = False
    api_key_file: Path | None = None
    max_images: int = Field(default=Limits.images, ge=1)
    max_steps: int = Field(default=Limits.steps, ge=1)
    max_work: float = Field(default=Limits.work, gt=0, allow_inf_nan=False)
    timeout: Seconds = Limits.timeout

    num_gpus: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """GPUs of a replica; None: one, and none where the backend uses none."""
    num_cpus: float = Field(default=1, ge=0, allow_inf_nan=False)
    """Processors of a replica, which are the threads of a backend that computes on them."""
    min_replicas: int = Field(default=1, ge=0)
    max_replicas: int = Field(default=1, ge=1)
    queue_seconds: Seconds | None = None
    """Seconds of work that each replica may have before another is started; None: as many requests as it has slots."""
    upscale_delay: Delay = 10.0
    downscale_delay: Delay = 300.0
    drain_timeout: Delay = 60.0
    """Seconds that requests have when a replica is stopped."""
    step_timeout: Seconds = 120.0
    """Seconds after which a step hangs, and the replica is started again."""

    @model_validator(mode="after")
    def _check(self) -> RaySettings:
        """Raise `RequestError` for numbers that no batcher takes, before any replica is started."""
        check_numbers(self.slots, self.rows, self.ongoing * self.max_images, self.max_wait)
        return self

    @property
    def ongoing(self) -> int:
        """Requests that a replica has at one time."""
        return self.slots + self.max_waiting

    @property
    def gpus(self) -> float:
        """GPUs of a replica."""
        return (0 if self.backend in ON_PROCESSORS else 1) if self.num_gpus is None else self.num_gpus

    @property
    def model(self) -> ModelSettings:
        """How bundles are opened."""
        threads = {"threads": max(1, int(self.num_cpus))} if self.backend in ON_PROCESSORS else {}
        return ModelSettings(
            backend=self.backend,
            options={**threads, **self.options},
            slots=self.slots,
            rows=self.rows,
            fixed_rows=self.fixed_rows,
            max_waiting=self.ongoing
            * self.max_images,  # how many there are is Ray's to bound: it may have other replicas
            max_wait=self.max_wait,
            sizes=tuple(self.sizes),
            sizes_only=self.sizes_only,
        )

    @property
    def limits(self) -> Limits:
        """What a request may ask for."""
        return Limits(images=self.max_images, steps=self.max_steps, work=self.max_work, timeout=self.timeout)
