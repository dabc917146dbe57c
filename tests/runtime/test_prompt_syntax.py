"""Requests whose prompts have weights or more than one part, against diffusers with the same embeddings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrt.engines.bundle import Bundle
from latentrt.engines.errors import RequestError
from latentrt.engines.onnxruntime.cpu import OnnxRuntimeCpu
from latentrt.runtime import Pipeline
from latentrt.runtime.cli import run

from .test_prompt_a1111 import LONG, reference

QUICK: dict[str, Any] = {"num_inference_steps": 3, "sampler": "ddim", "guidance_scale": 5.0, "width": 64, "height": 64}


@pytest.fixture(scope="module")
def pipe(tiny_sd15_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.open(tiny_sd15_bundle, "onnxruntime-cpu", threads=1) as opened:
        yield opened


def draw(pipe: Pipeline, prompt: Any, negative: Any = None, **arguments: Any) -> Any:
    return pipe(prompt, negative, seed=3, output_type="np", **{**QUICK, **arguments}).images


@pytest.mark.filterwarnings("ignore")
def test_long_and_weighted_prompts_draw_what_diffusers_draws_of_their_embeddings(
    tiny_sd15_checkpoint: Path, pipe: Pipeline
) -> None:
    """The negative prompt is shorter than the prompt: it gets the conditioning of empty prompts behind its own."""
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tiny_sd15_checkpoint, safety_checker=None)
    theirs.scheduler = diffusers.DDIMScheduler.from_config(theirs.scheduler.config)
    theirs.set_progress_bar_config(disable=True)
    parts = [reference(text, theirs.tokenizer, theirs.text_encoder) for text in (LONG, "(large:0.6) cat", "")]
    assert [len(part) for part in parts] == [2 * 77, 77, 77]
    embeds = {
        "prompt_embeds": torch.from_numpy(parts[0][None]),
        "negative_prompt_embeds": torch.from_numpy(np.concatenate([parts[1], parts[2]])[None]),
    }
    given = {name: value for name, value in QUICK.items() if name != "sampler"}
    expected = theirs(**embeds, generator=torch.Generator().manual_seed(3), output_type="np", **given).images
    ours = draw(pipe, LONG, "(large:0.6) cat", prompt_syntax="a1111")
    assert np.abs(ours - expected).max() <= 2 / 255
    assert np.abs(ours - draw(pipe, LONG, "large cat")).max() > 4 / 255


def test_prompts_without_syntax_are_what_they_say(pipe: Pipeline) -> None:
    plain = draw(pipe, "a red circle", "a cat")
    assert np.array_equal(draw(pipe, "a red circle", "a cat", prompt_syntax="a1111"), plain)
    assert not np.array_equal(
        draw(pipe, "a (red) circle", "a cat"), draw(pipe, "a (red) circle", "a cat", prompt_syntax="a1111")
    )


def test_each_picture_of_a_batch_has_its_own_prompt(pipe: Pipeline) -> None:
    prompts = ["a (red:1.4) circle", "a blue square BREAK a cat", "[star]"]
    together = draw(pipe, prompts, prompt_syntax="a1111", num_images_per_prompt=2)
    second = pipe(prompts[1], seed=6, output_type="np", prompt_syntax="a1111", **QUICK)
    assert np.abs(together[3] - second.images[0]).max() <= 1 / 255
    assert second.warnings == [] and second.timings.encode > 0
    assert second.request is not None and second.request.prompt_syntax == "a1111"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": "a [red:blue:0.5] cat"}, r"'\[red:blue:0.5\]', words that change from step to step"),
        ({"prompt": "a [red|blue] cat"}, r"'\[red\|blue\]', words that change"),
        ({"prompt": "a cat AND a star"}, "has AND, several prompts at once"),
        ({"prompt": "a <lora:cat:1>"}, "the network <lora:…>"),
        ({"prompt": "(cat:1..2)"}, r"the weight '1\.\.2': give a number, such as 1\.2"),
        ({"prompt": f"(cat:{10**38})"}, "leave no finite numbers: give weights nearer to 1"),
        ({"prompt": "a", "prompt_syntax": "comfy"}, "prompt_syntax is 'comfy': input should be"),
        ({"prompt_embeds": np.zeros((1, 77, 64), np.float32)}, "prompt_syntax and embeddings of a prompt are given"),
    ],
    ids=str,
)
def test_what_a_syntax_does_not_know_is_one_clear_line(pipe: Pipeline, arguments: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message) as refused:
        pipe(**{"prompt_syntax": "a1111", **QUICK, **arguments})
    assert "\n" not in str(refused.value)


def test_what_is_cut_off_is_told_in_the_user_s_own_words(pipe: Pipeline) -> None:
    words = "A Red  Circle, " * 18 + "Ünd a blue Cat" + " cat" * 9
    result = pipe(words, seed=1, **{**QUICK, "num_inference_steps": 1})
    cut = result.warnings[0].partition(" tokens: ")[2].partition(" is not used")[0].strip("'…\"")
    assert cut and cut in words and "</w>" not in result.warnings[0]
    assert result.warnings[0].endswith("prompt_syntax a1111 or compel takes prompts of any length")
    assert pipe(words, seed=1, prompt_syntax="a1111", **{**QUICK, "num_inference_steps": 1}).warnings == []


def test_a_bundle_for_one_length_refuses_more_and_advises_nothing(tiny_sd15_bundle: Path, tmp_path: Path) -> None:
    manifest = Bundle.open(tiny_sd15_bundle).manifest
    data = json.loads(manifest.model_dump_json())
    denoiser = next(graph for graph in data["graphs"] if graph["name"] == "denoiser")
    next(spec for spec in denoiser["inputs"] if spec["name"] == "context")["shape"][1] = 77
    denoiser["references"] = []
    for file in tiny_sd15_bundle.iterdir():
        (tmp_path / file.name).hardlink_to(file)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "manifest.json").write_text(json.dumps(data))
    with Pipeline(Bundle.open(tmp_path), OnnxRuntimeCpu(threads=1)) as old:
        assert draw(old, "a (red) circle", prompt_syntax="a1111").shape == (1, 64, 64, 3)
        with pytest.raises(
            RequestError, match="has 2 parts, and this bundle's denoiser takes 1: export the checkpoint again"
        ):
            draw(old, "a BREAK cat", prompt_syntax="a1111")
        assert old("cat " * 90, seed=1, **QUICK).warnings[0].endswith("is not used")


def test_the_command_line_reads_weights(
    tiny_sd15_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", "-b", str(tiny_sd15_bundle), "--steps", "1", "--size", "64x64", "--seed", "1", "--json"]
    assert run([*arguments, "a (red:1.5) cat", "--prompt-syntax", "a1111", "-o", str(tmp_path / "a.png")]) == 0
    assert json.loads(capsys.readouterr().out)["request"]["prompt_syntax"] == "a1111"
