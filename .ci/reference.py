"""Writes the generated tables of the documentation between their markers: `python .ci/reference.py`.

A table between `<!-- NAME:begin -->` and `<!-- NAME:end -->` comes from the code, and a test compares the two.
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from latentrt.engines import backends, errors
from latentrt.engines.bundle import manifest, records
from latentrt.export.families import families
from latentrt.runtime import arguments as call_arguments
from latentrt.runtime.sampling import registry, step_table
from pydantic import BaseModel

DOCS = Path(__file__).parent.parent / "docs"
TRAINED = {"_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table; `|` in a cell becomes `or`, which every renderer can show."""
    lines = [list(head), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(cell.replace(' | ', ' or ') for cell in line)} |" for line in lines)


def samplers() -> str:
    """Return the short names of samplers, where they come from, and what a run of 20 steps costs with each."""
    rows = []
    for sampler in registry.describe():
        run = step_table(TRAINED, 20, sampler=sampler.name)
        drawn, suffixes = "yes" if run.draws.any() else "", "yes" if sampler.suffixes else ""
        name, cost = [f"`{sampler.name}`", f"`{sampler.class_name}`"], [str(len(run)), str(run.history), drawn]
        rows.append([*name, sampler.meaning, *cost, suffixes])
    head = ["name", "diffusers class", "method and source", "calls", "history", "noise", "suffixes"]
    return table(head, rows)


def backend_options() -> str:
    """Return what `--option` takes, for every backend."""
    rows = [
        [f"`{backend}`", f"`{option}`", kind, "" if default is None else f"`{default}`", meaning]
        for backend in backends.names()
        for option, (kind, default, meaning) in backends.option_help(backend).items()
    ]
    return table(["backend", "option", "value", "default", "meaning"], rows)


def manifest_fields() -> str:
    """Return one table for each object of a manifest, the manifest first: fields, types and meanings."""
    nodes = [node for module in (manifest, records) for node in ast.parse(inspect.getsource(module)).body]
    models = [node for node in nodes if isinstance(node, ast.ClassDef) and node.name != "Strict"]
    models.sort(key=lambda node: node.name != "Manifest")
    return "\n\n".join(
        object_fields(node, getattr(manifest, node.name, None) or getattr(records, node.name)) for node in models
    )


def object_fields(node: ast.ClassDef, model: type[BaseModel]) -> str:
    """Return the docstring of one object and the table of its fields; a text below a field is its meaning."""
    rows = []
    for statement, after in pairwise([*node.body, ast.Pass()]):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            name = statement.target.id
            needed = "yes" if model.model_fields[name].is_required() else "no"
            rows.append([f"`{name}`", f"`{kind(statement.annotation)}`", needed, text_of(after)])
    return f"### {node.name}\n\n{text_of(node.body[0])}\n\n{table(['field', 'type', 'needed', 'meaning'], rows)}"


def kind(annotation: ast.expr) -> str:
    """Return an annotation as it is written, with the values of a choice in place of its name."""
    named = annotation.id if isinstance(annotation, ast.Name) else ""
    meant = getattr(manifest, named, None) or getattr(records, named, None)
    values = get_args(meant) if get_origin(meant) is Literal else ()
    return " | ".join(map(repr, values)) or ast.unparse(annotation)


def text_of(node: ast.stmt) -> str:
    """Return a docstring on one line, or nothing for another statement."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return " ".join(node.value.value.split())
    return ""


def error_tree() -> str:
    """Return the exception tree as it stands in its module."""
    lines = (errors.__doc__ or "").splitlines()
    tree = [line[4:] for line in lines if line.startswith("    ")]
    return "\n".join(["```text", *tree, "```"])


def arguments() -> str:
    """Return the arguments of diffusers' pipelines, and what becomes of them."""
    rows = []
    outcomes = {
        "as diffusers": call_arguments.SERVED,
        "as diffusers, in some families": call_arguments.READ_BY_SOME,
        "refused": call_arguments.REFUSED,
        "refused, in some families": call_arguments.REFUSED_BY_SOME,
    }
    for outcome, known in outcomes.items():
        for name, argument in known.items():
            tasks = "all" if argument.tasks == call_arguments.EVERY else ", ".join(argument.tasks)
            rows.append([f"`{name}`", tasks, outcome, argument.meaning])
    return table(["argument", "pipelines", "here", "meaning, or reason"], rows)


def compared() -> str:
    """Return what the tests of families found: each of diffusers' pipelines, requests, and the largest differences."""
    found = json.loads((DOCS / "families.json").read_text(encoding="utf-8"))
    rows = []
    for each in families():
        lines = len(inspect.getsource(sys.modules[type(each).__module__]).splitlines())
        for reference, entry in found.get(each.name, {"": None}).items():
            numbers = (
                [str(entry["requests"]), f"{entry['pixel']:.2g}", f"{entry['latents']:.1e}"] if entry else ["", "", ""]
            )
            rows.append([each.title, f"`{reference}`" if reference else "the suite's own tests", *numbers, str(lines)])
    return table(["family", "against", "requests", "pixels, of 255", "latents, relative", "lines of its file"], rows)


def plans() -> str:
    """Return for which checkpoints every graph was built by TensorRT-RTX, for which GPUs."""
    found = json.loads((DOCS / "families.json").read_text(encoding="utf-8")).get("plans", {})
    kinds = sorted({kind for entry in found.values() for kind in entry} - {"precision"})
    rows = [
        [name, entry["precision"], *(f"{entry[kind]} graphs" if kind in entry else "" for kind in kinds)]
        for name, entry in found.items()
    ]
    return table(["tiny checkpoint", "in", *kinds], rows)


def export_records() -> list[dict[str, Any]]:
    """Return the newest record of each export of a full-size architecture."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for file in sorted((DOCS.parent / "benchmarks" / "results").glob("*.jsonl")):
        for record in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
            if record["kind"] == "export":
                names = tuple(graph["graph"] for graph in record["graphs"])
                found[(record["architecture"], record["precision"], *names)] = record
    return list(found.values())


def exports() -> str:
    """Return what exports of full-size architectures took, the newest record of each."""
    rows = []
    for record in export_records():
        graphs = [graph for graph in record["graphs"] if graph["parity"]]
        worst = max(graphs, key=lambda graph: float(graph["parity"]["relative_error"]))["parity"]
        shallow = ", of a copy of few layers" if worst["layers"] else ""
        size = sum(graph["bytes"] for graph in record["graphs"]) / 2**30
        names = [graph["graph"] for graph in record["graphs"]]
        what = "all" if "decoder" in names else "denoiser" + (" in parts" if len(names) > 1 else "")
        memory = [f"{record[name] / 2**30:.1f} GiB" for name in ("anonymous_bytes", "peak_bytes")]
        times = f"{record['seconds'] / 60:.0f} min"
        error = f"{worst['relative_error']:.1e}{shallow}"
        where = f"{record['machine']['processor']}, {record['machine']['cores']} cores, {record['date'][:10]}"
        named = [record["architecture"], record["precision"], what, f"{size:.1f} GiB"]
        rows.append([*named, times, *memory, error, where])
    head = ["architecture", "in", "graphs", "size", "time", "memory", "with mapped files", "largest error", "where"]
    return table(head, rows)


def family() -> str:
    """Return the file of the family that the tests add."""
    source = DOCS.parent / "tests" / "export" / "more_families" / "toy.py"
    return f"```python\n{source.read_text(encoding='utf-8').rstrip()}\n```"


PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "options.md": {"samplers": samplers, "backend-options": backend_options},
    "arguments.md": {"arguments": arguments},
    "bundle.md": {"manifest": manifest_fields},
    "families.md": {"families": compared, "plans": plans, "exports": exports},
    "troubleshooting.md": {"errors": error_tree},
    "extend/family.md": {"family": family},
}


def written(page: str, text: str) -> str:
    """Return a page's text with its tables written anew."""
    for name, make in PAGES[page].items():
        begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise SystemExit(f"{page} has no place for {name}: add the lines {begin.strip()} and {end}")
        head, _, rest = text.partition(begin)
        text = f"{head}{begin}\n{make()}\n\n{end}{rest.partition(end)[2]}"
    return text


if __name__ == "__main__":
    for page in PAGES:
        path = DOCS / page
        old = path.read_text(encoding="utf-8")
        if (new := written(page, old)) != old:
            path.write_text(new, encoding="utf-8")
            sys.stderr.write(f"{path}\n")
