"""The page at / and its files, under a policy that lets it talk to this service alone."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Response

from service.errors import ApiError

_FOLDER = Path(__file__).parent.parent / "playground"
# Not from the host's table of types, which may be empty or wrong.
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def page_router() -> APIRouter:
    """Routes for ``index.html`` at / and for the other files at /playground/<name>, read once."""
    files = {path.name: path.read_bytes() for path in _FOLDER.iterdir() if path.suffix in _TYPES}
    router = APIRouter(include_in_schema=False)

    @router.api_route("/", methods=["GET", "HEAD"])
    async def page() -> Response:
        return _answer("index.html")

    @router.api_route("/playground/{name}", methods=["GET", "HEAD"])
    async def page_file(name: str) -> Response:
        return _answer(name)

    def _answer(name: str) -> Response:
        data = files.get(name)
        if data is None:
            raise ApiError(404, "not_found", "Nothing matches the given URI")
        return Response(data, headers=_HEADERS, media_type=_TYPES[Path(name).suffix])

    return router
