"""The page at /: one file of HTML, one of CSS and a few of JavaScript, as they are, with nothing from elsewhere."""

from .routes import PATHS, router

__all__ = ["PATHS", "router"]
