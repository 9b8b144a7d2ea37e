"""The OpenAPI document says what the service does."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from service import connections, openai, schemas
from service.app import create_app
from service.openai import ImagesEditBody, ImagesGenerateBody
from service.routes.openapi import ERRORS
from service.schemas import Body, EditRequest, GenerateRequest, InpaintRequest
from service.settings import Settings
from tests.service.asked import events_of
from tests.service.helpers import Running, read_pixels

pytestmark = pytest.mark.anyio

OURS: dict[str, type[Body]] = {
    "/generate": GenerateRequest,
    "/edit": EditRequest,
    "/inpaint": InpaintRequest,
}
THEIRS: dict[str, type[Body]] = {
    "/v1/images/generations": ImagesGenerateBody,
    "/v1/images/edits": ImagesEditBody,
}
MODELS = OURS | THEIRS


@pytest.fixture
def document(settings: Settings) -> dict[str, Any]:
    return create_app(settings).openapi()


def test_every_endpoint_is_there(document: dict[str, Any]) -> None:
    status = {"/livez", "/readyz", "/capabilities", "/metrics"}
    models = {"/models", "/models/{name}/load", "/models/{name}/unload"}
    jobs = {"/jobs/{job_id}", "/jobs/{job_id}/events"}
    openai = {"/v1/models", "/v1/models/{name}"}
    assert set(document["paths"]) == {*MODELS, *status, *models, *jobs, *openai}


def test_every_header_is_told_of(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "keys").touch()
    document = create_app(settings.model_copy(update={"api_keys_file": tmp_path / "keys"})).openapi()
    for path, operations in document["paths"].items():
        for status, answer in next(iter(operations.values()))["responses"].items():
            told = answer["headers"].keys()
            assert "X-Request-ID" in told
            assert ("X-Should-Retry" in told) == (status >= "400"), (path, status)
            assert ("Retry-After" in told) == (status in ("429", "503")), (path, status)
            assert ("WWW-Authenticate" in told) == (status == "401"), (path, status)
            assert ("Server-Timing" in told) == (status == "200" and path in {*MODELS, "/jobs/{job_id}"}), path


def test_every_tag_is_told_of(document: dict[str, Any]) -> None:
    used = {tag for path in document["paths"].values() for operation in path.values() for tag in operation["tags"]}
    assert {tag["name"] for tag in document["tags"]} == used
    assert all(tag["description"] for tag in document["tags"])


def test_every_endpoint_tells_of_foreign_pages_and_names(document: dict[str, Any]) -> None:
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert "403" in operation["responses"], path


def test_every_endpoint_tells_what_its_connection_may_be_told(document: dict[str, Any]) -> None:
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert {"400", "408", "503"} <= operation["responses"].keys(), path
    for code in ("invalid_http", "head_timeout", "too_many_connections"):
        assert f"`{code}`" in document["info"]["description"]
        assert f'"{code}"' in Path(connections.__file__).read_text()
    examples = [
        document["paths"]["/livez"]["get"]["responses"][status]["content"]["application/json"]["example"]["error"]
        for status in ("400", "408", "503")
    ]
    assert [example["code"] for example in examples] == ["invalid_http", "head_timeout", "too_many_connections"]


@pytest.mark.parametrize("path", MODELS)
def test_bodies_have_every_field_in_both_forms(document: dict[str, Any], path: str) -> None:
    content = document["paths"][path]["post"]["requestBody"]["content"]
    names = {field.alias or name for name, field in MODELS[path].model_fields.items()}
    for kind in ("application/json", "multipart/form-data"):
        schema = content[kind]["schema"]
        assert set(schema["properties"]) == names
        assert schema["additionalProperties"] is False
    if "image" in names:
        assert content["multipart/form-data"]["schema"]["properties"]["image"]["format"] == "binary"
        assert content["application/json"]["schema"]["properties"]["image"]["contentEncoding"] == "base64"


@pytest.mark.parametrize("path", MODELS)
def test_every_error_is_documented_with_an_example_of_the_one_shape(document: dict[str, Any], path: str) -> None:
    responses = document["paths"][path]["post"]["responses"]
    accepted, raw = ({202}, {"image/png", "image/jpeg", "image/webp"}) if path in OURS else (set(), set())
    assert {int(status) for status in responses} == {200, *accepted, 403, *ERRORS}
    assert raw | {"application/json"} == set(responses["200"]["content"])
    for status in map(str, ERRORS):
        media = responses[status]["content"]["application/json"]
        assert media["schema"] == {"$ref": "#/components/schemas/ErrorResponse"}
        schemas.ErrorResponse.model_validate_json(json.dumps(media["example"]))
    assert "Retry-After" in responses["429"]["headers"]


@pytest.mark.parametrize("path", MODELS)
async def test_the_examples_are_valid(document: dict[str, Any], app: Running, path: str) -> None:
    body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    example = body["example"]
    MODELS[path].model_validate(example, strict=True)
    if "image" in example:
        read_pixels(base64.b64decode(example["image"]))
    answer = await app.post(path, **{**example, "prompt": "a cat"})
    assert answer.status_code == 200, answer.text


def test_an_edit_of_theirs_has_one_image_by_either_name(document: dict[str, Any]) -> None:
    schema = document["paths"]["/v1/images/edits"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert "image" in schema["required"]
    assert schema["properties"]["image"]["format"] == "binary"
    # In words alone: generators of requests fail at files that may be left out.
    assert "image[]" in schema["properties"]["image"]["description"]


def test_every_error_of_every_endpoint_has_the_one_shape(document: dict[str, Any]) -> None:
    assert not [name for name in document["components"]["schemas"] if "Validation" in name]
    for path, operations in document["paths"].items():
        for status, answer in next(iter(operations.values()))["responses"].items():
            if status >= "400" and path != "/readyz":
                schema = answer["content"]["application/json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/ErrorResponse"}, (path, status)


def test_every_success_has_an_example_that_is_valid(document: dict[str, Any]) -> None:
    checked = set()
    for path, operations in document["paths"].items():
        for status, answer in next(iter(operations.values()))["responses"].items():
            media = answer.get("content", {}).get("application/json")
            if status < "300" and media is not None:
                name = media["schema"]["$ref"].rpartition("/")[2]
                model = getattr(schemas, name, None) or getattr(openai, name)
                model.model_validate_json(json.dumps(media["example"]))
                checked.add(path)
    assert checked == document["paths"].keys() - {"/metrics", "/jobs/{job_id}/events"}
    events = document["paths"]["/jobs/{job_id}/events"]["get"]["responses"]["200"]["content"]["text/event-stream"]
    [(event, data)] = events_of(events["example"])
    assert (event, schemas.JobResponse.model_validate_json(json.dumps(data)).status) == ("done", "done")


async def test_the_document_is_served(app: Running) -> None:
    answer = await app.client.get("/openapi.json")
    assert answer.json()["info"]["title"] == "fewstep"
