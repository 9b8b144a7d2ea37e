"""Fixtures of the training tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="session")
def short_references() -> Iterator[None]:
    """The table of rounds compares with fewer steps of the guided teacher than it does outside of tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.rounds.REFERENCE_STEPS", 16)
        yield
