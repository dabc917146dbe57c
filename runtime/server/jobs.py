"""Jobs: an id at once, and state, progress, pictures and cancelling by that id."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator, Iterable
from datetime import datetime, timezone
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response, StreamingResponse

from ..service import Ended, Job, Pictured, Previewed, Service, Stepped
from ..service.errors import NotFoundError, RefusedError
from ..service.job import Moment
from ..service.work import FORMATS
from .body import context_of, described, read_body
from .errors import RESPONSES, api_error
from .openai import picture_said, said_with
from .schema import JobBody
from .sse import COMMENT, HEADERS, STREAM, event
from .watch import Events, Workers

MAX_KEY = 255
MAX_LISTED = 100
PICTURES: dict[str, Any] = {f"image/{name}": {"schema": {"type": "string", "format": "binary"}} for name in FORMATS}


def router(service: Service, workers: Workers, heartbeat: float) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(tags=["Jobs"], responses=RESPONSES)

    def found(request: Request, id: str) -> Job:
        return service.store.find(context_of(request)["owner"], id)

    @routes.post("/v1/jobs", status_code=202, openapi_extra=described(JobBody, form=True))
    async def submit(request: Request) -> Response:
        """Take a request, with a picture an edit, and answer at once. `Idempotency-Key`: the same job each time."""
        key = request.headers.get("idempotency-key")
        if key is None or not service.store.has(context_of(request)["owner"], key):
            service.check_ready()
        if key is not None and not (0 < len(key) <= MAX_KEY):
            raise RefusedError(f"Idempotency-Key has {len(key)} characters: give 1 to {MAX_KEY}", "Idempotency-Key")
        body, work, ignored, came = await read_body(request, JobBody, workers)
        if body.stream:
            raise RefusedError("stream is true: a job is no stream, its events are at /v1/jobs/{id}/events", "stream")
        asked_for = await workers.run(_digest, came) if key else ""
        job = await workers.run(lambda: service.submit(work, keep=True, name=key, asked_for=asked_for))
        job.ignored = ignored
        request.scope["state"] |= {"job": job.id, "model": job.model}
        headers = {"location": f"/v1/jobs/{job.id}"}
        return _answer(job, 202, headers)

    @routes.get("/v1/jobs")
    async def listed(request: Request) -> dict[str, Any]:
        """List the jobs of this key, the newest first, without their pictures."""
        jobs = service.store.of(context_of(request)["owner"])[:MAX_LISTED]
        return {"object": "list", "data": [said_of(job, job.now()) for job in jobs]}

    @routes.get("/v1/jobs/{id}")
    async def status(request: Request, id: str) -> Response:
        """Say how far a job is, with its pictures once they are there."""
        return _answer(found(request, id))

    @routes.post("/v1/jobs/{id}/cancel")
    async def cancel(request: Request, id: str) -> Response:
        """Cancel a job; one that is over stays as it is."""
        job = found(request, id)
        await workers.run(job.cancel)
        return _answer(job)

    @routes.delete("/v1/jobs/{id}", status_code=204)
    async def forget(request: Request, id: str) -> Response:
        """Cancel a job, and drop its result."""
        job = found(request, id)
        await workers.run(job.cancel)
        service.store.drop(job)
        return Response(status_code=204)

    @routes.get("/v1/jobs/{id}/images/{number}", responses={200: {"content": PICTURES}}, response_class=Response)
    async def image(request: Request, id: str, number: str) -> Response:
        """Return the bytes of a picture, counted from 0, or with `preview` the latest on its way."""
        job = found(request, id)
        picture = job.preview if number == "preview" else None
        if number.isascii() and number.isdigit() and len(number) < 6:
            picture = job.pictures.get(int(number))
        if picture is None:
            raise NotFoundError(f"job {job.id} has no picture {number[:20]!r} now: see its state", "number")
        if number != "preview":
            job.given.add(int(number))
            _note_fetched(job)
        headers = {"cache-control": "no-store"} | ({} if picture.seed is None else {"x-seed": str(picture.seed)})
        return Response(picture.data, headers=headers, media_type=picture.output.media_type)

    @routes.get("/v1/jobs/{id}/events", responses={200: {"content": STREAM}}, response_class=Response)
    async def events(request: Request, id: str) -> StreamingResponse:
        """Stream what happens to a job; going away does not cancel it."""
        job = found(request, id)
        return StreamingResponse(_stream(job, heartbeat), headers=HEADERS, media_type="text/event-stream")

    return routes


def said_of(job: Job, now: Moment) -> dict[str, Any]:
    """Return what is said of a job at a moment, without its pictures."""
    said = {
        "object": "job",
        **said_with(job, now.facts),
        "task": job.work.task,
        "state": now.state,
        "created": int(job.created),
        "finished": None if now.finished is None else int(now.finished),
        "progress": job.progress,
        "links": {name: f"/v1/jobs/{job.id}{path}" for name, path in LINKS.items()},
        "error": None if now.error is None else api_error(now.error).body["error"],
        "ignored": job.ignored,
    }
    if now.finished is not None:
        said["finished_at"] = datetime.fromtimestamp(now.finished, timezone.utc).isoformat(timespec="milliseconds")
    return said


def _digest(came: Iterable[bytes]) -> str:
    """Return what tells the bytes of one request from those of another."""
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in came)).hexdigest()


LINKS = {"self": "", "events": "/events", "cancel": "/cancel", "preview": "/images/preview"}


def _answer(job: Job, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    now = job.now()  # it may end while this is written
    said = json.dumps(said_of(job, now), ensure_ascii=False).encode()
    pictures = [picture_said(job, index) for index in sorted(job.pictures)] if now.state == "succeeded" else []
    body = said[:-1] + b',"data":[' + b",".join(pictures) + b"]}"
    headers = {"cache-control": "no-store", **(headers or {})}
    if now.finished is None:
        headers["retry-after"] = "1"
    else:
        job.fetched = True
    return Response(body, status, headers, "application/json")


def _note_fetched(job: Job) -> None:
    """Note that the client of a job that is over has fetched all there is to fetch, once it has."""
    job.fetched |= job.is_over and (job.state != "succeeded" or job.given >= job.pictures.keys())


async def _stream(job: Job, heartbeat: float) -> AsyncIterator[bytes]:
    """Yield events: state and progress first, then each as it comes, the last one with the state it ended in."""
    with Events(job) as events:
        yield event("job.state", said_of(job, job.now()))
        while True:
            heard = await events.next(heartbeat)
            if heard is None:
                yield COMMENT
            elif isinstance(heard, Stepped):
                yield event("job.progress", {"type": "job.progress", "index": heard.index, **job.progress})
            elif isinstance(heard, Previewed):
                data = {"index": heard.index, "number": heard.number, "b64_json": heard.picture.text}
                yield event("job.preview", {"type": "job.preview", **data})
            elif isinstance(heard, Pictured):
                link = f"/v1/jobs/{job.id}/images/{heard.index}"
                yield event("job.image", {"type": "job.image", "index": heard.index, "url": link})
            elif isinstance(heard, Ended):
                _note_fetched(job)
                yield event(f"job.{heard.state}", {"type": f"job.{heard.state}", **said_of(job, job.now())})
                return
            else:
                yield event("job.state", said_of(job, job.now()))
