"""The page in a real browser: drawing, queueing, cancelling, painting, errors and keys, over the embedded model."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrt.engines.bundle import Bundle
from latentrt.engines.errors import EngineError
from latentrt.export.embedded import ensure_bundle
from latentrt.runtime.server import HttpSettings
from PIL import Image

from .browsing import Open, browser, choose, expect, opened, pictures, pixels_of, ready, sent
from .conftest import Served, held, until

__all__ = ["browser", "opened"]
pytestmark = pytest.mark.long


def test_a_picture_is_drawn_shown_on_its_way_kept_and_drawn_again(opened: Open, served: Served) -> None:
    page = ready(opened(), prompt="a red circle", steps="12")
    page.press("#prompt", "Enter")
    expect(page.locator(".job .prompt")).to_have_text("a red circle")
    expect(page.locator(".job .tile img").first).to_be_attached()
    expect(pictures(page)).to_have_count(1)
    expect(page.locator(".job")).to_have_count(0)
    expect(page.locator("#status")).to_contain_text("The picture is there, seed ")

    pictures(page).click()
    expect(page.locator("#viewer")).to_be_visible()
    facts = page.locator("#viewer-facts").inner_text().split("\n")
    said = dict(zip(facts[::2], facts[1::2], strict=True)) if len(facts) % 2 == 0 else {}
    assert said["Size"] == "64 × 64" and said["Steps"] == "12" and said["Model"] == "embedded"
    with page.expect_download() as download:
        page.click("#download")
    assert download.value.suggested_filename == f"a-red-circle-{said['Seed']}.png"
    assert Image.open(io.BytesIO(Path(download.value.path()).read_bytes())).size == (64, 64)

    page.click("#again")
    expect(page.locator("#seed")).to_have_value(said["Seed"])
    page.click("#draw")
    expect(pictures(page)).to_have_count(2)
    assert (pixels_of(page, 0) == pixels_of(page, 1)).all()

    page.reload()
    ready(page)
    expect(pictures(page)).to_have_count(2)
    expect(page.locator("#prompt")).to_have_value("a red circle")
    pictures(page).first.click()
    page.click("#delete")
    expect(pictures(page)).to_have_count(1)
    page.click("#close")
    page.click("#clear")
    page.click("#sure .danger")
    expect(pictures(page)).to_have_count(0)
    expect(page.locator("#empty")).to_be_visible()
    page.reload()
    ready(page)
    expect(pictures(page)).to_have_count(0)


def test_jobs_queue_are_cancelled_and_outlive_a_reload(opened: Open, served: Served) -> None:
    page = ready(opened(), count="2")
    with held() as free:
        for prompt in ("a red circle", "a blue star", "a green cross"):
            page.fill("#prompt", prompt)
            page.press("#prompt", "Control+Enter")
            expect(page.locator(".job .prompt").last).to_have_text(prompt)
        expect(page.locator(".job .note").last).to_contain_text("pictures before this one")
        page.keyboard.press("Escape")
        expect(page.locator(".job .prompt")).to_have_text(["a red circle", "a blue star"])
        page.get_by_role("button", name="Cancel: a red circle").click()
        expect(page.locator(".job .prompt")).to_have_text(["a blue star"])
        until(lambda: len(served.service.unfinished) == 1)
        page.reload()
        expect(page.locator(".job .prompt")).to_have_text(["a blue star"])
        free.set()
        expect(pictures(page)).to_have_count(2)
    expect(page.locator(".job")).to_have_count(0)
    expect(page.locator("#error")).to_be_hidden()


def test_what_is_wrong_is_one_line_at_its_field(opened: Open, served: Served) -> None:
    page = ready(opened())
    page.click("#draw")
    expect(page.get_by_role("alert")).to_have_text("Write a prompt first.")
    expect(page.locator("#prompt")).to_be_focused()
    page.fill("#prompt", "a red circle")
    for field, value, text in (
        ("steps", "0", "Steps is 0: input should be greater than or equal to 1"),
        ("count", "99", "Pictures is 99: at most 10 pictures of a request are drawn"),
        ("guidance", "-2", "Guidance is -2"),
        ("seed", "1e3", "The seed is a whole number"),
    ):
        before = page.input_value(f"#{field}")
        page.fill(f"#{field}", value)
        page.click("#draw")
        expect(page.get_by_role("alert")).to_contain_text(text)
        expect(page.locator(f"#{field}")).to_have_attribute("aria-invalid", "true")
        expect(page.locator(f"#{field}")).to_be_focused()
        page.fill(f"#{field}", before)
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": b"no picture"})
    expect(page.get_by_role("alert")).to_contain_text("This is no picture that a browser can read")
    page.click("#draw")
    expect(page.locator("#error")).to_be_hidden()
    expect(pictures(page)).to_have_count(1)
    assert page.locator("[aria-invalid]").count() == 0


def test_a_failure_on_the_way_is_said(opened: Open, served: Served) -> None:
    page = ready(opened(), prompt="a red circle")
    with held() as free:
        page.press("#prompt", "Enter")
        job = until(lambda: served.service.unfinished)[0]
        job.end("failed", EngineError("the engine stumbled: try again"))
        expect(page.get_by_role("alert")).to_have_text("The engine stumbled: try again")
        expect(page.locator(".job")).to_have_count(0)
        job.cancel()
        free.set()


@pytest.mark.parametrize("by", ["pointer", "keyboard"])
def test_a_part_of_a_picture_is_painted_and_drawn_anew(opened: Open, served: Served, by: str) -> None:
    page = ready(opened(), prompt="a red circle")
    choose(page, Image.new("RGB", (128, 128), (60, 120, 200)))
    page.fill("#strength", "1")
    mask = page.locator("#mask")
    page.fill("#brush", "70")
    if by == "pointer":
        mask.scroll_into_view_if_needed()
        box = mask.bounding_box()
        page.mouse.move(box["x"] + 0.8 * box["width"], box["y"] + 0.2 * box["height"])
        page.mouse.down()
        page.mouse.move(box["x"] + 0.8 * box["width"], box["y"] + 0.8 * box["height"], steps=5)
        page.mouse.up()
    else:
        mask.focus()
        for key in ["Shift+ArrowRight"] * 3 + ["Shift+ArrowUp"] * 3 + ["Space", "Shift+ArrowDown"] * 6 + ["Space"]:
            page.keyboard.press(key)
    with sent(page) as requests:
        page.keyboard.press("Control+Enter")
        expect(pictures(page)).to_have_count(1)
    (request,) = requests
    image, painted = (Image.open(io.BytesIO(base64.b64decode(request[name]))) for name in ("image", "mask"))
    values = np.asarray(painted.convert("L"))
    assert image.size == painted.size == (64, 64) and request["size"] == "64x64" and request["strength"] == 1
    assert (values[20:44, 46:56] == 255).all() and (values[:, :28] == 0).all()
    assert (np.asarray(image.convert("RGB")) == (60, 120, 200)).all()
    moved = np.abs(pixels_of(page, 0) - (60, 120, 200)).mean(axis=2)
    assert moved[:, :28].max() == 0 and moved[20:44, 46:56].mean() > 20
    page.click("#clear-mask")
    with sent(page) as requests:
        page.click("#draw")
        expect(pictures(page)).to_have_count(2)
    assert "mask" not in requests[0] and "image" in requests[0]
    page.click("#undo")
    page.click("#remove")
    with sent(page) as requests:
        page.click("#draw")
        expect(pictures(page)).to_have_count(3)
    assert not {"image", "mask", "strength"} & set(requests[0])


def test_one_of_several_bundles_is_chosen(opened: Open) -> None:
    bundle = Bundle.open(ensure_bundle())
    with Served({"first": bundle, "second": bundle}) as served:
        page = ready(opened(served.url), prompt="a red circle")
        assert page.locator("#model option").all_inner_texts() == ["first", "second"]
        page.select_option("#model", "second")
        expect(page.locator("#steps")).to_have_value("20")  # the model's own
        page.select_option("#sampler", "dpmpp_2m")
        page.select_option("#spacing", "karras")
        page.fill("#steps", "4")
        with sent(page) as requests:
            page.press("#prompt", "Enter")
            expect(pictures(page)).to_have_count(1)
        assert requests[0]["model"] == "second" and requests[0]["sampler"] == "dpmpp_2m_karras"
        page.select_option("#model", "first")
        page.select_option("#sampler", "")
        pictures(page).click()
        page.click("#again")
        expect(page.locator("#model")).to_have_value("second")
        expect(page.locator("#spacing")).to_have_value("karras")


def test_a_bundle_that_does_not_answer_or_answers_late_is_not_chosen(opened: Open) -> None:
    bundle = Bundle.open(ensure_bundle())
    with Served({"first": bundle, "second": bundle}) as served:
        page = ready(opened(served.url), prompt="a red circle", steps="7")
        page.route("**/v1/models/second", lambda route: route.abort())
        page.select_option("#model", "second")
        expect(page.get_by_role("alert")).to_contain_text("The server does not answer")
        expect(page.locator("#model")).to_have_value("first")
        expect(page.locator("#steps")).to_have_value("7")
        page.unroute("**/v1/models/second")
        waiting: list[Any] = []
        page.route("**/v1/models/second", lambda route: waiting.append(route))
        page.select_option("#model", "second")
        page.press("#prompt", "Enter")
        expect(page.get_by_role("alert")).to_contain_text("wait a moment")
        page.select_option("#model", "first")
        expect(page.locator("#steps")).to_have_value("20")  # the model's own
        page.fill("#steps", "6")
        with served.http() as http, page.expect_response("**/v1/models/second"):
            waiting[0].fulfill(json={**http.get("/v1/models/second").json(), "sizes": ["96x96"]})
        page.evaluate("new Promise((then) => { setTimeout(then, 100); })")
        assert page.input_value("#model") == "first" and page.input_value("#steps") == "6"
        assert page.locator("#size option").first.get_attribute("value") == "64x64"


KEPT = """() => new Promise((then) => {
    indexedDB.open("latentrt", 1).onsuccess = ({ target: { result } }) => {
        result.transaction("pictures").objectStore("pictures").getAll().onsuccess = (event) => {
            then(event.target.result.map(({ facts }) => facts.prompt));
        };
    };
})"""
"""Returns the prompts of the pictures in the browser's database, the oldest first."""


def test_a_picture_is_deleted_once_and_the_oldest_goes_beyond_the_most(opened: Open) -> None:
    page = ready(opened(), prompt="a red circle")
    page.evaluate(
        """async () => {
        const { MOST, pictures } = await import("/ui/store.js");
        const blob = new Blob(["no picture, but small"], { type: "image/png" });
        for (let at = 0; at < MOST; at += 1) await pictures.add({ blob, at, facts: { prompt: `${at}`, seed: at } });
    }"""
    )
    page.reload()
    ready(page)
    expect(pictures(page)).to_have_count(500)
    page.press("#prompt", "Enter")
    expect(page.locator("#status")).to_contain_text("The picture is there, seed ")
    expect(pictures(page)).to_have_count(500)
    expect(page.locator("#pictures-count")).to_have_text("500")
    assert page.evaluate(KEPT) == [*map(str, range(1, 500)), "a red circle"]
    pictures(page).nth(1).click()
    page.evaluate("for (let i = 0; i < 2; i += 1) document.getElementById('delete').click()")
    expect(page.locator("#pictures-count")).to_have_text("499")
    expect(pictures(page)).to_have_count(499)
    assert page.evaluate(KEPT) == [*map(str, range(1, 499)), "a red circle"]


def test_a_key_is_asked_for_and_stays_in_the_tab(opened: Open) -> None:
    with Served(http=HttpSettings(keys=("sk-right",))) as served:
        page = opened(served.url)
        expect(page.locator("#key-title")).to_have_text("This server needs a key.")
        page.fill("#key", "sk-wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#key-title")).to_have_text("This server does not know the key.")
        page.fill("#key", "sk-right")
        page.keyboard.press("Enter")
        ready(page, prompt="a red circle")
        page.press("#prompt", "Enter")
        expect(pictures(page)).to_have_count(1)
        assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
        assert page.evaluate("sessionStorage.getItem('latentrt.key')") == "sk-right"
        page.reload()
        ready(page)
    page.fill("#prompt", "a blue star")
    page.press("#prompt", "Enter")
    expect(page.get_by_role("alert")).to_have_text(
        "The server does not answer: is it running, and is this device online?"
    )


def test_a_server_that_loads_is_waited_for(opened: Open) -> None:
    with Served(opened=False) as served:
        page = opened(served.url)
        expect(page.locator("#server-text")).to_have_text("Loading")
        served.service.open()
        ready(page)
