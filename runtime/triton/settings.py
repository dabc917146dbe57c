"""How a bundle is served by Triton: parameters of the model's configuration, which are texts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from ...engines.errors import RequestError
from ..loop.widths import SLOTS
from ..request import problem_of
from ..service import Limits, ModelSettings
from ..service.work import MOST_SECONDS


@dataclass(frozen=True)
class TritonSettings:
    """Everything that the parameters say; those that are left out have these values."""

    bundle: str = "bundle"
    """The bundle's folder, from that of the model's version."""
    backend: str = "auto"
    options: dict[str, Any] = field(default_factory=dict)
    """Of the backend."""
    slots: int = SLOTS
    rows: int | None = None
    fixed_rows: bool = False
    max_waiting: int = 64
    sizes: list[tuple[int, int]] = field(default_factory=list)
    """Warmed up before the model is ready; none: the bundle's default size."""
    sizes_only: bool = False
    max_images: int = Limits.images
    max_steps: int = Limits.steps
    max_work: float = Limits.work
    """Megapixels times images times steps of a request."""
    timeout: float = Limits.timeout
    """Seconds that a request may take."""
    step_timeout: Annotated[float, Field(gt=0, le=MOST_SECONDS)] = 120.0
    """Seconds after which a step hangs, and the server is ended, to be started again."""
    drain_timeout: Annotated[float, Field(ge=0, le=MOST_SECONDS)] = 25.0
    """Seconds that requests have when the model is unloaded; Triton itself waits 30 (--exit-timeout-secs)."""

    @property
    def model(self) -> ModelSettings:
        """How the bundle is opened."""
        return ModelSettings(
            backend=self.backend,
            options=self.options,
            slots=self.slots,
            rows=self.rows,
            fixed_rows=self.fixed_rows,
            max_waiting=self.max_waiting,
            sizes=tuple(self.sizes),
            sizes_only=self.sizes_only,
        )

    @property
    def limits(self) -> Limits:
        """What a request may ask for."""
        return Limits(images=self.max_images, steps=self.max_steps, work=self.max_work, timeout=self.timeout)


_DEFAULT, _ADAPTER = TritonSettings(), TypeAdapter(TritonSettings)


def parameters_of(settings: TritonSettings) -> dict[str, str]:
    """Return the parameters that say what is not the default: texts as they are, everything else as JSON."""
    default = asdict(_DEFAULT)
    changed = {name: value for name, value in asdict(settings).items() if value != default[name]}
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in changed.items()}


def settings_of(parameters: Mapping[str, str]) -> TritonSettings:
    """Return what parameters say; raises `RequestError` for one that there is not, or that is no such value.

    Names in capitals are the Python backend's own.
    """
    default = asdict(_DEFAULT)
    values: dict[str, Any] = {}
    for name, text in parameters.items():
        if name.isupper():
            continue
        if name not in default:
            raise RequestError(f"parameter {name} is not known: choose {', '.join(default)}")
        try:
            values[name] = text if isinstance(default[name], str) else json.loads(text)
        except ValueError as error:
            raise RequestError(f"parameter {name} is {text!r}, which is no JSON: see config.pbtxt") from error
    try:
        return _ADAPTER.validate_python(values)
    except ValidationError as error:
        first = problem_of(error)
        raise RequestError(f"parameter {first.where[0]} is {first.given}: {first.text}") from error
