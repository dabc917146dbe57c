"""TensorRT plans in the engine cache: what one is for, which one fits, and why another does not."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from ..bundle import Bundle, GraphInfo
from ..cache import SIDECAR, EngineCache
from ..engine import Shapes, Sizes, solve_sizes
from ..errors import MissingPlanError, RequestError, ShapeError
from ..options import Bytes, Tf32
from .step import step_shapes

PLAN = "engine.plan"
BUILDER = 1
"""Raised when what the builder does to a network changes, so that plans built before are not reused."""

Shape = tuple[int, ...]
Hardware = Literal["ampere_plus", "same_compute_capability"]
"""What a plan may be compatible with beyond the GPU that it is built on."""

OptimizationLevel = Annotated[int | None, "0 (fastest build) to 5 (fastest engine) (default: the library's choice)"]
Scratch = Annotated[Bytes | None, "the most scratch memory that a layer may use (default: the library's limit)"]
OtherHardware = Annotated[
    Hardware | None, "the other GPUs that a plan also runs on; not for tensorrt-rtx (default: none)"
]


@dataclass(frozen=True)
class Profile:
    """The input shapes that a plan serves: the smallest, the one it is tuned for, and the largest, by input.

    A plan may have `others` besides, each tuned by itself: it holds its weights once for all of them.
    """

    ranges: Mapping[str, tuple[Shape, Shape, Shape]]
    others: tuple[Profile, ...] = ()

    @classmethod
    def of(cls, *shapes: Shapes) -> Profile:
        """Return the profile that spans the given shapes and is tuned for the first; one set of shapes is static."""
        first = shapes[0]
        ranges = {}
        for name in first:
            sizes = list(zip(*(tuple(each[name]) for each in shapes), strict=True))
            ranges[name] = (tuple(map(min, sizes)), tuple(first[name]), tuple(map(max, sizes)))
        return cls(ranges)

    @classmethod
    def together(cls, profiles: Sequence[Profile]) -> Profile:
        """Return the profile of a plan that has several; each once, in their order."""
        first, *others = [each for index, each in enumerate(profiles) if each not in profiles[:index]]
        return cls(first.ranges, tuple(others))

    @property
    def all(self) -> tuple[Profile, ...]:
        """Each profile by itself, in the order in which the plan has them."""
        return (Profile(self.ranges), *self.others)

    def index(self, shapes: Shapes) -> int | None:
        """Return the number of the first of all profiles that takes these input shapes, or None."""
        return next((number for number, each in enumerate(self.all) if _covers(each.ranges, shapes)), None)

    def covers(self, shapes: Shapes) -> bool:
        """Tell whether a plan of this profile takes these input shapes."""
        return self.index(shapes) is not None

    def as_json(self) -> Any:
        """Return what a sidecar records: a mapping, or a list where there are several."""
        found = [{name: [list(shape) for shape in each] for name, each in one.ranges.items()} for one in self.all]
        return found if self.others else found[0]

    def __str__(self) -> str:
        return " or ".join(map(_text, [each.ranges for each in self.all]))


def _covers(ranges: Mapping[str, tuple[Shape, Shape, Shape]], shapes: Shapes) -> bool:
    return set(shapes) == set(ranges) and all(
        len(shape) == len(low) and all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True))
        for (low, _, high), shape in ((ranges[name], shape) for name, shape in shapes.items())
    )


def _text(ranges: Mapping[str, tuple[Shape, Shape, Shape]]) -> str:
    return ", ".join(
        f"{name} {_shape(low)}" if low == high else f"{name} {_shape(low)} to {_shape(high)}"
        for name, (low, _, high) in ranges.items()
    )


def profile_for(graph: GraphInfo, *shapes: Shapes) -> Profile:
    """Return the profile of a plan for input shapes; several sets of shapes give a dynamic one.

    That of the step graph is always dynamic, and the same for every sampler, number of steps and guidance. Raises
    `ShapeError` when an input has no shape or shapes contradict the graph, `RequestError` for what no step plan takes.
    """
    inputs = {spec.name: spec for spec in graph.inputs}
    for each in shapes:
        if missing := [name for name in inputs if name not in each]:
            raise ShapeError(f"graph {graph.name} needs the shape of its input {missing[0]!r} to be built")
        solve_sizes(inputs, each)
    return Profile.of(*step_shapes(graph, [{name: each[name] for name in inputs} for each in shapes]))


@dataclass(frozen=True)
class PlanOptions:
    """What a plan is built with; `None` leaves a choice to the library."""

    optimization_level: OptimizationLevel = None
    scratch: Scratch = None
    hardware: OtherHardware = None
    weight_streaming: bool = False
    """Whether weights may stay in host memory and be streamed to the GPU."""
    tf32: Tf32 = False
    """Whether fp32 is computed in TF32."""

    def __post_init__(self) -> None:
        level, scratch = self.optimization_level, self.scratch
        if level is not None and not 0 <= level <= 5:
            raise RequestError(f"optimization_level is {level}: give 0 (fastest build) to 5 (fastest engine)")
        if scratch is not None and scratch <= 0:
            raise RequestError(f"scratch is {scratch}: give a number of bytes above 0, such as 2GiB")
        if self.hardware not in (None, *get_args(Hardware)):
            raise RequestError(
                f"hardware is {self.hardware!r}: choose {', '.join(get_args(Hardware))}, or leave it out"
            )


@dataclass(frozen=True)
class Plan:
    """A plan in the cache: its folder and its sidecar."""

    folder: Path
    facts: Mapping[str, Any]

    @classmethod
    def open(cls, folder: Path) -> Plan:
        """Read the sidecar of a finished plan."""
        return cls(folder, json.loads((folder / SIDECAR).read_text(encoding="utf-8")))

    @property
    def path(self) -> Path:
        """The serialized engine."""
        return self.folder / PLAN

    @property
    def profile(self) -> Profile:
        """The shapes that it serves."""
        return profile_from_json(self.facts["key"]["profile"])


def profile_from_json(data: Any) -> Profile:
    """Return the profile that a sidecar records."""
    if isinstance(data, list):
        return Profile.together([profile_from_json(each) for each in data])
    return Profile({name: (tuple(low), tuple(best), tuple(high)) for name, (low, best, high) in data.items()})


def plan_key(
    bundle: Bundle,
    graph: GraphInfo,
    *,
    backend: str,
    version: str,
    target: Mapping[str, str],
    profile: Profile,
    options: PlanOptions,
) -> dict[str, Any]:
    """Return everything that changes a plan."""
    return {
        "backend": backend,
        "builder": BUILDER,
        "graph": bundle.digest(graph),
        "version": version,
        "target": dict(target),
        "options": asdict(options),
        "profile": profile.as_json(),
    }


def find_dynamic(cache: EngineCache, graph: GraphInfo, key: Mapping[str, Any], shapes: Shapes) -> Plan | None:
    """Return a plan that differs from `key` in its profile alone and serves the given shapes, or None."""
    for entry in _plans(cache, graph):
        same = {**entry["key"], "profile": None} == {**key, "profile": None}
        covers = same and profile_from_json(entry["key"]["profile"]).covers(shapes)
        if covers and cache.find(graph.name, entry["key"]):  # whole, and written by us
            return Plan(entry["folder"], entry)
    return None


def _plans(cache: EngineCache, graph: GraphInfo) -> list[dict[str, Any]]:
    return [e for e in cache.entries() if e.get("graph") == graph.name and "profile" in e.get("key", {})]


def missing_plan(
    cache: EngineCache, bundle: Bundle, graph: GraphInfo, key: Mapping[str, Any], sizes: Sizes
) -> MissingPlanError:
    """Return the error that says which plans of a graph exist, why none fits, and how to build one that does.

    `sizes` are those of the request that needs it, as far as they are known: the command serves all its graphs.
    """
    backend = key["backend"]
    others = [entry["key"] for entry in _plans(cache, graph) if entry["key"]["backend"] == backend]
    reasons = dict.fromkeys(_difference(other, key) for other in others)
    have = f"those in the cache are for {'; '.join(reasons)}" if reasons else "the cache has none"
    return MissingPlanError(
        f"no {backend} plan of {graph.name} fits {_brief(profile_from_json(key['profile']))}: {have}. Build it with "
        f"`{build_command(bundle, backend, sizes, key['options'])}`"
    )


def build_command(bundle: Bundle, backend: str, sizes: Sizes, options: Mapping[str, Any]) -> str:
    """Return the command that builds a bundle's plans for a request of these sizes (B, R, h, w: those that are known).

    `latentrt build` covers requests without guidance, and for a bundle that is guided by default also those with it.
    """
    manifest = bundle.manifest
    latent, guided = (
        manifest.latent,
        len(manifest.guidance.weights(manifest.default_guidance_scale, negative_given=False)) > 1,
    )
    command = f"latentrt build {shlex.quote(str(bundle.path))} --backend {backend}"
    if "h" in sizes and "w" in sizes:
        command += f" --size {sizes['w'] * latent.downscale}x{sizes['h'] * latent.downscale}"
    rows = sizes.get("R", 1)
    batch = sizes.get("B", rows // 2 if guided and rows % 2 == 0 else rows)
    command += f" --batch {batch}"
    if rows > batch and not guided:
        command += " --guidance 1 --guidance 2"
    length = bundle.manifest.tokenizers[0].max_length if bundle.manifest.tokenizers else 1
    if sizes.get("L", length) > length:
        command += f" --prompt-parts {sizes['L'] // length}"
    for name, value in options.items():
        if name == "weight_streaming" and value:
            command += " --option weights_on_gpu=0"
        elif value is not None and value is not False:
            command += f" --option {name}={value}"
    return command


def _brief(profile: Profile) -> Profile:
    """Return a profile without the tables of the step graph, whose range is the same in every plan."""
    if "weights" not in profile.ranges:
        return profile
    return Profile.together([Profile({"latents": each.ranges["latents"]}) for each in profile.all])


def _difference(other: Mapping[str, Any], key: Mapping[str, Any]) -> str:
    """Return what a cached plan is for, in the first respect in which it differs from what is wanted."""
    if other["graph"] != key["graph"]:
        return "another export of this graph"
    if other["version"] != key["version"]:
        return f"{key['backend']} {other['version']} (installed: {key['version']})"
    if other["target"] != key["target"]:
        return f"{_target(other['target'])} (wanted: {_target(key['target'])})"
    if other["options"] != key["options"] or other["builder"] != key["builder"]:
        return "other build options"
    return str(_brief(profile_from_json(other["profile"])))


def _target(target: Mapping[str, str]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {target[name]}" for name in sorted(target))


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
