from __future__ import annotations

import numpy as np
import pytest
from latentrt.benchmarks.quality.scenes import (
    COLORS,
    PALETTE,
    SHAPES,
    SIZE,
    Object,
    Scene,
    describe,
    draw,
    held_out_scenes,
    is_held_out,
    is_training_scene,
    training_scenes,
)


def test_about_a_tenth_of_the_triples_is_held_out() -> None:
    triples = [(c, s, b) for c in COLORS for s in SHAPES for b in COLORS if c != b]
    assert 0.08 < np.mean([is_held_out(*triple) for triple in triples]) < 0.13


def test_training_never_sees_a_held_out_triple() -> None:
    for scene in training_scenes(np.random.default_rng(0), 3000):
        assert is_training_scene(scene)
        assert not any(is_held_out(thing.color, thing.shape, scene.background) for thing in scene.objects)


@pytest.mark.parametrize("kind, count", [("single", 1), ("pair", 2)])
def test_held_out_scenes_are_held_out_in_every_object_and_stay_the_same(kind: str, count: int) -> None:
    scenes = held_out_scenes(kind, 50)
    assert len(set(scenes)) == 50
    assert held_out_scenes(kind, 80)[:50] == scenes
    for scene in scenes:
        assert len(scene.objects) == count
        assert all(is_held_out(thing.color, thing.shape, scene.background) for thing in scene.objects)


def test_held_out_prompts_are_pinned() -> None:
    # Scores are comparable over time only while these stay.
    assert [scene.prompt for scene in held_out_scenes("pair", 2)] == [
        "a purple triangle left of a green cross on a red background",
        "a purple ring right of a yellow star on a cyan background",
    ]


def test_a_prompt_names_all_and_medium_size_goes_unsaid() -> None:
    pair = Scene((Object("orange", "star"), Object("gray", "ring")), "blue", "above")
    assert pair.prompt == "an orange star above a gray ring on a blue background"
    assert Scene((Object("red", "cross", "small"),), "white").prompt == "a small red cross on a white background"


def test_phrases_vary_and_mirror_relations() -> None:
    pair = Scene((Object("red", "circle"), Object("green", "square")), "blue", "left of")
    rng = np.random.default_rng(0)
    phrases = {describe(pair, rng) for _ in range(300)}
    assert len(phrases) > 100
    assert any("right of a red" in phrase for phrase in phrases)
    assert not any("background" not in phrase and "blue" not in phrase for phrase in phrases)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_drawn_object_has_its_colors_and_a_smooth_edge(shape: str) -> None:
    picture = draw([Scene((Object("red", shape, "large"),), "white")])[0]
    assert picture.shape == (SIZE, SIZE, 3)
    assert tuple(picture[0, 0]) == PALETTE["white"]
    colors = {tuple(int(v) for v in pixel) for pixel in picture.reshape(-1, 3)}
    assert PALETTE["red"] in colors
    assert len(colors) > 2 or shape in ("square", "cross")


def test_drawing_is_a_function_of_the_generator() -> None:
    scenes = training_scenes(np.random.default_rng(1), 4)
    first, second = (draw(scenes, np.random.default_rng(2)) for _ in range(2))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, draw(scenes, np.random.default_rng(3)))
