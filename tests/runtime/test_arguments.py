"""Every argument of diffusers' three pipelines gives diffusers' picture, or is refused with its reason."""

from __future__ import annotations

import gc
import inspect
import warnings
import weakref
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from latentrt.engines.bundle import GuidanceInfo, LatentInfo
from latentrt.engines.errors import RequestError
from latentrt.runtime import Batcher, Bundle, GenerationRequest, Pipeline, batches
from latentrt.runtime.arguments import READ_BY_SOME, REFUSED, REFUSED_BY_SOME, SERVED, read_by
from latentrt.runtime.call import legacy_callback
from latentrt.runtime.loop.inputs import Draws, draw_together
from latentrt.runtime.sampling import step_table
from latentrt.runtime.sizes import check_size
from PIL import Image

PROMPTS = ["a red circle on a blue background", "a small star"]
CLASSES = {
    "text": "StableDiffusionPipeline",
    "image": "StableDiffusionImg2ImgPipeline",
    "inpaint": "StableDiffusionInpaintPipeline",
}
QUICK: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "np"}
SIZE = {"height": 64, "width": 64}


@pytest.fixture(scope="module")
def theirs(tiny_sd15_checkpoint: Path) -> Iterator[dict[str, Any]]:
    """diffusers' three pipelines over one checkpoint."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text = diffusers.StableDiffusionPipeline.from_pretrained(tiny_sd15_checkpoint, safety_checker=None)
        made = {t: getattr(diffusers, c)(**text.components, requires_safety_checker=False) for t, c in CLASSES.items()}
        for pipe in made.values():
            pipe.set_progress_bar_config(disable=True)
        yield made


@pytest.fixture(scope="module")
def ours(tiny_sd15_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.open(tiny_sd15_bundle, "onnxruntime-cpu", threads=1) as pipe:
        yield pipe


@pytest.fixture(autouse=True)
def own_schedulers(theirs: dict[str, Any], ours: Pipeline) -> Iterator[None]:
    """Bring the checkpoint's own scheduler back after each test."""
    own, mine = theirs["text"].scheduler, ours.scheduler
    yield
    use(theirs, own)
    ours.scheduler = mine


def use(theirs: dict[str, Any], scheduler: Any) -> None:
    for pipe in theirs.values():
        pipe.scheduler = scheduler


def generator(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(shift: int = 0) -> Image.Image:
    y, x = np.mgrid[:64, :64] * 4
    return Image.fromarray(np.roll(np.stack([x, y, 255 - x], -1), shift, axis=1).astype(np.uint8))


def mask(left: int = 8, size: tuple[int, int] = (64, 64)) -> Image.Image:
    array = np.zeros(size[::-1], np.uint8)
    array[16:48, left : left + 32] = 255
    return Image.fromarray(array)


def pixels(images: Any) -> np.ndarray:
    return np.stack([np.asarray(each, float) if isinstance(each, Image.Image) else each * 255 for each in images])


def assert_same(theirs: dict[str, Any], ours: Pipeline, task: str, **arguments: Any) -> np.ndarray:
    """Draw with both, generators anew for each, and compare to 2 of 255; return ours."""

    def made(value: Any) -> Any:
        return value() if callable(value) and value.__name__ in ("<lambda>", "generator") else value

    arguments = {**QUICK, **({} if task == "image" else SIZE), **arguments}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = pixels(theirs[task](**{name: made(value) for name, value in arguments.items()}).images)
    got = pixels(ours(**{name: made(value) for name, value in arguments.items()}).images)
    assert got.shape == wanted.shape
    assert np.abs(got - wanted).max() <= 2
    return got


def embeddings(theirs: dict[str, Any], *texts: str) -> Any:
    with torch.no_grad():
        return theirs["text"].encode_prompt(list(texts), "cpu", 1, False)[0]


@pytest.mark.parametrize("task", list(CLASSES))
def test_every_argument_of_diffusers_is_served_or_refused(task: str) -> None:
    parameters = inspect.signature(getattr(diffusers, CLASSES[task]).__call__).parameters
    older = {"callback", "callback_steps"}  # inside diffusers' **kwargs
    known = {name for name, argument in (SERVED | REFUSED).items() if task in argument.tasks}
    assert known - older == set(parameters) - {"self", "kwargs"}
    assert not set(SERVED) & set(REFUSED)
    assert set(SERVED) <= set(inspect.signature(Pipeline.__call__).parameters)


FAMILIES = {
    "text": (
        "StableDiffusionXL",
        "StableDiffusion3",
        "Flux",
        "Flux2Klein",
        "Flux2",
        "ZImage",
        "LatentConsistencyModel",
    ),
    "image": ("StableDiffusionXL", "StableDiffusion3", "Flux", "ZImage"),
    "inpaint": ("StableDiffusionXL", "StableDiffusion3", "Flux", "Flux2Klein", "ZImage"),
}
SUFFIX = {"text": "Pipeline", "image": "Img2ImgPipeline", "inpaint": "InpaintPipeline"}
CALLS = {
    f"{name}{SUFFIX[task]}": (task, getattr(diffusers, f"{name}{SUFFIX[task]}").__call__)
    for task, names in FAMILIES.items()
    for name in names
}


@pytest.mark.parametrize("name", CALLS)
def test_every_argument_of_other_families_is_served_or_refused(ours: Pipeline, name: str) -> None:
    task, call = CALLS[name]
    parameters = inspect.signature(call).parameters
    tables = SERVED | READ_BY_SOME | REFUSED | REFUSED_BY_SOME
    assert set(parameters) - {"self", "kwargs"} <= set(tables)
    for argument in set(parameters) & set(REFUSED_BY_SOME):
        assert task in REFUSED_BY_SOME[argument].tasks or task == "image"
        with pytest.raises(RequestError, match=rf"^{argument} is not supported: \w") as caught:
            ours(PROMPTS[0], **{argument: "3"})
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_what_asks_for_nothing_of_other_families_is_taken(ours: Pipeline) -> None:
    idle = {name: argument.idle[-1] for name, argument in REFUSED_BY_SOME.items() if argument.idle}
    longest = ours.bundle.manifest.tokenizers[0].max_length
    ours(PROMPTS[0], **SIZE, num_inference_steps=1, **idle | {"max_sequence_length": longest})
    with pytest.raises(RequestError, match=f"prompts of this bundle have {longest} tokens, and no other"):
        ours(PROMPTS[0], max_sequence_length=longest + 1)


@pytest.mark.parametrize(
    ("name", "lengths", "rows"),
    [
        ("FluxPipeline", (77, 512), 512),
        ("StableDiffusion3Pipeline", (77, 77, 256), 77 + 256),
        ("StableDiffusion3Pipeline", (77, 77), 77 + 256),  # zeros stand for a T5 that is left out
        ("ZImagePipeline", (512,), "L"),
        ("Flux2KleinPipeline", (512,), 512),
    ],
)
def test_the_length_of_prompts_is_the_one_that_diffusers_means(
    ours: Pipeline, name: str, lengths: tuple[int, ...], rows: int | str
) -> None:
    manifest = ours.bundle.manifest
    info, context = manifest.tokenizers[0], manifest.graphs[0].outputs[0]
    longer = context.model_copy(update={"shape": ("R", rows, 32)})
    graphs = [
        graph.model_copy(
            update={
                side: tuple(longer if spec.name == context.name else spec for spec in getattr(graph, side))
                for side in ("inputs", "outputs")
            }
        )
        for graph in manifest.graphs
    ]
    tokenizers = tuple(info.model_copy(update={"max_length": length}) for length in lengths)
    manifest = manifest.model_copy(update={"graphs": tuple(graphs), "tokenizers": tokenizers})
    meant = inspect.signature(getattr(diffusers, name).__call__).parameters["max_sequence_length"].default
    assert read_by(manifest, {"max_sequence_length": meant}) == {}
    for other in {77, 128, 512, 256} - {meant}:
        with pytest.raises(RequestError, match=f"prompts of this bundle have {meant} tokens, and no other"):
            read_by(manifest, {"max_sequence_length": other})


@pytest.mark.parametrize("name", [*REFUSED, "callback_on_step_end_tensor_inputs", "output_type"])
def test_what_is_refused_says_why_and_its_default_is_taken(ours: Pipeline, name: str) -> None:
    values = {"callback_on_step_end_tensor_inputs": ["prompt_embeds"], "output_type": "pt", "guidance_rescale": 0.7}
    with pytest.raises(RequestError, match=rf"^{name} (is|has) .*: \w"):
        ours(PROMPTS[0], **{name: values.get(name, 2)})
    if name in REFUSED:
        default = next(
            each.parameters[name].default
            for each in (inspect.signature(getattr(diffusers, c).__call__) for c in CLASSES.values())
            if name in each.parameters
        )
        ours(PROMPTS[0], **SIZE, num_inference_steps=1, **{name: default})


def test_a_name_that_is_no_argument_is_a_type_error(ours: Pipeline) -> None:
    with pytest.raises(TypeError, match="no argument 'promt'"):
        ours(PROMPTS[0], promt="x")  # type: ignore[call-overload]


@pytest.mark.parametrize("task", list(CLASSES))
def test_one_generator_draws_for_the_whole_batch_and_goes_on(
    theirs: dict[str, Any], ours: Pipeline, tiny_sd15_bundle: Path, task: str
) -> None:
    extra = {} if task == "text" else {"image": picture(), "strength": 0.7}
    extra |= {"mask_image": mask()} if task == "inpaint" else {}
    size = {} if task == "image" else SIZE
    arguments = {**QUICK, **size, **extra, "prompt": [*PROMPTS, PROMPTS[0]], "guidance_scale": 1.0}
    use(theirs, diffusers.EulerAncestralDiscreteScheduler.from_config(theirs["text"].scheduler.config))
    one, other = generator(), generator()
    with warnings.catch_warnings(), Pipeline.open(tiny_sd15_bundle, "onnxruntime-cpu", threads=1, max_batch=2) as small:
        warnings.simplefilter("ignore")
        for _ in range(2):  # the second time from where the first one stopped
            wanted = theirs[task](**arguments, generator=one).images
            got = small(**arguments, generator=other, sampler="euler_a").images
            assert np.abs(got - wanted).max() * 255 <= 2
    assert torch.equal(one.get_state(), other.get_state())


def test_a_generator_or_a_seed_for_each_image(theirs: dict[str, Any], ours: Pipeline) -> None:
    got = assert_same(
        theirs, ours, "text", prompt=PROMPTS[0], num_images_per_prompt=2, generator=lambda: [generator(7), generator(3)]
    )
    for given in ({"seed": [7, 3]}, {"generator": [7, 3]}):
        result = ours(PROMPTS[0], num_images_per_prompt=2, **QUICK, **SIZE, **given)
        assert np.array_equal(result.images * 255, got) and result.seeds == [7, 3]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"generator": [torch.Generator()]}, "generator is a list of 1: give one for each of the 2 images"),
        ({"generator": "7"}, r"generator is a builtins.str: give a torch.Generator"),
        ({"generator": 7, "seed": 7}, "seed and generator are given"),
        ({"seed": [1, 2, 3]}, "seed is a list of 3: give one seed, or one for each of the 2 images"),
        (
            {"latents": np.zeros((1, 4, 8, 8), np.float32)},
            r"latents is of shape \[1, 4, 8, 8\]: this request takes \[2,",
        ),
        ({"latents": np.full((2, 4, 8, 8), np.nan)}, "latents holds numbers that are not finite"),
        ({"latents": np.zeros((2, 4, 8, 8)), "image": picture()}, "latents and image are given"),
        ({"timesteps": [1], "sigmas": [1]}, "timesteps and sigmas are given"),
        ({"prompt_embeds": np.zeros((2, 77, 32))}, "prompt and prompt_embeds are given"),
        ({"image": [picture()] * 3}, "image is 3 pictures: give one, or one for each of the 2 images"),
        ({"image": []}, "image is an empty list"),
        ({"image": picture(), "padding_mask_crop": 4}, "padding_mask_crop is for one picture with one mask_image"),
        ({"callback_steps": 0, "callback": print}, "callback_steps is 0"),
        ({"callback_on_step_end": 5}, "callback_on_step_end is 5: give a function, or leave it out"),
        ({"callback": "x"}, "callback is 'x': give a function"),
        ({"on_batch": [print]}, "on_batch is .*: give a function"),
        ({"progress": True}, "progress is True: give a function"),
        ({"callback_on_step_end_tensor_inputs": 5}, "callback_on_step_end_tensor_inputs has 5: give"),
    ],
    ids=str,
)
def test_what_cannot_be_served_is_named(ours: Pipeline, given: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        ours(PROMPTS, **{**SIZE, **given})


def test_a_picture_has_a_budget_of_pixels() -> None:
    latent = LatentInfo(channels=4, downscale=8, size_multiple=8, default_height=512, default_width=512)
    check_size(4096, 4096, latent)
    with pytest.raises(RequestError, match="the picture is 8192x4096, 34 Mpixels: at most 17"):
        check_size(8192, 4096, latent)


def test_embeddings_stand_in_place_of_prompts(theirs: dict[str, Any], ours: Pipeline) -> None:
    both, negative = embeddings(theirs, *PROMPTS), embeddings(theirs, "gray", "dark")
    seeds = {"generator": lambda: [generator(1), generator(2)]}
    got = assert_same(theirs, ours, "text", prompt_embeds=both, negative_prompt_embeds=negative, **seeds)
    assert_same(theirs, ours, "image", prompt_embeds=both, image=picture(), **seeds)  # "" against
    assert_same(theirs, ours, "text", prompt=PROMPTS, negative_prompt_embeds=negative, **seeds)
    assert_same(theirs, ours, "text", prompt_embeds=both, guidance_scale=1.0, **seeds)
    for kind in (np.asarray(both, np.float64), both.double(), both.clone().requires_grad_()):
        again = ours(prompt_embeds=kind, negative_prompt_embeds=negative, seed=1, **QUICK, **SIZE).images
        assert np.array_equal(again * 255, got)
    assert ours(prompt_embeds=both.bfloat16(), seed=1, **QUICK, **SIZE).images.shape == got.shape
    with pytest.raises(RequestError, match=r"of shape \[2, 77, 5\]: this bundle takes \[prompts, \w+, \d+\]"):
        ours(prompt_embeds=both[..., :5])
    with pytest.raises(RequestError, match="give one shape"):
        ours(prompt_embeds=both, negative_prompt_embeds=negative[:1])
    with pytest.raises(RequestError, match="prompt is None"):
        ours()


@pytest.mark.parametrize(
    "options", [{"mode": "request"}, {"mode": "loop"}, {"low_memory": True}, {"max_batch": 1}], ids=str
)
def test_embeddings_are_captured_and_opened_as_prompts_are(
    theirs: dict[str, Any], ours: Pipeline, tiny_sd15_bundle: Path, options: dict[str, Any]
) -> None:
    both = embeddings(theirs, *PROMPTS)
    requests = [
        {"prompt_embeds": both},
        {"prompt": PROMPTS},
        {"prompt_embeds": both.flip(0), "negative_prompt": "gray"},
    ]
    wanted = [ours(seed=1, **QUICK, **SIZE, **request).images for request in requests]
    with Pipeline.open(tiny_sd15_bundle, "onnxruntime-cpu", threads=1, **options) as other:
        for request, images in list(zip(requests, wanted, strict=True)) * (3 if "mode" in options else 1):
            got = other(seed=1, **QUICK, **SIZE, **request).images
            assert np.abs(got - images).max() <= 1 / 255


def test_latents_timesteps_and_sigmas_of_the_caller(theirs: dict[str, Any], ours: Pipeline) -> None:
    latents = torch.randn(ours(PROMPTS[0], **{**QUICK, **SIZE, "output_type": "latent"}).images.shape)
    inpaint = {"image": picture(), "mask_image": mask()}
    for sampler in ("EulerAncestralDiscreteScheduler", "DDIMScheduler"):
        scheduler = getattr(diffusers, sampler).from_config(theirs["text"].scheduler.config)
        use(theirs, scheduler)
        ours.scheduler = scheduler
        given = {"prompt": PROMPTS[0], "latents": latents, "generator": generator}
        assert_same(theirs, ours, "text", **given)
        assert_same(theirs, ours, "inpaint", strength=0.7, **inpaint, **given)
    use(theirs, diffusers.EulerDiscreteScheduler.from_config(theirs["text"].scheduler.config))
    ours.scheduler = theirs["text"].scheduler
    for custom in ({"timesteps": [999, 500, 100, 20]}, {"sigmas": [14.0, 5.0, 1.0, 0.0]}):
        assert_same(theirs, ours, "text", prompt=PROMPTS[0], generator=generator, **custom)
    assert_same(
        theirs,
        ours,
        "image",
        prompt=PROMPTS[0],
        image=picture(),
        strength=0.5,
        generator=generator,
        timesteps=[999, 500, 100, 20],
    )


def test_a_picture_and_a_mask_for_each_image(theirs: dict[str, Any], ours: Pipeline) -> None:
    lists = {"prompt": PROMPTS, "image": [picture(), picture(20)], "strength": 0.7}
    for noise in (lambda: [generator(1), generator(2)], lambda: generator(5)):
        assert_same(theirs, ours, "image", generator=noise, **lists)
        assert_same(theirs, ours, "inpaint", generator=noise, mask_image=[mask(), mask(24)], **lists)


@pytest.mark.parametrize(
    ("size", "left", "padding"),
    [((64, 64), 0, 0), ((64, 128), 40, 30), ((128, 64), 90, 30), ((64, 64), 90, 0)],
    ids=str,
)
def test_the_part_around_the_mask_is_drawn_and_put_back(
    theirs: dict[str, Any], ours: Pipeline, size: tuple[int, int], left: int, padding: int
) -> None:
    whole = picture().resize((120, 80))
    assert_same(
        theirs,
        ours,
        "inpaint",
        prompt=PROMPTS[0],
        image=whole,
        mask_image=mask(left, whole.size),
        padding_mask_crop=padding,
        generator=generator,
        output_type="pil",
        num_inference_steps=1,
        height=size[1],
        width=size[0],
    )


@pytest.mark.parametrize("sampler", ["PNDMScheduler", "HeunDiscreteScheduler", "DDIMScheduler"])
def test_callbacks_are_called_as_diffusers_calls_them(theirs: dict[str, Any], ours: Pipeline, sampler: str) -> None:
    use(theirs, getattr(diffusers, sampler).from_config(theirs["text"].scheduler.config))
    for task, extra in (("text", SIZE), ("image", {"image": picture(), "strength": 0.6})):
        seen: dict[str, list[Any]] = {}
        for name, pipe in (("theirs", theirs[task]), ("ours", ours)):
            heard = seen[name] = []

            def at_end(pipe: Any, step: int, timestep: Any, values: dict[str, Any], heard: list[Any] = heard) -> Any:
                state = (pipe.num_timesteps, pipe.guidance_scale, pipe.do_classifier_free_guidance, pipe.interrupt)
                heard.append(("end", step, float(timestep), list(values), *state))
                return values

            def older(step: int, timestep: Any, latents: Any, heard: list[Any] = heard) -> None:
                heard.append(("older", step, float(timestep), tuple(latents.shape)))

            arguments = {**QUICK, **extra, "num_inference_steps": 5, "callback": older, "callback_steps": 2}
            arguments |= {"sampler": sampler} if name == "ours" else {}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                pipe(PROMPTS[0], generator=generator(), callback_on_step_end=at_end, **arguments)
        assert seen["ours"] == seen["theirs"] and len(seen["ours"]) >= 4


def test_negative_embeddings_guide_where_a_negative_prompt_must_be_given(
    theirs: dict[str, Any], ours: Pipeline
) -> None:
    """As in diffusers' FluxPipeline, whose rule this bundle gets here."""
    rule = GuidanceInfo(scale="true_cfg_scale", needs_negative=True)
    bundle = Bundle(ours.bundle.path, ours.bundle.manifest.model_copy(update={"guidance": rule}))
    given: dict[str, Any] = {"prompt_embeds": embeddings(theirs, "a star")}
    given["negative_prompt_embeds"] = embeddings(theirs, "dark")
    given |= {"num_inference_steps": 2, "output_type": "latent", **SIZE}
    wanted = theirs["text"](**given, guidance_scale=4.0, generator=generator(1)).images.numpy()
    with Pipeline(bundle, ours.backend) as pipe, Batcher(pipe, slots=1) as batcher:
        request = {**given, "true_cfg_scale": 4.0, "seed": 1}
        for found in (pipe(**request), batcher.submit(**request).result(60)):
            np.testing.assert_allclose(found.images, wanted, atol=1e-4)


def test_what_a_generator_has_drawn_goes_with_its_request(ours: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[weakref.ref[Draws]] = []

    def noted(*arguments: Any) -> Draws:
        found = draw_together(*arguments)
        drawn.append(weakref.ref(found))
        return found

    def fail(request: Any, first: int, images: Any) -> None:
        assert drawn[-1]() is not None
        raise RuntimeError("enough")

    monkeypatch.setattr(batches, "draw_together", noted)
    request = {**SIZE, "num_inference_steps": 2, "num_images_per_prompt": 3, "sampler": "euler_a"}
    ours(PROMPTS, generator=generator(), **request)  # in two batches
    with suppress(RuntimeError):
        ours(PROMPTS, generator=generator(), on_batch=fail, **request)
    gc.collect()
    assert [each() for each in drawn] == [None, None]


@pytest.mark.parametrize(("steps", "strength"), [(28, 0.6), (5, 0.5), (10, 0.85), (4, 1.0)])
def test_the_older_callback_sees_every_step_of_a_flow_from_a_picture(steps: int, strength: float) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    kind, stub = diffusers.FluxImg2ImgPipeline, SimpleNamespace(scheduler=scheduler)
    timesteps, left = kind.get_timesteps(stub, steps, strength, "cpu")
    warm_up = max(len(timesteps) - left * scheduler.order, 0)  # as in its loop
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    table = step_table(config, steps, strength=strength)
    assert len(table) == len(timesteps)
    heard: list[int] = []
    request = GenerationRequest.of(prompt="a star", num_inference_steps=steps, strength=strength)
    call = legacy_callback(lambda step, *_: heard.append(step), None, len(table), request, config)
    assert call is not None
    for index in range(len(table)):
        call(index, 0.0, None)
    assert heard == list(range(warm_up, len(timesteps)))


def test_an_interrupted_request_returns_what_there_is(theirs: dict[str, Any], ours: Pipeline) -> None:
    def interrupt(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step == 1
        return values

    def stop(pipe: Pipeline, step: int, timestep: Any, values: dict[str, Any]) -> None:
        if step == 1:
            pipe.stop()

    given = {"prompt": PROMPTS[0], "num_inference_steps": 6, "callback_on_step_end": interrupt}
    got = assert_same(theirs, ours, "text", generator=generator, **given)
    result = ours(**{**given, "callback_on_step_end": stop}, seed=7, **SIZE, output_type="np", guidance_scale=4.0)
    assert np.array_equal(result.images * 255, got) and result.timings.steps == 2
    whole = ours(PROMPTS[0], seed=7, **SIZE, **{**QUICK, "num_inference_steps": 6})
    assert whole.timings.steps >= 6 and not np.array_equal(whole.images * 255, got)


def test_what_a_callback_cannot_change_is_an_error(ours: Pipeline) -> None:
    def louder(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> None:
        pipe._guidance_scale = 9.0

    with pytest.raises(RequestError, match="changed _guidance_scale"):
        ours(PROMPTS[0], **QUICK, **SIZE, callback_on_step_end=louder)
    with pytest.raises(RequestError, match="'prompt_embeds': only latents"):
        ours(PROMPTS[0], **QUICK, **SIZE, callback_on_step_end=lambda *_: {"prompt_embeds": 1})


def test_a_result_is_read_by_number_slice_and_name_as_that_of_diffusers(ours: Pipeline) -> None:
    result = ours(PROMPTS[0], **QUICK, **SIZE)
    theirs = StableDiffusionPipelineOutput(images=result.images, nsfw_content_detected=None)
    assert list(result) == list(theirs) and ("images" in result) is ("images" in theirs)
    for key in ("images", 0, -1):
        assert result[key] is theirs[key] is result.images
    for cut in (slice(1), slice(None), slice(1, None), slice(0, 2)):
        assert len(result[cut]) == len(theirs[cut])
        assert all(mine is other for mine, other in zip(result[cut], theirs[cut], strict=True))
    for key in (2, "seeds"):
        for each in (result, theirs):
            with pytest.raises(LookupError):
                each[key]
    for each in (result, theirs):
        with pytest.raises(ValueError, match="not enough values to unpack"):
            _, _ = each
    assert result[1] is result["nsfw_content_detected"] is None


def test_without_return_dict_a_tuple_is_returned(theirs: dict[str, Any], ours: Pipeline) -> None:
    given = {"prompt": PROMPTS[0], "return_dict": False, **QUICK, **SIZE}
    images, flags = ours(**given, seed=7)
    wanted, their_flags = theirs["text"](**given, generator=generator())
    assert np.abs(images - wanted).max() * 255 <= 2 and flags is their_flags is None
