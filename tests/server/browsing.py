"""The page opened in a real browser, which complains about nothing meanwhile."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from PIL import Image

from .conftest import Served, picture, png

playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect

DESKTOP: dict[str, Any] = {"viewport": {"width": 1320, "height": 900}}
PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
SECONDS = 30_000
"""How long to wait for what must come, in milliseconds."""

Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("chromium is not installed")
    with playwright.sync_playwright() as running:
        started = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def opened(browser: Any, served: Served) -> Iterator[Open]:
    """Return a function that opens the page, and complains afterwards about all that a browser complained about."""
    contexts: list[Any] = []
    complaints: list[str] = []

    def open_page(url: str = "", **options: Any) -> Any:
        context = browser.new_context(**{**DESKTOP, "reduced_motion": "reduce", **options})
        context.set_default_timeout(SECONDS)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text) if _is_bad(message) else None)
        page.on("request", lambda request: complaints.append(request.url) if _is_far(request.url) else None)
        page.goto(f"{url or served.url}/")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def _is_bad(message: Any) -> bool:
    return message.type in ("error", "warning") and "Failed to load resource" not in message.text


def _is_far(url: str) -> bool:
    return not url.startswith(("data:", "blob:", "http://127.0.0.1:"))


def ready(page: Any, **fields: str) -> Any:
    """Wait for the server, and fill in fields."""
    expect(page.locator("#server")).to_have_attribute("data-state", "ready")
    expect(page.locator("#size")).to_have_value("64x64")
    page.evaluate("document.getElementById('settings').open = true")
    for name, value in {"steps": "4", **fields}.items():
        page.fill(f"#{name}", value)
    return page


def pictures(page: Any) -> Any:
    return page.locator("#gallery button")


def pixels_of(page: Any, place: int) -> np.ndarray:
    """Return the pixels of a picture in the gallery."""
    image = page.locator("#gallery img").nth(place)
    image.evaluate("(image) => image.decode()")
    text = image.evaluate(
        """(image) => {
        const canvas = document.createElement("canvas");
        [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
        canvas.getContext("2d").drawImage(image, 0, 0);
        return canvas.toDataURL("image/png").split(",")[1];
    }"""
    )
    return np.asarray(picture(text).convert("RGB"), int)


@contextmanager
def sent(page: Any) -> Iterator[list[dict[str, Any]]]:
    """Note the requests that the page sends for drawing."""
    found: list[dict[str, Any]] = []

    def note(request: Any) -> None:
        if request.method == "POST" and request.url.endswith("/v1/jobs"):
            found.append(json.loads(request.post_data))

    page.on("request", note)
    yield found
    page.remove_listener("request", note)


def choose(page: Any, image: Image.Image) -> None:
    """Choose a picture to start from."""
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": png(image)})
    expect(page.locator("#edit")).to_be_visible()
