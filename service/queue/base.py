"""The JobQueue seam: what passes between the API and the workers, and nothing of how it is stored."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from service.jobs import Finished, Job, Outcome

Stage = Literal["queued", "running"]
JobState = Literal["queued", "running", "done", "failed", "cancelled"]

WATCHED_S = 10.0
"""How long previews are made after somebody asked for one."""

FRESH_S = 1.0
"""How long an outcome stays whatever the bounds: who waits for it asks several times in that time."""

FARTHEST_POSITION = 100
"""Jobs that wait behind more than so many others are told no position."""

# A step of priority counts as so much age: so nothing is overtaken for ever.
HEAD_START_S = 10.0


class QueueFull(Exception):
    """There is no room, or not in time. Who comes back after ``retry_after_s``, in whole seconds, finds some."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(f"the queue is full; room is expected in {retry_after_s:.0f} s")
        self.retry_after_s = retry_after_s


class QueueUnavailable(Exception):
    """The queue cannot be reached now. Whether it has what was being submitted is not known."""

    def __init__(self) -> None:
        super().__init__("the queue cannot be reached")


@dataclass(frozen=True, slots=True)
class QueueStats:
    """Jobs that wait to be taken: how many, their cost in row-ticks, and the age of the oldest in seconds."""

    depth: int
    cost: int
    oldest_s: float


class KeyConflict(Exception):
    """The key that was given with a job names one that asks for something else."""

    def __init__(self) -> None:
        super().__init__("this key was used for another request")


@dataclass(frozen=True, slots=True)
class Keep:
    """That a job's outcome is kept for ``seconds``, for whoever asks and as often as they ask.

    ``note`` is the submitter's own and comes back in every status. A ``key`` names the job: as long as that is
    known and has not failed, submitting with the same key and ``digest`` gives this job and no other.
    """

    seconds: float
    note: str = ""
    key: str | None = None
    digest: str = ""


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much is kept at once: outcomes, and the bytes of their images.

    The oldest go first. The newest stays, and whatever is younger than `FRESH_S`.
    """

    outcomes: int = 1024
    bytes: int = 256 * 1024 * 1024


DEFAULT_BOUNDS = Bounds()


@dataclass(frozen=True, slots=True)
class Status:
    """How far a job has come whose outcome is kept.

    ``done`` of ``total`` row-ticks have run, ``left_s`` seconds are left to its deadline. ``position`` is how many
    jobs for its model wait before it by age and priority, None where it does not wait or more than FARTHEST_POSITION
    do. ``preview`` is the last one that its worker has shown, of a running job and only for who asked for it.
    """

    state: JobState
    done: int
    total: int
    left_s: float
    note: str
    position: int | None = None
    outcome: Outcome | None = None
    preview: bytes | None = None


def state_after(outcome: Outcome) -> JobState:
    """The state of a job that has this outcome."""
    if isinstance(outcome, Finished):
        return "done"
    return "cancelled" if outcome.reason == "cancelled" else "failed"


def worked_s(outcome: Outcome) -> float | None:
    """How long a worker was at what it finished, from the first stage to the last; None where it is not finished."""
    if not isinstance(outcome, Finished):
        return None
    return outcome.timings.encode_s + outcome.timings.denoise_s + outcome.timings.decode_s


def finishing_s(outcome: Outcome) -> float:
    """How long that was behind its last tick: to be decoded, checked and encoded, and until then; 0 where it is not."""
    return outcome.timings.decode_s if isinstance(outcome, Finished) else 0.0


def rank(since: float, priority: int) -> float:
    """When a job came, or would have come with no priority, to be where it is in the line. In seconds."""
    return since - HEAD_START_S * priority


LATE_S = 5.0
"""How long after its deadline a job has failed though no worker says so: perhaps there is none for it any more."""


PATIENCE_S = 3.0
"""How long a job waits for other workers before one takes it that can only fail it."""


class JobQueue(Protocol):
    """Jobs wait here, oldest first but for a head start of those with priority, bounded by their cost.

    The API side (coroutines) submits, waits and cancels; the worker side (blocking calls from threads of its
    own) takes and settles. Taking may hand out a job again after its worker died, so settling is idempotent.

    While the queue is away, ``submit``, ``ask``, ``holder``, ``status``, ``cancel`` and ``stats`` raise
    QueueUnavailable and ``outcome`` goes on waiting. The worker side never fails then: there is nothing to take, and
    outcomes are handed over later.
    """

    @property
    def durable(self) -> bool:
        """Whether what it accepted outlives this process, for others to go on with."""
        ...

    async def submit(self, job: Job, keep: Keep | None = None) -> str:
        """Accept the job, or raise QueueFull, also where it would come too late behind the others.

        A job that was refused, and comes again when it was told to with the same ``identity``, goes before newcomers.

        An accepted job is settled or cancelled, never lost.

        Without ``keep`` the submitter waits for its ``outcome``; with it anybody asks for its ``status``. Returns the
        id of the job: that of an older one where its key names one. Raises KeyConflict where that asks for another
        thing.
        """
        ...

    async def ask(self, job: Job, keep: Keep | None = None) -> None:
        """Raise what `submit` would raise now, and let nothing in. Of the tasks only their number and cost count.

        Who is refused here need not be refused again by `submit`: the same time is promised.
        """
        ...

    async def holder(self, keep: Keep) -> str | None:
        """The job that its key names, if it names one. Raises KeyConflict where that asks for another thing."""
        ...

    async def outcome(self, job_id: str) -> Outcome:
        """Wait for the outcome of a submitted job. It can be had once; KeyError for an unknown job."""
        ...

    async def status(self, job_id: str, preview: bool = False) -> Status:
        """How far a job has come whose outcome is kept. KeyError for one that is unknown, or no longer kept.

        ``preview`` asks for one: the worker learns of that with its next `progress`.
        """
        ...

    async def ended(self, job_id: str, wait_s: float) -> None:
        """Wait until a kept job is over, where that is known at once, at most ``wait_s``."""
        ...

    async def cancel(self, job_id: str) -> Stage | None:
        """Give the job up. Says how far it had come, None when it was over. Its outcome is forgotten, unless kept."""
        ...

    def take(self, rooms: Mapping[str, int], wait_s: float, refused: Collection[str] = ()) -> list[Job]:
        """Take waiting jobs for each model in ``rooms``: of at most so many images, but at least one where any waits.

        So jobs of one model wait behind those of no other. Waits up to ``wait_s`` seconds for a first job and not at
        all for more. Every job taken must be settled, also one that was cancelled meanwhile. A job that is handed out
        again comes alone, and nothing comes beside it until it is settled: it may have been what its worker died of.

        Jobs for models in ``refused`` can only be failed here. Where there may be other workers they are left to those,
        for PATIENCE_S and as long as any have jobs of the model.
        """
        ...

    def pass_on(self, job_id: str) -> bool:
        """Let others have a taken job that cannot be made here. False, and nothing, where it must be settled here."""
        ...

    def expect(self, model: str, per_second: float) -> None:
        """Learn how many row-ticks a second the warm-up of ``model`` has shown.

        It counts for who is let in until more is known.
        """
        ...

    def cancelled(self, job_ids: Iterable[str]) -> set[str]:
        """Which of these taken jobs were cancelled since."""
        ...

    def progress(self, done: Mapping[str, int]) -> set[str]:
        """Note how many row-ticks of these taken jobs have run. Returns those of which previews are wanted."""
        ...

    def show(self, job_id: str, preview: bytes) -> None:
        """Hand over a preview of a taken job."""
        ...

    def settle(self, job_id: str, outcome: Outcome) -> Outcome | None:
        """Hand over the outcome. The first call for a job counts and returns it, later ones do nothing and return None.

        A kept job that has failed by LATE_S stays so: that is handed over instead, and returned.

        None too while the queue is away: who made the queue is told when an outcome was handed over, and counts it.
        """
        ...

    def owes(self, model: str) -> bool:
        """Whether a job for ``model`` is not settled, waiting or with any worker. True while the queue is away."""
        ...

    def stats(self) -> QueueStats:
        """What waits now.

        What waits LATE_S after its deadline has failed, and is let go of here and at the door: who made the queue is
        told of each, once, and counts it.
        """
        ...

    async def close(self) -> None:
        """Let go of what the queue holds open. Nothing is called afterwards."""
        ...
