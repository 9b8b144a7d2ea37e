"""The names of what the queue keeps in Redis. The Lua scripts make up the same names, and `settled:` with a job's id.

Everything but speeds and dead letters lasts only a little longer than the jobs it is for, or than their outcomes are
kept.
"""

from __future__ import annotations

from service.jobs import Priority

# One hash tag: all keys lie in one slot of a cluster, so that a script may touch any of them.
PREFIX = "{fewstep}:"

GRACE_S = 60.0
"""How long after its deadline a job is forgotten, whatever became of it."""

RESULT_TTL_S = 300.0
"""How long an outcome is kept that nobody asks for."""

SPEED_TTL_S = 24 * 3600.0
"""How long it is known how fast a model's jobs are finished, though none comes."""

MODELS = f"{PREFIX}models"
"""Set: models that were asked for lately."""

KEPT = f"{PREFIX}kept"
"""List: outcomes that are kept, the oldest first, as `when they expire in ms:bytes:id`."""

KEPT_ENDS = f"{PREFIX}kept-ends"
"""Sorted set: the entries of that list, by when they expire."""

KEPT_BYTES = f"{PREFIX}kept-bytes"
"""Number: the bytes of those outcomes."""

NOTHING = f"{PREFIX}nothing"
"""Never there: it is removed to see whether Redis takes writes."""

DEAD = f"{PREFIX}dead"
"""Stream: jobs that were given up, with their message."""


def jobs(model: str, priority: Priority) -> str:
    """Stream: an entry for each job of a model and priority that is not settled.

    Its consumer group is the model's workers.
    """
    return f"{PREFIX}jobs:{priority:d}:{model}"


def load(model: str) -> str:
    """Hash: the cost that waits in each of a model's streams, all that is outstanding, and what was promised last.

    And since when it is measured how fast jobs are finished, with the last pause that did not count, in ms; and how
    many jobs no worker took in time that nobody has counted yet.
    """
    return f"{PREFIX}load:{model}"


def speed(model: str) -> str:
    """Hash: how fast a model's jobs are finished, as expected or measured: in all, and alone. It outlasts them."""
    return f"{PREFIX}speed:{model}"


def promises(model: str) -> str:
    """Sorted set: requests for a model that were refused, by the time in ms at which they should come back."""
    return f"{PREFIX}promises:{model}"


def record(job_id: str) -> str:
    """Hash: a job's message, how far it has come, and who waits for it."""
    return f"{PREFIX}job:{job_id}"


def images(job_id: str) -> str:
    """String: a job's images and masks, where it has any."""
    return f"{PREFIX}images:{job_id}"


def result(job_id: str) -> str:
    """String: a job's outcome, until who waits has it, or for as long as it is kept."""
    return f"{PREFIX}result:{job_id}"


def claim(key: str) -> str:
    """Hash: the job that a client's key names, and the digest of what it asks for."""
    return f"{PREFIX}claim:{key}"


def preview(job_id: str) -> str:
    """String: a small image of how far a running job is, where somebody wants to see that."""
    return f"{PREFIX}preview:{job_id}"


def rate(key_name: str) -> str:
    """Number: when the bucket of an API key is full again, in ms on the clock of Redis."""
    return f"{PREFIX}rate:{key_name}"


def replies(process: str) -> str:
    """Stream: the jobs of an API process that have an outcome since."""
    return f"{PREFIX}replies:{process}"


def milliseconds(seconds: float) -> int:
    """The unit of time in Redis."""
    return round(seconds * 1000)
