"""The rates of API keys: in one process, and counted together in Redis by several."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.queue import keys
from service.queue.rates import RedisRates
from service.security.api_keys import ApiKey, digest_of
from service.security.rates import Rates, TokenBuckets
from service.settings import Settings
from tests.service.helpers import error, running
from tests.service.redis_server import RedisServer

DIGEST = digest_of("one")


class Clock:
    """A clock that goes when it is told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_minute_at_once_and_then_evenly() -> None:
    clock, key = Clock(), ApiKey("ann", DIGEST, per_minute=6)
    buckets = TokenBuckets(clock)
    assert [buckets.take(key) for _ in range(6)] == [0.0] * 6
    assert buckets.take(key) == pytest.approx(10)
    assert buckets.take(ApiKey("ben", DIGEST, per_minute=6)) == 0.0
    clock.now += 25
    assert [buckets.take(key), buckets.take(key)] == [0.0, 0.0]
    assert buckets.take(key) == pytest.approx(5)
    clock.now += 3600
    assert sum(buckets.take(key) == 0.0 for _ in range(20)) == 6


def test_no_rate_is_no_bound() -> None:
    buckets = TokenBuckets(Clock())
    assert {buckets.take(ApiKey("ann", DIGEST)) for _ in range(1000)} == {0.0}


@given(st.floats(0.01, 1e4), st.lists(st.floats(0, 100), max_size=20))
def test_who_waits_as_long_as_he_is_told_is_served_and_nobody_gets_more_than_his_rate(
    per_minute: float, pauses: list[float]
) -> None:
    clock, key = Clock(), ApiKey("ann", DIGEST, per_minute)
    buckets = TokenBuckets(clock)
    served = 0
    for pause in pauses:
        clock.now += pause
        if (wait_s := buckets.take(key)) > 0:
            # Retry-After has whole seconds.
            clock.now += math.ceil(wait_s)
            assert buckets.take(key) == 0.0
        served += 1
    assert served <= max(1.0, per_minute) + clock.now * per_minute / 60 + 1e-6


@pytest.fixture(params=["memory", "redis"])
async def rates(anyio_backend: str, request: pytest.FixtureRequest) -> AsyncIterator[Rates]:
    opened: Rates = TokenBuckets(Clock())
    if request.param == "redis":
        server: RedisServer = request.getfixturevalue("redis_server")
        opened = RedisRates(server.url)
    yield opened
    await opened.close()


@pytest.mark.anyio
async def test_a_key_has_its_rate_and_no_other_is_hindered(rates: Rates) -> None:
    slow = ApiKey("slow", DIGEST, per_minute=0.5)
    assert await rates.wait_s(slow) == 0.0
    for _ in range(2):
        assert 0 < await rates.wait_s(slow) <= 120
    assert await rates.wait_s(ApiKey("other", DIGEST, per_minute=0.5)) == 0.0
    few = ApiKey("few", DIGEST, per_minute=3)
    assert [await rates.wait_s(few) for _ in range(3)] == [0.0] * 3
    assert 0 < await rates.wait_s(few) <= 20
    assert {await rates.wait_s(ApiKey("free", DIGEST)) for _ in range(10)} == {0.0}


@pytest.mark.anyio
async def test_a_rate_that_is_raised_counts_at_once(rates: Rates) -> None:
    assert await rates.wait_s(ApiKey("ann", DIGEST, per_minute=0.1)) == 0.0
    assert await rates.wait_s(ApiKey("ann", DIGEST, per_minute=0.1)) > 500
    assert 0 < await rates.wait_s(ApiKey("ann", DIGEST, per_minute=60)) <= 1


@pytest.mark.anyio
async def test_who_asks_hundreds_of_times_at_once_has_no_more_than_the_rate(rates: Rates) -> None:
    key = ApiKey("ann", DIGEST, per_minute=3)
    waits = await asyncio.gather(*(rates.wait_s(key) for _ in range(500)))
    assert waits.count(0.0) == 3


@pytest.mark.anyio
async def test_a_redis_that_hangs_is_left_alone_for_a_while(
    anyio_backend: str, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    async def hangs(*_: object) -> int:
        asked.append(1)
        await asyncio.sleep(60)
        return 0

    monkeypatch.setattr("service.queue.rates._LONGEST_S", 0.1)
    rates = RedisRates(redis_server.url)
    monkeypatch.setattr(rates._redis, "run", hangs)
    key = ApiKey("ann", DIGEST, per_minute=1)
    assert await rates.wait_s(key) == 0.0
    assert 0 < await rates.wait_s(key) <= 60
    assert len(asked) == 1
    await rates.close()


@pytest.mark.anyio
@pytest.mark.parametrize("per_minute", [1e-300, 1e-9, 1e9, 1e300])
async def test_no_rate_is_too_small_or_too_large(rates: Rates, per_minute: float) -> None:
    key = ApiKey("ann", DIGEST, per_minute)
    assert await rates.wait_s(key) == 0.0
    assert (await rates.wait_s(key) > 1e6) is (per_minute < 1)


@pytest.mark.anyio
@pytest.mark.parametrize("per_minute", [0.9, 0.7, 0.35, 0.3, 0.1, 0.011])
async def test_a_new_key_has_a_request_however_its_rate_is_rounded(rates: Rates, per_minute: float) -> None:
    key = ApiKey("ann", DIGEST, per_minute)
    assert await rates.wait_s(key) == 0.0
    assert await rates.wait_s(key) == pytest.approx(60 / per_minute, abs=2)


@pytest.mark.anyio
async def test_a_bucket_in_redis_fills_as_time_goes_and_is_forgotten_when_it_is_full(
    anyio_backend: str, redis_server: RedisServer
) -> None:
    rates, key = RedisRates(redis_server.url), ApiKey("ann", DIGEST, per_minute=6)
    assert [await rates.wait_s(key) for _ in range(6)] == [0.0] * 6
    assert await rates.wait_s(key) > 0
    with redis_server.client() as client:
        assert 50_000 < client.pttl(keys.rate("ann")) <= 60_000
        # As if 25 seconds had gone by.
        full = float(client.get(keys.rate("ann")))  # type: ignore[arg-type]
        client.set(keys.rate("ann"), full - 25_000, px=60_000)
    assert [await rates.wait_s(key), await rates.wait_s(key)] == [0.0, 0.0]
    await rates.close()


@pytest.mark.anyio
async def test_a_bucket_in_redis_is_at_most_empty_after_its_clock_went_back(
    anyio_backend: str, redis_server: RedisServer
) -> None:
    rates, key = RedisRates(redis_server.url), ApiKey("ann", DIGEST, per_minute=1200)
    assert await rates.wait_s(key) == 0.0
    with redis_server.client() as client:
        client.incrbyfloat(keys.rate("ann"), 3_600_000)
    wait_s = await rates.wait_s(key)
    assert 0 < wait_s <= 0.05
    await asyncio.sleep(wait_s)
    assert await rates.wait_s(key) == 0.0
    await rates.close()


KEY = {"X-Api-Key": "key of ann"}


@pytest.mark.anyio
async def test_processes_that_share_a_redis_count_together_and_each_for_itself_while_it_is_away(
    anyio_backend: str, settings: Settings, redis_path: str, tmp_path: Path
) -> None:
    path = tmp_path / "keys"
    path.write_text(ApiKey("ann", digest_of("key of ann"), per_minute=2).line)
    with RedisServer(redis_path, tmp_path) as server:
        shared = settings.model_copy(update={"role": "api", "queue": server.url, "api_keys_file": path})
        async with running(shared) as one, running(shared) as other:
            for app in (one, other):
                assert (await app.client.get("/models", headers=KEY)).status_code == 200
            for app in (one, other):
                refused = await app.client.get("/models", headers=KEY)
                error(refused, 429, "rate_limited")
                assert 1 <= int(refused.headers["retry-after"]) <= 30
            server.stop()
            for app in (one, other):
                answers = [(await app.client.get("/models", headers=KEY)).status_code for _ in range(3)]
                assert answers == [200, 200, 429]
