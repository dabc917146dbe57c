"""Server-sent events: an image request as a stream, and heartbeats."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from starlette.responses import StreamingResponse

from ..service import Ended, Event, Job, Pictured, Previewed
from ..service.job import Queued
from .errors import api_error
from .watch import Events, unless_gone

HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
TEXT = {"type": "string"}
STREAM: dict[str, Any] = {
    "text/event-stream": {"schema": {"type": "object", "properties": {"event": TEXT, "data": TEXT}}}
}
"""What OpenAPI says of a stream."""
COMMENT = b": keep-alive\n\n"


def event(name: str, data: dict[str, Any]) -> bytes:
    """Return one event of a stream."""
    return f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


async def stream_of(request: Request, job: Job, ignored: list[str], heartbeat: float) -> StreamingResponse:
    """Return a job as OpenAI's stream; a client that goes cancels it.

    Raises what ends the job before it has begun, where that comes within a heartbeat: later it is an event.
    """
    events = Events(job)
    try:
        first: Event | None = None
        if job.state == "loading" or job.is_over:  # what is wrong with it may not be known before its model is open
            first = await unless_gone(request, asyncio.ensure_future(events.next(heartbeat)))
        if isinstance(first, Ended) and first.error is not None:
            raise api_error(first.error)
    except BaseException:
        events.close()
        job.cancel()
        raise
    headers = {**HEADERS, "x-job-id": job.id}
    return StreamingResponse(_stream(job, events, first, ignored, heartbeat), 200, headers, "text/event-stream")


async def _stream(
    job: Job, events: Events, first: Event | None, ignored: list[str], heartbeat: float
) -> AsyncIterator[bytes]:
    prefix = "image_edit" if job.work.task == "edit" else "image_generation"
    try:
        yield COMMENT
        sent = time.monotonic()
        waiting = None if first is None or isinstance(first, Queued) else first
        last: Pictured | None = None
        missing = job.work.images
        while True:
            silent = time.monotonic() - sent  # though steps are heard of, of which a stream says nothing
            heard, waiting = waiting or await events.next(max(0.0, heartbeat - silent)), None
            said = b""
            if heard is None:
                said = COMMENT
            elif isinstance(heard, Previewed):
                said = event(f"{prefix}.partial_image", _partial(job, heard, f"{prefix}.partial_image"))
            elif isinstance(heard, Pictured):
                missing -= 1
                if missing:
                    said = event(f"{prefix}.completed", _completed(job, heard, f"{prefix}.completed"))
                else:
                    last = heard
            elif isinstance(heard, Ended):
                if heard.error is not None:
                    yield event("error", {"type": "error", **api_error(heard.error).body})
                elif last is not None:  # the last picture's event holds what is known at the end
                    data = _completed(job, last, f"{prefix}.completed") | job.facts | {"ignored": ignored}
                    yield event(f"{prefix}.completed", data)
                return
            if said:
                yield said
                sent = time.monotonic()
    finally:
        events.close()
        job.cancel()


def _said(job: Job, kind: str) -> dict[str, Any]:
    return {
        "type": kind,
        "created_at": int(time.time()),
        "size": "{}x{}".format(*job.size),
        "quality": "auto",
        "background": "opaque",
    }


def _partial(job: Job, heard: Previewed, kind: str) -> dict[str, Any]:
    return {
        **_said(job, kind),
        "b64_json": heard.picture.text,
        "output_format": heard.picture.output.format,
        "partial_image_index": heard.number,
        "index": heard.index,
    }


def _completed(job: Job, heard: Pictured, kind: str) -> dict[str, Any]:
    tokens = {"image_tokens": 0, "text_tokens": 0}
    return {
        **_said(job, kind),
        "b64_json": heard.picture.text,
        "output_format": heard.picture.output.format,
        "usage": {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0, "input_tokens_details": tokens},
        "seed": heard.picture.seed,
        "index": heard.index,
        "id": job.id,
        "model": job.model,
        "request_id": job.work.request_id,
    }
