"""What the client raises: each a ClientError, which says whether the same call may succeed later."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx


class ClientError(Exception):
    """A call that gave no result. ``retryable``: the same call may succeed later.

    ``retry_after_s`` is the least time that the service wants to be left alone, where it said so.
    """

    retryable = False
    retry_after_s: float | None = None

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        """Have copies, also those in other processes, made of class, text and fields, not by the constructor."""
        return Exception.__new__, (type(self), *self.args), vars(self)


class ServiceError(ClientError):
    """The service answered that it will not, or cannot.

    ``code`` is for programs and ``message`` for people; ``param`` is the field at fault, if one is; ``request_id``
    finds the request in the service's log.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        request_id: str | None = None,
        retryable: bool = False,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(f"{message} ({status} {code}, request {request_id})")
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.request_id = request_id
        self.retryable = retryable
        self.retry_after_s = retry_after_s


class JobFailed(ClientError):
    """A job ended without images: it failed, or was cancelled. ``retryable``: submitted again, it may succeed."""

    def __init__(self, code: str, message: str, *, param: str | None, request_id: str | None, retryable: bool) -> None:
        super().__init__(f"{message} ({code}, request {request_id})")
        self.code = code
        self.message = message
        self.param = param
        self.request_id = request_id
        self.retryable = retryable


class Unreachable(ClientError):
    """The connection could not be made, or broke before the whole answer was there."""

    retryable = True


class TimeLimitPassed(ClientError):
    """The call's time limit passed."""

    def __init__(self, message: str = "the time limit passed before the answer came") -> None:
        super().__init__(message)


class AnswerUnreadable(ClientError):
    """What answered does not speak as this service does."""


@contextmanager
def as_client_errors() -> Iterator[None]:
    """Turn what httpx raises as it sends and receives into ClientError."""
    try:
        yield
    except httpx.ConnectTimeout as error:
        raise Unreachable("the connection was not made in time") from error
    except httpx.TimeoutException as error:
        raise TimeLimitPassed from error
    except httpx.LocalProtocolError:
        # Its text quotes what is wrong, which may be a secret.
        raise ClientError("the request is not one that HTTP can carry") from None
    except httpx.TransportError as error:
        raise Unreachable(str(error) or "the connection broke") from error
    except httpx.RequestError as error:
        raise AnswerUnreadable(str(error)) from error
