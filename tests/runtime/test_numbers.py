"""Numbers and embeddings that graphs of some families read, on bundles of no more than a manifest's records."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from latentrt.engines.bundle import NumbersInput, TensorInfo
from latentrt.engines.errors import RequestError
from latentrt.runtime.prompt.embeddings import Conditioning, embeddings_of
from latentrt.runtime.prompt.numbers import number_inputs
from latentrt.runtime.request import GenerationRequest

SIDES = ("original_height", "original_width", "crop_top", "crop_left", "target_height", "target_width")
TIME_IDS = NumbersInput(name="time_ids", values=SIDES, negative=tuple(f"negative_{side}" for side in SIDES))
CONTEXT = TensorInfo(name="context", dtype="float16", shape=("R", "L", 6))
POOLED = TensorInfo(name="pooled", dtype="float32", shape=("R", 4))


def numbers(info: NumbersInput, negative: int = 2, dtype: str = "float32", **fields: Any) -> Any:
    """Return the rows of an input for a request of 40x30 pixels with three rows of its prompt."""
    spec = TensorInfo(name=info.name, dtype=dtype, shape=("R", len(info.values)))  # type: ignore[arg-type]
    bundle: Any = SimpleNamespace(manifest=SimpleNamespace(graphs=[SimpleNamespace(inputs=[spec])], inputs=[info]))
    request = GenerationRequest.of(prompt="a", width=40, height=30, **fields)
    rows = number_inputs(bundle, request, 3, negative)[info.name]
    assert rows.shape == (3 + negative, len(info.values)) and rows.dtype == dtype
    for side in (rows[:negative], rows[negative:]):
        assert (side == side[:1]).all()
    return [rows[0].tolist(), rows[-1].tolist()]


@pytest.mark.parametrize(
    ("given", "negative", "prompt"),
    [
        ({}, [30, 40, 0, 0, 30, 40], [30, 40, 0, 0, 30, 40]),
        ({"original_size": (7, 8), "crops_coords_top_left": (1, 2)}, [7, 8, 1, 2, 30, 40], [7, 8, 1, 2, 30, 40]),
        ({"target_size": (7, 8)}, [30, 40, 0, 0, 7, 8], [30, 40, 0, 0, 7, 8]),
        ({"negative_original_size": (5, 6)}, [30, 40, 0, 0, 30, 40], [30, 40, 0, 0, 30, 40]),
        ({"negative_target_size": (5, 6)}, [30, 40, 0, 0, 30, 40], [30, 40, 0, 0, 30, 40]),
        (
            {
                "original_size": (7, 8),
                "crops_coords_top_left": (9, 9),
                "negative_original_size": (5, 6),
                "negative_crops_coords_top_left": (1, 2),
                "negative_target_size": (3, 4),
            },
            [5, 6, 1, 2, 3, 4],
            [7, 8, 9, 9, 30, 40],
        ),
    ],
    ids=["none", "prompt", "target", "one negative", "the other", "both"],
)
def test_sizes_are_diffusers_time_ids(given: dict[str, Any], negative: list[int], prompt: list[int]) -> None:
    """SDXL's rule: negative sizes count where the original and the target one are given."""
    assert numbers(TIME_IDS, **given) == [negative, prompt]


def test_every_number_is_that_of_its_name() -> None:
    values = ("height", "width", "num_inference_steps", "guidance_scale", "true_cfg_scale", "negative_given", 2.5)
    values = (*values, "aesthetic_score", "negative_aesthetic_score")
    fields = {"num_inference_steps": 9, "guidance_scale": 4.5, "true_cfg_scale": 3.5}
    fields |= {"aesthetic_score": 5.5, "negative_aesthetic_score": 1.5}
    row = [30, 40, 9, 4.5, 3.5, 0, 2.5, 5.5, 1.5]
    info = NumbersInput(name="n", values=values)  # type: ignore[arg-type]
    assert numbers(info, **fields) == [row, row]
    row[5] = 1
    assert numbers(info, negative_prompt="", **fields)[1] == row
    assert numbers(NumbersInput(name="n", values=("height",)), negative=0, dtype="int64") == [[30], [30]]


def bundle_of(*specs: TensorInfo) -> Any:
    encoder = SimpleNamespace(name="text_encoder", stage="prompt", inputs=[], outputs=specs)
    denoiser = SimpleNamespace(name="denoiser", stage="step", inputs=list(specs), outputs=[])
    return SimpleNamespace(manifest=SimpleNamespace(graphs=[encoder, denoiser]), graph=lambda name: denoiser)


def given(**arguments: Any) -> dict[str, Any]:
    names = ("prompt", "negative_prompt", "prompt_embeds", "negative_prompt_embeds")
    return {**dict.fromkeys(names), **arguments}


def test_rows_of_embeddings_are_each_image_s_own_with_negatives_first() -> None:
    prompt = {"context": np.arange(3.0)[:, None], "pooled": np.arange(10.0, 13.0)[:, None]}
    negative = {name: -each for name, each in prompt.items()}
    rows = Conditioning(prompt, negative, images_per_prompt=2).rows(1, 3, 4)  # images 1, 2, 3 of six, and one too many
    assert rows["context"].ravel().tolist() == [0, -1, -1, -1, 0, 1, 1, 1]
    assert rows["pooled"].ravel().tolist() == [-10, -11, -11, -11, 10, 11, 11, 11]
    assert Conditioning(prompt, {}, 1).rows(0, 3, 3)["context"].ravel().tolist() == [0, 1, 2]


def test_texts_beside_embeddings_are_encoded_once_on_their_own_side() -> None:
    both = bundle_of(CONTEXT, POOLED)
    embeddings = embeddings_of(
        both, given(prompt_embeds=np.ones((2, 5, 6)), pooled_prompt_embeds=np.ones((2, 4)), negative_prompt="x")
    )
    assert embeddings is not None
    asked: list[tuple[str, bool]] = []

    def encode(text: str, negative: bool) -> dict[str, Any]:
        asked.append((text, negative))
        return {"context": np.full((1, 5, 6), 7.0), "pooled": np.full((1, 4), 8.0)}

    found = embeddings.conditioning((CONTEXT, POOLED), ["", ""], ["x", "x"], 1, encode, guided=True)
    assert asked == [("x", True)]
    assert {name: (each.shape, each.dtype) for name, each in found.negative.items()} == {
        "context": ((2, 5, 6), np.float16),
        "pooled": ((2, 4), np.float32),
    }
    assert (found.negative["pooled"] == 8).all() and (found.prompt["context"] == 1).all()
    unguided = embeddings.conditioning((CONTEXT, POOLED), ["", ""], ["x", "x"], 1, encode, guided=False)
    assert unguided.negative == {} and len(asked) == 1


@pytest.mark.parametrize(
    ("specs", "arguments", "message"),
    [
        (
            (CONTEXT, POOLED),
            {"prompt_embeds": np.ones((1, 5, 6))},
            "prompt_embeds is given without pooled_prompt_embeds",
        ),
        (
            (CONTEXT,),
            {"prompt": "a", "pooled_prompt_embeds": np.ones((1, 4))},
            "denoiser does not read it, leave it out",
        ),
        (
            (CONTEXT, POOLED),
            {"prompt_embeds": np.ones((2, 5, 6)), "pooled_prompt_embeds": np.ones((1, 4))},
            "different numbers of prompts",
        ),
        (
            (CONTEXT,),
            {"prompt_embeds": np.ones((1, 5, 7))},
            r"of shape \[1, 5, 7\]: this bundle takes \[prompts, L, 6\]",
        ),
        ((CONTEXT,), {"prompt_embeds": np.ones((5, 6))}, r"of shape \[5, 6\]: this bundle takes"),
        ((CONTEXT,), {"prompt_embeds": np.ones((0, 5, 6))}, r"of shape \[0, 5, 6\]: this bundle takes"),
        ((CONTEXT,), {"prompt_embeds": np.full((1, 5, 6), np.inf)}, "holds numbers that are not finite"),
        ((CONTEXT,), {"prompt_embeds": np.ones((1, 5, 6), int)}, "of int64: give an array of floats"),
        (
            (CONTEXT,),
            {"prompt_embeds": np.ones((1, 5, 6)), "negative_prompt_embeds": np.ones((1, 4, 6))},
            "give one shape",
        ),
        ((CONTEXT,), {"prompt": "a", "prompt_embeds": np.ones((1, 5, 6))}, "prompt and prompt_embeds are given"),
    ],
    ids=["no pooled", "pooled", "counts", "width", "axes", "none", "infinite", "whole", "negative", "both"],
)
def test_embeddings_that_do_not_fit_are_named(
    specs: tuple[TensorInfo, ...], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        embeddings_of(bundle_of(*specs), given(**arguments))
