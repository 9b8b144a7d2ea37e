"""schemathesis against the OpenAPI document: what it says is what is answered, whatever is asked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, reject, settings, strategies
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from service.app import create_app
from service.settings import Settings
from tests.service.helpers import listening

DOCUMENT = create_app(Settings()).openapi()
OPERATIONS = [(path, method) for path, methods in DOCUMENT["paths"].items() for method in methods]
WITH_BODIES = [(path, method) for path, method in OPERATIONS if "requestBody" in DOCUMENT["paths"][path][method]]

FEW, MANY = 12, 400
PATIENCE_MS = 30_000
how_many = pytest.mark.parametrize("examples", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])


@pytest.fixture(scope="module")
def address(bundle_path: Path) -> Iterator[str]:
    """A service that listens, and is ready."""
    some = Settings(bundle=str(bundle_path), backend="fake", threads=1)
    with listening(create_app(some)) as port:
        yield f"http://127.0.0.1:{port}"


@how_many
@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_every_answer_is_documented_and_none_is_a_fault(address: str, path: str, method: str, examples: int) -> None:
    ask(address, path, method, GenerationMode.POSITIVE, examples)


@how_many
@pytest.mark.parametrize(("path", "method"), WITH_BODIES)
def test_what_the_document_forbids_is_refused_as_documented(
    address: str, path: str, method: str, examples: int
) -> None:
    ask(address, path, method, GenerationMode.NEGATIVE, examples)


def ask(address: str, path: str, method: str, mode: GenerationMode, examples: int) -> None:
    """Ask in many ways, and hold every answer to the document."""
    operation = schemathesis.openapi.from_dict(DOCUMENT)[path][method]

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(case=_generated(operation.as_strategy(generation_mode=mode)))
    def asked(case: schemathesis.Case) -> None:
        _give_time(case.body)
        # What the schema allows may still be more than the bundle can: that is a 422, and documented.
        case.call_and_validate(base_url=address, excluded_checks=[positive_data_acceptance])

    asked()


@strategies.composite
def _generated(draw: strategies.DrawFn, cases: strategies.SearchStrategy[schemathesis.Case]) -> schemathesis.Case:
    """A case, passed over where the generator itself fails: it cannot check some mutations of forms with files."""
    try:
        return draw(cases)
    except ValueError as error:
        if "Unsupported type: 'Binary'" not in str(error):
            raise
        reject()


def _give_time(body: Any) -> None:
    """A request that leaves the service two milliseconds gets a 504, as it should, and is not a fault."""
    if isinstance(body, dict) and isinstance(limit := body.get("timeout_ms"), int | float) and 0 < limit < PATIENCE_MS:
        body["timeout_ms"] = PATIENCE_MS
