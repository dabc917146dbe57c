"""What there is to choose from: models, samplers, options; and lists that are empty here, which clients ask for."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from fastapi import APIRouter, Request
from pydantic import TypeAdapter

from ...engines.host import HostDevice
from ..server.body import context_of, read_json
from ..server.watch import Workers
from ..service import Service
from .samplers import listed, schedulers
from .settings import Board, title_of

EMPTY: dict[str, Any] = {
    "sd-vae": [],
    "loras": [],
    "hypernetworks": [],
    "face-restorers": [],
    "realesrgan-models": [],
    "prompt-styles": [],
    "latent-upscale-modes": [],
    "extensions": [],
    "script-info": [],
    "embeddings": {"loaded": {}, "skipped": {}},
    "scripts": {"txt2img": [], "img2img": []},
    "upscalers": [{"name": "None", "model_name": None, "model_path": None, "model_url": None, "scale": 1}],
    "cmd-flags": {"api": True, "nowebui": True},
}
"""What the web UI has and this server has not: clients ask when they connect."""


OPTIONS = TypeAdapter(dict[str, Any])
DESCRIBED = {"requestBody": {"required": True, "content": {"application/json": {"schema": OPTIONS.json_schema()}}}}
"""What OpenAPI says of a body that is read by hand."""


def add_listings(routes: APIRouter, service: Service, board: Board, workers: Workers) -> None:
    """Add the routes that list, and those of options."""

    @routes.get("/samplers")
    async def samplers() -> Any:
        """List the samplers."""
        return listed()

    @routes.get("/schedulers")
    async def spacings() -> Any:
        """List the ways to space sigmas."""
        return schedulers()

    @routes.get("/sd-models")
    async def models() -> Any:
        """List the bundles that are served."""
        return [
            {
                "title": title_of(model),
                "model_name": model.name,
                "hash": model.digest[:10],
                "sha256": model.digest,
                "filename": model.name,
                "config": None,
            }
            for model in service.models
        ]

    @routes.get("/options")
    async def options(request: Request) -> Any:
        """Say which model and which format the requests of this key get."""
        return board.settings(context_of(request)["owner"]).said(service.models)

    @routes.post("/options", openapi_extra=DESCRIBED)
    async def set_options(request: Request) -> None:
        """Choose the model of this key's requests, which is opened, the format of pictures, and whether to preview."""
        came = await request.body()
        given = await workers.run(lambda: read_json(OPTIONS.validate_json, came))
        owner = context_of(request)["owner"]
        settings = board.settings(owner).with_options(given, service.models)
        if given.get("sd_model_checkpoint") is not None:
            service.check_ready()
            await asyncio.wrap_future(service.models.opened(service.models.find(settings.model)))
        board.change(owner, given, service.models)  # others may have been set meanwhile

    @routes.post("/refresh-checkpoints")
    async def refresh() -> None:
        """Do nothing: bundles are named when the server starts."""

    @routes.get("/memory")
    async def memory() -> Any:
        """Say how much memory this process has in use, in bytes."""
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        used = HostDevice().bytes_taken()
        return {"ram": {"free": total - used, "used": used, "total": total}, "cuda": {"error": "see /metrics"}}

    def empty(name: str) -> None:
        async def answer() -> Any:
            return EMPTY[name]

        routes.add_api_route(f"/{name}", answer, methods=["GET"], summary="Nothing of this kind is here.")

    for name in EMPTY:
        empty(name)
