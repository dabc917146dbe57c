"""Step-time curves: how long a step takes by its network rows, each with where its numbers come from."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...engines.errors import RequestError
from ...runtime.batcher.times import StepTimes

FOLDER = Path(__file__).parent / "curves"

Seconds = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
Kind = Literal["measured", "published", "model"]
"""Whether somebody's clock says so here, somebody else's elsewhere, or nobody's."""


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    title: str = Field(min_length=1, max_length=200)
    kind: Kind
    source: str = Field(min_length=1, max_length=2000)
    step_seconds: dict[Annotated[int, Field(ge=1, le=4096)], Seconds] = Field(min_length=2, max_length=256)
    encode_seconds: Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)] = 0.0
    decode_seconds: Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)] = 0.0
    dynamic: bool = True


@dataclass(frozen=True)
class Curve:
    """Seconds of a step by its rows, and of what is done once for each image on the same device."""

    name: str
    title: str
    kind: Kind
    source: str
    known: Mapping[int, float]
    """Seconds of a step by rows, increasing."""
    encode: float = 0.0
    decode: float = 0.0
    scale: float = 1.0
    """What its times were multiplied by, so that a run takes minutes instead of hours."""
    dynamic: bool = True
    """Whether its engines take any number of rows, or each is for one: a batcher's steps then have fewer widths."""

    def step(self, rows: int) -> float:
        """Return the seconds of a step: on straight lines between the known points and beyond the last two."""
        if rows in self.known:
            return self.known[rows]
        points = list(self.known.items())
        after = next((i for i, (at, _) in enumerate(points) if at > rows), len(points) - 1)
        (x, y), (right, high) = points[max(1, after) - 1], points[max(1, after)]
        return y + (high - y) / (right - x) * (rows - x)

    def alone(self, rows: int, evaluations: int) -> float:
        """Return the seconds that an image takes on an idle device."""
        return self.encode + evaluations * self.step(rows) + self.decode

    def times(self, buckets: Iterable[int]) -> StepTimes:
        """Return what a batcher knows of its steps once every bucket was timed."""
        chosen = tuple(buckets)
        times = StepTimes(chosen, {bucket: self.step(bucket) for bucket in chosen})
        times.beside |= {"encode": self.encode, "decode": self.decode}
        return times

    def scaled(self, factor: float) -> Curve:
        """Return the curve of a device on which everything takes `factor` times as long."""
        known = {rows: factor * seconds for rows, seconds in self.known.items()}
        encode, decode = factor * self.encode, factor * self.decode
        return replace(self, known=known, encode=encode, decode=decode, scale=factor * self.scale)

    def extrapolated(self, most: int) -> str | None:
        """Say which steps of up to `most` rows are beyond the source; None when none is, or it is a line itself."""
        parts = [f"fewer than {first}"] if (first := min(self.known)) > 1 else []
        parts += [f"more than {last}"] if (last := max(self.known)) < most else []
        if not parts or self.kind == "model":
            return None
        return f"steps of {' or '.join(parts)} rows are extrapolated, not {self.kind}"

    def as_record(self, most: int) -> dict[str, Any]:
        """Return what a record of up to `most` rows says of the curve, so that no line passes for a measurement."""
        about = {"name": self.name, "kind": self.kind, "title": self.title, "scale": self.scale}
        return about | {"extrapolated": self.extrapolated(most)}


def names() -> list[str]:
    """Return the names of the curves that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def curve(given: str) -> Curve:
    """Return a curve by its name, or from a JSON file of your own.

    The file has `title`, `kind` (measured, published or model), `source`, `step_seconds` (seconds by rows, two or more)
    and, where known, `encode_seconds` and `decode_seconds` of an image; `dynamic` is false of engines for fixed shapes.
    Raises `RequestError` for what is no curve.
    """
    path = FOLDER / f"{given}.json" if given in names() else Path(given)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"curve is {given!r}: choose {', '.join(names())}, or give a JSON file") from error
    return parse(path.stem, text)


def parse(name: str, text: str) -> Curve:
    """Return the curve that a JSON text describes; raises `RequestError`."""
    try:
        found = _File.model_validate(json.loads(text))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise RequestError(f"curve {name}: {where}: {first['msg'][0].lower()}{first['msg'][1:]}") from error
    except ValueError as error:
        raise RequestError(f"curve {name} is no JSON ({error}): see the files in {FOLDER}") from error
    known = dict(sorted(found.step_seconds.items()))
    about = (name, found.title, found.kind, found.source)
    read = Curve(*about, known, found.encode_seconds, found.decode_seconds, dynamic=found.dynamic)
    values = list(known.values())
    if any(later < earlier for earlier, later in itertools.pairwise(values)) or read.step(1) <= 0:
        raise RequestError(f"curve {name}: step_seconds must not fall with more rows, nor reach 0 at one row: {known}")
    return read
