"""What ends a training command."""

from __future__ import annotations


class TrainingError(Exception):
    """A run that cannot go on; the message says why and what to do."""


class Stopped(Exception):
    """A signal asked the run to leave, and it saved its work."""
