"""The application: everything put together."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI

from engines.provenance import package_version
from service import errors
from service.middleware import BodyLimit, Linger, RequestContext
from service.queue.base import JobQueue
from service.roles import open_queue, open_rates, opener_of
from service.routes import images, jobs, models, openai, status
from service.routes.openapi import FOREIGN, OF_CONNECTIONS, DocumentedApp, guarded
from service.routes.page import page_router
from service.runtime import OpenPipeline, Service
from service.security.access import Access
from service.security.api_keys import KeyFile
from service.security.browsers import Foreign
from service.security.cors import Preflights, Readable
from service.settings import Settings
from service.telemetry.gpus import open_gpus
from service.telemetry.metrics import Metrics
from service.telemetry.tracing import Tracing, open_tracing

_DESCRIPTION = """
Images from few-step students: text to image, editing and inpainting, batched together.

Every error has one shape, `{"error": {type, code, message, param, request_id, retryable}}`. An option that the
loaded bundle cannot honour is refused, never ignored; `/capabilities` says what it can.

Any request may find that its connection is refused instead, and closed: 400 `invalid_http`, 408 `head_timeout`, 503
`too_many_connections`.
"""
_TAGS = [
    {"name": "images", "description": "Make images; wait for them, or have a job made of the request."},
    {"name": "jobs", "description": "Jobs that were accepted with 202 or with a key: how far they are, and their end."},
    {"name": "models", "description": "The bundles that this service can run."},
    {"name": "openai", "description": "The same images for clients of OpenAI's API."},
    {"name": "status", "description": "Whether the service lives and is ready, what it can do, and its metrics."},
]


def create_app(
    settings: Settings | None = None,
    *,
    queue: JobQueue | None = None,
    opener: OpenPipeline | None = None,
    tracing: Tracing | None = None,
    local: bool = False,
) -> FastAPI:
    """The service as an ASGI application; it loads its bundle in the background once it is started.

    ``queue`` is where jobs wait, ``opener`` opens the pipeline of a folder, warm, and ``tracing`` is where spans go;
    the settings say which by default. ``local`` says that it listens to this host only, and so has only this host's
    names. A service whose role is ``worker`` has no endpoints but those that tell how it is.
    """
    settings = settings or Settings()
    metrics = Metrics()
    queue = queue or open_queue(settings, metrics)
    metrics.watch_queue(queue.stats)
    if settings.role != "api" and (gpus := open_gpus()) is not None:
        metrics.watch_gpus(gpus)
    tracing = tracing or open_tracing(settings.tracing)
    rates = open_rates(settings)
    service = Service(settings, metrics, queue, opener or opener_of(settings.role), tracing)
    if settings.role != "api":
        metrics.watch_models(service.models.loaded)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.stop()
        await rates.close()

    # The interactive pages of the framework would load their scripts from elsewhere.
    app = DocumentedApp(
        title="fewstep",
        version=package_version(),
        description=_DESCRIPTION,
        openapi_tags=_TAGS,
        lifespan=lifespan,
        redirect_slashes=False,
        openapi_url=None if settings.role == "worker" else "/openapi.json",
        docs_url=None,
        redoc_url=None,
        # The framework's own spans have the queries and errors of requests in them; those of `tracing` do not.
        telemetry={"tracing": False, "metrics": False, "logs": False},
        responses={403: FOREIGN, **OF_CONNECTIONS},
    )
    app.state.service = service
    errors.install(app)
    app.add_middleware(
        BodyLimit,
        max_bytes=settings.max_body_bytes,
        max_total_bytes=settings.max_inflight_bytes,
        metrics=metrics,
    )
    if settings.api_keys_file is not None:
        keys = KeyFile(settings.api_keys_file)
        app.add_middleware(Access, keys=keys, rates=rates, open_metrics=settings.open_metrics, metrics=metrics)
    if settings.cors_origins:
        app.add_middleware(Preflights)
    app.add_middleware(Foreign, origins=settings.cors_origins, local=local, metrics=metrics)
    tracing.watch(app)
    app.add_middleware(Linger, max_bytes=settings.max_body_bytes)
    routers = _routers(settings)
    routes = [*app.routes, *(route for router, _ in routers for route in router.routes)]
    app.add_middleware(RequestContext, metrics=metrics, routes=routes)
    if settings.cors_origins:
        app.add_middleware(Readable, origins=settings.cors_origins)
    for router, options in routers:
        app.include_router(router, **options)
    return app


def _routers(settings: Settings) -> list[tuple[APIRouter, dict[str, Any]]]:
    """What this service answers, with what including each takes."""
    by_keys = guarded(settings.api_keys_file is not None)
    status_routers = [(status.router, {}), (status.scraped, {} if settings.open_metrics else by_keys)]
    if settings.role == "worker":
        return status_routers
    keyed = (images.router, jobs.router, models.router, openai.router, status.about)
    return [*((router, by_keys) for router in keyed), (page_router(), {}), *status_routers]
