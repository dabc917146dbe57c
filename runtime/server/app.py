"""The application: routes over a service, with the guards in front of them."""

from __future__ import annotations

from importlib import metadata

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from .. import page, sdapi
from ..sdapi.errors import error_response
from ..service import Service
from . import health, jobs, openai
from .auth import Keys
from .context import Context
from .errors import ApiError, add_handlers
from .guard import Guard
from .metrics import Metrics
from .settings import HttpSettings
from .watch import Workers


def create_app(service: Service, settings: HttpSettings | None = None, metrics: Metrics | None = None) -> FastAPI:
    """Return an ASGI application that serves a service, which stays the caller's to open and to close.

    `metrics` are those that the service's models tell of their steps, without them only requests are counted.
    """
    settings, metrics = settings or HttpSettings(), metrics or Metrics()
    metrics.watch(service)
    workers = Workers(service)
    app = FastAPI(
        title="latentrt",
        version=metadata.version("latentrt"),
        description="Text to pictures: OpenAI's Images API with more fields, and jobs.",
        docs_url=None,  # its pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,  # every path is one
    )
    add_handlers(app)
    app.include_router(openai.router(service, workers, settings.heartbeat))
    app.include_router(jobs.router(service, workers, settings.heartbeat))
    app.include_router(sdapi.router(service, workers))
    app.include_router(page.router())
    app.include_router(health.router(service, metrics))
    app.add_middleware(Guard, settings=settings)
    app.add_middleware(Context, keys=Keys(settings.keys), note=metrics.answered, shape=_shape)
    if settings.cors_origins:  # around it all: a browser asks for leave without a key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "x-job-id", "retry-after"],
        )
    return app


def _shape(path: str, error: ApiError) -> Response:
    """Return the answer to a request that reached no route, as clients of its path read errors."""
    return error_response(error) if path.startswith("/sdapi/") else error.response()
