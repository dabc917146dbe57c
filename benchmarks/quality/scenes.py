"""The world of the embedded model: drawn scenes, the prompts that describe them, and the held-out combinations.

A scene is one object near the middle, or two objects on opposite sides, on a flat background. Every picture is 128×128.
About a tenth of the (color, shape, background) triples never occurs in training, neither alone nor in a pair.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

SIZE = 128  # pixels, height and width
PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (214, 34, 40),
    "orange": (255, 140, 0),
    "yellow": (255, 226, 50),
    "green": (36, 152, 60),
    "cyan": (40, 205, 225),
    "blue": (36, 66, 212),
    "purple": (128, 44, 168),
    "pink": (255, 150, 195),
    "black": (16, 16, 16),
    "white": (248, 248, 248),
    "gray": (128, 128, 128),
}
COLORS = tuple(PALETTE)
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
SIZES = ("small", "medium", "large")
RADIUS = {"small": 18.0, "medium": 30.0, "large": 44.0}  # pixels
PAIR_RADIUS, PAIR_OFFSET = 21.0, 31.0  # pixels; the offset is from the middle of the picture
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # first object's side (x, y)
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
Kind = Literal["single", "pair"]

WORDS: dict[str, tuple[str, ...]] = {  # the canonical word first; each synonym is seen in training
    "gray": ("gray", "grey"),
    "purple": ("purple", "violet"),
    "cyan": ("cyan", "turquoise"),
    "circle": ("circle", "disk", "disc", "dot"),
    "square": ("square", "box"),
    "ring": ("ring", "donut", "hoop"),
    "cross": ("cross", "plus", "plus sign"),
    "small": ("small", "tiny", "little"),
    "large": ("large", "big", "huge"),
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over", "on top of"),
    "below": ("below", "under", "beneath", "underneath"),
}
SIDES = {"left of": "on the left", "right of": "on the right", "above": "at the top", "below": "at the bottom"}


@dataclass(frozen=True)
class Object:
    """One drawn thing: its color, shape and size (a pair's objects are always medium)."""

    color: str
    shape: str
    size: str = "medium"


@dataclass(frozen=True)
class Scene:
    """One object, or two with the first standing in `relation` to the second, on a background."""

    objects: tuple[Object, ...]
    background: str
    relation: str | None = None

    @property
    def prompt(self) -> str:
        """The canonical prompt."""
        named = [_with_article(_noun(thing)) for thing in self.objects]
        what = f" {self.relation} ".join(named)
        return f"{what} on {_with_article(self.background)} background"


def is_held_out(color: str, shape: str, background: str) -> bool:
    """Whether a triple is kept out of training: about one in ten, by a hash that no random generator touches."""
    return zlib.crc32(f"{color} {shape} {background}".encode()) % 10 == 0


def is_training_scene(scene: Scene) -> bool:
    """Whether a scene has no held-out triple."""
    return not any(is_held_out(thing.color, thing.shape, scene.background) for thing in scene.objects)


def random_scene(rng: np.random.Generator, kind: Kind) -> Scene:
    """A uniformly drawn scene; an object never has the background's color, a pair is never twice the same object."""
    background = str(rng.choice(COLORS))
    things: list[Object] = []
    while len(things) < (1 if kind == "single" else 2):
        size = str(rng.choice(SIZES)) if kind == "single" else "medium"
        thing = Object(str(rng.choice(COLORS)), str(rng.choice(SHAPES)), size)
        if thing.color != background and thing not in things:
            things.append(thing)
    return Scene(tuple(things), background, str(rng.choice(list(RELATIONS))) if kind == "pair" else None)


def training_scenes(rng: np.random.Generator, count: int, pair_share: float = 0.6) -> list[Scene]:
    """`count` scenes without held-out triples, `pair_share` of them with two objects."""
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = random_scene(rng, "pair" if rng.random() < pair_share else "single")
        if is_training_scene(scene):
            scenes.append(scene)
    return scenes


def held_out_scenes(kind: Kind, count: int, seed: int = 0) -> list[Scene]:
    """The first `count` distinct scenes, in a fixed order, all of whose objects are held-out triples."""
    rng = np.random.default_rng([seed, len(kind)])
    scenes: dict[Scene, None] = {}
    while len(scenes) < count:
        scene = random_scene(rng, kind)
        if all(is_held_out(thing.color, thing.shape, scene.background) for thing in scene.objects):
            scenes[scene] = None
    return list(scenes)


def describe(scene: Scene, rng: np.random.Generator) -> str:
    """One of many prompts for a scene: synonyms, word order, a mirrored relation, a left-out default background."""
    if rng.random() < 0.35:
        return scene.prompt
    things, relation = list(scene.objects), scene.relation
    if relation and rng.random() < 0.5:
        things, relation = things[::-1], OPPOSITE[relation]
    nouns = [_phrase(thing, rng) for thing in things]
    if relation is None:
        what = nouns[0]
    elif rng.random() < 0.2:
        what = f"{nouns[0]} {SIDES[relation]} and {nouns[1]} {SIDES[OPPOSITE[relation]]}"
    else:
        what = f"{nouns[0]} {_synonym(relation, rng)} {nouns[1]}"
    if scene.background == default_background(scene) and rng.random() < 0.3:
        return what
    ground = _synonym(scene.background, rng)
    form = rng.choice(
        (
            "{what} on {a_ground} background",
            "{what} on {ground}",
            "{what} with {a_ground} background",
            "{what} against {a_ground} background",
            "{what}, {ground} background",
            "{what}, the background is {ground}",
            "{what}, background is {ground}",
            "{ground} background, {what}",
            "{ground} background with {what}",
            "on {a_ground} background, {what}",
        )
    )
    return str(form).format(what=what, ground=ground, a_ground=_with_article(ground))


def default_background(scene: Scene) -> str:
    """The background of a prompt that names none: white, or black where an object is white."""
    return "black" if any(thing.color == "white" for thing in scene.objects) else "white"


def coverage(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Anti-aliased coverage in [0, 1] of a shape centred on the origin, at pixel offsets `x`, `y` (downwards).

    Each shape is a signed distance (exact near its edges); half a pixel on either side of the edge fades linearly.
    """
    if shape == "circle":
        distance = np.hypot(x, y) - 0.95 * radius
    elif shape == "square":
        distance = np.maximum(abs(x), abs(y)) - 0.82 * radius
    elif shape == "triangle":
        distance = np.maximum(y, 0.75**0.5 * abs(x) - 0.5 * y) - 0.575 * radius
    elif shape == "star":
        # Fold the plane onto half of one of five points; the edge is the line from the tip to the inner corner.
        fifth, tip = 2 * np.pi / 5, 1.15 * radius
        angle = abs((np.arctan2(x, -y) + fifth / 2) % fifth - fifth / 2)
        inner = 0.5 * tip * np.array([np.cos(fifth / 2), np.sin(fifth / 2)])
        normal = np.array([inner[1], tip - inner[0]]) / np.hypot(inner[1], tip - inner[0])
        rho = np.hypot(x, y)
        distance = rho * (np.cos(angle) * normal[0] + np.sin(angle) * normal[1]) - tip * normal[0]
    elif shape == "ring":
        distance = abs(np.hypot(x, y) - 0.75 * radius) - 0.23 * radius
    elif shape == "cross":
        long, short = np.maximum(abs(x), abs(y)), np.minimum(abs(x), abs(y))
        distance = np.maximum(long - radius, short - 0.33 * radius)
    else:
        raise ValueError(f"unknown shape {shape!r}: one of {', '.join(SHAPES)}")
    return np.clip(0.5 - distance, 0.0, 1.0).astype(np.float32)


def draw(scenes: Sequence[Scene], rng: np.random.Generator | None = None) -> np.ndarray:
    """Draw scenes: uint8 [B, H, W, 3]. With a generator, positions and radii vary a little."""
    pictures = np.empty((len(scenes), SIZE, SIZE, 3), np.uint8)
    axis = np.arange(SIZE, dtype=np.float32) + 0.5 - SIZE / 2
    for scene, picture in zip(scenes, pictures, strict=True):
        canvas = np.full((SIZE, SIZE, 3), PALETTE[scene.background], np.float32)
        for index, thing in enumerate(scene.objects):
            side = np.array(RELATIONS[scene.relation] if scene.relation else (0, 0)) * (1 if index == 0 else -1)
            centre, radius = PAIR_OFFSET * side, PAIR_RADIUS if scene.relation else RADIUS[thing.size]
            if rng is not None:
                centre = centre + rng.uniform(-3.0, 3.0, 2)
                radius *= rng.uniform(0.95, 1.05)
            mask = coverage(thing.shape, axis[None, :] - centre[0], axis[:, None] - centre[1], radius)[..., None]
            canvas += mask * (np.array(PALETTE[thing.color], np.float32) - canvas)
        picture[:] = np.rint(canvas)
    return pictures


def _synonym(word: str, rng: np.random.Generator) -> str:
    choices = WORDS.get(word, (word,))
    return choices[0] if rng.random() < 0.5 else str(rng.choice(choices))


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _noun(thing: Object) -> str:
    return " ".join(word for word in (thing.size, thing.color, thing.shape) if word != "medium")


def _phrase(thing: Object, rng: np.random.Generator) -> str:
    """A noun phrase with synonyms: `a tiny grey disk`, `the red box`, `a box that is red`."""
    size, color, shape = (_synonym(word, rng) for word in (thing.size, thing.color, thing.shape))
    sized = "" if thing.size == "medium" else f"{size} "
    style = rng.integers(6)
    if style == 0:
        return f"{_with_article(sized + shape)} that is {color}"
    if style == 1:
        return f"{color} {sized}{shape}"
    if style == 2:
        return f"the {sized}{color} {shape}"
    return _with_article(f"{sized}{color} {shape}")
