"""One call of a pipeline: what it asks for, checked and complete, before an engine runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..engines.bundle import Bundle, Manifest
from ..engines.errors import RequestError
from .arguments import check_tensor_inputs, read_by
from .callbacks import LegacyCallback
from .loop.decoding import Decoding, decodings_of
from .loop.generators import Noise, noise_of
from .loop.inputs import Latents
from .pictures.initial import Pictures, load_pictures
from .prompt.embeddings import Embeddings, embeddings_of, float_array
from .request import GenerationRequest, short
from .result import GenerationResult, Timings
from .sampling.registry import evaluations_of_a_step, first_step
from .sampling.resolve import resolved
from .sampling.step_table import Guided, StepTable

OutputType = Literal["pil", "np", "latent"]

SET_ELSEWHERE = ("prompt", "strength", "seed")
"""Fields of a request that follow from more than the argument of their name."""
FIELDS = tuple(name for name in GenerationRequest.model_fields if name not in SET_ELSEWHERE)
"""Arguments that are fields of the request as they are."""


@dataclass(frozen=True)
class Call:
    """A request with everything that is no text or number: pictures, arrays, sources of noise."""

    request: GenerationRequest
    pictures: Pictures | None
    noise: Noise
    latents: Latents | None
    """The first noise of all images [n, C, h, w], or None to draw it."""
    embeddings: Embeddings | None
    output_type: OutputType
    decodings: tuple[Decoding, ...]
    """How its latents become pictures: the first that there are engines for."""
    started: bool = False
    """Whether the latents are those of a run half-way, which are taken as they are."""
    guided: bool = True
    """Whether predictions of several branches become one."""

    @classmethod
    def of(cls, bundle: Bundle, manifest: Manifest, given: Mapping[str, Any]) -> Call:
        """Return the call of some arguments; `manifest` has the defaults. Raises `RequestError`."""
        given = {**given, **read_by(manifest, given["others"])}
        output_type = given["output_type"]
        if output_type not in get_args(OutputType):
            why = "; pt needs PyTorch, which torch.from_numpy makes of np" if output_type == "pt" else ""
            raise RequestError(f"output_type is {output_type!r}: choose pil, np or latent{why}")
        for name in ("callback_on_step_end", "callback", "on_batch", "progress"):
            check_function(name, given[name])
        check_tensor_inputs(given["callback_on_step_end_tensor_inputs"])
        check_tensor_inputs(getattr(given["callback_on_step_end"], "tensor_inputs", ()))
        if started := given.get("denoising_start") is not None:
            given = {**given, "image": None, "latents": _half_way(given)}
        pictures = load_pictures(given["image"], given["mask_image"], given["strength"], given["padding_mask_crop"])
        if pictures and pictures.padding is not None and output_type != "pil":
            raise RequestError(f"output_type is {output_type!r}: padding_mask_crop pastes into a picture, give pil")
        if pictures and not bundle.has_graph("image_encoder"):
            raise RequestError(f"bundle {bundle.path} has no image_encoder: it cannot start from a picture")
        if manifest.masked_input is not None and not (pictures and pictures.masks):
            raise RequestError(f"bundle {bundle.path} is for inpainting alone: give image and mask_image")
        embeddings = embeddings_of(bundle, given)
        if embeddings is not None and given["prompt_syntax"] is not None:
            raise RequestError("prompt_syntax and embeddings of a prompt are given: give texts alone, or no syntax")
        latents = None if given["latents"] is None else float_array(given["latents"], "latents")
        request = _request(manifest, given, pictures, embeddings, latents)
        if pictures:
            pictures.check(len(request.images))
        if latents is not None:
            _check_latents(latents, request, manifest, pictures)
        generator = given["generator"]
        if generator is None or _is_seed(generator):
            noise = Noise(tuple(seed for *_, seed in request.images))
        else:
            noise = noise_of(generator, len(request.images))
            seeds = noise.seeds * (len(request.images) if noise.shared else 1)
            request = GenerationRequest.of(**{**request.model_dump(), "seed": tuple(seeds)})
        guided = len(request.weights(manifest.guidance)) > 1
        cells = [(side or 0) // manifest.latent.downscale for side in (request.height, request.width)]
        decodings = decodings_of(bundle, request.decoder, request.tiled, cells)
        return cls(request, pictures, noise, latents, embeddings, output_type, decodings, started, guided)

    def result(
        self,
        asked: tuple[int | None, int | None],
        takes_eta: bool,
        multiple: int,
        table: StepTable,
        *,
        logged: bool = False,
    ) -> GenerationResult[Any]:
        """Return an empty result, with what to know about the request; `asked` are the caller's width and height.

        With `logged` its warnings are logged as well.
        """
        request, pictures = self.request, self.pictures
        seeds = [seed for *_, seed in request.images]
        finished: GenerationResult[Any] = GenerationResult([], seeds, Timings(), request=request, logged=logged)
        if pictures is not None and pictures.padding is None:
            size, drawn = pictures.size, (request.width, request.height)
            if any(given is None and own != to for given, own, to in zip(asked, size, drawn, strict=True)):
                finished.warn(
                    f"the initial picture is {size[0]}x{size[1]}: it is resized to "
                    f"{request.width}x{request.height}, multiples of {multiple}"
                )
        if request.eta and not takes_eta:
            finished.warn(f"eta is {request.eta:g}: sampler {request.sampler} has no such option, it is not used")
        in_part = request.guidance_interval is not None or request.guidance_reuse is not None
        if in_part and not self.guided:
            finished.warn("guidance_interval or guidance_reuse is given without guidance: it changes nothing")
        elif table.guided and {*table.guided} == {Guided.NOT}:
            first, last = request.guidance_interval or (0.0, 1.0)
            part = f"guidance_interval {first:g} to {last:g} holds none of {len(table)} evaluations"
            finished.warn(f"{part}: nothing is guided, and a negative prompt changes nothing")
        if request.skip_guidance_layers and not table.skips:
            finished.warn("skip_guidance_layers is given, and no step is guided by it: it changes nothing")
        if request.tiled and self.decodings[0].tile is None:
            finished.warn(f"tiled is given: {request.width}x{request.height} fits in one tile, it changes nothing")
        return finished


def _request(
    manifest: Manifest,
    given: Mapping[str, Any],
    pictures: Pictures | None,
    embeddings: Embeddings | None,
    latents: Latents | None,
) -> GenerationRequest:
    """Return the complete request of a call."""
    fields = {name: given[name] for name in FIELDS if name in given}
    fields["prompt"], strength = given["prompt"], given["strength"]
    if embeddings is not None and embeddings.prompt:
        fields["prompt"] = ("",) * len(next(iter(embeddings.prompt.values())))
    if embeddings is not None and embeddings.negative:  # as in diffusers, that is a negative prompt, too
        fields["negative_prompt"] = ("",)
    fields["strength"] = strength if strength is not None else _default_strength(manifest, pictures)
    fields["seed"] = _seed(given["seed"], given["generator"])
    if latents is not None and latents.ndim == 4:
        for name, cells in (("height", latents.shape[2]), ("width", latents.shape[3])):
            fields[name] = cells * manifest.latent.downscale if fields[name] is None else fields[name]
    request = GenerationRequest.of(**fields)
    skipped = manifest.guidance.skipped
    if skipped is not None and {*(request.skip_guidance_layers or skipped.layers)} != {*skipped.layers}:
        asked, has = (",".join(map(str, each)) for each in (request.skip_guidance_layers or (), skipped.layers))
        raise RequestError(
            f"skip_guidance_layers is {asked}: this bundle skips {has}; give those, or export the checkpoint again "
            f"with --skip-layers {asked}"
        )
    if (length := request.max_sequence_length) is not None:  # there is a tokenizer that reads it
        longest = min(info.max_length for info in manifest.tokenizers if info.any_length)
        if length > longest:
            raise RequestError(f"max_sequence_length is {length}: this bundle takes {longest} at most")
    negatives = 0 if embeddings is None or not embeddings.negative else len(next(iter(embeddings.negative.values())))
    if negatives not in (0, len(request.prompt)):
        raise RequestError(
            f"negative_prompt_embeds is for {negatives} prompts, and there are {len(request.prompt)}: give one for each"
        )
    whole = pictures is not None and pictures.padding is None and latents is None
    size = pictures.size if pictures and whole else None
    from_picture = pictures is not None or request.denoising_start is not None  # whose pipeline is the same
    return request.with_defaults(manifest, size, from_picture=from_picture)


def _default_strength(manifest: Manifest, pictures: Pictures | None) -> float:
    if not pictures:
        return 1.0
    return manifest.default_inpainting_strength if pictures.masks else manifest.default_strength


def _half_way(given: Mapping[str, Any]) -> Any:
    """Return the latents that denoising_start goes on from, which diffusers' pipelines take as `image`."""
    if given["mask_image"] is not None or given["strength"] is not None or given["latents"] is not None:
        raise RequestError(
            "denoising_start is given: it goes on from image; leave mask_image, strength and latents out"
        )
    image = given["image"]
    if image is None or getattr(image, "ndim", 0) != 4 or getattr(image, "shape", (0, 0))[1] in (1, 3):
        raise RequestError(
            "denoising_start is given: give latents [images, C, h, w] as image, those of a request with denoising_end"
        )
    return image


def _is_seed(generator: Any) -> bool:
    """Tell whether `generator` is a seed or a list of seeds."""
    each = generator if isinstance(generator, list | tuple) else (generator,)
    return bool(each) and all(hasattr(seed, "__index__") for seed in each)


def _seed(seed: Any, generator: Any) -> Any:
    """Return what the request holds as its seed; raises `RequestError` when a generator is given beside one."""
    if generator is None:
        return seed
    if seed is not None:
        raise RequestError("seed and generator are given: give one of them")
    return generator if _is_seed(generator) else None


def _check_latents(latents: Latents, request: GenerationRequest, manifest: Manifest, pictures: Pictures | None) -> None:
    """Raise `RequestError` for latents that do not fit a request."""
    if pictures and not pictures.masks:
        raise RequestError(
            "latents and image are given: a picture's own latents are started from; leave one of them out"
        )
    latent = manifest.latent
    cells = ((request.height or 0) // latent.downscale, (request.width or 0) // latent.downscale)
    wanted = (len(request.images), latent.channels, *cells)
    if latents.shape != wanted:
        raise RequestError(f"latents is of shape {list(latents.shape)}: this request takes {list(wanted)}")


def check_function(name: str, value: Any) -> None:
    """Raise `RequestError` for an argument that is to be called, is given and cannot be."""
    if value is not None and not callable(value):
        raise RequestError(f"{name} is {short(value)}: give a function, or leave it out")


def calls_of_a_step(sampler: str | None, scheduler: Mapping[str, Any]) -> int:
    """Return how often a sampler asks the denoiser in a step of its own (diffusers' scheduler.order)."""
    return evaluations_of_a_step(resolved(scheduler, sampler)[0])


def legacy_callback(
    callback: LegacyCallback | None,
    every: Any,
    evaluations: int,
    request: GenerationRequest,
    scheduler: Mapping[str, Any],
) -> LegacyCallback | None:
    """Return a function that calls diffusers' older callback(step, timestep, latents) at the steps that are its own.

    `evaluations` are those of the denoiser in the run, of which a step of the sampler may take several.
    """
    if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
        raise RequestError(f"callback_steps is {every!r}: give a whole number, 1 or more")
    if callback is None:
        return None
    name, steps = resolved(scheduler, request.sampler)[0], request.num_inference_steps or 1
    calls = 1 if request.forecast else evaluations_of_a_step(name)
    left = steps - first_step(name, steps, request.strength)
    first = evaluations - left * calls  # where the sampler warms up

    def call(index: int, timestep: float, latents: Any) -> None:
        whole = index + 1 > first and (index + 1) % calls == 0
        if (whole or index == evaluations - 1) and index % (every or 1) == 0:
            callback(index // calls, timestep, latents)

    return call
