"""The errors of the Python client outlive a copy and the way to another process, as pools of processes send them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest

from service import client
from service.client import (
    AnswerUnreadable,
    ClientError,
    JobFailed,
    ServiceError,
    TimeLimitPassed,
    Unreachable,
)

ERRORS = [
    ClientError("no"),
    ServiceError(429, "queue_full", "full", param="n", request_id="r1", retryable=True, retry_after_s=3.0),
    JobFailed("cancelled", "given up", param=None, request_id="r1", retryable=True),
    Unreachable("the connection broke"),
    TimeLimitPassed("late"),
    AnswerUnreadable("the answer is not a Job"),
]


def pickled(error: ClientError) -> ClientError:
    again: ClientError = pickle.loads(pickle.dumps(error))
    return again


@pytest.mark.parametrize("again", [pickled, copy.copy, copy.deepcopy])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_stays_what_it_was(error: ClientError, again: Callable[[ClientError], ClientError]) -> None:
    found = again(error)
    assert type(found) is type(error)
    assert (str(found), found.args, vars(found)) == (str(error), error.args, vars(error))


def test_these_are_all_errors_there_are() -> None:
    public = (getattr(client, name) for name in client.__all__)
    assert {kind for kind in public if isinstance(kind, type) and issubclass(kind, Exception)} == set(map(type, ERRORS))
