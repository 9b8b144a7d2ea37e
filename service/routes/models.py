"""GET /models, and POST /models/{name}/load and /unload: which bundles are in memory."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Depends, Request

from service.errors import ApiError, model_refusals
from service.routes.examples import MODEL, MODELS, UNLOADED
from service.routes.openapi import error, success
from service.routes.strict import OPTIONS_ALONE, REFUSED
from service.runtime import Service
from service.schemas import Model, ModelList
from service.security.access import require_admin

router = APIRouter(tags=["models"], dependencies=OPTIONS_ALONE, responses=REFUSED)

_ERRORS: dict[int | str, dict[str, Any]] = {status: error(status) for status in (403, 404, 503, 504)}
_LOADED = success(MODEL, "It is loaded")
_UNLOADED = success(UNLOADED, "It is not loaded")
_ADMIN = [Depends(require_admin)]


@router.head("/models", include_in_schema=False)
@router.get(
    "/models", summary="The bundles there are", responses={200: success(MODELS, "Each of them"), 503: error(503)}
)
async def models(request: Request) -> ModelList:
    """Those that are loaded, and those that a request may name and are then loaded."""
    service: Service = request.app.state.service
    service.require_loaded()
    return await asyncio.to_thread(_listed, service)


@router.post("/models/{name}/load", summary="Load a bundle", responses={200: _LOADED, **_ERRORS}, dependencies=_ADMIN)
async def load(request: Request, name: str) -> Model:
    """Load it as its folder has it now; answered when it is warm.

    Requests that name it have it loaded by themselves; this spares the first of them the wait. Only this process loads
    it: workers elsewhere do so with the first job. A new revision takes over from the one that is loaded, which
    processes find out by themselves too. Where there is no room, the bundles that were used the least recently go
    first, when they are no longer in use.
    """
    service: Service = request.app.state.service
    service.require_loaded()
    await service.load(name, _deadline(request, service))
    return await _one(service, name)


@router.post(
    "/models/{name}/unload",
    summary="Give a bundle's memory back",
    responses={200: _UNLOADED, **_ERRORS},
    dependencies=_ADMIN,
)
async def unload(request: Request, name: str) -> Model:
    """Answered when all that use it are done and it is closed. A request that names it has it loaded anew."""
    service: Service = request.app.state.service
    service.require_loaded()
    before = await _found(service, name)  # Afterwards it may be in no folder any more.
    await service.unload(name, _deadline(request, service))
    gone = before or await _one(service, name)
    return gone.model_copy(update={"loaded": False, "in_use": 0, "stand_ins": {}})


def _deadline(request: Request, service: Service) -> float:
    began: float = request.state.began
    return began + service.settings.max_timeout_ms / 1000


def _listed(service: Service) -> ModelList:
    with model_refusals():
        states, default = service.models.states(), service.models.catalogue.default_name
    found = [
        Model(
            name=state.name,
            revision=state.revision,
            default=state.name == default,
            loaded=state.loaded and not state.retiring,
            in_use=state.holders,
            memory_bytes=state.memory_bytes,
            stand_ins=dict(state.stand_ins),
        )
        for state in states
    ]
    bound = None if service.settings.role == "api" else service.models.max_bytes
    return ModelList(models=tuple(found), memory_bytes=service.models.memory_bytes, max_memory_bytes=bound)


async def _one(service: Service, name: str) -> Model:
    if (found := await _found(service, name)) is None:
        raise ApiError(404, "model_not_found", f"no model {name[:100]!r} any more", param="model")
    return found


async def _found(service: Service, name: str) -> Model | None:
    listed = await asyncio.to_thread(_listed, service)
    named = (model for model in listed.models if name in (model.name, f"{model.name}@{model.revision}"))
    return next(named, None)
