"""What pydantic found wrong with a document or with settings, in words for people."""

from __future__ import annotations

from pydantic_core import ErrorDetails

# What pydantic puts before the words of a validator that is not its own.
_PREFIX = "Value error, "


def problem_of(found: ErrorDetails) -> str:
    """Where it is, for what is wrong in one place, and what it is."""
    place = ".".join(map(str, found["loc"]))
    message = found["msg"].removeprefix(_PREFIX)
    return f"{place}: {message}" if place else message
