"""What form an answer takes: JSON or one image's raw bytes, by the Accept header and the body's fields."""

from __future__ import annotations

from dataclasses import dataclass

from engines.images import FORMATS, ImageFormat
from service.errors import ApiError
from service.schemas import GenerateRequest

_JSON = "application/json"


@dataclass(frozen=True, slots=True)
class Rendering:
    """``raw``: the bytes of the one image; else JSON. ``format``: how the images are encoded."""

    raw: bool
    format: ImageFormat


def choose(accept: str | None, request: GenerateRequest) -> Rendering:
    """The form the client likes best, JSON where it has no preference. Raises ApiError 406."""
    formats = (request.output_format,) if request.output_format else FORMATS
    offers: dict[str, Rendering] = {_JSON: Rendering(False, formats[0])}
    if request.n == 1 and request.response_format is None:
        offers |= {f"image/{name}": Rendering(True, name) for name in formats}
    return _best(accept, offers)


def choose_kept(accept: str | None, image_format: ImageFormat, images: int) -> Rendering:
    """The same for images that are encoded already. Raises ApiError 406."""
    offers = {_JSON: Rendering(False, image_format)}
    if images == 1:
        offers[f"image/{image_format}"] = Rendering(True, image_format)
    return _best(accept, offers)


def _best(accept: str | None, offers: dict[str, Rendering]) -> Rendering:
    if accept is None or not accept.strip():
        return offers[_JSON]
    ranges = [_parse(part) for part in accept.split(",")]
    # max keeps the first of equals, and JSON is the first offer.
    best = max(offers, key=lambda offer: _liking(offer, ranges))
    if _liking(best, ranges) <= 0:
        listed = ", ".join(offers)
        raise ApiError(406, "not_acceptable", f"the answer to this request can be {listed}", param="accept")
    return offers[best]


def _parse(part: str) -> tuple[str, float]:
    kind, *parameters = (piece.strip().lower() for piece in part.split(";"))
    weights = [parameter[2:] for parameter in parameters if parameter.startswith("q=")]
    return kind, _weight(weights[0]) if weights else 1.0


def _weight(text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        return 0.0
    return weight if 0 <= weight <= 1 else 0.0


def _liking(offer: str, ranges: list[tuple[str, float]]) -> float:
    """The weight of the most specific range that matches, 0 where none does."""
    for pattern in (offer, f"{offer.split('/')[0]}/*", "*/*"):
        weights = [weight for kind, weight in ranges if kind == pattern]
        if weights:
            return max(weights)
    return 0.0
