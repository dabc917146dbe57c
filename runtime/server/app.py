"""The application: routes over a service, with the guards in front of them."""

from __future__ import annotations

from importlib import metadata

from fastapi import FastAPI

from ..service import Service
from . import health, openai
from .auth import Keys
from .context import Context
from .errors import add_handlers
from .settings import HttpSettings
from .watch import Workers


def create_app(service: Service, settings: HttpSettings | None = None) -> FastAPI:
    """Return an ASGI application that serves a service, which stays the caller's to open and to close."""
    settings = settings or HttpSettings()
    workers = Workers()
    app = FastAPI(
        title="latentrt",
        version=metadata.version("latentrt"),
        description="Text to pictures: OpenAI's Images API with more fields, and jobs.",
        docs_url=None,  # its pages load scripts from elsewhere
        redoc_url=None,
    )
    add_handlers(app)
    app.include_router(openai.router(service, workers, settings.heartbeat))
    app.include_router(health.router(service))
    app.add_middleware(Context, keys=Keys(settings.keys), note=lambda *_: None)
    return app
