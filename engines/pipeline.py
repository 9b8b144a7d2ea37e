"""Tasks -> rows -> ticks -> images. Knows a bundle and its engines; knows nothing of HTTP or queues."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Self, TypeVar

import numpy as np

from engines.backends import open_engines
from engines.backends.base import BATCH_SIZES, STEP_OUTPUT, Array, Engine, EngineError, EngineOptions, Role
from engines.backends.standin import BuildState, StandIn, wait_until_built
from engines.bundle import Bundle, BundleError, steady_bundle
from engines.conditions import Condition, ConditionCache
from engines.images import from_pixels, to_pixels
from engines.manifest import ATTENTION_MASK, LABEL, MASK, MASKED, Manifest
from engines.masks import joined
from engines.paths import path_of
from engines.plans import Precision, Profile
from engines.rows import Group, Row, TickInputs, keep_cells, noise_of, start_row
from engines.tasks import (
    MAX_SEED,
    Edit,
    Floats,
    FromImage,
    Generate,
    Inpaint,
    Pixels,
    Task,
    TaskError,
    Transfer,
    check_task,
    kept_steps,
    strengths,
    ticks,
    words_of,
)
from engines.tokenizer import PromptSize, Tokenizer, TokenizerError

__all__ = [
    "MAX_SEED",
    "Edit",
    "FromImage",
    "Generate",
    "Group",
    "Inpaint",
    "Pipeline",
    "Row",
    "Task",
    "TaskError",
    "Transfer",
    "kept_steps",
    "noise_of",
    "open_tokenizer",
    "strengths",
    "ticks",
]

_Item = TypeVar("_Item")


class Pipeline:
    """A bundle with every graph of it open on one backend. Its methods may be called from several threads.

    An image made alone and the same made in any batch differ by at most 2 of 255 in any value.
    """

    def __init__(self, bundle: Bundle, engines: Mapping[str, Engine], batch_sizes: Sequence[int] = BATCH_SIZES) -> None:
        """Take the engines of ``bundle`` by the file name of their graph; the pipeline closes them.

        Raises ValueError for batch sizes below 1 or none, and BundleError for a tokenizer that cannot be read.
        """
        if not batch_sizes or min(batch_sizes) < 1:
            raise ValueError("batch_sizes must be positive, and at least one")
        self.bundle = bundle
        self.batch_sizes = tuple(sorted(set(batch_sizes)))
        self.backend, self.passed_over = "given", dict[str, str]()
        self._engines = dict(engines)
        self.seconds: dict[str, dict[int, float]] = {}
        self._inputs = TickInputs()
        self._conditions = ConditionCache()
        self._tokenizer = open_tokenizer(bundle)

    @classmethod
    def open(
        cls,
        path: Path | str,
        backend: str = "ort",
        threads: int = 0,
        batch_sizes: Sequence[int] = BATCH_SIZES,
        precision: Precision = "fp32",
        plans: Path | None = None,
        lone_threads: int = 0,
    ) -> Self:
        """Load and verify the bundle at ``path`` and open its graphs on ``backend``, "auto" for the best that works.

        ``precision`` is for backends that have more than fp32, ``plans`` (the folder of compiled plans) for those that
        compile; ``lone_threads`` are those of `EngineOptions`. Raises BundleError for a bad bundle and EngineError for
        a graph that does not open or differs from what the manifest says, and for a bundle that is replaced meanwhile.
        """
        options = EngineOptions(threads, precision, Profile(tuple(batch_sizes)), plans, lone_threads)
        with ExitStack() as closing:
            with steady_bundle(path) as bundle:
                opened = open_engines(backend, bundle.graphs(), options)
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

    def wait_until_built(self) -> None:
        """Wait for graphs that are compiled while others answer for them. Raises EngineError where one cannot be."""
        for engine in self._engines.values():
            wait_until_built(engine)

    @property
    def stand_ins(self) -> dict[str, BuildState]:
        """The graphs for which another engine answers than was asked for, and what became of that one so far."""
        states = {name: engine.state for name, engine in self._engines.items() if isinstance(engine, StandIn)}
        return {name: state for name, state in states.items() if state != "built"}

    def warmup(self) -> dict[str, dict[int, float]]:
        """Run every graph at every batch size; return seconds of a tick by step graph and rows.

        They stay in ``seconds``. Each is of a second run, as the first one of a size may compile or capture.
        """
        self.seconds = {name: {} for name in self.manifest.step_graphs()}
        for name, engine in self._engines.items():
            engine.warmup(self.batch_sizes)
            for size in self.batch_sizes if name in self.seconds else ():
                self.seconds[name][size] = _seconds_of_run(engine, size)
        return self.seconds

    @property
    def rows_per_second(self) -> float:
        """The most rows a second that a tick of the warm-up has moved, 0 where there was none."""
        return max((rows / s for ticks in self.seconds.values() for rows, s in ticks.items() if s > 0), default=0.0)

    def validate(self, task: Task) -> None:
        """Raise TaskError where the bundle cannot honour ``task``. Cheap: calls no engine."""
        check_task(task, self.manifest, self._measure)

    def at_hand(self, task: Task) -> bool:
        """Whether `prepare` needs no engine for ``task``: its prompts are kept, and no image is to be encoded."""
        shows = isinstance(task, FromImage) or (self.manifest.sees_masks and "_all_masked" not in self.__dict__)
        if shows and self.manifest.encode is not None:
            return False
        return self._tokenizer is None or all(words in self._conditions for words in words_of(task))

    def prepare(self, tasks: Sequence[Task]) -> list[Row]:
        """Encode conditions and images and place every task at the start of its path. Order is kept.

        Raises TaskError for a task that `validate` refuses, before any engine is called, and EngineError where one
        fails.
        """
        for task in tasks:
            self.validate(task)
        conditions = self._encode_conditions([words for task in tasks for words in words_of(task)])
        images = {id(task.image): task.image for task in tasks if isinstance(task, FromImage)}
        latents = dict(zip(images, self._encode_images([from_pixels(i) for i in images.values()]), strict=True))
        return [
            start_row(
                task,
                revision=self.manifest.revision,
                path=path_of(task, self.manifest),
                condition=conditions[task.condition] | seen,
                source=conditions[task.source] | seen if isinstance(task, Transfer) else None,
                shape=self.manifest.latent_shape,
                latent=latents[id(task.image)] if isinstance(task, FromImage) else None,
                puts_back=not seen,
            )
            for task, seen in zip(tasks, self._seen(tasks), strict=True)
        ]

    def tick(self, rows: Sequence[Row]) -> None:
        """Move every row one step along its path, in one call of the step engine.

        All rows must be of one group and not done, or ValueError. When the call fails (EngineError), no row
        has changed.
        """
        if any(row.done for row in rows):
            raise ValueError("a row is done already")
        groups = {row.group for row in rows}
        if len(groups) != 1 or next(iter(groups)).revision != self.manifest.revision:
            raise ValueError(f"a tick needs rows of one group of this bundle, got {groups or 'none'}")
        inputs = self._inputs.of(rows)
        z_next = self._finite("step", rows[0].step.graph, inputs)[STEP_OUTPUT]
        self._inputs.move(rows, inputs, z_next)

    def finish(self, rows: Sequence[Row]) -> list[Pixels]:
        """Decode rows that are done (else ValueError) to uint8 (H, W, 3). Kept pixels come back exactly.

        Raises EngineError as `decode` does.
        """
        if not all(row.done for row in rows):
            raise ValueError("a row is not done yet")
        decoded = self.decode([row.z for row in rows])
        return [_paste(row.task, image) for row, image in zip(rows, decoded, strict=True)]

    def decode(self, latents: Sequence[Floats]) -> list[Pixels]:
        """Latents (c, h, w) as images, uint8 (H, W, 3). Raises EngineError where values are not finite."""
        if self.manifest.decode is None:
            return [to_pixels(latent) for latent in latents]
        return [
            to_pixels(image)
            for batch in self._batches(latents)
            for image in self._finite("decode", self.manifest.decode, {"latent": np.stack(batch)})["image"]
        ]

    def run(self, tasks: Sequence[Task], progress: Callable[[int], None] | None = None) -> list[Pixels]:
        """Make the images of ``tasks``, batching what can share ticks.

        ``progress`` is called after every tick with the number of rows it moved. Raises as `prepare` does.
        """
        rows = self.prepare(tasks)
        while moving := [row for row in rows if not row.done]:
            group = moving[0].group
            for batch in self._batches([row for row in moving if row.group == group]):
                self.tick(batch)
                if progress is not None:
                    progress(len(batch))
        return self.finish(rows)

    def _batches(self, items: Sequence[_Item]) -> Iterator[Sequence[_Item]]:
        for start in range(0, len(items), self.max_rows):
            yield items[start : start + self.max_rows]

    def _measure(self, prompt: str) -> PromptSize:
        assert self._tokenizer is not None
        return self._tokenizer.measure(prompt)

    def _encode_conditions(self, conditions: Sequence[str]) -> dict[str, Condition]:
        if self._tokenizer is None:
            labels = {name: np.array(label, np.int64) for label, name in enumerate(self.manifest.classes)}
            return {name: {LABEL: labels[name]} for name in conditions}
        kept = {prompt: self._conditions.get(prompt) for prompt in conditions}
        by_prompt = {prompt: condition for prompt, condition in kept.items() if condition is not None}
        for batch in self._batches([prompt for prompt in kept if prompt not in by_prompt]):
            for prompt, condition in zip(batch, self._encode_prompts(batch), strict=True):
                self._conditions.put(prompt, condition)
                by_prompt[prompt] = condition
        return by_prompt

    def _encode_prompts(self, prompts: Sequence[str]) -> list[Condition]:
        assert self._tokenizer is not None
        assert self.manifest.text is not None
        inputs = self._tokenizer.inputs(prompts)
        arrays = self._finite("text", self.manifest.text.graph, inputs) | {ATTENTION_MASK: inputs[ATTENTION_MASK]}
        names = [spec.name for spec in self.manifest.condition if spec.name in arrays]
        return [{name: arrays[name][row].copy() for name in names} for row in range(len(prompts))]

    def _seen(self, tasks: Sequence[Task]) -> list[Condition]:
        """What the networks see of each task's mask and of the image that it leaves: nothing, if they see no masks."""
        if not self.manifest.sees_masks:
            return [{} for _ in tasks]
        inpainted = {place: task for place, task in enumerate(tasks) if isinstance(task, Inpaint)}
        left = self._encode_images([from_pixels(task.image) * ~task.repaint for task in inpainted.values()])
        seen = [self._all_masked for _ in tasks]
        for (place, task), latent in zip(inpainted.items(), left, strict=True):
            seen[place] = {MASK: 1 - keep_cells(task.repaint, self.manifest.latent_shape), MASKED: latent}
        return seen

    @cached_property
    def _all_masked(self) -> Condition:
        """What networks that see masks are shown where all is made anew."""
        (latent,) = self._encode_images([np.zeros(self.manifest.image_shape, np.float32)])
        return {MASK: np.ones((1, *latent.shape[1:]), np.float32), MASKED: latent}

    def _encode_images(self, arrays: Sequence[Floats]) -> Sequence[Floats]:
        """Images (3, H, W) in -1..1 in the space that the networks work in."""
        if self.manifest.encode is None:
            return arrays
        return [
            latent.copy()
            for batch in self._batches(arrays)
            for latent in self._finite("encode", self.manifest.encode, {"image": np.stack(batch)})["latent"]
        ]

    def _finite(self, role: Role, graph: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """What a graph gives. Raises EngineError where it has values that are not finite."""
        outputs = self._engines[graph].run(inputs)
        if not all(np.isfinite(array).all() for array in outputs.values()):
            raise EngineError(f"the {role} graph gave values that are not finite")
        return outputs


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


def open_tokenizer(bundle: Bundle) -> Tokenizer | None:
    """The tokenizer of a bundle that takes prompts. Raises BundleError for a file that is none."""
    text = bundle.manifest.text
    if text is None:
        return None
    try:
        second = None
        if text.second is not None:
            second = Tokenizer(bundle.graph_path(text.second.tokenizer), text.max_tokens, text.second.pad_id)
        return Tokenizer(bundle.graph_path(text.tokenizer), text.max_tokens, text.pad_id, second)
    except TokenizerError as error:
        raise BundleError(f"{bundle.path}: {error}") from error
