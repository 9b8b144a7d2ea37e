"""Tasks -> rows -> ticks -> images. Knows a bundle and its engines; knows nothing of HTTP or queues."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Self, TypeVar

import numpy as np

from engines.backends import open_engines
from engines.backends.base import BATCH_SIZES, Array, Engine, EngineError, EngineOptions
from engines.bundle import Bundle, BundleError, load_bundle
from engines.conditions import Condition, ConditionCache
from engines.images import from_pixels, to_pixels
from engines.manifest import ATTENTION_MASK, LABEL, Manifest
from engines.masks import joined
from engines.plans import Precision, Profile
from engines.rows import Group, Row, TickInputs, initial_noise, start_row
from engines.tasks import (
    MAX_SEED,
    Edit,
    Floats,
    Generate,
    Inpaint,
    Pixels,
    Task,
    TaskError,
    check_task,
    kept_steps,
    lowest_strength,
)
from engines.tokenizer import PromptSize, Tokenizer, TokenizerError

__all__ = [
    "MAX_SEED",
    "Edit",
    "Generate",
    "Group",
    "Inpaint",
    "Pipeline",
    "Row",
    "Task",
    "TaskError",
    "initial_noise",
    "kept_steps",
    "lowest_strength",
]

_Item = TypeVar("_Item")


class Pipeline:
    """A bundle with every graph of it open on one backend. Its methods may be called from several threads.

    An image made alone and the same made in any batch differ by at most 2 of 255 in any value.
    """

    def __init__(self, bundle: Bundle, engines: Mapping[str, Engine], batch_sizes: Sequence[int] = BATCH_SIZES) -> None:
        """Take the engines of ``bundle`` by the file name of their graph; the pipeline closes them."""
        if not batch_sizes or min(batch_sizes) < 1:
            raise ValueError("batch_sizes must be positive, and at least one")
        self.bundle = bundle
        self.batch_sizes = tuple(sorted(set(batch_sizes)))
        self.backend, self.passed_over = "given", dict[str, str]()
        self._engines = dict(engines)
        self.seconds: dict[int, dict[int, float]] = {}
        self._inputs = TickInputs()
        self._conditions = ConditionCache()
        self._tokenizer = _open_tokenizer(bundle)

    @classmethod
    def open(
        cls,
        path: Path | str,
        backend: str = "ort",
        threads: int = 0,
        batch_sizes: Sequence[int] = BATCH_SIZES,
        precision: Precision = "fp32",
        plans: Path | None = None,
    ) -> Self:
        """Load and verify the bundle at ``path`` and open its graphs on ``backend``, "auto" for the best that works.

        ``precision`` and ``plans`` (the folder of compiled plans) are for backends that compile. Raises BundleError
        for a bad bundle and EngineError for a graph that does not open or differs from what the manifest says.
        """
        bundle = load_bundle(path)
        options = EngineOptions(threads, precision, Profile(tuple(batch_sizes)), plans)
        opened = open_engines(backend, bundle.graphs(), options)
        with ExitStack() as closing:
            for engine in opened.engines.values():
                closing.push(engine)
            pipeline = cls(bundle, opened.engines, batch_sizes)
            closing.pop_all()
        pipeline.backend, pipeline.passed_over = opened.backend, dict(opened.passed_over)
        return pipeline

    def __enter__(self) -> Self:
        """Return the pipeline, which is open already."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close every engine."""
        self.close()

    def close(self) -> None:
        """Close every engine; the pipeline cannot be used afterwards."""
        with ExitStack() as closing:
            for engine in self._engines.values():
                closing.push(engine)

    @property
    def manifest(self) -> Manifest:
        """What the bundle says of itself."""
        return self.bundle.manifest

    @property
    def max_rows(self) -> int:
        """Rows of the largest batch that is warmed up."""
        return self.batch_sizes[-1]

    def warmup(self) -> dict[int, dict[int, float]]:
        """Run every graph at every batch size; return seconds of a tick by steps of the student and rows.

        They stay in ``seconds``. Each is of a second run, as the first one of a size may compile or capture.
        """
        seconds: dict[str, dict[int, float]] = {student.graph: {} for student in self.manifest.students}
        for name, engine in self._engines.items():
            engine.warmup(self.batch_sizes)
            for size in self.batch_sizes if name in seconds else ():
                seconds[name][size] = _seconds_of_run(engine, size)
        self.seconds = {student.steps: seconds[student.graph] for student in self.manifest.students}
        return self.seconds

    def validate(self, task: Task) -> None:
        """Raise TaskError where the bundle cannot honour ``task``. Cheap: calls no engine."""
        check_task(task, self.manifest, self._measure)

    def at_hand(self, task: Task) -> bool:
        """Whether `prepare` needs no engine for ``task``: its prompt is kept, and no image is to be encoded."""
        encodes_image = isinstance(task, Edit | Inpaint) and self.manifest.encode is not None
        return not encodes_image and (self._tokenizer is None or task.condition in self._conditions)

    def prepare(self, tasks: Sequence[Task]) -> list[Row]:
        """Encode conditions and images and place every task at its start on the grid. Order is kept.

        Raises TaskError for a task that `validate` refuses, before any engine is called.
        """
        for task in tasks:
            self.validate(task)
        conditions = self._encode_conditions([task.condition for task in tasks])
        images = {id(task.image): task.image for task in tasks if isinstance(task, Edit | Inpaint)}
        latents = dict(zip(images, self._encode_images(list(images.values())), strict=True))
        return [
            start_row(
                task,
                revision=self.manifest.revision,
                student=self.bundle.student(task.steps),
                condition=condition,
                shape=self.manifest.latent_shape,
                latent=latents[id(task.image)] if isinstance(task, Edit | Inpaint) else None,
            )
            for task, condition in zip(tasks, conditions, strict=True)
        ]

    def tick(self, rows: Sequence[Row]) -> None:
        """Move every row one step along its grid, in one call of the step engine.

        All rows must be of one group and not done, or ValueError. When the call fails (EngineError), no row
        has changed.
        """
        groups = {row.group for row in rows}
        if len(groups) != 1 or next(iter(groups)).revision != self.manifest.revision:
            raise ValueError(f"a tick needs rows of one group of this bundle, got {groups or 'none'}")
        if any(row.done for row in rows):
            raise ValueError("a row is done already")
        inputs = self._inputs.of(rows)
        z_next = self._engines[rows[0].student.graph].run(inputs)["z_next"]
        if not np.isfinite(z_next).all():
            raise EngineError("the step graph gave values that are not finite")
        self._inputs.move(rows, inputs, z_next)

    def finish(self, rows: Sequence[Row]) -> list[Pixels]:
        """Decode rows that are done (else ValueError) to uint8 (H, W, 3). Kept pixels come back exactly."""
        if not all(row.done for row in rows):
            raise ValueError("a row is not done yet")
        decoded = self.decode([row.z for row in rows])
        return [_paste(row.task, image) for row, image in zip(rows, decoded, strict=True)]

    def decode(self, latents: Sequence[Floats]) -> list[Pixels]:
        """Latents (c, h, w) as images, uint8 (H, W, 3)."""
        if self.manifest.decode is None:
            return [to_pixels(latent) for latent in latents]
        engine = self._engines[self.manifest.decode]
        return [
            to_pixels(image)
            for batch in self._batches(latents)
            for image in engine.run({"latent": np.stack(batch)})["image"]
        ]

    def run(self, tasks: Sequence[Task], progress: Callable[[int], None] | None = None) -> list[Pixels]:
        """Make the images of ``tasks``, batching what can share ticks.

        ``progress`` is called after every tick with the number of rows it moved.
        """
        rows = self.prepare(tasks)
        for group in {row.group for row in rows}:
            while moving := [row for row in rows if row.group == group and not row.done]:
                for batch in self._batches(moving):
                    self.tick(batch)
                    if progress is not None:
                        progress(len(batch))
        return self.finish(rows)

    def _batches(self, items: Sequence[_Item]) -> Iterator[Sequence[_Item]]:
        for start in range(0, len(items), self.max_rows):
            yield items[start : start + self.max_rows]

    def _measure(self, prompt: str) -> PromptSize:
        assert self._tokenizer is not None
        try:
            return self._tokenizer.measure(prompt)
        except TokenizerError as error:
            raise TaskError("invalid_prompt", "condition", str(error)) from error

    def _encode_conditions(self, conditions: Sequence[str]) -> list[dict[str, Array]]:
        if self._tokenizer is None:
            labels = {name: np.array(label) for label, name in enumerate(self.manifest.classes)}
            return [{LABEL: labels[name].astype(np.int64)} for name in conditions]
        kept = {prompt: self._conditions.get(prompt) for prompt in conditions}
        by_prompt = {prompt: condition for prompt, condition in kept.items() if condition is not None}
        for batch in self._batches([prompt for prompt in kept if prompt not in by_prompt]):
            for prompt, condition in zip(batch, self._encode_prompts(batch), strict=True):
                self._conditions.put(prompt, condition)
                by_prompt[prompt] = condition
        return [by_prompt[prompt] for prompt in conditions]

    def _encode_prompts(self, prompts: Sequence[str]) -> list[Condition]:
        assert self._tokenizer is not None
        assert self.manifest.text is not None
        ids, mask = self._tokenizer(prompts)
        arrays = self._engines[self.manifest.text.graph].run({"input_ids": ids, ATTENTION_MASK: mask})
        arrays[ATTENTION_MASK] = mask
        names = [spec.name for spec in self.manifest.condition]
        return [{name: arrays[name][row].copy() for name in names} for row in range(len(prompts))]

    def _encode_images(self, images: Sequence[Pixels]) -> list[Floats]:
        arrays = [from_pixels(image) for image in images]
        if self.manifest.encode is None:
            return arrays
        engine = self._engines[self.manifest.encode]
        return [
            latent.copy()
            for batch in self._batches(arrays)
            for latent in engine.run({"image": np.stack(batch)})["latent"]
        ]


def _seconds_of_run(engine: Engine, batch: int) -> float:
    inputs = {spec.name: spec.zeros(batch) for spec in engine.inputs}
    start = perf_counter()
    engine.run(inputs)
    return perf_counter() - start


def _paste(task: Task, image: Pixels) -> Pixels:
    if not isinstance(task, Inpaint):
        return image
    if task.blend is not None:
        return joined(task.image, image, task.blend)
    return np.where(task.repaint[..., None], image, task.image)


def _open_tokenizer(bundle: Bundle) -> Tokenizer | None:
    text = bundle.manifest.text
    if text is None:
        return None
    try:
        return Tokenizer(bundle.graph_path(text.tokenizer), text.max_tokens, text.pad_id)
    except TokenizerError as error:
        raise BundleError(f"{bundle.path}: {error}") from error
