"""Ten thousand damaged bodies and ten thousand damaged images: no fault, no crash, and memory that stays flat."""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Iterator

import httpx
import pytest

from tests.service.helpers import Running, b64
from tests.service.mutations import image_files, mutated_image, mutated_json
from tests.service.test_fuzz import GOOD, NAMES

pytestmark = pytest.mark.anyio

FEW, MANY = 200, 10_000
MIB = 2**20
# What thousands of requests may leave behind after the first: arenas of the allocator, and no bodies.
WARM, GROWTH_BYTES = 2000, 32 * MIB

FILES = image_files()
how_many = pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """The lines that pytest would keep of every request are memory too."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


class Tally:
    """Holds every answer to be no fault, and memory to be flat; counts what the answers were."""

    def __init__(self, app: Running) -> None:
        self._app = app
        self._warm_bytes = 0.0
        self.answers: Counter[str] = Counter()

    def add(self, answer: httpx.Response, seed: str) -> None:
        code = {200: "image", 202: "job"}.get(answer.status_code) or answer.json()["error"]["code"]
        self.answers[code] += 1
        assert answer.status_code < 500, (seed, answer.text)
        if self.answers.total() == WARM:
            self._warm_bytes = self._app.metric("process_resident_memory_bytes")

    def close(self) -> None:
        print(dict(self.answers))
        if self._warm_bytes:
            assert self._app.metric("process_resident_memory_bytes") - self._warm_bytes < GROWTH_BYTES
        assert self._app.service.inflight == 0


@how_many
async def test_damaged_json(app: Running, count: int) -> None:
    tally = Tally(app)
    headers = {"Content-Type": "application/json"}
    for index in range(count):
        chance = random.Random(f"json {index}")
        path = chance.choice(["generate", "edit", "inpaint"])
        body = mutated_json(chance, GOOD, NAMES)
        tally.add(await app.client.post(f"/{path}", content=body, headers=headers), f"json {index}")
    tally.close()
    assert {"invalid_json", "invalid_value", "unknown_field", "image"} <= tally.answers.keys()


@how_many
async def test_damaged_images(app: Running, count: int) -> None:
    tally = Tally(app)
    for index in range(count):
        chance = random.Random(f"image {index}")
        name = chance.choice(sorted(FILES))
        fields = {"image": FILES["png"], "mask": FILES["png-1"]}
        field = chance.choice(sorted(fields))
        fields[field] = mutated_image(chance, FILES[name])
        path = "inpaint" if field == "mask" or chance.random() < 0.5 else "edit"
        sent = fields if path == "inpaint" else {"image": fields["image"]}
        if chance.random() < 0.5:
            answer = await app.client.post(f"/{path}", json={**_PROMPT, **{key: b64(sent[key]) for key in sent}})
        else:
            form = {key: str(value) for key, value in _PROMPT.items()}
            answer = await app.client.post(f"/{path}", data=form, files=sent)
        tally.add(answer, f"image {index}: {name}")
    tally.close()
    assert {"image", "undecodable", "too_many_pixels"} <= tally.answers.keys()


_PROMPT = {"prompt": "a cat", "steps": 1}


@pytest.mark.parametrize("name", FILES)
async def test_what_is_damaged_was_good_before(app: Running, name: str) -> None:
    answer = await app.client.post("/edit", json={**_PROMPT, "image": b64(FILES[name])})
    assert answer.status_code == {"webp-animated": 422, "jpeg-scans": 400}.get(name, 200), answer.text
