"""A real server on loopback over the embedded model: small pictures, one thread, official clients."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import httpx2
import openai
import pytest
import uvicorn
from latentrt.engines.bundle import Bundle
from latentrt.export.embedded import ensure_bundle
from latentrt.runtime.server import HttpSettings, Metrics, create_app
from latentrt.runtime.server.guard import protocol_of
from latentrt.runtime.server.lifecycle import LifeSettings, Server, bound
from latentrt.runtime.service import Limits, Models, ModelSettings, Service
from latentrt.runtime.service.models import Model
from PIL import Image

from ..conftest import Gate, calls_held, turns_held

pytest.importorskip("onnxruntime")

FEW: dict[str, Any] = {"num_inference_steps": 4, "seed": 7}
"""Fields of ours for requests that are quick."""
held = turns_held


class Served:
    """A server in a thread of this process, over bundles by name; a context manager."""

    def __init__(
        self,
        bundles: dict[str, Bundle] | None = None,
        *,
        limits: Limits | None = None,
        http: HttpSettings | None = None,
        life: LifeSettings | None = None,
        budget: int | None = None,
        aliases: dict[str, str] | None = None,
        keep_prompts: bool = False,
        results_seconds: float = 600.0,
        results_bytes: int = 1 << 28,
        opened: bool = True,
        **settings: Any,
    ) -> None:
        self.metrics, http = Metrics(), http or HttpSettings()
        given = {"backend": "onnxruntime-cpu", "options": {"threads": 1}, "sizes": ((64, 64),), "slots": 1, **settings}
        models = Models(
            bundles or {"embedded": Bundle.open(ensure_bundle())},
            ModelSettings(**given),
            budget=budget,
            aliases=aliases,
            observer=self.metrics,
        )
        results = {"results_seconds": results_seconds, "results_bytes": results_bytes}
        self.service = Service(models, limits, keep_prompts=keep_prompts, **results)
        app = create_app(self.service, http, self.metrics)
        options: dict[str, Any] = {"log_config": None, "access_log": False, "lifespan": "off", "ws": "none"}
        protocol = protocol_of(http, self.metrics.answered)
        config = uvicorn.Config(app, http=protocol, timeout_graceful_shutdown=2, **options)
        self.server = Server(config, self.service, life or LifeSettings(), http, self.metrics)
        self._socket = bound("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._opened = opened
        if not opened:
            self.server._load = lambda: None  # type: ignore[method-assign]
        self._thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self._socket]}, daemon=True)

    def __enter__(self) -> Served:
        self._thread.start()
        until(lambda: self.server.started and (self.service.state != "loading" or not self._opened))
        return self

    def __exit__(self, *_: Any) -> None:
        self.server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()
        self._socket.close()
        self.service.close()

    def openai(self, key: str = "none", **options: Any) -> openai.OpenAI:
        """Return the official client."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, **{"max_retries": 0, **options})

    def http(self, **options: Any) -> httpx2.Client:
        """Return a plain client."""
        return httpx2.Client(base_url=self.url, timeout=60, verify=False, **options)  # certificates take long to load


def opening_held() -> AbstractContextManager[Gate]:
    """Hold the opening of bundles until the event is set, or the block ends."""
    return calls_held(Model, "open")


def until(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    """Return what a condition returns once it is true."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it never came to pass"
        time.sleep(0.005)
    return found


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with Served() as running:
        yield running
        until(lambda: not running.service.unfinished)


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with served.openai() as client:
        yield client


@pytest.fixture(scope="module")
def http(served: Served) -> Iterator[httpx2.Client]:
    with served.http() as client:
        yield client


def picture(text: str | None) -> Image.Image:
    """Return the picture in a base64 text."""
    return Image.open(io.BytesIO(base64.b64decode(text or "")))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def generate(client: httpx2.Client, **fields: Any) -> httpx2.Response:
    """Ask for a small picture."""
    given = {"prompt": "a red circle", "size": "64x64", **FEW, **fields}
    return client.post(
        "/v1/images/generations", json={name: value for name, value in given.items() if value is not None}
    )


def error_of(response: httpx2.Response) -> dict[str, Any]:
    """Return the error object of an answer, which is of OpenAI's shape."""
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str) and "\n" not in body["error"]["message"]
    assert response.headers["content-type"] == "application/json" and response.headers["x-request-id"]
    return dict(body["error"])
