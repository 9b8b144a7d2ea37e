"""What every endpoint of the API is strict in: an option in the URL, or a body, that it does not know is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Depends, Request, Response
from fastapi.routing import APIRoute

from service.errors import ApiError, shown
from service.routes.openapi import example


async def known_options(request: Request) -> None:
    """A dependency: each option in the URL is one that the endpoint declares, and there once. Raises ApiError 422."""
    route: APIRoute = request.scope["route"]
    known = {field.alias for field in route.dependant.query_params}
    given = Counter(name for name, _ in request.query_params.multi_items())
    for name, times in given.items():
        if name not in known:
            raise ApiError(422, "unknown_field", f"there is no option {shown(name)!r} in the URL", param="query")
        if times > 1:
            raise ApiError(422, "duplicate_field", f"{name}: given more than once", param=name)


async def no_body(request: Request) -> None:
    """A dependency of endpoints that take no body. Raises ApiError 422, without reading it."""
    headers = request.headers
    if headers.get("content-length", "").strip("0") or "transfer-encoding" in headers:
        raise ApiError(422, "unknown_field", "this takes no body", param="body")


class Direct(APIRoute):
    """A route with no options in its URL, whose endpoint takes the request as it is.

    It leaves the framework nothing to solve, which would cost every request a quarter of a millisecond or more.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """What answers a request."""

        async def answer(request: Request) -> Response:
            await known_options(request)
            response: Response = await self.endpoint(request)
            return response

        return answer


OPTIONS = [Depends(known_options)]
OPTIONS_ALONE = [*OPTIONS, Depends(no_body)]

REFUSED: dict[int | str, dict[str, Any]] = {
    422: example(
        422,
        "There is no such option in the URL, or it has no such value, or there is a body",
        "unknown_field",
        "there is no option 'x' in the URL",
        "query",
    )
}
