"""The page for everybody: by keyboard alone, on phones, by day and by night, and as axe-core sees it."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from .browsing import PHONE, Open, browser, choose, expect, opened, pictures, ready
from .conftest import Served, held

__all__ = ["browser", "opened"]
pytestmark = pytest.mark.long


def test_the_keyboard_alone_is_enough(opened: Open, served: Served) -> None:
    """Every stop of the tab key can be seen and has a name, and nothing needs a pointer."""
    page = ready(opened())
    page.locator(".skip").focus()
    stops: list[str] = []
    look = """() => {
        const element = document.activeElement, style = getComputedStyle(element);
        const box = element.getBoundingClientRect();
        const seen = style.outlineStyle !== "none" || element.id === "file" || element.id === "mask";
        const name = element.getAttribute("aria-label") || element.labels?.[0]?.textContent || element.textContent;
        return [element.id || element.tagName, seen && name.trim() !== "" && box.width > 0];
    }"""
    for _ in range(40):
        page.keyboard.press("Tab")
        name, good = page.evaluate(look)
        if name in ("BODY", "A"):
            break
        assert good, name
        stops.append(name)
    settings = ["size", "count", "steps", "guidance", "sampler", "seed", "any-seed", "previews"]
    assert stops == ["key-button", "prompt", "negative", "file", "SUMMARY", *settings, "draw"]

    page.keyboard.press("Tab")
    page.locator("#prompt").focus()
    page.keyboard.type("a red circle")
    page.keyboard.press("Enter")
    expect(pictures(page)).to_have_count(1)
    page.keyboard.type(" on white")
    page.keyboard.press("Enter")
    expect(pictures(page)).to_have_count(2)
    page.locator("#draw").focus()
    page.keyboard.press("Tab")  # Delete all
    page.keyboard.press("Tab")
    expect(pictures(page).first).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#viewer-title")).to_have_text("a red circle on white")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#viewer-title")).to_have_text("a red circle")
    page.keyboard.press("Escape")
    expect(page.locator("#viewer")).to_be_hidden()
    expect(pictures(page).nth(1)).to_be_focused()
    with held():
        page.locator("#prompt").focus()
        page.keyboard.press("Enter")
        expect(page.locator(".job")).to_have_count(1)
        page.get_by_role("button", name="Cancel: ").focus()
        page.keyboard.press("Enter")
        expect(page.locator(".job")).to_have_count(0)
        expect(page.locator("#draw")).to_be_focused()
        expect(page.locator("#status")).to_have_text("Cancelled")


@pytest.mark.parametrize("width", [320, 390])
def test_a_phone(opened: Open, served: Served, width: int) -> None:
    page = opened(**{**PHONE, "viewport": {"width": width, "height": 800}})
    expect(page.locator("#server")).to_have_attribute("data-state", "ready")
    assert page.evaluate("document.getElementById('settings').open") is False
    page.locator("#prompt").tap()
    page.keyboard.type("a blue star")
    expect(page.locator("#draw")).to_be_in_viewport()
    with held():  # however fast the machine is
        page.locator("#draw").tap()
        expect(page.locator(".job")).to_be_in_viewport()
    expect(pictures(page)).to_have_count(1)
    ready(page)
    choose(page, Image.new("RGB", (90, 160)))
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.fill("#steps", "0")
    page.locator("#draw").tap()
    expect(page.locator("#error")).to_be_in_viewport()
    bar = page.locator(".actions").bounding_box()
    assert page.locator("#steps").bounding_box()["y"] < bar["y"] - 20
    pictures(page).tap()
    expect(page.locator("#viewer-image")).to_be_in_viewport()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.locator("#close").tap()


def test_light_and_dark_follow_the_system(opened: Open, served: Served) -> None:
    grounds = {}
    for scheme in ("light", "dark"):
        page = opened(color_scheme=scheme)
        color = page.evaluate("getComputedStyle(document.body).backgroundColor")
        grounds[scheme] = sum(map(int, color[4:-1].split(",")))
    assert grounds["light"] > 600 and grounds["dark"] < 120


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(opened: Open, served: Served, scheme: str) -> None:
    """axe-core's rules of WCAG 2.2 AA and its good practice, in every state of the page."""
    axe = pytest.importorskip("axe_playwright_python")
    page = opened(color_scheme=scheme, bypass_csp=True)
    ready(page, prompt="a red circle")
    page.evaluate((Path(axe.__file__).parent / "axe.min.js").read_text(encoding="utf-8") + "; 0")

    def check(state: str) -> None:
        tags = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
        found = page.evaluate("(tags) => axe.run(document, {runOnly: tags})", tags)
        assert len(found["passes"]) > 15
        assert [(each["id"], each["nodes"][0]["html"][:200]) for each in found["violations"]] == [], state

    check("empty")
    choose(page, Image.new("RGB", (64, 64)))
    page.fill("#steps", "0")
    page.click("#draw")
    expect(page.locator("#error")).to_be_visible()
    check("with a picture and an error")
    page.fill("#steps", "4")
    with held() as free:
        page.click("#draw")
        expect(page.locator(".job")).to_have_count(1)
        check("drawing")
        free.set()
        expect(pictures(page)).to_have_count(1)
    check("with a gallery")
    pictures(page).click()
    check("looking")
    page.keyboard.press("Escape")
    page.click("#key-button")
    check("asking for a key")
