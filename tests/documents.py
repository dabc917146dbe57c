"""What the tests of README and of the documentation share: code blocks, commands and links of a Markdown page."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from latentrt.runtime.cli import run

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def page_name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def commands(page: Path) -> list[str]:
    """Return the lines of a page's shell blocks that run latentrt, without their comments."""
    lines = [line for block in blocks(page, "sh") for line in block.splitlines() if line.startswith("latentrt ")]
    return [shlex.join(shlex.split(line, comments=True)) for line in lines]


def named_in_prose(page: Path) -> list[str]:
    """Return the commands that a page names between backticks, such as `latentrt cache path`."""
    prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [f"latentrt {words}" for words in re.findall(r"`latentrt ((?!\W)[^`]+)`", prose)]


def listed(help_text: str) -> set[str]:
    """Return the commands that a help text lists."""
    return set(re.findall(r"^  ([\w-]+)  ", help_text.partition("Commands:")[2], re.MULTILINE))


def missing_from_help(line: str, capsys: object) -> list[str]:
    """Return what a command line uses and the help of its command does not know."""
    words = shlex.split(line)[1:]
    path: list[str] = []
    while True:
        assert run([*path, "--help"]) == 0, path
        text = capsys.readouterr().out  # type: ignore[attr-defined]
        known, word = listed(text), words[len(path)] if len(path) < len(words) else "-"
        if word in known:
            path.append(word)
        elif path and "run" in known and not word.startswith("-"):  # `bench WORKLOAD` is short for `bench run WORKLOAD`
            words.insert(len(path), "run")
        else:
            break
    if not path and words and not words[0].startswith("-"):
        return words[:1]
    options = [word for word in words if re.match(r"--?[a-z]", word)]
    return [option for option in options if not re.search(rf"(^|[\s,]){re.escape(option)}\b", text, re.MULTILINE)]


def dead_links(page: Path) -> list[str]:
    """Return links and pictures of a page that lead to no file, or to no heading of a page."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    return [target for target in targets if not target.startswith("https://") and not leads_somewhere(page, target)]


def leads_somewhere(page: Path, target: str) -> bool:
    name, _, anchor = target.partition("#")
    file = (page.parent / name).resolve() if name else page
    if not file.exists():
        return False
    return not anchor or anchor in {
        slug(heading) for heading in re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
    }


def slug(heading: str) -> str:
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())
