"""Learned words in a bundle, against diffusers' own loader; and files that hold none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrt.engines.bundle import Bundle
from latentrt.engines.errors import CheckpointError
from latentrt.engines.files import sha256_of
from latentrt.runtime import Pipeline
from latentrt.runtime.cli import run
from latentrt.runtime.prompt.tokenizer import Tokenizer

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
save_file = pytest.importorskip("safetensors.torch").save_file

PROMPTS = ["a <cat-toy> on the blue background", "large gem, a <cat-toy>, gem", "<CAT-TOY> star plush"]
WIDTH = 64


def vectors(count: int, seed: int) -> Any:
    return 0.02 * torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One file of every kind: diffusers' own, the web UI's two, and one for two text encoders."""
    folder = tmp_path_factory.mktemp("words")
    save_file({"<cat-toy>": vectors(1, 0)[0]}, folder / "learned_embeds.safetensors")
    parameter = {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors(3, 1)}, "name": "gem", "step": 100}
    torch.save(parameter, folder / "old.pt")
    save_file({"emb_params": vectors(2, 2)}, folder / "plush.safetensors")
    save_file({"clip_g": torch.zeros(2, 1280), "clip_l": vectors(2, 3)}, folder / "two.safetensors")
    return {file.stem: file for file in folder.iterdir()}


@pytest.fixture(scope="module")
def bundle(tiny_sd15_checkpoint: Path, files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "words"
    given = (files["learned_embeds"], files["old"], files["plush"], f"<two>={files['two']}")
    arguments = [argument for each in given for argument in ("--textual-inversion", str(each))]
    assert run(["export", str(tiny_sd15_checkpoint), "-o", str(out), *arguments]) == 0
    return out


@pytest.fixture(scope="module")
def reference(tiny_sd15_checkpoint: Path, files: dict[str, Path]) -> Any:
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tiny_sd15_checkpoint, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_textual_inversion(str(files["learned_embeds"].parent), weight_name="learned_embeds.safetensors")
    pipeline.load_textual_inversion(str(files["old"].parent), weight_name="old.pt")
    pipeline.load_textual_inversion(str(files["plush"].parent), weight_name="plush.safetensors", token="plush")
    return pipeline


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("prompt", PROMPTS)
def test_learned_words_draw_what_diffusers_draws(bundle: Path, reference: Any, prompt: str) -> None:
    request: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 5.0}
    with Pipeline.open(bundle, "onnxruntime-cpu", threads=1) as pipe:
        ours = pipe(prompt, seed=1, output_type="np", **request).images
        plain = pipe("a star", seed=1, output_type="np", **request).images
    generator = torch.Generator().manual_seed(1)
    theirs = reference(prompt, generator=generator, output_type="np", **request).images
    assert np.abs(ours - theirs).max() <= 2 / 255
    assert np.abs(ours - plain).max() > 4 / 255


@pytest.mark.long
def test_words_are_read_as_all_of_their_vectors(bundle: Path, reference: Any) -> None:
    opened = Bundle.open(bundle)
    info = opened.manifest.tokenizers[0]
    tokenizer = Tokenizer(opened.file(info.file), info)
    for prompt in PROMPTS[:2]:
        converted = reference.maybe_convert_prompt(prompt, reference.tokenizer)
        assert tokenizer.text_ids(prompt) == reference.tokenizer(converted, add_special_tokens=False).input_ids
    names = [tokenizer.token(number) for number in tokenizer.text_ids("gem <two>")]
    assert names == ["gem", "gem_1", "gem_2", "<two>", "<two>_1"]
    assert tokenizer.encode("star " * 74 + "gem cat").truncated == "gem cat"


@pytest.mark.long
def test_the_manifest_says_where_words_came_from(bundle: Path, files: dict[str, Path]) -> None:
    source = Bundle.open(bundle).manifest.source["textual_inversion"]
    assert source["gem"] == {"file": "old.pt", "sha256": sha256_of(files["old"]), "vectors": 3}
    assert list(source) == ["<cat-toy>", "gem", "plush", "<two>"]


class Evil:
    def __reduce__(self) -> Any:
        return print, ("ran",)


@pytest.mark.parametrize(
    ("name", "contents", "given", "message"),
    [
        ("x.pt", {"a": 1, "b": 2}, "{}", "holds no embedding but a, b: give one with a token"),
        ("x.pt", Evil(), "{}", "cannot be read as tensors"),
        (
            "x.pt",
            {"<x>": torch.zeros(2, 8)},
            "{}",
            "is 8 wide and the text encoder 64: it was learned on another model",
        ),
        ("x.pt", {"<x>": torch.full((2, WIDTH), float("nan"))}, "{}", "give finite numbers"),
        ("x.pt", {"<x>": torch.zeros(2, WIDTH)}, " ={}", "has the token ' ': give a word, as TOKEN=FILE"),
        ("x.pt", {"<x>": torch.zeros(2, WIDTH)}, "cat</w>={}", "has a token 'cat</w>' already: give another"),
        ("x.zip", {}, "{}", "is no embedding file: give a .safetensors, .pt or .bin file, or TOKEN=FILE"),
        ("x.pt", {}, "{}.missing", "is no embedding file"),
    ],
    ids=["keys", "code", "width", "nan", "token", "taken", "ending", "missing"],
)
def test_what_is_no_learned_word_is_refused_in_one_line(
    tiny_sd15_checkpoint: Path, tmp_path: Path, name: str, contents: Any, given: str, message: str
) -> None:
    from latentrt.export import export_checkpoint

    torch.save(contents, tmp_path / name)
    with pytest.raises(CheckpointError) as refused:
        export_checkpoint(tiny_sd15_checkpoint, tmp_path / "out", textual_inversion=[given.format(tmp_path / name)])
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()
