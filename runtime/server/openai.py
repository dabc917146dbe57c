"""OpenAI's Images API: /v1/images/generations, /v1/images/edits, /v1/models."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ..service import Job, Model, Service
from .body import described, read_body
from .errors import RESPONSES, api_error
from .schema import Edit, Generation
from .sse import STREAM, stream_of
from .watch import ClientGoneError, Events, Workers, unless_gone

ANSWERS: dict[int | str, dict[str, Any]] = {200: {"content": STREAM}}


def router(service: Service, workers: Workers, heartbeat: float) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(tags=["OpenAI"], responses=RESPONSES)

    async def answer(request: Request, schema: type[Generation]) -> Response:
        service.check_ready()
        body, work, ignored, _ = await read_body(request, schema, workers)
        job = await workers.run(lambda: service.submit(work, steps=bool(body.stream)))
        request.scope["state"] |= {"job": job.id, "model": job.model}
        if body.stream:
            return await stream_of(request, job, ignored, heartbeat)
        return await whole(request, job, ignored)

    @routes.post("/v1/images/generations", responses=ANSWERS, openapi_extra=described(Generation))
    async def generations(request: Request) -> Response:
        """Draw pictures of a prompt."""
        return await answer(request, Generation)

    @routes.post("/v1/images/edits", responses=ANSWERS, openapi_extra=described(Edit, form=True))
    async def edits(request: Request) -> Response:
        """Draw pictures that start from one, or repaint a part of it."""
        return await answer(request, Edit)

    @routes.get("/v1/models")
    async def models() -> dict[str, Any]:
        """List the bundles that are served."""
        return {"object": "list", "data": [model_said(model) for model in service.models]}

    @routes.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """Say what a bundle can do: sizes, samplers, limits, defaults."""
        return model_said(service.models.find(name)) | capabilities(service, service.models.find(name))

    return routes


async def whole(request: Request, job: Job, ignored: list[str]) -> Response:
    """Return the answer to a request that is not streamed, once it is there; a client that goes away cancels it."""
    with Events(job) as events:
        try:
            ended = await unless_gone(request, asyncio.ensure_future(events.until_over()))
        except (ClientGoneError, asyncio.CancelledError):
            job.cancel()
            raise
    if ended.error is not None:
        raise api_error(ended.error)
    return Response(rendered(job, ignored), media_type="application/json", headers={"x-job-id": job.id})


def rendered(job: Job, ignored: Iterable[str] = (), *, request_id: str | None = None) -> bytes:
    """Return OpenAI's answer with ours on top. Base64 is put in as it is: an encoder would look at each letter."""
    pictures = [picture_said(job, index) for index in sorted(job.pictures)]
    rest = json.dumps(said_with(job, job.facts) | {"ignored": list(ignored)}, ensure_ascii=False)
    head = f'{{"created":{int(job.created)},"data":['
    return b"".join([head.encode(), b",".join(pictures), b"],", rest[1:].encode()])


def picture_said(job: Job, index: int) -> bytes:
    """Return one picture of an answer."""
    picture = job.pictures[index]
    rest = json.dumps({"seed": picture.seed, "index": index, "encode_seconds": round(picture.encode_seconds, 6)})
    return b'{"b64_json":"' + picture.text.encode() + b'",' + rest[1:].encode()


def said_with(job: Job, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an answer says beside its pictures; `facts` are those of the job, once it is over."""
    output = job.work.output
    return {
        "id": job.id,
        "model": job.model,
        "size": "{}x{}".format(*job.size),
        "output_format": output.format,
        "background": "opaque",
        "request_id": job.work.request_id,
        **facts,
    }


def model_said(model: Model) -> dict[str, Any]:
    """Return OpenAI's object of a model, and whether it is open."""
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "latentrt",
        "state": model.state,
        "bundle": model.digest,
    }


def capabilities(service: Service, model: Model) -> dict[str, Any]:
    """Return what a request to a model may ask for, and what it gets that names nothing."""
    from ..sampling.registry import describe

    manifest, limits = model.manifest, service.limits
    latent, allowed = manifest.latent, model.allowed
    pictures = model.bundle.has_graph("image_encoder")
    return {
        "family": manifest.family,
        "precision": manifest.precision,
        "tasks": [
            *(["text-to-image"] if manifest.masked_input is None else []),
            *(["image-to-image"] if pictures and manifest.masked_input is None else []),
            *(["inpainting"] if pictures else []),
        ],
        "sizes": ["{}x{}".format(*size) for size in model.sizes],
        "other_sizes": allowed is None,
        "size_multiple": latent.size_multiple,
        "max_pixels": model.most_pixels,
        "defaults": {
            "size": f"{latent.default_width}x{latent.default_height}",
            "num_inference_steps": manifest.default_num_inference_steps,
            "guidance_scale": manifest.default_guidance_scale,
            "strength": manifest.default_strength,
            "sampler": manifest.scheduler.get("_class_name"),
        },
        "samplers": [sampler.name for sampler in describe()],
        "spacings": {sampler.name: list(sampler.suffixes) for sampler in describe() if sampler.suffixes},
        "limits": {
            "n": limits.images,
            "num_inference_steps": limits.steps,
            "prompt_characters": limits.prompt,
            "megapixel_steps": limits.work,
            "partial_images": limits.previews,
            "timeout_seconds": limits.timeout,
        },
    }
