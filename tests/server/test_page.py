"""The page's files: what they refer to, what a browser may do with them, and that they come without a key."""

from __future__ import annotations

import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fastapi import FastAPI
from latentrt.runtime.page import PATHS, router
from latentrt.runtime.page.routes import FOLDER, HEADERS
from starlette.testclient import TestClient

SCRIPTS = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.js")}
HTML = (FOLDER / "page.html").read_text(encoding="utf-8")


class Page(HTMLParser):
    """Ids, labels and references of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.references: list[str] = []
        self.needed: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append((tag, given))
        self.ids += [value for name, value in attrs if name == "id" and value]
        self.references += [value for name, value in attrs if name in ("href", "src") and value]
        for name in ("for", "aria-labelledby", "aria-describedby", "data-for"):
            self.needed += (given.get(name) or "").split()


@pytest.fixture(scope="module")
def page() -> Page:
    parsed = Page()
    parsed.feed(HTML)
    return parsed


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = FastAPI()
    app.include_router(router())
    return TestClient(app)


def test_every_file_comes_with_a_policy_of_its_own_files_alone(client: TestClient) -> None:
    assert set(PATHS) == {"/"} | {f"/ui/{path.name}" for path in FOLDER.iterdir() if path.suffix != ".html"}
    for path in PATHS:
        answer = client.get(path)
        assert answer.status_code == 200 and {**answer.headers, **HEADERS} == dict(answer.headers)
        policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'" and policy["script-src"] == policy["style-src"] == "'self'"
        assert policy["connect-src"] == "'self'" and "unsafe" not in answer.headers["content-security-policy"]
        kind = {"/": "text/html", "css": "text/css", ".js": "text/javascript"}[path if path == "/" else path[-3:]]
        assert answer.headers["content-type"] == f"{kind}; charset=utf-8"
        assert client.head(path).status_code == 200
        again = client.get(path, headers={"if-none-match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    assert client.get("/ui/routes.py").status_code == client.get("/ui/../routes.py").status_code == 404


def test_nothing_is_fetched_from_elsewhere(page: Page) -> None:
    for reference in page.references:
        assert reference.startswith(("ui/", "#", "data:image/svg+xml,")), reference
        assert not reference.startswith("ui/") or (FOLDER / reference[3:]).is_file()
    for path in FOLDER.iterdir():
        text = path.read_text(encoding="utf-8")
        assert set(re.findall(r"https?://[^\s'\"]+", text)) <= {"http://www.w3.org/2000/svg"}, path
        assert "@import" not in text and "url(" not in text
    for name, text in SCRIPTS.items():
        imported = re.findall(r'from "([^"]+)"', text)
        assert all(each.startswith("./") and each[2:] in SCRIPTS for each in imported), name


def test_no_text_becomes_markup_or_code(page: Page) -> None:
    for text in SCRIPTS.values():
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)
    assert not any(name.startswith("on") or name == "style" for _, attributes in page.tags for name in attributes)
    assert [attributes for tag, attributes in page.tags if tag in ("script", "style")] == [
        {"type": "module", "src": "ui/main.js"}
    ]


def test_what_scripts_and_labels_name_is_there_once(page: Page) -> None:
    assert max(Counter(page.ids).values()) == 1
    named = {name for text in SCRIPTS.values() for name in re.findall(r'\$\("([\w-]+)"\)', text)}
    styled = set(re.findall(r"#([a-z][\w-]*)(?=[\s.,:\[{>)])", (FOLDER / "page.css").read_text(encoding="utf-8")))
    icons = {reference[1:] for reference in page.references if reference.startswith("#")}
    assert named | set(page.needed) | icons <= set(page.ids)
    assert {name for name in styled if not re.fullmatch(r"[0-9a-f]{3,8}", name)} <= set(page.ids)


def test_every_control_has_a_label(page: Page) -> None:
    labelled = {attributes.get("for") for tag, attributes in page.tags if tag == "label"}
    wrapped = {"brush", "previews"}  # inside their labels
    for tag, attributes in page.tags:
        if tag in ("input", "select", "textarea") and attributes.get("aria-hidden") != "true":
            assert attributes["id"] in labelled | wrapped, attributes


def test_files_are_small_and_packaged() -> None:
    for path in FOLDER.iterdir():
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 300, path
        assert path.suffix in (".html", ".css", ".js")
    project = Path(__file__).parents[2] / "pyproject.toml"
    assert '"latentrt.runtime.page" = ["files/*"]' in project.read_text(encoding="utf-8")
