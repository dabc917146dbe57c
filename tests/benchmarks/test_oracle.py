from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from latentrt.benchmarks.quality.oracle import judge, normalise, recognise, score
from latentrt.benchmarks.quality.scenes import (
    COLORS,
    OPPOSITE,
    SHAPES,
    Object,
    Scene,
    draw,
    held_out_scenes,
    random_scene,
)
from scipy import ndimage

KINDS = ("single", "pair")


def scenes_of(kind: str, count: int, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [random_scene(rng, kind) for _ in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_drawn_scene_is_recognised(kind: str) -> None:
    scenes = scenes_of(kind, 100)
    for scene, picture in zip(scenes, draw(scenes, np.random.default_rng(1)), strict=True):
        assert recognise(picture) == normalise(scene), scene.prompt


@pytest.mark.parametrize("kind", KINDS)
def test_blur_and_noise_are_tolerated(kind: str) -> None:
    scenes, rng = scenes_of(kind, 60, seed=2), np.random.default_rng(3)
    hits = []
    for scene, picture in zip(scenes, draw(scenes, rng), strict=True):
        blurred = ndimage.gaussian_filter(picture.astype(float), (1.2, 1.2, 0)) + rng.normal(0, 6, picture.shape)
        hits.append(judge(scene, np.clip(blurred, 0, 255).astype(np.uint8))["right"])
    assert np.mean(hits) >= 0.98


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_color_shape_background_or_relation_is_named(kind: str) -> None:
    rng = np.random.default_rng(4)
    for scene in scenes_of(kind, 25, seed=5):
        last = scene.objects[-1]
        used = {scene.background, *(thing.color for thing in scene.objects)}
        color = str(rng.choice([name for name in COLORS if name not in used]))
        shape = str(rng.choice([name for name in SHAPES if name != last.shape]))
        wrong = {
            "color": replace(scene, objects=(*scene.objects[:-1], replace(last, color=color))),
            "shape": replace(scene, objects=(*scene.objects[:-1], replace(last, shape=shape))),
            "background": replace(scene, background=color),
        }
        for part, drawn in wrong.items():
            verdict = judge(scene, draw([drawn], rng)[0])
            assert not verdict["right"] and not verdict[part], (part, scene.prompt, drawn.prompt)
            assert all(verdict[other] for other in wrong if other != part)
        if scene.relation:
            mirrored = replace(scene, relation=OPPOSITE[scene.relation])
            assert not judge(scene, draw([mirrored], rng)[0])["right"]
            turned = replace(scene, relation="above" if scene.relation in ("left of", "right of") else "left of")
            assert not judge(scene, draw([turned], rng)[0])["relation"]


def test_what_is_no_scene_is_not_recognised() -> None:
    rng = np.random.default_rng(6)
    assert recognise(rng.integers(0, 256, (128, 128, 3), dtype=np.uint8)) is None
    assert recognise(np.full((128, 128, 3), 248, np.uint8)) is None
    picture = draw([Scene((Object("red", "circle", "small"),), "white")])[0]
    blob = picture.copy()
    blob[5:25, 5:45] = (36, 66, 212)
    assert not judge(Scene((Object("red", "circle", "small"),), "white"), blob)["right"]
    half = picture.copy()
    half[:, :64] = (16, 16, 16)
    assert recognise(half) is None


def test_an_object_of_two_colors_is_not_recognised() -> None:
    red, blue = draw([Scene((Object(color, "circle", "large"),), "white") for color in ("red", "blue")])
    assert recognise(np.concatenate([red[:64], blue[64:]])) is None


def test_a_ring_needs_a_hole_and_a_round_outline() -> None:
    ring = Scene((Object("white", "ring", "small"),), "pink")
    disk = draw([Scene((Object("white", "circle", "small"),), "pink")])[0]
    thick, pierced = disk.copy(), disk.copy()
    thick[59:69, 59:69] = (255, 150, 195)
    pierced[62:66, 62:66] = (255, 150, 195)
    assert judge(ring, thick)["right"]
    assert not judge(ring, pierced)["right"]
    square = draw([Scene((Object("white", "square", "medium"),), "pink")])[0]
    square[54:74, 54:74] = (255, 150, 195)
    assert recognise(square) is None


def test_the_size_is_measured() -> None:
    for size in ("small", "medium", "large"):
        scene = Scene((Object("green", "star", size),), "pink")
        assert recognise(draw([scene])[0]) == scene


def test_score_counts_and_explains_failures() -> None:
    wanted = {scene.prompt: scene for scene in held_out_scenes("single", 20)}

    def generate(prompts: list[str], seeds: list[int]) -> np.ndarray:
        pictures = draw([wanted[prompt] for prompt in prompts])
        for picture, seed in zip(pictures, seeds, strict=True):
            if seed % 5 == 0:
                picture[:] = 128
        return pictures

    result = score(generate, "single", 20, batch=8)
    assert (result.count, result.right, result.shape) == (20, 0.8, 0.8)
    assert [seed for _, seed, _ in result.failures] == [0, 5, 10, 15]
    with pytest.raises(ValueError, match="uint8"):
        score(lambda prompts, seeds: np.zeros((len(prompts), 8, 8, 3)), "pair", 2)
