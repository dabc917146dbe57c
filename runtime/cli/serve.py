"""`latentrt serve`: bundles over HTTP."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from ...engines.errors import MissingExtraError
from ..sizes import parse_size
from .generate import _embedded
from .interrupts import INTERRUPTED
from .options import BackendOptions, backend_options


def _option(*names: str, help: str, **named: Any) -> Any:
    """Return an option that an environment variable sets as well: LATENTRT_SERVE_ and its name."""
    variable = "LATENTRT_SERVE_" + names[0].partition("/")[0].strip("-").replace("-", "_").upper()
    return typer.Option(*names, help=help, envvar=variable, **named)


SERVER, BUNDLES, LIMITS = "Server", "Bundles", "Limits"


def serve(
    bundles: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[BUNDLE...]",
            envvar="LATENTRT_SERVE_BUNDLES",
            help="Bundles, as PATH or NAME=PATH (default: the embedded model). The first is the default one.",
        ),
    ] = None,
    host: Annotated[str, _option("--host", help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, _option("--port", min=0, max=65535, help="Port; 0 for any that is free.")] = 8000,
    api_key_file: Annotated[
        Path | None, _option("--api-key-file", help="File with the keys of clients, one a line (default: no key).")
    ] = None,
    sizes: Annotated[
        list[str] | None,
        _option("--size", metavar="WxH", help="Size to warm up (default: the bundle's); may be repeated."),
    ] = None,
    sizes_only: Annotated[bool, _option("--sizes-only", help="Refuse other sizes.")] = False,
    slots: Annotated[int, _option("--slots", min=1, help="Pictures that are drawn at one time.")] = 4,
    rows: Annotated[
        int | None, _option("--rows", min=2, help="Network rows that they share (default: 2 for each).")
    ] = None,
    fixed_rows: Annotated[
        bool, _option("--fixed-rows", help="Compute all rows always: the same picture bit for bit in any company.")
    ] = False,
    max_waiting: Annotated[int, _option("--max-waiting", min=1, help="Pictures of a size that may wait.")] = 64,
    backend: Annotated[str, _option("--backend", help="Backend (default: the fastest that works).")] = "auto",
    threads: Annotated[int | None, _option("--threads", min=1, help="Processor threads.")] = None,
    options: BackendOptions = None,
    drain_timeout: Annotated[
        float, _option("--drain-timeout", min=0, help="Seconds for unfinished requests after SIGTERM.")
    ] = 60.0,
) -> None:
    """Serve bundles over HTTP: OpenAI's Images API, jobs, health, metrics."""
    try:
        from ..server import HttpSettings, create_app
        from ..server.auth import keys_of_file
        from ..server.lifecycle import LifeSettings
        from ..server.lifecycle import serve as run
        from ..service import Limits, Models, ModelSettings, Service
        from ..service.models import named_bundles
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("latentrt"):
            raise
        raise MissingExtraError("serve", "serving over HTTP") from error
    settings = ModelSettings(
        backend=backend,
        options=backend_options(backend, options, threads=threads),
        slots=slots,
        rows=rows,
        fixed_rows=fixed_rows,
        max_waiting=max_waiting,
        sizes=tuple(map(parse_size, sizes or ())),
        sizes_only=sizes_only,
    )
    models = Models(named_bundles(bundles or [f"embedded={_embedded()}"]), settings)
    service = Service(models, Limits())
    http = HttpSettings(keys=keys_of_file(api_key_file) if api_key_file else ())
    logging.getLogger("latentrt").setLevel(min(logging.INFO, logging.getLogger("latentrt").level))
    life = LifeSettings(host=host, port=port, drain_timeout=drain_timeout)
    if run(create_app(service, http), service, life):
        raise typer.Exit(INTERRUPTED)
