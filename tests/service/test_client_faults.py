"""The Python client against a server that fails in every way a network has, and the laws of its retries."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import anyio
import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.client import (
    AnswerUnreadable,
    AsyncClient,
    Client,
    ClientError,
    Retries,
    ServiceError,
    TimeLimitPassed,
    Unreachable,
)
from service.client.bounded import within
from service.client.errors import as_client_errors
from service.client.tries import Tries
from service.schemas import ModelList
from tests.service.scripted import (
    Act,
    ScriptedServer,
    answers,
    breaks,
    cuts_short,
    drips,
    drips_its_head,
    hangs,
    refuses,
)

EMPTY = {"models": [], "memory_bytes": 0, "max_memory_bytes": 1}
GOOD = answers(200, json.dumps(EMPTY).encode())
SOON = Retries(tries=4, first_wait_s=0.01)

Ask = Callable[..., ModelList]


def ask_blocking(url: str, **options: Any) -> ModelList:
    with Client(url, **{"retries": SOON, "timeout_s": 30, **options}) as client:
        return client.models()


def ask_awaited(url: str, **options: Any) -> ModelList:
    async def ask() -> ModelList:
        async with AsyncClient(url, **{"retries": SOON, "timeout_s": 30, **options}) as client:
            return await client.models()

    return anyio.run(ask)


@pytest.fixture(params=[ask_blocking, ask_awaited], ids=["blocking", "awaited"])
def ask(request: pytest.FixtureRequest) -> Ask:
    """Asks for the models with either client."""
    found: Ask = request.param
    return found


@pytest.mark.parametrize(
    "fault",
    [
        breaks,
        cuts_short,
        refuses(503, "not_ready", retryable=True),
        refuses(429, "queue_full", retryable=True),
        refuses(500, "generation_failed", retryable=True),
        answers(502, b"<html>bad gateway</html>"),
        answers(503, b""),
        answers(504, b'{"error": "late"}'),
    ],
    ids=range(8),
)
def test_what_may_succeed_later_is_tried_again(ask: Ask, fault: Act) -> None:
    with ScriptedServer(fault, fault, GOOD) as server:
        assert ask(server.url).models == ()
        assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        (refuses(422, "invalid_value", retryable=False, param="steps"), 422, "invalid_value"),
        (refuses(500, "generation_failed", retryable=False), 500, "generation_failed"),
        (refuses(503, "model_unavailable", retryable=False, Retry_After="60"), 503, "model_unavailable"),
        (answers(404, b"<html>not here</html>"), 404, "http_404"),
        (answers(500, b"[" * 100_000), 500, "http_500"),
        (answers(307, b"", Location="http://127.0.0.1:1/"), 307, "http_307"),
        (answers(503, b'{"error": {"retryable": "false"}}'), 503, "http_503"),
    ],
    ids=range(7),
)
def test_what_will_not_succeed_is_tried_once(ask: Ask, fault: Act, status: int, code: str) -> None:
    with ScriptedServer(fault, GOOD) as server:
        with pytest.raises(ServiceError) as caught:
            ask(server.url)
        assert (caught.value.status, caught.value.code) == (status, code)
        assert len(server.requests) == 1


def test_an_error_says_what_the_service_said(ask: Ask) -> None:
    fault = refuses(422, "invalid_value", retryable=False, param="steps")
    with ScriptedServer(fault) as server, pytest.raises(ServiceError) as caught:
        ask(server.url)
    assert (caught.value.param, caught.value.request_id, caught.value.message) == ("steps", "r1", "-")


@pytest.mark.parametrize("body", [b"", b"hello", b"{}", b"[]", json.dumps({**EMPTY, "memory_bytes": "x"}).encode()])
def test_an_answer_of_something_else_is_said_to_be_one(ask: Ask, body: bytes) -> None:
    with ScriptedServer(answers(200, body), GOOD) as server:
        with pytest.raises(AnswerUnreadable):
            ask(server.url)
        assert len(server.requests) == 1


def test_fields_of_a_later_service_are_passed_over(ask: Ask) -> None:
    with ScriptedServer(answers(200, json.dumps({**EMPTY, "colour": "red"}).encode())) as server:
        assert ask(server.url).max_memory_bytes == 1


def test_tries_end(ask: Ask) -> None:
    with ScriptedServer(*[breaks] * 9) as server:
        with pytest.raises(Unreachable):
            ask(server.url)
        assert len(server.requests) == SOON.tries


def test_where_nobody_listens(ask: Ask) -> None:
    with socket.create_server(("127.0.0.1", 0)) as place:
        port = place.getsockname()[1]
    with pytest.raises(Unreachable):
        ask(f"http://127.0.0.1:{port}")


def test_a_service_that_starts_meanwhile_is_found(ask: Ask) -> None:
    with ScriptedServer(refuses(503, "not_ready", retryable=True, Retry_After="1"), GOOD) as server:
        began = time.monotonic()
        assert ask(server.url).models == ()
        assert time.monotonic() - began >= 1


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_a_retry_after_beyond_the_time_limit_ends_the_call_at_once(ask: Ask, form: str) -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=300), usegmt=True)
    value = "300" if form == "seconds" else date
    with ScriptedServer(refuses(429, "queue_full", retryable=True, Retry_After=value), GOOD) as server:
        began = time.monotonic()
        with pytest.raises(ServiceError) as caught:
            ask(server.url)
        assert time.monotonic() - began < 20
        assert caught.value.retry_after_s == pytest.approx(300, abs=20)
        assert len(server.requests) == 1


@pytest.mark.parametrize("value", ["soon", "-1", "", "1.5", f"Mon, 01 Jan 2024 00:00:00 +{'9' * 17}"])
def test_a_retry_after_of_another_kind_is_none(ask: Ask, value: str) -> None:
    with ScriptedServer(refuses(429, "queue_full", retryable=True, Retry_After=value), GOOD) as server:
        assert ask(server.url).models == ()


def test_redirects_that_do_not_end_are_no_answer(ask: Ask) -> None:
    kind = httpx.Client if ask is ask_blocking else httpx.AsyncClient
    circle = httpx.MockTransport(lambda request: httpx.Response(307, headers={"Location": request.url.path}))
    with pytest.raises(AnswerUnreadable, match="redirects"):
        ask("http://127.0.0.1:1", http=kind(transport=circle, follow_redirects=True))


@pytest.mark.parametrize("fault", [hangs, drips, drips_its_head])
def test_a_time_limit_holds_against_a_server_that_does_not_end(ask: Ask, fault: Act) -> None:
    with ScriptedServer(fault) as server:
        began = time.monotonic()
        with pytest.raises(TimeLimitPassed):
            ask(server.url, timeout_s=0.3)
        assert 0.3 <= time.monotonic() - began < 20


def test_bounded_work_gives_what_it_gives_or_is_left_behind() -> None:
    assert within(60, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        within(60, lambda: 1 // 0)
    released, ended = threading.Event(), threading.Event()
    with pytest.raises(TimeLimitPassed):
        within(0.01, lambda: released.wait(60) and ended.set())
    assert not ended.is_set()
    released.set()
    assert ended.wait(60)


def test_the_key_is_sent_and_not_shown(ask: Ask) -> None:
    with ScriptedServer(GOOD, GOOD) as server:
        ask(server.url, api_key="very-secret")
        ask(server.url)
        assert "authorization: bearer very-secret" in server.requests[0].lower()
        assert "authorization" not in server.requests[1].lower()
        assert "x-api-key" not in "".join(server.requests).lower()
    with Client("http://ann:secret-too@127.0.0.1", api_key="very-secret") as client:
        assert "secret" not in repr(vars(client))


@pytest.mark.parametrize("place", ["url", "http"])
def test_the_key_is_sent_beside_other_credentials(ask: Ask, place: str) -> None:
    kind = httpx.Client if ask is ask_blocking else httpx.AsyncClient
    with ScriptedServer(GOOD) as server:
        if place == "url":
            ask(server.url.replace("http://", "http://ann:pass@"), api_key="very-secret")
        else:
            ask(server.url, api_key="very-secret", http=kind(auth=("ann", "pass")))
        assert "x-api-key: very-secret\r\n" in server.requests[0].lower()
        assert "authorization: basic " in server.requests[0].lower()


@pytest.mark.parametrize("key", ["very-secret\n", " very-secret", "very-secr\u00e9t", "very\nsecret", ""])
def test_a_key_that_no_header_carries_is_refused_unquoted(key: str) -> None:
    with pytest.raises(ValueError, match="api_key") as caught:
        Client(api_key=key)
    assert "secr" not in str(caught.value)


def test_a_request_that_http_cannot_carry_is_not_tried_again_nor_quoted() -> None:
    with pytest.raises(ClientError) as caught, as_client_errors():
        raise httpx.LocalProtocolError("Illegal header value b'very-secret'")
    assert not caught.value.retryable
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("options", [{"url": "127.0.0.1:8000"}, {"timeout_s": 0}, {"timeout_s": float("nan")}])
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"url|timeout_s"):
        Client(**options)


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "http://ann:secret@",
        "http://ann:secret/@127.0.0.1",
        "http://127.0.0.1:port",
        "http://127.0.0.1:-1",
        "http://127.0.0.1:99999",
        "http://127.0.0.1:1\n",
        "http://[::1",
        "http://a..b",
        "http://xn--/",
        "https://\N{SNOWMAN}.example/",
        "http://127.0.0.1/?a=1",
        "http://127.0.0.1/?",
        "http://127.0.0.1/#a",
    ],
)
def test_a_url_that_no_call_could_be_made_with_is_refused_unquoted(url: str) -> None:
    with pytest.raises(ValueError, match=r"^url must ") as caught:
        Client(url)
    assert "secret" not in str(caught.value)
    assert caught.value.__context__ is None


@pytest.mark.parametrize(
    "url", ["http://host", "https://ann:p@[::1]:8000/a/", "http://a_b:80", "http://\u00fc.example"]
)
def test_a_url_of_any_host_is_taken(url: str) -> None:
    Client(url).close()


@pytest.mark.parametrize("options", [{"tries": 0}, {"first_wait_s": -1}, {"first_wait_s": 3, "longest_wait_s": 2}])
def test_retries_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="tries"):
        Retries(**options)


@given(st.integers(1, 10**6), st.none() | st.floats(0, 1e6), st.floats(0, 1, exclude_max=True), st.floats(0, 20))
def test_waits_grow_within_bounds_and_never_undercut_the_service(
    failed: int, retry_after_s: float | None, chance: float, first_wait_s: float
) -> None:
    retries = Retries(first_wait_s=first_wait_s)
    wait_s = retries.wait_s(failed, retry_after_s, chance)
    assert wait_s >= (retry_after_s or 0)
    assert wait_s <= max(retries.longest_wait_s, retry_after_s or 0)
    assert wait_s >= min(first_wait_s, retries.longest_wait_s) / 2
    assert retries.wait_s(failed + 1, retry_after_s, chance) >= wait_s


def wait_or_none(tries: Tries, retryable: bool) -> float | None:
    error = ClientError("no")
    error.retryable = retryable
    try:
        return tries.wait_after(error)
    except ClientError:
        return None


@given(st.lists(st.tuples(st.floats(0, 5), st.booleans()), max_size=10), st.integers(1, 6), st.floats(0.1, 20))
def test_a_call_waits_only_for_tries_that_begin_in_time(
    failures: list[tuple[float, bool]], most: int, timeout_s: float
) -> None:
    now = 0.0
    tries = Tries(Retries(tries=most, first_wait_s=0.5), timeout_s, lambda: now)
    for count, (spent_s, retryable) in enumerate(failures, start=1):
        now += spent_s
        wait_s = wait_or_none(tries, retryable)
        if wait_s is None:
            return
        now += wait_s
        assert retryable
        assert count < most
        assert tries.left_s() > 0
