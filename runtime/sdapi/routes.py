"""The routes of /sdapi/v1: drawing, how far it is, interrupting, and what there is to choose from."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from pydantic import TypeAdapter
from starlette.responses import Response

from ..server.body import context_of, read_json
from ..server.errors import ApiError, api_error
from ..server.watch import ClientGoneError, Events, Workers, unless_gone
from ..service import Ended, Job, Pictured, Service
from ..service.pictures import Picture
from .answer import progress_of, rendered
from .errors import Route
from .fields import ImageToImage, TextToImage
from .listings import add_listings
from .settings import Asked, Board
from .work import drawing_of

PREFIX = "/sdapi/v1"
DROPPED_WAIT = 0.25
"""Seconds in which the end of a connection may follow an interrupt that was sent for it."""
ANYTHING = TypeAdapter(Any)


def router(service: Service, workers: Workers) -> APIRouter:
    """Return the routes."""
    board = Board()
    routes = APIRouter(prefix=PREFIX, tags=["AUTOMATIC1111"], route_class=Route)
    _add_drawing(routes, service, workers, board)
    _add_watching(routes, board, workers)
    add_listings(routes, service, board, workers)

    @routes.api_route("/{rest:path}", methods=["GET", "POST", "PUT", "PATCH", "DELETE"], include_in_schema=False)
    async def nothing(rest: str) -> None:
        raise ApiError(
            404, f"{PREFIX}/{rest[:60]} is not served: this is a small part of the web UI's API", "not_found"
        )

    return routes


def _add_drawing(routes: APIRouter, service: Service, workers: Workers, board: Board) -> None:
    async def draw(request: Request, schema: type[TextToImage]) -> Response:
        service.check_ready()
        came = await request.body()
        body = await workers.run(lambda: read_json(schema.model_validate_json, came))
        context, whose = context_of(request), whose_is(request)
        owner = context["owner"]
        asked, dropped = Asked(body.images, body.force_task_id), False
        board.add(whose, asked)  # an interrupt may come before the service has taken it
        try:
            drawing = await workers.run(lambda: drawing_of(body, service, board.settings(owner), **context))
            if not body.override_settings_restore_afterwards:
                board.change(owner, body.override_settings, service.models)
            steps = drawing.work.previews > 0
            job = await workers.run(lambda: asked.takes(service.submit(drawing.work, steps=steps)))
            ended, pictures = await _over(request, job)
        except (ClientGoneError, asyncio.CancelledError):
            dropped = True
            asked.interrupt()
            raise
        finally:
            board.remove(whose, asked, dropped=dropped)
        if ended.error is not None and not asked.interrupted:
            raise api_error(ended.error)
        answer = rendered(drawing, job, pictures, interrupted=asked.interrupted)
        return Response(answer, media_type="application/json", headers={"x-job-id": job.id})

    @routes.post("/txt2img", openapi_extra=_described(TextToImage))
    async def txt2img(request: Request) -> Response:
        """Draw pictures of a prompt."""
        return await draw(request, TextToImage)

    @routes.post("/img2img", openapi_extra=_described(ImageToImage))
    async def img2img(request: Request) -> Response:
        """Draw pictures that start from one, or repaint a part of it."""
        return await draw(request, ImageToImage)


async def _over(request: Request, job: Job) -> tuple[Ended, dict[int, Picture]]:
    """Wait for the end of a request; returns it and the pictures that are done, also of one that was interrupted."""
    pictures: dict[int, Picture] = {}

    async def watch(events: Events) -> Ended:
        async for event in events:
            if isinstance(event, Pictured):
                pictures[event.index] = event.picture
            elif isinstance(event, Ended):
                return event
        raise AssertionError("a job has an end")

    with Events(job) as events:
        ended = await unless_gone(request, asyncio.ensure_future(watch(events)))
    return ended, pictures


def whose_is(request: Request) -> str:
    """Return who asks: a key, and where there is none an address."""
    owner = context_of(request)["owner"]
    return owner or (request.client.host if request.client else "")


def _add_watching(routes: APIRouter, board: Board, workers: Workers) -> None:
    def one_of(whose: str, task: str | None) -> Asked | None:
        """Return somebody's request by its task or job, or the oldest that is not over."""
        asked = [each for each in board.asked(whose) if not each.is_over]
        named = [each for each in asked if task in (each.task, each.job and each.job.id)]
        return next(iter(named if task else asked), None)

    @routes.get("/progress")
    async def progress(request: Request, skip_current_image: bool = False, id_task: str | None = None) -> Any:
        """Say how far the oldest unfinished request of this key is, or the one that force_task_id named."""
        whose = whose_is(request)
        found, count = one_of(whose, id_task), len(board.asked(whose))
        images = found.images if found else 0
        return progress_of(found.job if found else None, images=images, queued=count, picture=not skip_current_image)

    @routes.post("/interrupt")
    @routes.post("/skip")
    async def interrupt(request: Request, id_task: str | None = None) -> dict[str, Any]:
        """End the oldest unfinished request of this key and API, or the one that force_task_id named.

        Its answer holds the pictures that are done. Programs send this when a user of theirs has gone, and close that
        user's connection as well: then it is that request which ends, and no other one.
        """
        came = await request.body()
        body = await workers.run(lambda: read_json(ANYTHING.validate_json, came)) if came else None
        task = id_task or (body.get("id_task") if isinstance(body, dict) else None)
        whose = whose_is(request)
        if not task:
            if len(board.asked(whose)) > 1:
                await asyncio.sleep(DROPPED_WAIT)
            if board.take_dropped(whose):
                return {}
        if (found := one_of(whose, task)) is not None:
            found.interrupt()
        return {}


def _described(schema: type[TextToImage]) -> dict[str, Any]:
    """Return what OpenAPI says of a body that is read by hand."""
    content = {"application/json": {"schema": schema.model_json_schema()}}
    return {"requestBody": {"required": True, "content": content}}
