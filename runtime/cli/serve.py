"""`latentrt serve`: bundles over HTTP."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ...engines.errors import MissingExtraError, RequestError
from ..loop.widths import SLOTS
from ..sizes import parse_size
from .generate import _embedded
from .interrupts import INTERRUPTED
from .options import backend_options, bytes_of, opened_bundle

PREFIX = "LATENTRT_SERVE_"
KEY_VARIABLE = PREFIX + "API_KEY"
"""The environment variable that holds keys with commas between them: what stands on a command line is seen by all."""


def _option(*names: str, help: str, **named: Any) -> Any:
    """Return an option that an environment variable of its name sets as well."""
    variable = PREFIX + names[0].partition("/")[0].strip("-").replace("-", "_").upper()
    return typer.Option(*names, help=help, envvar=variable, **named)


def serve(
    bundles: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[BUNDLE...]",
            envvar=PREFIX + "BUNDLES",
            help="Bundles, as PATH or NAME=PATH (default: the embedded model). The first is the default one.",
        ),
    ] = None,
    host: Annotated[str, _option("--host", help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, _option("--port", min=0, max=65535, help="Port; 0 for any that is free.")] = 8000,
    aliases: Annotated[
        list[str] | None,
        _option("--alias", metavar="NAME=MODEL", help="Another name of a bundle, such as gpt-image-1=sdxl."),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        _option("--api-key-file", help=f"File with the keys of clients, one a line; {KEY_VARIABLE} holds more."),
    ] = None,
    sizes: Annotated[
        list[str] | None,
        _option("--size", metavar="WxH", help="Size to warm up (default: the bundle's); may be repeated."),
    ] = None,
    sizes_only: Annotated[bool, _option("--sizes-only", help="Refuse other sizes.")] = False,
    max_pixels: Annotated[
        int | None,
        _option("--max-pixels", min=1, help="Pixels of a picture of another size (default: 4 times the largest's)."),
    ] = None,
    slots: Annotated[int, _option("--slots", min=1, help="Pictures that are drawn at one time.")] = SLOTS,
    rows: Annotated[
        int | None,
        _option("--rows", min=2, help="Network rows that they share (default: 2 each up to 8, or 1 each)."),
    ] = None,
    fixed_rows: Annotated[
        bool, _option("--fixed-rows", help="Compute all rows always: the same picture bit for bit in any company.")
    ] = False,
    max_waiting: Annotated[int, _option("--max-waiting", min=1, help="Pictures of a size that may wait.")] = 64,
    max_wait: Annotated[
        float | None,
        _option("--max-wait", help="Seconds that what waits may take, above which requests get 429 (default: any)."),
    ] = None,
    backend: Annotated[str, _option("--backend", help="Backend (default: the fastest that works).")] = "auto",
    threads: Annotated[int | None, _option("--threads", min=1, help="Processor threads.")] = None,
    options: Annotated[
        list[str] | None,
        _option("--option", "-O", metavar="NAME=VALUE", help="Option of the backend; may be repeated."),
    ] = None,
    models_budget: Annotated[
        str | None,
        _option("--models-budget", metavar="BYTES", help="Memory of bundles that are open at a time (default: all)."),
    ] = None,
    max_images: Annotated[int, _option("--max-images", min=1, help="Pictures of one request.")] = 10,
    max_steps: Annotated[int, _option("--max-steps", min=1, help="Steps of one request.")] = 150,
    max_prompt: Annotated[int, _option("--max-prompt", min=1, help="Characters of a prompt.")] = 10_000,
    max_work: Annotated[
        float, _option("--max-work", help="Megapixels times pictures times steps of one request.")
    ] = 2000.0,
    max_previews: Annotated[int, _option("--max-previews", min=0, max=3, help="Partial images of each picture.")] = 3,
    timeout: Annotated[float, _option("--timeout", help="Seconds that a request may take.")] = 600.0,
    key_concurrency: Annotated[
        int | None, _option("--key-concurrency", min=1, help="Unfinished requests of one key (default: any).")
    ] = None,
    max_body: Annotated[str, _option("--max-body", metavar="BYTES", help="Size of a request's body.")] = "32MiB",
    max_connections: Annotated[int, _option("--max-connections", min=1, help="Open connections.")] = 1000,
    body_timeout: Annotated[
        float, _option("--body-timeout", help="Seconds in which a request must have come whole.")
    ] = 30.0,
    send_timeout: Annotated[
        float, _option("--send-timeout", help="Seconds for which a client may read nothing of its answer.")
    ] = 30.0,
    results_ttl: Annotated[float, _option("--results-ttl", help="Seconds for which results of jobs are kept.")] = 600.0,
    results_memory: Annotated[
        str, _option("--results-memory", metavar="BYTES", help="Memory for results of jobs.")
    ] = "256MiB",
    drain_timeout: Annotated[
        float, _option("--drain-timeout", min=0, help="Seconds for unfinished requests after SIGTERM.")
    ] = 60.0,
    step_timeout: Annotated[
        float, _option("--step-timeout", help="Seconds after which a step hangs, which ends the process.")
    ] = 120.0,
    max_failures: Annotated[
        int, _option("--max-failures", min=1, help="Failures of an engine in a row that end the process.")
    ] = 3,
    cors_origins: Annotated[
        list[str] | None,
        _option("--cors-origin", metavar="ORIGIN", help="Site whose pages may call the server (default: none)."),
    ] = None,
    keep_prompts: Annotated[
        bool, _option("--keep-prompts", help="Write prompts into PNG files and into warnings of the log.")
    ] = False,
    log_json: Annotated[bool, _option("--log-json", help="Log one JSON object a line.")] = False,
    access_log: Annotated[bool, _option("--access-log/--no-access-log", help="Log a line for every request.")] = True,
) -> None:
    """Serve bundles over HTTP: OpenAI's Images API, jobs, health, metrics."""
    try:
        from ..server import HttpSettings, Metrics, create_app
        from ..server.context import logs
        from ..server.lifecycle import LifeSettings
        from ..server.lifecycle import serve as run
        from ..service import Limits, Models, ModelSettings, Service
        from ..service.names import named_aliases, named_bundles
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
        max_wait=max_wait,
        sizes=tuple(map(parse_size, sizes or ())),
        sizes_only=sizes_only,
        most_pixels=max_pixels,
    )
    limits = Limits(
        images=max_images,
        steps=max_steps,
        prompt=max_prompt,
        work=max_work,
        previews=max_previews,
        timeout=timeout,
        unfinished=key_concurrency,
    )
    http = HttpSettings(
        keys=_keys(api_key_file),
        max_body=bytes_of("--max-body", max_body) or 0,
        body_timeout=body_timeout,
        send_timeout=send_timeout,
        max_connections=max_connections,
        cors_origins=tuple(cors_origins or ()),
    )
    life = LifeSettings(host, port, drain_timeout, step_timeout, max_failures)
    metrics = Metrics()
    models = Models(
        named_bundles(bundles or [f"embedded={_embedded()}"], opened_bundle),
        settings,
        budget=bytes_of("--models-budget", models_budget),
        aliases=named_aliases(aliases or ()),
        observer=metrics,
    )
    service = Service(
        models,
        limits,
        keep_prompts=keep_prompts,
        results_seconds=results_ttl,
        results_bytes=bytes_of("--results-memory", results_memory) or 0,
    )
    app = create_app(service, http, metrics)
    with logs(as_json=log_json, access=access_log):
        interrupted = run(app, service, life, http, metrics)
    if interrupted:
        raise typer.Exit(INTERRUPTED)


def _keys(file: Path | None) -> tuple[str, ...]:
    from ..server.auth import keys_of_file

    variable = os.environ.get(KEY_VARIABLE, "")
    given = tuple(key.strip() for key in variable.split(",") if key.strip())
    if variable and not given:  # whoever set it did not mean a server for everybody
        raise RequestError(f"{KEY_VARIABLE} is set, and holds no key: give keys with commas between them, or unset it")
    return (*given, *(keys_of_file(file) if file else ()))
