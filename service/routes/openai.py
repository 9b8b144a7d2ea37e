"""OpenAI's endpoints under /v1, for clients that speak it already. They make images as /generate and the others do."""

from __future__ import annotations

import asyncio
import base64
from datetime import UTC, datetime
from functools import partial
from typing import Any

from fastapi import APIRouter, Depends, Request, Response

from engines.manifest import Manifest
from service.answers import Ticket, server_timing, timings_ms
from service.bodies import FILE_FIELDS, check_fields, read_fields
from service.errors import ApiError, model_refusals
from service.jobs import Finished
from service.openai import (
    PARAMS,
    ImageData,
    ImagesAnswer,
    ImagesEditBody,
    ImagesGenerateBody,
    ModelCard,
    ModelCards,
)
from service.routes.examples import OPENAI_IMAGES, OPENAI_MODEL, OPENAI_MODELS
from service.routes.images import Dialect, make_images
from service.routes.openapi import TIMING_HEADERS, documented, error, success
from service.routes.strict import OPTIONS, REFUSED, no_body
from service.runtime import Service
from service.schemas import GenerateRequest

router = APIRouter(prefix="/v1", tags=["openai"], dependencies=OPTIONS)

_NO_BODY = [Depends(no_body)]

_LIST = "image[]"
_ANSWER = {**success(OPENAI_IMAGES, "The images"), "headers": TIMING_HEADERS}
_ALL: dict[int | str, dict[str, Any]] = {200: success(OPENAI_MODELS, "Each of them"), **REFUSED, 503: error(503)}
_ONE: dict[int | str, dict[str, Any]] = {
    200: success(OPENAI_MODEL, "A model"),
    **REFUSED,
    404: error(404),
    503: error(503),
}


@router.post("/images/generations", summary="Text to images", **documented(ImagesGenerateBody, _ANSWER))
async def openai_generations(request: Request) -> Response:
    """OpenAI's images.generate. What /generate knows beside their fields goes into extra_body."""
    return await _serve(request, ImagesGenerateBody)


@router.post("/images/edits", summary="Image and text to images", **documented(ImagesEditBody, _ANSWER))
async def openai_edits(request: Request) -> Response:
    """OpenAI's images.edit: /inpaint where there is a mask, else /edit.

    A mask marks by being wholly transparent, as theirs do, unless mask_mode says otherwise. One image is taken.
    """
    return await _serve(request, ImagesEditBody)


@router.head("/models", include_in_schema=False, dependencies=_NO_BODY)
@router.get("/models", summary="The bundles there are", responses=_ALL, dependencies=_NO_BODY)
async def openai_models(request: Request) -> ModelCards:
    """Each name once. /models says more."""
    service: Service = request.app.state.service
    service.require_loaded()
    found = await asyncio.to_thread(_manifests, service)
    return ModelCards(data=tuple(_card(name, manifest) for name, manifest in found.items()))


@router.head("/models/{name}", include_in_schema=False, dependencies=_NO_BODY)
@router.get("/models/{name}", summary="One bundle", responses=_ONE, dependencies=_NO_BODY)
async def openai_model(request: Request, name: str) -> ModelCard:
    """By its name, or by name@revision."""
    service: Service = request.app.state.service
    service.require_loaded()
    return _card(name, await asyncio.to_thread(service.manifest, name))


async def _serve(request: Request, model: type[ImagesGenerateBody]) -> Response:
    return await make_images(request, partial(_read, model), _THEIRS)


async def _read(model: type[ImagesGenerateBody], request: Request, service: Service) -> GenerateRequest:
    fields, typed = await read_fields(request, service, FILE_FIELDS | {_LIST})
    if not typed and _LIST in fields:
        if "image" in fields:
            raise ApiError(422, "duplicate_field", "one image is taken", param="image")
        fields = {("image" if name == _LIST else name): value for name, value in fields.items()}
    return check_fields(model, fields, typed).request()


def _render(_: str, ticket: Ticket, finished: Finished, raw: bool, total_s: float) -> Response:
    assert not raw  # Their bodies ask for b64_json.
    images = zip(ticket.seeds, finished.images, strict=True)
    answer = ImagesAnswer(
        created=ticket.created,
        data=tuple(ImageData(b64_json=base64.b64encode(data).decode(), seed=seed) for seed, data in images),
        output_format=ticket.format,
        size=f"{ticket.width}x{ticket.height}",
    )
    headers = server_timing(timings_ms(finished, total_s))
    return Response(answer.model_dump_json(), headers=headers, media_type="application/json")


_THEIRS = Dialect(_render, PARAMS, gives_jobs=False)


def _manifests(service: Service) -> dict[str, Manifest]:
    with model_refusals():
        entries, _ = service.models.catalogue.read()
    return {entry.manifest.name: entry.manifest for entry in entries}


def _card(name: str, manifest: Manifest) -> ModelCard:
    return ModelCard(id=name, created=_unix_time(manifest.provenance.created), owned_by="fewstep")


def _unix_time(text: str) -> int:
    try:
        made = datetime.fromisoformat(text)
    except ValueError:
        return 0
    return int((made if made.tzinfo else made.replace(tzinfo=UTC)).timestamp())
