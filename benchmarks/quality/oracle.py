"""Judge pictures of drawn scenes by their pixels: what is on them, and whether that is what the prompt asked for.

No network takes part. The background is the color of the border; what differs from it falls into connected
components; each has the palette color nearest to its purest pixels, and the shape whose template, drawn at the same
centre and area, overlaps it best. A disk with a hole is a ring. A pair's relation comes from the centroids.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from scipy import ndimage

from .scenes import COLORS, OPPOSITE, PALETTE, RADIUS, SHAPES, Kind, Object, Scene, coverage, held_out_scenes

Generate = Callable[[list[str], list[int]], np.ndarray]

COLOR_TOLERANCE = 60.0  # RGB distance; the nearest two palette colors are 93 apart
BORDER = 5  # pixels
FLAT_BORDER = 0.9  # least share of border pixels within COLOR_TOLERANCE of the background
ONE_COLOR = 0.7  # least share of an object's pixels within COLOR_TOLERANCE of its color
SMALLEST_OBJECT = 100  # pixels
LEAST_OVERLAP = 0.72  # intersection over union with the best template
RING_HOLE = 0.1  # least share of a ring's disk that is hole; it is drawn as 0.28
SOLID = tuple(shape for shape in SHAPES if shape != "ring")
_COLOR_VALUES = np.array([PALETTE[name] for name in COLORS], np.float32)


def recognise(picture: np.ndarray) -> Scene | None:
    """Read the scene off a picture, uint8 [H, W, 3]; None where it is not a clean scene of one or two objects.

    A pair is given as `left of` or `above`. Sizes are measured for a single object.
    """
    pixels = picture.astype(np.float32)
    inside = (slice(BORDER, -BORDER),) * 2
    border_mask = np.ones(pixels.shape[:2], bool)
    border_mask[inside] = False
    border = pixels[border_mask]
    ground_value = np.median(border, axis=0)
    ground = _nearest_color(ground_value)
    if ground is None or np.mean(_distance(border, ground_value) < COLOR_TOLERANCE) < FLAT_BORDER:
        return None
    regions, count = ndimage.label(_distance(pixels, ground_value) > COLOR_TOLERANCE / 2, np.ones((3, 3)))
    found = []
    for label in range(1, count + 1):
        region = regions == label
        if region.sum() >= SMALLEST_OBJECT:
            found.append(_identify(pixels, region, ground_value))
    if not 1 <= len(found) <= 2 or None in found:
        return None
    seen = [thing for thing in found if thing is not None]
    if len(seen) == 1:
        return Scene((seen[0][0],), ground)
    (_, first), (_, second) = seen
    across = int(abs(first[0] - second[0]) < abs(first[1] - second[1]))  # 0: side by side, 1: stacked
    seen.sort(key=lambda thing: thing[1][across])
    things = tuple(Object(thing.color, thing.shape) for thing, _ in seen)
    return Scene(things, ground, ("left of", "above")[across])


def normalise(scene: Scene) -> Scene:
    """The same scene with its pair in the order of `recognise`."""
    if scene.relation in (None, "left of", "above"):
        return scene
    assert scene.relation is not None
    return Scene(scene.objects[::-1], scene.background, OPPOSITE[scene.relation])


@dataclass
class Score:
    """How many of `count` pictures show what their prompts say, as a whole and by part (shares in [0, 1])."""

    kind: Kind
    count: int = 0
    right: float = 0.0  # background, every color and shape, and the relation; not the size
    background: float = 0.0
    color: float = 0.0
    shape: float = 0.0
    relation: float = 0.0
    size: float = 0.0
    failures: list[tuple[str, int, Scene | None]] = field(default_factory=list)  # prompt, seed, what was seen


def judge(scene: Scene, picture: np.ndarray) -> dict[str, bool]:
    """Compare a picture, uint8 [H, W, 3], with the scene that was asked for, part by part."""
    seen, asked = recognise(picture), normalise(scene)
    parts = dict.fromkeys(("background", "color", "shape", "relation", "size"), False)
    if seen is not None:
        pairs = list(zip(seen.objects, asked.objects, strict=False))
        complete = len(seen.objects) == len(asked.objects)
        parts["background"] = seen.background == asked.background
        parts["color"] = complete and all(a.color == b.color for a, b in pairs)
        parts["shape"] = complete and all(a.shape == b.shape for a, b in pairs)
        parts["relation"] = seen.relation == asked.relation
        parts["size"] = complete and all(a.size == b.size for a, b in pairs)
    return parts | {"right": all(value for name, value in parts.items() if name != "size")}


def score(generate: Generate, kind: Kind, count: int, *, seed: int = 0, batch: int = 16) -> Score:
    """Judge `generate(prompts, seeds)` on held-out combinations; picture i is asked for with seed `seed + i`.

    `generate` returns uint8 [B, H, W, 3] for B prompts. Raises ValueError where it returns anything else.
    """
    scenes = held_out_scenes(kind, count)
    total = Score(kind)
    sums: Counter[str] = Counter()
    for start in range(0, count, batch):
        chosen = scenes[start : start + batch]
        seeds = [seed + start + index for index in range(len(chosen))]
        pictures = generate([scene.prompt for scene in chosen], seeds)
        if pictures.dtype != np.uint8 or len(pictures) != len(chosen):
            raise ValueError(f"expected {len(chosen)} uint8 pictures, got {pictures.dtype} {pictures.shape}")
        for scene, used, picture in zip(chosen, seeds, pictures, strict=True):
            parts = judge(scene, picture)
            sums.update({name: int(value) for name, value in parts.items()})
            if not parts["right"]:
                total.failures.append((scene.prompt, used, recognise(picture)))
    total.count = count
    for name, hits in sums.items():
        setattr(total, name, hits / count)
    return total


def _distance(pixels: np.ndarray, value: np.ndarray) -> np.ndarray:
    distance: np.ndarray = np.linalg.norm(pixels - value, axis=-1)
    return distance


def _nearest_color(value: np.ndarray) -> str | None:
    distances = _distance(_COLOR_VALUES, value)
    return COLORS[int(distances.argmin())] if distances.min() < COLOR_TOLERANCE else None


def _identify(pixels: np.ndarray, region: np.ndarray, ground: np.ndarray) -> tuple[Object, np.ndarray] | None:
    """The object in a region, and its centroid (x, y) in pixels; None where color or shape is none of ours."""
    contrast = _distance(pixels, ground)
    # The third of the region that is farthest from the background's color: thin parts of a soft picture have no core.
    value = np.median(pixels[region & (contrast >= np.quantile(contrast[region], 2 / 3))], axis=0)
    color = _nearest_color(value)
    # How far a pixel is from the background towards the object's color: 0.5 is where the edge runs.
    axis = value - ground
    mask = region & (((pixels - ground) @ axis) > 0.5 * (axis @ axis))
    if color is None or np.mean(_distance(pixels[mask], value) < COLOR_TOLERANCE) < ONE_COLOR:
        return None
    # Hollow and solid objects are told apart first: the walls of small rings vary too much for a template.
    filled = ndimage.binary_fill_holes(mask)
    hollow = 1 - mask.sum() / filled.sum() > RING_HOLE
    mask = filled if hollow else mask
    rows, columns = np.nonzero(mask)
    centre = np.array([columns.mean(), rows.mean()])
    y, x = np.mgrid[: mask.shape[0], : mask.shape[1]]
    overlaps = {}
    for shape in SOLID:
        template = coverage(shape, x - centre[0], y - centre[1], (mask.sum() / _unit_area(shape)) ** 0.5) > 0.5
        overlaps[shape] = (template & mask).sum() / (template | mask).sum()
    shape = max(overlaps, key=lambda name: overlaps[name])
    if overlaps[shape] < LEAST_OVERLAP or (hollow and shape != "circle"):
        return None
    radius = (mask.sum() / _unit_area(shape)) ** 0.5
    shape = "ring" if hollow else shape
    size = min(RADIUS, key=lambda name: abs(RADIUS[name] - radius))
    return Object(color, shape, size), centre


@cache
def _unit_area(shape: str) -> float:
    """The area of a shape of radius 1."""
    axis = np.arange(-150.0, 151.0)
    return float(coverage(shape, axis[None, :], axis[:, None], 100.0).sum()) / 100.0**2
