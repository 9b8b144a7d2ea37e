"""The page at / and its files, under a policy that lets it talk to this service alone."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fastapi import APIRouter, Request, Response

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


def page_router(folder: Path = _FOLDER) -> APIRouter:
    """Routes for ``index.html`` at / and for the other files at /playground/<name>, read once."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in _TYPES}
    router = APIRouter(include_in_schema=False)

    @router.api_route("/", methods=["GET", "HEAD"])
    async def page(request: Request) -> Response:
        return _answer(request, "index.html")

    @router.api_route("/playground/{name}", methods=["GET", "HEAD"])
    async def page_file(request: Request, name: str) -> Response:
        return _answer(request, name)

    def _answer(request: Request, name: str) -> Response:
        data = files.get(name)
        if data is None:
            raise ApiError(404, "not_found", "Nothing matches the given URI")
        tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
        headers = {**_HEADERS, "ETag": tag}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(data, headers=headers, media_type=_TYPES[Path(name).suffix])

    return router
