"""Compiled plans on disk, outside of bundles: each under the key of all that it depends on. Compiles nothing."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

from engines.files import write_whole

Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
"""Of the arithmetic; int8 and fp8 are fp16 with the weights of products in 8 bits."""
MOST_ROWS = 256
"""In one tick of a service."""
REWRITING = 5
"""Raised whenever graphs come to be cast or checked, or plans to be built, in another way: older plans are not used."""
DIRECTORY_VARIABLE = "FEWSTEP_PLANS"

_MAX_RECORD_BYTES = 65536
_PARTIAL = re.compile(r"\.[0-9a-f]{16}")
_PARTIAL_KEPT_S = 24 * 3600.0

_log = logging.getLogger(__name__)


class PlanError(Exception):
    """A plan on disk that is damaged, or of another key than its name says; or no folder that plans can be kept in."""


def batch_sizes_up_to(largest: int) -> tuple[int, ...]:
    """The batch sizes that a service of so many rows a tick runs at: the powers of two below them, and all of them."""
    return tuple(sorted({largest} | {1 << k for k in range(largest.bit_length())}))


@dataclass(frozen=True)
class Profile:
    """The batch sizes that a plan runs at: each a fixed shape of its own, or any from 1 to the largest."""

    batch_sizes: tuple[int, ...]
    dynamic: bool = False

    def __post_init__(self) -> None:
        """Sort the sizes. Raises ValueError for none, or one below 1."""
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ValueError(f"batch sizes must be positive, and at least one: {self.batch_sizes}")
        object.__setattr__(self, "batch_sizes", tuple(sorted(set(self.batch_sizes))))

    @property
    def ranges(self) -> tuple[tuple[int, int, int], ...]:
        """The least, the usual and the largest batch of each shape that is compiled for."""
        if self.dynamic:
            largest = self.batch_sizes[-1]
            return ((1, largest, largest),)
        return tuple((size, size, size) for size in self.batch_sizes)

    def covers(self, other: Profile) -> bool:
        """Whether a plan of this profile serves who asks for the other: static, with its sizes; dynamic, as large."""
        if self.dynamic:
            return self.batch_sizes[-1] >= other.batch_sizes[-1]
        return not other.dynamic and set(self.batch_sizes) >= set(other.batch_sizes)

    def bucket(self, batch: int) -> int:
        """The place in `ranges` of the smallest shape that a batch fits. Raises ValueError for one too large."""
        for place, (_, _, largest) in enumerate(self.ranges):
            if batch <= largest:
                return place
        raise ValueError(f"a batch of {batch} is larger than the plan's largest, {self.batch_sizes[-1]}")

    def __str__(self) -> str:
        return f"1 to {self.batch_sizes[-1]}" if self.dynamic else ", ".join(map(str, self.batch_sizes))


@dataclass(frozen=True)
class PlanKey:
    """All that a plan depends on: the graph's SHA-256, what it is asked, the library, the chip, precision, profile.

    ``asked`` stands for the shapes that it was built for and the inputs that it was checked on, ``library`` has the
    version, and ``rewriting`` is how graphs were cast to that precision. Of a dynamic profile only the largest size
    counts.
    """

    graph: str
    asked: str
    library: str
    target: str
    precision: Precision
    profile: Profile
    rewriting: int = REWRITING

    def __post_init__(self) -> None:
        """Reduce a dynamic profile to what makes a difference."""
        if self.profile.dynamic:
            object.__setattr__(self, "profile", Profile(self.profile.batch_sizes[-1:], dynamic=True))

    @property
    def digest(self) -> str:
        """The key as a file name."""
        return hashlib.sha256(json.dumps(self.document, sort_keys=True).encode()).hexdigest()[:32]

    @property
    def document(self) -> dict[str, object]:
        """The key as JSON has it."""
        document: dict[str, object] = json.loads(json.dumps(asdict(self)))
        return document


def plans_folder() -> Path:
    """Where plans are kept: $FEWSTEP_PLANS, or the user's cache. Raises PlanError for a user without a home."""
    if given := os.environ.get(DIRECTORY_VARIABLE):
        return Path(given)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fewstep" / "plans"
    except RuntimeError as error:
        raise PlanError(f"there is no folder to keep plans in ({error}): name one in {DIRECTORY_VARIABLE}") from error


def make_folder(folder: Path) -> None:
    """Make a folder for plans. Raises PlanError where that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PlanError(f"the folder for plans, {folder}, cannot be made: {error.strerror}") from error


class PlanCache:
    """Plans in a folder. A file is a line of JSON, the record of the plan's key and its hash, and then the plan.

    They are one file, so that of several who save a plan of the same key none leaves another's record beside its own
    plan. What does not fit its record is never given out.
    """

    def __init__(self, folder: Path | None = None) -> None:
        """Use `folder`, by default `plans_folder()`; it appears with the first plan."""
        self.folder = folder or plans_folder()

    def path(self, key: PlanKey) -> Path:
        """Where the plan of a key is, or would be."""
        return self.folder / f"{key.digest}.plan"

    def find(self, key: PlanKey) -> tuple[bytes, Profile] | None:
        """A plan that serves who asks for that of a key, and its profile: that very plan, or one that covers it.

        What is damaged is passed over.
        """
        for profile in (key.profile, *self._covering(key)):
            try:
                plan = self.load(replace(key, profile=profile))
            except PlanError as error:
                _log.warning("a plan is passed over: %s", error)
            else:
                if plan is not None:
                    return plan, profile
        return None

    def _covering(self, key: PlanKey) -> list[Profile]:
        """The wider profiles of which there are plans for a key, best first: static ones, then the smallest."""
        found = []
        for path in self.folder.glob("*.plan"):
            try:
                with path.open("rb") as file:
                    document = _read_record(file)["key"]
                profile = Profile(tuple(document["profile"]["batch_sizes"]), document["profile"]["dynamic"])
            except (OSError, ValueError, KeyError, TypeError, RecursionError):
                continue
            is_wider = profile != key.profile and profile.covers(key.profile)
            if is_wider and document == replace(key, profile=profile).document:
                found.append(profile)
        return sorted(found, key=lambda profile: (profile.dynamic, profile.batch_sizes[-1], len(profile.batch_sizes)))

    def load(self, key: PlanKey) -> bytes | None:
        """The plan of a key, or None. Raises PlanError for one that is damaged or of another key."""
        path = self.path(key)
        try:
            with path.open("rb") as file:
                record, plan = _read_record(file), file.read()
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise PlanError(f"{path}: {error}") from error
        if record.get("key") != key.document:
            raise PlanError(
                f"{path}: its record is of another graph, use, library, chip, precision, profile or casting"
            )
        if record.get("sha256") != hashlib.sha256(plan).hexdigest():
            raise PlanError(f"{path}: its SHA-256 does not match its record")
        return plan

    def is_checked(self, key: PlanKey) -> bool:
        """Whether the plan of a key, where there is one, was seen to give what the graph gives."""
        try:
            with self.path(key).open("rb") as file:
                return _read_record(file).get("checked") is True
        except (OSError, ValueError, RecursionError):
            return False

    def save(self, key: PlanKey, plan: bytes, checked: bool = False) -> Path:
        """Keep a plan; an older one of the same key is replaced. Raises PlanError where it cannot be written.

        ``checked`` says that it ran, and gave what the graph gives.
        """
        path = self.path(key)
        sha256 = hashlib.sha256(plan).hexdigest()
        record = {"key": key.document, "sha256": sha256, "size_bytes": len(plan), "checked": checked}
        make_folder(self.folder)
        self._remove_partial()
        try:
            write_whole(path, json.dumps(record).encode() + b"\n", plan)
        except OSError as error:
            raise self._unwritable(error) from error
        return path

    def check_writable(self) -> None:
        """Make the folder, and a file in it that is gone at once. Raises PlanError where that fails."""
        make_folder(self.folder)
        try:
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise self._unwritable(error) from error

    def keep(self, key: PlanKey, plan: bytes) -> None:
        """Save a plan that was checked and is in use: one that cannot be written is built again at the next start."""
        try:
            self.save(key, plan, checked=True)
        except PlanError as error:
            _log.warning("a plan cannot be kept, and is built again at every start: %s", error)

    def mark_checked(self, key: PlanKey, plan: bytes) -> None:
        """Do so with one that was there: where nothing can be written it is checked again at the next start."""
        try:
            self.save(key, plan, checked=True)
        except PlanError as error:
            _log.warning("a plan cannot be marked as checked, and is checked at every start: %s", error)

    def _unwritable(self, error: OSError) -> PlanError:
        return PlanError(f"plans cannot be kept in {self.folder}: {error.strerror}")

    def _remove_partial(self) -> None:
        """Remove what was left by those who were killed while they wrote. Who still writes has a newer file."""
        oldest = time.time() - _PARTIAL_KEPT_S
        for path in self.folder.glob(".*"):
            with suppress(OSError):  # of another user, or removed by another process just now
                if _PARTIAL.fullmatch(path.name) and path.stat().st_mtime < oldest:
                    path.unlink()


def _read_record(file: BinaryIO) -> dict[str, Any]:
    """The record in front of a plan; the rest of the file is the plan. Raises ValueError where there is none."""
    record = json.loads(file.readline(_MAX_RECORD_BYTES))
    if not isinstance(record, dict):
        raise ValueError("its record is not a JSON object")
    return record
