"""The web API of AUTOMATIC1111's web UI, for programs that speak it: /sdapi/v1 over a `Service`."""

from .routes import router

__all__ = ["router"]
