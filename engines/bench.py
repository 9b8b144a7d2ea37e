"""Backends side by side on one bundle: speed, share of the machine's peak, memory, and how far apart they are."""

from __future__ import annotations

import math
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np

from engines.backends import open_engine
from engines.backends.base import STEP_OUTPUT, Array, Engine, EngineError, EngineOptions, GraphSpec, TensorSpec
from engines.backends.standin import wait_until_built
from engines.bundle import Bundle
from engines.decibels import psnr_db
from engines.fidelity import typical_inputs
from engines.operations import count_operations
from engines.pipeline import Generate, Pipeline
from engines.plans import Precision, Profile

PROMPTS = ("a red apple", "a smiling face", "a dog", "the sun")
_REFERENCES = ("pytorch", "ort", "fake")
_WARM_RUNS = 2
_ON_DEVICE = ("trt", "ort-tensorrt", "ort-cuda", "pytorch-cuda")
_BY_TORCH: dict[str, Literal["cpu", "cuda"]] = {"pytorch": "cpu", "pytorch-aot": "cpu", "pytorch-cuda": "cuda"}
"""Backends that run torch programs, of which the products have none, and where."""
_PRODUCTS = 8


@dataclass(frozen=True)
class Contender:
    """A backend in a precision, as `trt:fp16` names it."""

    backend: str
    precision: Precision = "fp32"

    def __str__(self) -> str:
        """As it was named."""
        return self.backend if self.precision == "fp32" else f"{self.backend}:{self.precision}"


@dataclass(frozen=True)
class Speed:
    """Whole images: median seconds of a batch, and the operations that it takes (0 where they were not counted)."""

    contender: Contender
    steps: int
    batch: int
    seconds: float
    operations: int

    @property
    def images_per_second(self) -> float:
        """Images that come out in a second."""
        return self.batch / self.seconds

    def share_of(self, peak: float | None) -> float | None:
        """The share of so many operations a second; None where that is not known."""
        return self.operations / self.seconds / peak if peak else None


@dataclass(frozen=True)
class Parity:
    """How far a contender is from the reference: one call of the step graph, and whole images of values 0 to 255."""

    contender: Contender
    steps: int
    step_maximum: float
    step_mean: float
    image_maximum: int
    image_mean: float
    image_psnr_db: float


@dataclass(frozen=True)
class Made:
    """What is compared: the z of one call of the step graph (B, c, h, w), and whole images (B, H, W, 3), uint8."""

    step: Array
    images: Array


def parity(contender: Contender, steps: int, made: Made, expected: Made) -> Parity:
    """How far what a contender made is from what was expected."""
    step = np.abs(made.step - expected.step)
    image = np.abs(made.images.astype(np.int32) - expected.images)
    psnr = psnr_db(float(np.square(image).mean()), peak=255)
    return Parity(contender, steps, float(step.max()), float(step.mean()), int(image.max()), float(image.mean()), psnr)


class Bench:
    """A bundle, open once for every contender; all are warm, and what is compiled for one is there."""

    def __init__(
        self,
        bundle: Bundle,
        contenders: Sequence[Contender],
        batch_sizes: Sequence[int],
        options: EngineOptions,
        skip: bool = False,
        prompts: Sequence[str] = (),
    ) -> None:
        """Open them. Raises EngineError for a backend that does not open the bundle, naming it.

        Images are of ``prompts`` in turn; where there are none, of every class, or of `PROMPTS`. With ``skip`` a
        backend that does not open, or that fails later, is left out, and `left_out` says why; at least one must remain.
        """
        self.bundle, self.batch_sizes, self.options = bundle, tuple(batch_sizes), options
        self.prompts = tuple(prompts) or bundle.manifest.classes or PROMPTS
        self._closing, self._skip = ExitStack(), skip
        self.pipelines: dict[Contender, Pipeline] = {}
        self.left_out: dict[Contender, str] = {}
        try:
            for contender in contenders:
                with self.trying(contender):
                    opened = _opened(bundle.path, contender, self.batch_sizes, options)
                    self.pipelines[contender] = self._closing.enter_context(opened)
            self._check_any()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close every engine."""
        self._closing.close()

    @property
    def reference(self) -> Contender:
        """What errors are against: the first of `_REFERENCES` that is compared, in fp32, else the first contender."""
        exact = [one for name in _REFERENCES for one in self.pipelines if one == Contender(name)]
        return exact[0] if exact else next(iter(self.pipelines))

    @contextmanager
    def trying(self, contender: Contender) -> Iterator[None]:
        """Name a contender that fails within, in an EngineError; or leave it out from there on, with ``skip``."""
        try:
            yield
        except EngineError as error:
            if not self._skip:
                raise EngineError(f"{contender}: {error}") from error
            self.left_out[contender] = f"{contender}: {error}"
            self.pipelines.pop(contender, None)

    def _check_any(self) -> None:
        if not self.pipelines:
            raise EngineError("; ".join(self.left_out.values()))

    def speeds(self, steps: int, rounds: int) -> list[Speed]:
        """Time whole images of the student of so many steps. In every round all contenders have their turn.

        Prompts are encoded before, in the warm runs, and kept, as a service keeps those that it has seen. Raises
        TaskError for a prompt that the bundle does not take, EngineError for a contender that fails.
        """
        speeds = list[Speed]()
        for batch in self.batch_sizes:
            tasks, operations = self._tasks(steps, batch), self._operations(steps, batch)
            seconds: dict[Contender, list[float]] = {contender: [] for contender in self.pipelines}
            for k in range(_WARM_RUNS + rounds):
                for contender, pipeline in list(self.pipelines.items()):
                    with self.trying(contender):
                        start = time.perf_counter()
                        pipeline.run(tasks)
                        if k >= _WARM_RUNS:
                            seconds[contender].append(time.perf_counter() - start)
            self._check_any()
            speeds += [
                Speed(contender, steps, batch, statistics.median(seconds[contender]), operations)
                for contender in self.pipelines
            ]
        return [speed for speed in speeds if speed.contender in self.pipelines]

    def parities(self, steps: int) -> list[Parity]:
        """How far every contender is from the reference, on the largest batch. Raises EngineError as `speeds` does."""
        batch = self.batch_sizes[-1]
        tasks = self._tasks(steps, batch)
        graph = self.bundle.graphs()[self.bundle.student(steps).graph]
        inputs = typical_inputs(graph, batch)
        made = dict[Contender, Made]()
        for contender, pipeline in list(self.pipelines.items()):
            with self.trying(contender):
                step = _step(graph, contender, self.options, inputs)
                made[contender] = Made(step, np.stack(pipeline.run(tasks)))
        self._check_any()
        expected = made[self.reference]
        return [parity(contender, steps, made[contender], expected) for contender in self.pipelines]

    def _tasks(self, steps: int, batch: int) -> list[Generate]:
        w = self.bundle.manifest.guidance.default
        return [Generate(self.prompts[seed % len(self.prompts)], steps, w, seed) for seed in range(batch)]

    def _operations(self, steps: int, batch: int) -> int:
        """Of a batch of whole images whose prompts are encoded: the step graph at every step, and the decode graph."""
        graphs, decode = self.bundle.graphs(), self.bundle.manifest.decode
        operations = steps * count_operations(graphs[self.bundle.student(steps).graph])
        if decode is not None:
            operations += count_operations(graphs[decode])
        return batch * operations


def _opened(bundle: Path, contender: Contender, batch_sizes: Sequence[int], options: EngineOptions) -> Pipeline:
    """The bundle on a contender, with all built that it compiles. Raises EngineError where one does not work."""
    backend, precision = contender.backend, contender.precision
    with ExitStack() as closing:
        pipeline = Pipeline.open(bundle, backend, options.threads, batch_sizes, precision, options.plans)
        closing.enter_context(pipeline).wait_until_built()
        closing.pop_all()
    return pipeline


@contextmanager
def _built(graph: GraphSpec, contender: Contender, batch: int, options: EngineOptions) -> Iterator[Engine]:
    """A graph on a contender, for one batch size. Raises EngineError where it does not open or cannot be built."""
    options = replace(options, precision=contender.precision, profile=Profile((batch,)))
    with open_engine(contender.backend, graph, options) as engine:
        wait_until_built(engine)
        yield engine


def _step(graph: GraphSpec, contender: Contender, options: EngineOptions, inputs: Mapping[str, Array]) -> Array:
    with _built(graph, contender, len(inputs["z"]), options) as engine:
        return engine.run(inputs)[STEP_OUTPUT].astype(np.float64)


def peak_operations_per_second(contender: Contender, options: EngineOptions) -> float:
    """Operations a second of large square matrix products on the contender: the most that a graph could reach there.

    On backends of PyTorch they are torch's own, and the others need the package onnx. Raises EngineError where the
    backend does not run it, and without the package.
    """
    device = _BY_TORCH.get(contender.backend)
    size, repeats = (4096, 20) if contender.backend in _ON_DEVICE else (1024, 3)
    if device == "cpu" and contender.precision != "fp32":  # a CPU without instructions for it takes a minute
        size = 256
    with ExitStack() as closing:
        if device is not None:
            from engines.backends.pytorch import time_products

            chosen = replace(options, precision=contender.precision)
            timed: Callable[[], float] = partial(time_products, _matrix(size), _PRODUCTS, chosen, device)
        else:
            folder = closing.enter_context(tempfile.TemporaryDirectory())
            graph = _products(Path(folder) / "products.onnx", size)
            rows: Array = np.random.default_rng(0).standard_normal((size, size), np.float32)
            rows.flags.writeable = False  # so that a device keeps them
            engine = closing.enter_context(_built(graph, contender, size, options))
            timed = partial(_time_run, engine, {"rows": rows})
        seconds = min(timed() for _ in range(_WARM_RUNS + repeats))
    return float(_PRODUCTS * 2 * size**3 / seconds)


def _time_run(engine: Engine, inputs: Mapping[str, Array]) -> float:
    start = time.perf_counter()
    engine.run(inputs)
    return time.perf_counter() - start


def _matrix(size: int) -> Array:
    """A matrix that keeps the size of what is multiplied with it, and that weights of 8 bits hold as it is."""
    signs = np.random.default_rng(1).integers(0, 2, (size, size)) * 2 - 1
    return signs.astype(np.float32) / np.float32(math.sqrt(size))


def _products(path: Path, size: int) -> GraphSpec:
    """A chain of products with one constant matrix, whose values keep their size along it.

    Of the last one only the mean of each row comes back: to bring all from a device would take longer than to make it.
    Raises EngineError without the package onnx.
    """
    try:
        import onnx
        from onnx import helper, numpy_helper
    except ImportError as error:
        raise EngineError(f"that needs the package onnx ({error}): pip install onnx") from error
    names = ["rows", *(f"product_{k}" for k in range(1, _PRODUCTS)), "products"]
    nodes = [helper.make_node("MatMul", [a, "matrix"], [b]) for a, b in pairwise(names)]
    nodes.append(helper.make_node("ReduceMean", ["products", "columns"], ["mean"]))
    sizes = {"rows": size, "mean": 1}
    ends = [helper.make_tensor_value_info(name, 1, ["batch", columns]) for name, columns in sizes.items()]
    constants = [
        numpy_helper.from_array(_matrix(size), "matrix"),
        numpy_helper.from_array(np.array([1], np.int64), "columns"),
    ]
    graph = helper.make_graph(nodes, "products", ends[:1], ends[1:], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    specs = [TensorSpec(name=name, dtype="float32", shape=("batch", columns)) for name, columns in sizes.items()]
    return GraphSpec("decode", path, (specs[0],), (specs[1],), f"products-{size}")


def memory_bytes(
    bundle: Path, contender: Contender, batch_sizes: Sequence[int], options: EngineOptions
) -> dict[str, int]:
    """What a process grows by when it opens and warms up the bundle, at its peak: of the host, and of the device.

    Raises EngineError where the contender does not work, or the process is killed.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as child:
        try:
            return child.submit(_grown, bundle, contender, tuple(batch_sizes), options).result()
        except BrokenProcessPool as error:
            raise EngineError("the process that measured its memory was killed") from error


def _grown(bundle: Path, contender: Contender, batch_sizes: Sequence[int], options: EngineOptions) -> dict[str, int]:
    device = _device_bytes(contender) if contender.backend in _ON_DEVICE else None
    before = _peak_resident_bytes()
    with _opened(bundle, contender, batch_sizes, options) as pipeline:
        pipeline.warmup()
        grown = {"host": _peak_resident_bytes() - before}
        if device is not None:
            grown["device"] = _device_bytes(contender) - device
    return grown


def _peak_resident_bytes() -> int:
    """Of this process; Linux's own count where it has one, as the other starts from that of the parent."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _device_bytes(contender: Contender) -> int:
    if contender.backend in _BY_TORCH:
        from engines.backends.pytorch import used_bytes

        return used_bytes()
    from engines.backends.cuda import Cuda

    return Cuda().used_bytes
