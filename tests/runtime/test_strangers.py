"""Programs as people write them for diffusers, from its documentation: the import and the device line are changed.

Each runs twice, on diffusers and here, and their pictures are compared. `LATENTRT_COMPEL` names a folder with Compel,
for the program that uses it.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from latentrt.engines.errors import RequestError
from latentrt.runtime import Pipeline
from PIL import Image

PROMPT = "a photo of an astronaut riding a horse on mars"
SIZE = {"height": 64, "width": 64}


def init_image() -> Image.Image:
    y, x = np.mgrid[:64, :96] * 2
    return Image.fromarray(np.stack([x, 2 * y, 255 - x], -1).astype(np.uint8)).resize((64, 64))


def mask_image() -> Image.Image:
    array = np.zeros((64, 64), np.uint8)
    array[20:40, 24:48] = 255
    return Image.fromarray(array)


def text_to_image(Pipe: Any, folder: Path, where: str) -> Any:
    pipe = Pipe.from_pretrained(
        folder, torch_dtype=torch.float32, use_safetensors=True, safety_checker=None, requires_safety_checker=False
    )
    pipe = pipe.to(where)
    pipe.safety_checker = None
    pipe.set_progress_bar_config(disable=True)
    pipe.enable_attention_slicing()
    pipe.fuse_qkv_projections()
    generator = [torch.Generator("cpu").manual_seed(i) for i in range(2)]
    return pipe([PROMPT] * 2, generator=generator, num_inference_steps=3, guidance_scale=7.5, **SIZE).images


def another_scheduler(Pipe: Any, folder: Path, where: str) -> Any:
    scheduler = diffusers.EulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    pipe = Pipe.from_pretrained(folder, scheduler=scheduler, safety_checker=None).to(where)
    first = pipe(PROMPT, generator=torch.manual_seed(0), num_inference_steps=3, **SIZE)[0]
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)
    images = pipe(prompt=PROMPT, generator=torch.manual_seed(0), num_inference_steps=4, **SIZE).images
    pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    lcm = pipe(PROMPT, generator=torch.manual_seed(0), num_inference_steps=2, guidance_scale=1.0, **SIZE)["images"]
    return [*first, *images, *lcm]


def callbacks(Pipe: Any, folder: Path, where: str) -> Any:
    pipe = Pipe.from_pretrained(folder, safety_checker=None).to(where)
    seen = []

    def decode_latents(pipe: Any, step: int, timestep: Any, callback_kwargs: dict[str, Any]) -> dict[str, Any]:
        latents = callback_kwargs["latents"]
        seen.append((step, tuple(latents.shape), pipe.num_timesteps, pipe.guidance_scale))
        callback_kwargs["latents"] = latents * 0.9
        if step == 2:
            pipe._interrupt = True
        return callback_kwargs

    images = pipe(
        PROMPT,
        generator=torch.manual_seed(1),
        num_inference_steps=5,
        callback_on_step_end=decode_latents,
        callback_on_step_end_tensor_inputs=["latents"],
        **SIZE,
    ).images
    assert seen[-1][0] >= 2 and seen[0][1] == (1, 4, *seen[0][1][2:]) and seen[0][3] == 7.5
    return images


def image_to_image(Pipe: Any, folder: Path, where: str) -> Any:
    if Pipe is not Pipeline:
        Pipe = diffusers.AutoPipelineForImage2Image
    pipeline = Pipe.from_pretrained(folder, safety_checker=None).to(where)
    generator = torch.Generator().manual_seed(33)
    image = pipeline(PROMPT, image=init_image(), strength=0.6, guidance_scale=6.0, generator=generator).images[0]
    array = np.asarray(init_image(), np.float32) / 255
    generator = torch.Generator().manual_seed(33)
    return [image, pipeline(PROMPT, image=array, strength=0.6, num_inference_steps=5, generator=generator).images[0]]


def from_pipe(Pipe: Any, folder: Path, where: str) -> Any:
    if Pipe is Pipeline:
        Text = Image_ = Pipe
    else:
        Text, Image_ = diffusers.AutoPipelineForText2Image, diffusers.AutoPipelineForImage2Image
    first = Text.from_pretrained(folder, safety_checker=None).to(where)
    image = first(PROMPT, generator=torch.manual_seed(2), num_inference_steps=2, **SIZE).images[0]
    second = Image_.from_pipe(first)
    return second(PROMPT, image=image, strength=0.5, generator=torch.manual_seed(2), num_inference_steps=4).images


def inpaint(Pipe: Any, folder: Path, where: str) -> Any:
    if Pipe is not Pipeline:
        Pipe = diffusers.AutoPipelineForInpainting
    pipe = Pipe.from_pretrained(folder, safety_checker=None).to(where)
    given = {"image": init_image(), "mask_image": mask_image(), "num_inference_steps": 3, **SIZE}
    whole = pipe(PROMPT, generator=torch.manual_seed(4), strength=0.8, **given).images
    return [*whole, *pipe(PROMPT, generator=torch.manual_seed(4), padding_mask_crop=8, **given).images]


def embeddings(Pipe: Any, folder: Path, where: str) -> Any:
    """Encode a prompt by hand, as recipes for long prompts do."""
    pipe = Pipe.from_pretrained(folder, safety_checker=None).to(where)
    length = pipe.tokenizer.model_max_length
    ids = pipe.tokenizer(PROMPT, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    with torch.no_grad():
        embeds = pipe.text_encoder(ids.input_ids)[0]
        none = pipe.text_encoder(
            pipe.tokenizer("", padding="max_length", max_length=length, return_tensors="pt").input_ids
        )[0]
    return pipe(
        prompt_embeds=embeds,
        negative_prompt_embeds=none,
        generator=torch.manual_seed(6),
        num_inference_steps=2,
        **SIZE,
    ).images


def weighted(Pipe: Any, folder: Path, where: str) -> Any:
    from compel import Compel, DownweightMode

    pipe = Pipe.from_pretrained(folder, safety_checker=None).to(where)
    compel = Compel(tokenizer=pipe.tokenizer, text_encoder=pipe.text_encoder, downweight_mode=DownweightMode.REMOVE)
    embeds = compel("a red cat playing with a (ball)1.5++ in the (forest)0.6")
    return pipe(prompt_embeds=embeds, generator=torch.manual_seed(8), num_inference_steps=2, **SIZE).images


PROGRAMS = [text_to_image, another_scheduler, callbacks, image_to_image, from_pipe, inpaint, embeddings]


def assert_same(program: Callable[..., Any], checkpoint: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = program(diffusers.StableDiffusionPipeline, checkpoint, "cpu")
        got = program(Pipeline, checkpoint, "cpu")
    assert len(got) == len(wanted) > 0
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.size == theirs.size
        assert np.abs(np.asarray(ours, float) - np.asarray(theirs, float)).max() <= 2


@pytest.fixture(scope="module")
def checkpoint(tiny_sd15_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint as diffusers saves one, with the version that inpainting looks for."""
    folder = shutil.copytree(tiny_sd15_checkpoint, tmp_path_factory.mktemp("strangers") / "checkpoint")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_diffusers_version": "0.42.1"}))
    return folder


@pytest.mark.long
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_draws_the_same_after_another_import(program: Callable[..., Any], checkpoint: Path) -> None:
    assert_same(program, checkpoint)


@pytest.mark.long
def test_compel_reads_the_pipeline_s_tokenizer_and_text_encoder(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "LATENTRT_COMPEL" in os.environ:
        monkeypatch.setattr(sys, "path", [os.environ["LATENTRT_COMPEL"], *sys.path])
    pytest.importorskip("compel")
    assert_same(weighted, checkpoint)


@pytest.mark.parametrize("low", [0.0, -1.0])
def test_pictures_may_be_tensors(low: float, pipe: Pipeline) -> None:
    array = np.moveaxis(np.asarray(init_image(), np.float32) / 255, -1, 0)
    tensor = torch.from_numpy(array * (1 - low) + low)
    mask = torch.from_numpy(np.asarray(mask_image(), np.float32) / 255)
    given = {"num_inference_steps": 2, "strength": 0.7, "seed": 1, "output_type": "np"}
    wanted = pipe(PROMPT, image=init_image(), mask_image=mask_image(), **given).images
    for image, painted in ((tensor, mask), (tensor[None], mask[None, None]), (tensor.bfloat16(), mask[None])):
        got = pipe(PROMPT, image=image, mask_image=painted, **given).images
        assert np.abs(got - wanted).max() <= (0.02 if image.dtype == torch.bfloat16 else 1e-5)
    both = pipe([PROMPT] * 2, image=torch.stack([tensor, tensor]), **given).images
    assert both.shape[0] == 2
    with pytest.raises(RequestError, match=r"image is a tensor of shape \[4, 8, 8\]: give one picture as \[3, H, W\]"):
        pipe(PROMPT, image=torch.zeros(4, 8, 8))


@pytest.fixture(scope="module")
def pipe(tiny_sd15_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.open(tiny_sd15_bundle, "onnxruntime-cpu", threads=1) as opened:
        yield opened


def test_switches_that_change_no_picture_are_taken_with_a_note(
    pipe: Pipeline, caplog: pytest.LogCaptureFixture
) -> None:
    stranger: Any = pipe
    with caplog.at_level(logging.INFO, logger="latentrt"):
        stranger.enable_model_cpu_offload()
        stranger.enable_sequential_cpu_offload(gpu_id=0)
        stranger.enable_vae_tiling()
        stranger.enable_xformers_memory_efficient_attention()
        stranger.maybe_free_model_hooks()
        stranger.unload_lora_weights()
    assert len(caplog.records) == 6 and "low_memory=True" in caplog.records[0].message
    assert stranger.vae_scale_factor == pipe.bundle.manifest.latent.downscale and stranger.safety_checker is None


def test_tensors_come_from_where_they_are_and_go_back(pipe: Pipeline) -> None:
    """A subclass stands for a GPU's tensor, which numpy cannot read."""

    class Elsewhere(torch.Tensor):
        def __array__(self, *_: Any, **__: Any) -> Any:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")

        def cpu(self, *_: Any, **__: Any) -> torch.Tensor:
            return self.as_subclass(torch.Tensor)

    handle: Any = pipe.text_encoder
    ids = pipe.tokenizer("a star", padding="max_length", padding_side="right", return_tensors="pt").input_ids
    states = handle(ids.as_subclass(Elsewhere), torch.ones_like(ids).as_subclass(Elsewhere), return_dict=True)[0]
    assert torch.equal(states, handle(ids, position_ids=None, output_attentions=False)[0])
    assert states.device == ids.device


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda pipe: pipe.load_lora_weights("lora"), "merge the LoRA"),
        (lambda pipe: pipe.components, "use it itself, or from_pipe"),
        (lambda pipe: pipe.unet, "export another"),
        (lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6), "fixed at export"),
        (lambda pipe: setattr(pipe, "safety_checker", print), "safety_checker cannot be set"),
        (lambda pipe: Pipeline.from_pipe(pipe, unet=1), "unet is given"),
        (lambda pipe: Pipeline.from_pipe(object()), "from_pipe was given a object: give a latentrt pipeline"),
        (lambda pipe: pipe.tokenizer("a", padding_side="left"), "padding_side is given: the bundle's tokenizer has"),
        (lambda pipe: pipe.tokenizer("a", return_overflowing_tokens=True), "return_overflowing_tokens is given"),
        (
            lambda pipe: pipe.text_encoder(np.zeros((1, 77), int), position_ids=np.arange(77)),
            "position_ids is given: the bundle's text encoder has nothing that reads it",
        ),
        (lambda pipe: pipe.text_encoder(np.zeros((1, 77), int))[1], r"there is no \[1\]: there is last_hidden_state"),
        (lambda pipe: pipe.text_encoder(np.zeros((1, 5), int)), r"of shape \[1, 5\]: the text encoder takes \[n, 77\]"),
        (lambda pipe: pipe.text_encoder(np.zeros((1, 77), int), np.zeros((1, 77))), "DownweightMode.REMOVE"),
        (lambda pipe: pipe.text_encoder(np.zeros((1, 77), int), output_hidden_states=True), "hidden states"),
        (lambda pipe: pipe.tokenizer(["a", "a b"], return_tensors="np"), "padding='max_length'"),
        (lambda pipe: pipe.tokenizer("a", return_tensors="tf"), "return_tensors is 'tf'"),
        (lambda pipe: pipe.to("mps"), "cannot move to mps"),
    ],
)
def test_what_cannot_be_done_says_what_to_do_instead(pipe: Pipeline, use: Callable[[Any], Any], message: str) -> None:
    with pytest.raises((RequestError, AttributeError), match=message) as caught:
        use(pipe)
    assert "\n" not in str(caught.value)
