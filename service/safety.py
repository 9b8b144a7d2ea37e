"""The safety check that an operator may plug in. None is the honest default: the service judges no content itself.

``FEWSTEP_SAFETY=module:callable`` names a callable of a prompt (or class) and an image, which returns None or the
reason for a refusal, which the client is told. It is asked about each prompt before its job is queued, with None for
the image, by the process that takes the request; and about each finished image and each preview, before it is encoded,
by the process that made it. Prompts have a thread of their own and images another: a process that does both may ask
about a prompt and an image at once. Finished images wait for their check, and ticks wait while two batches of them do.
A thread that gives no answer in time is left to itself, and the next question has another.
"""

from __future__ import annotations

import importlib
import logging
import threading
from collections.abc import Callable
from functools import partial

from engines.tasks import Pixels, words_of
from service.jobs import Failed, Job
from service.telemetry.logs import describe
from service.telemetry.metrics import Metrics
from service.threads import Helper

logger = logging.getLogger(__name__)

_REASON_CHARS = 200
_MOST_LEFT = 3
"""Threads without an answer, while which nothing more is asked."""
_BROKEN = Failed("engine", "the safety check failed, so nothing is let through", "safety_check_failed")

Check = Callable[[str, Pixels | None], object]


class Safety:
    """What a check lets through.

    It fails closed: an exception, an answer that is not text, and none within ``timeout_s`` refuse too. While three
    questions are without an answer no other is asked: all is refused.
    """

    def __init__(self, check: Check, metrics: Metrics, timeout_s: float = 10.0) -> None:
        self._check = check
        self._metrics = metrics
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._helpers = dict[bool, Helper]()
        self._left = list[Helper]()

    def close(self) -> None:
        """End the threads, without waiting for those that have no answer yet."""
        with self._lock:
            for helper in self._helpers.values():
                helper.close()
            self._helpers.clear()

    def refuse_prompt(self, job: Job) -> Failed | None:
        """Why a prompt or class of a job is refused, as its outcome; None where it is not."""
        for condition in dict.fromkeys(words for task in job.tasks for words in words_of(task)):
            if (refusal := self._refusal("prompt", job, condition, None)) is not None:
                return refusal
        return None

    def refuse_image(self, job: Job, condition: str, image: Pixels) -> Failed | None:
        """Why an image of a job is refused, uint8 with shape (H, W, 3); None where it is not."""
        return self._refusal("image", job, condition, image)

    def refuse_preview(self, job: Job, condition: str, image: Pixels) -> Failed | None:
        """The same of an image in the making. It is only not shown: the finished one is judged for itself."""
        return self._refusal("preview", job, condition, image)

    def _refusal(self, stage: str, job: Job, condition: str, image: Pixels | None) -> Failed | None:
        try:
            reason = self._answer(condition, image)
            if reason is not None and not isinstance(reason, str):
                raise TypeError("a safety check returns None or text")
        except BaseException as error:  # A check that gives up, or exits, lets nothing through either.
            fields = {"stage": stage, "requests": [job.request_id], **describe(error)}
            logger.error("the safety check failed", extra=fields)
            return _BROKEN
        if reason is None:
            return None
        self._metrics.refused.labels(stage).inc()
        said = reason[:_REASON_CHARS].encode("utf-8", "replace").decode()  # Half a surrogate pair is no JSON.
        return Failed("invalid", f"the {stage} is refused: {said}", "content_refused")

    def _answer(self, condition: str, image: Pixels | None) -> object:
        of_image = image is not None
        with self._lock:
            self._left = [helper for helper in self._left if helper.is_alive]
            if len(self._left) >= _MOST_LEFT:
                raise TimeoutError(f"{len(self._left)} earlier questions have no answer yet")
            helper = self._helpers.setdefault(of_image, Helper("safety"))
            asked = helper.submit(partial(self._check, condition, image))
        try:
            return asked.result(self._timeout_s)
        except TimeoutError:
            asked.cancel()
            with self._lock:
                if self._helpers.get(of_image) is helper:
                    self._left.append(self._helpers.pop(of_image))
            helper.close()
            raise


def find_check(name: str) -> Check:
    """The callable that ``module:callable`` names. Raises ValueError."""
    module, _, attribute = name.partition(":")
    try:
        found: Check = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"no safety check {name!r}: {error}") from error
    if not callable(found):
        raise ValueError(f"no safety check {name!r}: it cannot be called")
    return found


def open_safety(name: str | None, metrics: Metrics, timeout_s: float) -> Safety | None:
    """The check of that name, None for None. Raises ValueError."""
    return None if name is None else Safety(find_check(name), metrics, timeout_s)
