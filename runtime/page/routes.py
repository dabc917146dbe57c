"""The page's files, and what a browser may do with them."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import Response

FOLDER = Path(__file__).parent / "files"
PAGE = "page.html"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
}
FILES = {"/" if path.name == PAGE else f"/ui/{path.name}": path for path in sorted(FOLDER.iterdir())}

PATHS = tuple(FILES)
"""Paths that need no key: they hold nothing of anybody."""

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob: data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
"""Own files alone, pictures that were drawn or chosen, and no text that becomes code."""

HEADERS = {
    "content-security-policy": POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}


def router() -> APIRouter:
    """Return the routes; raises `OSError` where the package's files cannot be read."""
    routes = APIRouter(include_in_schema=False)
    for path, file in FILES.items():
        _add(routes, path, file.read_bytes(), TYPES[file.suffix])
    return routes


def _add(routes: APIRouter, path: str, content: bytes, kind: str) -> None:
    headers = {**HEADERS, "etag": f'"{hashlib.sha256(content).hexdigest()[:20]}"'}

    async def answer(request: Request) -> Response:
        if headers["etag"] in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=kind)

    routes.add_api_route(path, answer, methods=["GET", "HEAD"])
