"""The application for Ray: `serve run latentrt.runtime.ray.app:build bundles=/models/sd15 max_replicas=4`."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

from ray import serve
from ray.exceptions import RayActorError, TaskCancelledError
from ray.serve import exceptions
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from ..server import HttpSettings, Metrics, create_app
from ..server.auth import keys_of_file
from ..service import Work
from ..service.names import named_bundles
from .engine import Engine, QueuePolicy
from .service import Errors, RemoteModels, RemoteService
from .settings import RaySettings

ENGINE = "Engine"
CONNECTIONS = 1000
"""Requests that the ingress has at one time: it only waits for them."""


class _Engines:
    """The engine deployment's handle, as `RemoteService` calls it."""

    def __init__(self, handle: Any) -> None:
        self._draw, self._described = handle.options(stream=True).draw, handle.described

    def draw(self, work: Work) -> Any:
        return self._draw.remote(work)

    async def described(self) -> Any:
        return await self._described.remote()


def _ingress(settings: RaySettings) -> Callable[[], Any]:
    """Return what makes the ASGI application, in the replica that serves it."""

    def build_app() -> Any:
        handle = serve.get_deployment_handle(ENGINE, app_name=serve.get_replica_context().app_name)
        errors = Errors(
            busy=(exceptions.BackPressureError,),
            lost=(RayActorError, getattr(exceptions, "ReplicaUnavailableError", RayActorError)),  # not in all releases
            unavailable=(exceptions.DeploymentUnavailableError,),
            cancelled=(exceptions.RequestCancelledError, TaskCancelledError, asyncio.CancelledError),
        )
        metrics = Metrics()
        models = RemoteModels(
            named_bundles(settings.bundles), settings.model, aliases=settings.aliases, observer=metrics
        )
        service = RemoteService(_Engines(handle), errors, models, settings.limits)
        threading.Thread(target=service.open, name="latentrt open", daemon=True).start()
        keys = keys_of_file(settings.api_key_file) if settings.api_key_file else ()
        return create_app(service, HttpSettings(keys=keys), metrics)

    return build_app


def build(settings: RaySettings) -> Any:
    """Return the application: an ingress that speaks HTTP, bound to engines that draw."""
    scaled = AutoscalingConfig(
        min_replicas=settings.min_replicas,
        max_replicas=settings.max_replicas,
        target_ongoing_requests=settings.slots,
        upscale_delay_s=settings.upscale_delay,
        downscale_delay_s=settings.downscale_delay,
        **_policy(settings),
    )
    engine = serve.deployment(
        Engine,
        name=ENGINE,
        ray_actor_options={"num_cpus": settings.num_cpus, "num_gpus": settings.gpus},
        autoscaling_config=scaled,
        max_ongoing_requests=settings.ongoing,
        max_queued_requests=settings.max_queued,
        health_check_period_s=5,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=settings.drain_timeout,
    )
    ingress = serve.deployment(
        serve.ingress(_ingress(settings))(),
        name="Ingress",
        num_replicas=1,  # jobs are known to the replica that took them
        ray_actor_options={"num_cpus": 0.5},
        max_ongoing_requests=CONNECTIONS,
        graceful_shutdown_timeout_s=settings.drain_timeout,
    )
    return ingress.bind(engine.bind(settings))


def _policy(settings: RaySettings) -> dict[str, Any]:
    if settings.queue_seconds is None:
        return {}
    name = f"{QueuePolicy.__module__}:{QueuePolicy.__name__}"
    return {"policy": AutoscalingPolicy(policy_function=name, policy_kwargs={"seconds": settings.queue_seconds})}
