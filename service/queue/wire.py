"""Jobs and outcomes <-> bytes: JSON for what is small, beside it the bytes of images as they are."""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.pipeline import Edit, Generate, Inpaint, Task, Transfer
from service.jobs import Failed, Finished, Job, Outcome, Output, Priority, Timings

VERSION = 1

_KINDS: dict[str, type[Task]] = {"generate": Generate, "edit": Edit, "inpaint": Inpaint, "transfer": Transfer}
_NAMES = {kind: name for name, kind in _KINDS.items()}
_ARRAYS = frozenset({"image", "repaint", "blend"})
_SIZE_BYTES = 4


class WireError(Exception):
    """Bytes that this version cannot read."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A job's message, and its images and masks: an npz file, empty where it has none."""

    message: bytes
    images: bytes


def pack_job(job: Job) -> Packed:
    """Everything of a job but its two times, which mean nothing on other hosts. An image is packed once."""
    arrays: list[NDArray[Any]] = []
    fields = {
        "version": VERSION,
        "id": job.id,
        "request_id": job.request_id,
        "model": job.model,
        "priority": job.priority,
        "trace": job.trace,
        "output": asdict(job.output),
        "tasks": [_pack_task(task, arrays) for task in job.tasks],
        "arrays": len(arrays),
    }
    file = io.BytesIO()
    if arrays:
        np.savez(file, *arrays)
    return Packed(json.dumps(fields).encode(), file.getvalue())


def unpack_job(message: bytes, fetch_images: Callable[[], bytes], submitted: float, deadline: float) -> Job:
    """The job, with its times on this host's clock; ``fetch_images`` is called where it has any. Raises WireError."""
    fields = _read_json(message)
    try:
        arrays = _read_arrays(fetch_images(), fields["arrays"]) if fields["arrays"] else []
        tasks = tuple(_unpack_task(task, arrays) for task in fields["tasks"])
        output = Output(**fields["output"])
        model, trace = fields["model"], fields.get("trace", "")
        priority = Priority(fields.get("priority", Priority.NORMAL))
        return Job(fields["id"], fields["request_id"], tasks, output, submitted, deadline, model, trace, priority)
    except (LookupError, TypeError, ValueError) as error:
        raise WireError("the job has other fields than this version's") from error


def request_of(message: bytes) -> list[str]:
    """The id of a job's request, for a log line about a job that is not unpacked; none where it cannot be read."""
    try:
        return [str(_read_json(message)["request_id"])]
    except (WireError, KeyError):
        return []


def pack_outcome(outcome: Outcome) -> bytes:
    """The length of a header, the header in JSON, and the encoded images one after the other."""
    images: tuple[bytes, ...] = ()
    fields: dict[str, Any] = {"version": VERSION}
    if isinstance(outcome, Finished):
        images = outcome.images
        sizes = [len(image) for image in images]
        fields |= {"sizes": sizes, "timings": asdict(outcome.timings), "ticks": outcome.ticks}
    else:
        fields |= {"failed": asdict(outcome)}
    header = json.dumps(fields).encode()
    return b"".join((len(header).to_bytes(_SIZE_BYTES, "big"), header, *images))


def unpack_outcome(data: bytes) -> Outcome:
    """The outcome. Raises WireError."""
    start = _SIZE_BYTES + int.from_bytes(data[:_SIZE_BYTES], "big")
    fields = _read_json(data[_SIZE_BYTES:start])
    try:
        if "failed" in fields:
            return Failed(**fields["failed"])
        ends = np.cumsum([start, *fields["sizes"]]).tolist()
        if ends[-1] != len(data):
            raise WireError("the outcome is cut short")
        images = tuple(data[begin:end] for begin, end in pairwise(ends))
        return Finished(images, Timings(**fields["timings"]), tuple(fields["ticks"]))
    except (KeyError, TypeError, ValueError) as error:
        raise WireError("the outcome has other fields than this version's") from error


def _pack_task(task: Task, arrays: list[NDArray[Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {"kind": _NAMES[type(task)], **vars(task)}
    for name in _ARRAYS & fields.keys():
        if fields[name] is not None:
            fields[name] = _place(fields[name], arrays)
    return fields


def _place(array: NDArray[Any], arrays: list[NDArray[Any]]) -> int:
    """The array's place among ``arrays``: the images of one request start from the same one."""
    for place, other in enumerate(arrays):
        if other is array:
            return place
    arrays.append(array)
    return len(arrays) - 1


def _unpack_task(fields: dict[str, Any], arrays: list[NDArray[Any]]) -> Task:
    values = {name: value for name, value in fields.items() if name != "kind"}
    values |= {name: arrays[fields[name]] for name in _ARRAYS & fields.keys() if fields[name] is not None}
    return _KINDS[fields["kind"]](**values)


def _read_arrays(data: bytes, count: int) -> list[NDArray[Any]]:
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            return [file[f"arr_{place}"] for place in range(count)]
    except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise WireError("the images of the job are gone or damaged") from error


def _read_json(data: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise WireError("not a message") from error
    if not isinstance(fields, dict) or fields.get("version") != VERSION:
        raise WireError(f"not a message of version {VERSION}")
    return fields
