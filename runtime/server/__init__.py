"""The HTTP server: OpenAI's Images API with our fields on top, jobs, health and metrics over a `Service`."""

from .app import create_app
from .metrics import Metrics
from .settings import HttpSettings

__all__ = ["HttpSettings", "Metrics", "create_app"]
