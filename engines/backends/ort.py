"""The ONNX Runtime backend: one graph in one session, on the CPU or a GPU. Knows no sampling and no images."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from contextlib import redirect_stdout
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import Lock
from typing import Any

import onnxruntime as ort  # type: ignore[import-untyped, unused-ignore]

from engines.backends.base import (
    STEP_INPUT,
    STEP_OUTPUT,
    Array,
    EngineError,
    EngineOptions,
    GraphEngine,
    GraphSpec,
)
from engines.backends.cores import Company, usable_cores
from engines.backends.faults import failure
from engines.backends.ort_session import CPU, check_signature, load_session, unpack_weights
from engines.backends.resident import Resident
from engines.compile import prepare
from engines.plans import REWRITING, Precision, make_folder, plans_folder

CUDA, TENSORRT = "CUDAExecutionProvider", "TensorrtExecutionProvider"
_one_at_a_time = Lock()
_company = Company()
_SPIN_US = "20"
_EXACT = {"use_tf32": "0"}
"""CUDA's provider would multiply float32 in TF32, which keeps ten bits of it."""


class OrtEngine(GraphEngine):
    """An Engine on an ONNX Runtime session. ``run`` may be called from several threads."""

    def __init__(self, graph: GraphSpec, options: EngineOptions) -> None:
        """Load ``graph`` on the threads of ``options``, 0 for one on every core the process may use.

        Raises EngineError where the file does not load or its inputs and outputs differ from the specs.
        """
        super().__init__(graph)
        self._outputs = [spec.name for spec in graph.outputs]
        session = self._open(options)
        check_signature(session, graph)
        self._session: ort.InferenceSession | None = session

    def _open(self, options: EngineOptions) -> ort.InferenceSession:
        if options.precision != "fp32":
            raise EngineError(f"ONNX Runtime computes in fp32 on a CPU, not in {options.precision}")
        threads = options.threads or usable_cores()
        # A session cannot change the number of its threads.
        wider = options.lone_threads > threads
        self._lone = load_session(self._graph.path, _options(options.lone_threads)) if wider else None
        return load_session(self._graph.path, _options(threads))

    def _run(self, inputs: Mapping[str, Array], batch: int) -> dict[str, Array]:
        session = self._session
        if session is None:
            raise self._closed()
        try:
            return self._run_session(session, inputs, batch)
        except Exception as error:
            raise failure(self._name, error) from error

    def _run_session(self, session: ort.InferenceSession, inputs: Mapping[str, Array], batch: int) -> dict[str, Array]:
        lone = self._lone if batch == 1 else None
        with _company.joined() as alone:
            chosen = lone if alone and lone is not None else session
            return dict(zip(self._outputs, chosen.run(self._outputs, dict(inputs)), strict=True))

    def close(self) -> None:
        """Drop the sessions; what they hold is freed when a run in another thread ends."""
        self._session = self._lone = None


class OrtCudaEngine(OrtEngine):
    """The same on a CUDA device: inputs that did not change since the last run stay there, outputs too.

    Runs of several threads take turns.
    """

    provider = CUDA
    device = "cuda"
    precisions: tuple[Precision, ...] = ("fp32", "fp16")  # it has no bf16 kernel of Resize, nor of older Conv

    def _open(self, options: EngineOptions) -> ort.InferenceSession:
        if self.provider not in ort.get_available_providers():
            there = ", ".join(ort.get_available_providers())
            raise EngineError(f"this ONNX Runtime has no {self.provider}, only {there}: {_cure()}")
        if options.precision not in self.precisions:
            raise EngineError(f"{self.provider} computes in {', '.join(self.precisions)}, not in {options.precision}")
        _load_cuda()
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = options.threads or usable_cores()
        settings.log_severity_level = 3
        with tempfile.TemporaryDirectory() as scratch:
            path = self._cast(options.precision, Path(scratch))
            session = load_session(path, settings, [*self._providers(options), CPU])
        if self.provider not in session.get_providers():
            raise EngineError(f"{self._name}: {self.provider} is there but found no device that it can use")
        self._resident: Resident[ort.OrtValue] = Resident()
        self._lock = Lock()
        return session

    def _cast(self, precision: Precision, scratch: Path) -> Path:
        if precision == "fp32":
            return self._graph.path
        return prepare(self._graph, precision, scratch)[0]

    def _providers(self, options: EngineOptions) -> list[Any]:
        return [(CUDA, _EXACT)]

    def _run_session(self, session: ort.InferenceSession, inputs: Mapping[str, Array], batch: int) -> dict[str, Array]:
        with self._lock:
            binding = session.io_binding()
            for name, array in inputs.items():
                binding.bind_ortvalue_input(name, self._resident.get(name, array, self._send))
            for name in self._outputs:
                binding.bind_output(name, self.device, 0)
            session.run_with_iobinding(binding)
            values = dict(zip(self._outputs, binding.get_outputs(), strict=True))
            outputs = {name: value.numpy() for name, value in values.items()}
            if self._graph.role == "step" and self._session is not None:  # what it gives is what the next tick takes
                outputs[STEP_OUTPUT].flags.writeable = False
                self._resident.put(STEP_INPUT, outputs[STEP_OUTPUT], values[STEP_OUTPUT])
            return outputs

    def _send(self, array: Array) -> ort.OrtValue:
        return ort.OrtValue.ortvalue_from_numpy(array, self.device, 0)

    def close(self) -> None:
        """Drop the session and what lies on the device."""
        with self._lock:
            super().close()
            self._resident.clear()


class OrtTensorrtEngine(OrtCudaEngine):
    """The same by ONNX Runtime's TensorRT provider, which builds its plans when it first meets a shape.

    Every tensor has the type that the graph, cast beforehand, gives it: the provider's own settings for fp16 and bf16
    would let TensorRT lower what is to stay in fp32. It has none against TF32.
    """

    provider = TENSORRT
    precisions = ("fp32", "fp16", "bf16")

    def _providers(self, options: EngineOptions) -> list[Any]:
        folder = options.plans or plans_folder()
        make_folder(folder)
        settings = {
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": str(folder),
            # The provider's own key leaves out the weights.
            "trt_engine_cache_prefix": f"ort-{self._graph.sha256[:16]}-{options.precision}-{REWRITING}",
        }
        return [(TENSORRT, settings), (CUDA, _EXACT)]


def _cure() -> str:
    """What gives an ONNX Runtime its providers for GPUs: its two builds share a folder, and the last one wins."""
    try:
        version("onnxruntime-gpu")
    except PackageNotFoundError:
        return "pip install 'fewstep[gpu]'"
    return (
        "its build for CPUs lies over that for GPUs: pip uninstall -y onnxruntime, then "
        "pip install --force-reinstall --no-deps onnxruntime-gpu"
    )


@cache
def _load_cuda() -> None:
    """Load CUDA's libraries from the packages that pip installs, where the system has none.

    What it does not find it prints, and stdout is for results. Raises EngineError where it fails.
    """
    if not hasattr(ort, "preload_dlls"):  # before 1.21
        return
    try:
        with _one_at_a_time, redirect_stdout(sys.stderr):
            ort.preload_dlls()
    except Exception as error:  # the library's errors share no base class
        raise EngineError(f"CUDA's libraries could not be loaded: {error}") from error


@cache
def _share_arena() -> None:
    """Give the process one CPU arena for all sessions, once.

    An arena for each session would keep the peak of every graph; one keeps the peak of the largest.
    """
    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(memory, None)


def _options(threads: int) -> ort.SessionOptions:
    _share_arena()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.use_env_allocators", "1")
    # Memory patterns reserve a block for every batch size ever seen.
    options.enable_mem_pattern = False
    # Threads spin within a run, where it saves a tenth of its time, and sleep between runs. For no longer than it takes
    # to hand over work: what waits for a thread that others keep from its core would keep others from theirs.
    options.add_session_config_entry("session.intra_op.spin_duration_us", _SPIN_US)
    options.add_session_config_entry("session.force_spinning_stop", "1")
    unpack_weights(options)
    return options
