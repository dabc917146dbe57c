"""Whether the server lives, whether it takes requests, and what it is."""

from __future__ import annotations

import asyncio
from importlib import metadata
from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse, PlainTextResponse, Response

from ..service import Service
from .metrics import Metrics


def router(service: Service, metrics: Metrics) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(tags=["Server"])

    def said(healthy: bool) -> Response:
        status = 200 if healthy else 503
        return JSONResponse({"status": service.state}, status, headers={} if healthy else {"retry-after": "5"})

    not_now: dict[int | str, dict[str, Any]] = {503: {"description": "Not now."}}

    @routes.head("/health", include_in_schema=False)
    @routes.get("/health", responses=not_now)
    @routes.head("/v2/health/ready", include_in_schema=False)
    @routes.get("/v2/health/ready", responses=not_now)
    async def ready() -> Response:
        """Whether requests are taken: 503 while loading, draining or failed."""
        return said(service.state == "ready")

    @routes.head("/v2/health/live", include_in_schema=False)
    @routes.get("/v2/health/live", responses=not_now)
    async def live() -> Response:
        """Whether the process is any good: 503 once its device is lost."""
        return said(service.state != "failed")

    @routes.get("/version")
    async def version() -> dict[str, Any]:
        """Say which release this is, and which bundles it serves."""
        bundles = {model.name: model.digest for model in service.models}
        return {"name": "latentrt", "version": metadata.version("latentrt"), "bundles": bundles}

    @routes.get("/metrics", response_class=PlainTextResponse)
    async def read() -> Response:
        """Return the metrics as Prometheus reads them."""
        text = await asyncio.get_running_loop().run_in_executor(None, metrics.text)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    return routes
