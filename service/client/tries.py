"""How often a call is tried, and how long it waits in between. Sends nothing and sleeps nowhere."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from service.client.errors import ClientError, TimeLimitPassed

_LONGEST_S = 1e9  # thirty years, about what sockets and threads can count


@dataclass(frozen=True, slots=True)
class Retries:
    """A call is tried ``tries`` times at most, and only after errors that are retryable.

    Waits begin at ``first_wait_s`` and double up to ``longest_wait_s``, each shortened at random by up to half so
    that clients do not come back together. The service's Retry-After is a lower bound.
    """

    tries: int = 5
    first_wait_s: float = 0.5
    longest_wait_s: float = 20.0

    def __post_init__(self) -> None:
        if self.tries < 1 or not 0 <= self.first_wait_s <= self.longest_wait_s:
            raise ValueError("tries must be 1 or more, and 0 <= first_wait_s <= longest_wait_s")

    def wait_s(self, failed: int, retry_after_s: float | None, chance: float) -> float:
        """Seconds to wait after ``failed`` tries; ``chance`` lies in [0, 1)."""
        # Beyond some tens of doublings a float would overflow.
        backoff_s = min(self.longest_wait_s, self.first_wait_s * 2.0 ** min(failed - 1, 60))
        return max(backoff_s * (1 - chance / 2), retry_after_s or 0.0)


class Tries:
    """The tries of one call within its time limit."""

    def __init__(self, retries: Retries, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._retries = retries
        self._clock = clock
        self._end = clock() + min(timeout_s, _LONGEST_S)
        self._failed = 0

    def left_s(self) -> float:
        """Seconds that are left for the next try. Raises TimeLimitPassed."""
        left_s = self._end - self._clock()
        if left_s <= 0:
            raise TimeLimitPassed
        return left_s

    def wait_after(self, error: ClientError) -> float:
        """Seconds to wait before the next try. Raises the error where there is none, or none in time."""
        self._failed += 1
        if not error.retryable or self._failed >= self._retries.tries:
            raise error
        wait_s = self._retries.wait_s(self._failed, error.retry_after_s, random.random())
        if self._clock() + wait_s >= self._end:
            raise error
        return wait_s
