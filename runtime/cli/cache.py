"""`latentrt cache`: what engines are kept on this machine, and which to give up."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from ...engines.bundle import MANIFEST, Bundle
from ...engines.cache import EngineCache, home
from ...engines.errors import LatentRTError, RequestError
from .bundle import readable_size

app = typer.Typer(add_completion=False, rich_markup_mode=None)

DAY = 24 * 3600


@app.callback(invoke_without_command=True, epilog="Example: latentrt cache prune --older-than 30 --dry-run")
def cache(context: typer.Context) -> None:
    """List the engines that were built on this machine, remove some, or print where they are."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command("list", short_help="List the engines in the cache.", epilog="Example: latentrt cache list --json")
def list_engines(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the engines in the cache: of which graph, for what, how large and how old.

    Bundles that were exported into it, by Pipeline.from_pretrained, come behind them.
    """
    found, bundles = _engines(), _bundles()
    if as_json:
        typer.echo(json.dumps([{**each, "folder": str(each["folder"])} for each in (*found, *bundles)], indent=2))
        return
    for engine in found:
        typer.echo(_line(engine))
    total = sum(engine["bytes"] for engine in found)
    typer.echo(f"{len(found)} engines, {readable_size(total)} in {EngineCache().root}")
    if bundles:
        for bundle in bundles:
            typer.echo(_line(bundle))
        total = sum(bundle["bytes"] for bundle in bundles)
        typer.echo(f"{len(bundles)} bundles, {readable_size(total)} in {home() / 'bundles'}: remove the folder of one")


@app.command(short_help="Check every engine.", epilog="Example: latentrt cache verify")
def verify() -> None:
    """Hash the files of every engine and remove damaged ones, which are built again when they are needed; exit 1."""
    engines = EngineCache()
    damaged = engines.verify()
    for folder, problem in damaged.items():
        typer.echo(f"{folder.name}: {problem}; removed")
    typer.echo(f"{len(engines.entries())} engines are as they were built")
    if damaged:
        raise typer.Exit(1)


@app.command(short_help="Remove engines.", epilog="Example: latentrt cache prune --older-than 30 --dry-run")
def prune(
    older_than: Annotated[
        float | None, typer.Option("--older-than", min=0, metavar="DAYS", help="Engines built before so many days.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Every engine.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed, and remove nothing.")] = False,
) -> None:
    """Remove engines; the next request that needs one builds it again. What is being built stays."""
    if every == (older_than is not None):
        raise RequestError("say which engines: give either --older-than DAYS or --all")
    engines, removed = EngineCache(), 0
    if not dry_run and engines.root.exists():
        engines.sweep()
    for engine in _engines():
        if older_than is not None and engine["age_days"] < older_than:
            continue
        if dry_run or engines.remove(engine):
            removed += engine["bytes"]
            typer.echo(_line(engine))
        else:
            typer.echo(f"{_line(engine)}: kept, another process is building it")
    typer.echo(f"{'would remove' if dry_run else 'removed'} {readable_size(removed)}")


@app.command("path", short_help="Print the folder of the caches.", epilog="Example: du -sh $(latentrt cache path)")
def print_path() -> None:
    """Print the folder of the caches: $LATENTRT_HOME, or a folder of the user's caches."""
    typer.echo(home())


def _engines() -> list[dict[str, Any]]:
    """Return what the cache has, the newest first."""
    now, found = time.time(), []
    for entry in EngineCache().entries():
        key = entry.get("key", {})
        found.append(
            {
                "graph": entry.get("graph", "unknown"),
                "backend": key.get("backend", "unknown"),
                "for": _purpose(key),
                "bytes": entry["bytes"],
                "age_days": round(max(0.0, now - entry["built"]) / DAY, 3),
                "folder": entry["folder"],
            }
        )
    return sorted(found, key=lambda engine: engine["age_days"])


def _bundles() -> list[dict[str, Any]]:
    """Return the bundles that were exported into the cache, the newest first."""
    now, found = time.time(), []
    for manifest in (home() / "bundles").glob(f"*/{MANIFEST}"):
        try:
            files = [file.stat() for file in manifest.parent.rglob("*") if file.is_file()]
            exported = manifest.stat().st_mtime
        except FileNotFoundError:  # another process removes it
            continue
        try:
            source = Bundle.open(manifest.parent).manifest.source.get("name", "unknown")
        except LatentRTError as error:
            source = f"cannot be read: {str(error)[:60]}"
        found.append(
            {
                "graph": "bundle",
                "backend": "any",
                "for": f"{source}, {manifest.parent.name}",
                "bytes": sum(each.st_size for each in files),
                "age_days": round(max(0.0, now - exported) / DAY, 3),
                "folder": manifest.parent,
            }
        )
    return sorted(found, key=lambda bundle: bundle["age_days"])


def _purpose(key: Mapping[str, Any]) -> str:
    """Return what an engine runs on, and for which shapes it was made: from its key."""
    if key.get("backend") == "openvino":
        fixed = "; ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in key.get("shapes", {}).items())
        of = f"computes in {key['precision']}, {fixed or 'any shape'}" if "precision" in key else "graph and weights"
        return f"openvino {key.get('openvino')}, {of}"
    if "cpu" in key:  # the processor's name, then its instruction sets in lower case
        words = str(key["cpu"]).split(" fpu ")[0].split()
        return f"{' '.join(words[:8])}, onnxruntime {key.get('onnxruntime', '')}"
    if "profile" in key:
        from ...engines.tensorrt.plan import profile_from_json

        target = " ".join(map(str, key.get("target", {}).values()))
        return f"{target}, version {key.get('version')}, {profile_from_json(key['profile'])}"
    if "target" in key:  # nothing but the note that engines of a graph have passed their check
        return f"{' '.join(map(str, key['target'].values()))}, onnxruntime {key.get('onnxruntime')}, checked"
    return "unknown"


def _line(engine: Mapping[str, Any]) -> str:
    days = engine["age_days"]
    age = f"{days:.0f} days" if days >= 2 else f"{days * 24:.0f} hours" if days >= 1 / 12 else f"{days * 1440:.0f} min"
    size = readable_size(engine["bytes"])
    return f"{engine['graph']:<18}{engine['backend']:<18}{size:>10}  {age:>9}  {engine['for']}"
