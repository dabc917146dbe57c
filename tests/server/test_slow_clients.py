"""Clients that are slow, many, or no clients at all: none of them holds the server up."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
from latentrt.runtime.server import HttpSettings
from latentrt.runtime.server.guard import protocol_of, watch_connections
from latentrt.runtime.server.lifecycle import bound
from latentrt.runtime.server.metrics import Metrics

from .conftest import Served, generate, until

HEAD = b"POST /v1/images/generations HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


@pytest.fixture(scope="module")
def impatient(request: pytest.FixtureRequest) -> Iterator[Served]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("latentrt.runtime.server.guard.LOOK_SECONDS", 0.02)
        patch.setattr("latentrt.runtime.server.guard.GRACE", 0.2)
        with Served(http=HttpSettings(body_timeout=0.3, send_timeout=0.3)) as served:
            yield served


def connected(served: Served) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2])))
    client.settimeout(20)
    return client


def read(client: socket.socket) -> bytes:
    """Return what comes until the server closes or cuts the connection."""
    found = b""
    try:
        while data := client.recv(65536):
            found += data
    except ConnectionResetError:
        pass
    return found


def counted(served: Served, name: str, **labels: str) -> float:
    """Return a counter of the server."""
    return served.metrics.registry.get_sample_value(f"latentrt_{name}_total", labels) or 0.0


def test_a_body_that_does_not_come(impatient: Served) -> None:
    with connected(impatient) as client:
        client.sendall(HEAD + b'content-length: 100\r\n\r\n{"prompt"')
        head, _, body = read(client).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408") and b"x-should-retry: false" in head
    assert json.loads(body)["error"]["code"] == "body_timeout"


def test_a_body_that_comes_byte_by_byte(impatient: Served) -> None:
    with connected(impatient) as client:
        client.sendall(HEAD + b"content-length: 100000\r\n\r\n")
        stop = threading.Event()

        def drip() -> None:
            while not stop.wait(0.01):
                try:
                    client.send(b" ")
                except OSError:
                    return

        thread = threading.Thread(target=drip)
        thread.start()
        assert read(client).startswith(b"HTTP/1.1 408")
        stop.set()
        thread.join()


@pytest.mark.parametrize("sent", [b"", b"POST /v1/ima", HEAD], ids=["nothing", "half a line", "half a head"])
def test_a_head_that_does_not_come(impatient: Served, sent: bytes) -> None:
    with connected(impatient) as client:
        client.sendall(sent)
        assert read(client) == b""


def test_a_second_head_that_does_not_come(impatient: Served) -> None:
    with connected(impatient) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\nGET /heal")
        answer = read(client)
    assert answer.startswith(b"HTTP/1.1 200") and answer.count(b"HTTP/1.1") == 1


LONG = b"x" * 200_000
UNREAD = {"method": "other", "route": "(none)"}
"""What metrics say of that which no application saw."""


@pytest.mark.parametrize(
    "sent",
    [
        HEAD + b"cookie: " + LONG,
        HEAD + b"cookie: " + LONG + b"\r\n\r\n",
        HEAD + LONG,
        HEAD + b"a:\r\n" * 50_000 + b"\r\n",
        b"GET /" + LONG + b" HTTP/1.1\r\nhost: x\r\n\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n" + b"a: b\r\n" * 30_000,
        HEAD + b"transfer-encoding: chunked\r\n\r\n2;" + LONG,
    ],
    ids=["value", "whole value", "name", "headers", "path", "trailers", "extension"],
)
@pytest.mark.parametrize("piece", [200_100, 5000])
def test_a_head_that_is_too_large(impatient: Served, sent: bytes, piece: int) -> None:
    before = counted(impatient, "rejections", reason="head_too_large")
    with connected(impatient) as client:
        for begin in range(0, len(sent), piece):
            client.sendall(sent[begin : begin + piece])
        head, _, body = read(client).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 431 Request Header Fields Too Large\r\n") and b"connection: close" in head
    assert json.loads(body)["error"]["code"] == "head_too_large"
    assert counted(impatient, "rejections", reason="head_too_large") == before + 1
    with impatient.http() as http:
        assert http.get("/health").status_code == 200


def test_a_second_head_that_is_too_large(impatient: Served) -> None:
    ask = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
    with connected(impatient) as client:
        client.sendall(ask)
        assert client.recv(65536).startswith(b"HTTP/1.1 200")
        client.sendall(HEAD + LONG)
        assert read(client).startswith(b"HTTP/1.1 431")
    with connected(impatient) as client:
        client.sendall(ask + HEAD + LONG)  # where the first is not answered yet, both are cut
        assert read(client).count(b"HTTP/1.1 431") <= 1


def test_a_head_that_is_large_is_read(impatient: Served) -> None:
    body = b" " * 300_000
    with connected(impatient) as client:
        client.sendall(HEAD + b"cookie: " + b"x" * 60_000 + b"\r\nconnection: close\r\n")
        client.sendall(b"content-length: %d\r\n\r\n" % len(body) + body)
        answer = read(client)
    assert answer.startswith(b"HTTP/1.1 400") and b"no JSON" in answer


def test_a_client_that_sends_on_after_its_answer_is_cut(impatient: Served) -> None:
    with connected(impatient) as client:
        client.sendall(HEAD.replace(b"/v1/images/generations", b"/nothing") + b"content-length: 100000\r\n\r\n")
        answer = read(client)
    assert answer.startswith(b"HTTP/1.1 404")


def test_what_is_no_http(impatient: Served) -> None:
    refused, answered = ("rejections", {"reason": "invalid_http"}), ("http_requests", UNREAD | {"status": "400"})
    before = [counted(impatient, name, **labels) for name, labels in (refused, answered)]
    with connected(impatient) as client:
        client.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
        head, _, body = read(client).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400") and json.loads(body)["error"]["code"] == "invalid_http"
    assert [counted(impatient, name, **labels) for name, labels in (refused, answered)] == [n + 1 for n in before]


def test_more_connections_than_there_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are refused, but not what a busy server lives by; those beyond are cut."""
    monkeypatch.setattr("latentrt.runtime.server.guard.SPARE", 1)
    ask = b"GET /nothing HTTP/1.1\r\nhost: x\r\nx-request-id: beyond\r\n\r\n"
    with Served(http=HttpSettings(max_connections=2), opened=False) as served:
        connections = served.server.server_state.connections

        def asked(path: bytes) -> tuple[bytes, bytes]:
            until(lambda: len(connections) == 2)
            with connected(served) as beyond:
                beyond.sendall(ask.replace(b"/nothing", path))
                head, _, body = read(beyond).partition(b"\r\n\r\n")
            return head, body

        clients = [connected(served) for _ in range(2)]
        head, body = asked(b"/nothing")
        assert head.startswith(b"HTTP/1.1 503") and b"retry-after: 1" in head and b"connection: close" in head
        assert b"x-request-id: beyond" in head and json.loads(body)["error"]["code"] == "too_many_connections"
        assert counted(served, "rejections", reason="too_many_connections") == 1
        assert counted(served, "http_requests", method="GET", route="(none)", status="503") == 1
        said = {path: asked(path) for path in (b"/v2/health/live", b"/metrics", b"/v2/health/ready", b"/health")}
        assert all(b"connection: close" in head for head, _ in said.values())
        assert [head.split()[1] for head, _ in said.values()] == [b"200", b"200", b"503", b"503"]
        assert all(json.loads(said[path][1]) == {"status": "loading"} for path in said if path != b"/metrics")
        until(lambda: served.metrics.open_connections == 2)
        clients.append(connected(served))
        until(lambda: len(connections) == 3)
        with connected(served) as cut:
            assert read(cut) == b""
        for client in clients:
            client.close()
        until(lambda: not connections)
        with connected(served) as client:
            client.sendall(ask.replace(b"x-request-id: beyond", b"connection: close"))
            assert read(client).startswith(b"HTTP/1.1 404")


def test_fast_clients_are_served_all_the_while(impatient: Served) -> None:
    with impatient.http() as http:
        assert generate(http).status_code == 200


def test_a_client_that_reads_nothing_is_cut() -> None:
    """Against an answer that no buffer holds."""
    gone = threading.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": bytes(1 << 26), "more_body": True})
        await send({"type": "http.response.body", "body": bytes(1 << 26), "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass
        gone.set()

    settings, metrics = HttpSettings(send_timeout=0.2), Metrics()
    protocol = protocol_of(settings, metrics.answered)
    config = uvicorn.Config(app, http=protocol, log_config=None, lifespan="off", ws="none")
    server, listener = uvicorn.Server(config), bound("127.0.0.1", 0)

    async def run() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("latentrt.runtime.server.guard.LOOK_SECONDS", 0.02)
            watch = asyncio.create_task(watch_connections(server.server_state.connections, settings, metrics))
            await server.serve(sockets=[listener])
            watch.cancel()

    thread = threading.Thread(target=asyncio.run, args=[run()])
    thread.start()
    with (
        socket.create_connection(listener.getsockname()) as slow,
        socket.create_connection(listener.getsockname()) as fast,
    ):
        for client in (slow, fast):
            client.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        until(lambda: len(server.server_state.connections) == 2)

        def is_alone() -> bool:
            time.sleep(0.02)
            return bool(fast.recv(1 << 18)) and len(server.server_state.connections) == 1

        fast.settimeout(20)
        until(is_alone)  # one that reads a little all the while is let go on
        assert gone.wait(10) and fast.recv(1)
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()
