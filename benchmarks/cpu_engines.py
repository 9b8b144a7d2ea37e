"""Graphs of a bundle on ONNX Runtime in several settings and on OpenVINO, in turn in one process, on a CPU.

Printed are ratios to ONNX Runtime as the service has it: the median over the rounds of time / time in the same round,
so above 1 is slower. Beside them, how far the outputs are from those of the service.
"""

from __future__ import annotations

import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module, metadata
from pathlib import Path

import click
import numpy as np
import onnxruntime as ort

from benchmarks.arguments import known_bundle
from benchmarks.fused_attention import fuse_attention
from engines.backends.base import Array, EngineOptions, GraphSpec
from engines.backends.ort import OrtEngine, _options
from engines.backends.ort_session import CPU
from engines.bundle import Bundle, find_bundle, load_bundle
from engines.compile import unpack
from engines.fidelity import typical_inputs

WARMUP = 2
PAUSE_S = 0.2
"""In which threads of the last in turn stop spinning."""

BATCHES = (1, 4, 16)
SERVICE = "ONNX Runtime, as the service has it"
OPENVINO = {
    "OpenVINO, f32": {"INFERENCE_PRECISION_HINT": "f32"},
    "OpenVINO, f32, denormals as zero": {"INFERENCE_PRECISION_HINT": "f32", "CPU_DENORMALS_OPTIMIZATION": "YES"},
    "OpenVINO, bf16": {"INFERENCE_PRECISION_HINT": "bf16"},
}

Inputs = dict[str, Array]
Run = Callable[[Inputs], Array]


def on_ort(graph: Path, output: str, **settings: str | int) -> Run:
    """A graph on ONNX Runtime: the service's settings, but for those given."""
    threads, level = settings.pop("threads", 1), settings.pop("level", None)
    options = _options(int(threads))
    if level is not None:
        options.graph_optimization_level = ort.GraphOptimizationLevel(level)
    for name, value in settings.items():
        options.add_session_config_entry(f"session.{name}", str(value))
    session = ort.InferenceSession(str(graph), options, providers=[CPU])
    return lambda inputs: session.run([output], inputs)[0]


def on_openvino(graph: Path, threads: int, settings: dict[str, str]) -> Run:
    """A graph on OpenVINO, in one stream."""
    fixed = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    compiled = import_module("openvino").Core().compile_model(str(graph), "CPU", fixed | settings)
    request = compiled.create_infer_request()
    return lambda inputs: np.array(request.infer(inputs)[0])


def variants(graph: GraphSpec, threads: int, folder: Path) -> dict[str, Run]:
    """Every way to run a graph, the service's first."""
    output, levels = graph.outputs[0].name, ort.GraphOptimizationLevel
    service = OrtEngine(graph, EngineOptions(threads=threads))
    made: dict[str, Run] = {SERVICE: lambda inputs: service.run(inputs)[output]}
    on = partial(on_ort, output=output, threads=threads)
    made["the same, opened once more"] = on(graph.path)
    for name in ("BASIC", "EXTENDED", "LAYOUT"):
        made[f"optimised: {name.lower()}"] = on(graph.path, level=int(getattr(levels, f"ORT_ENABLE_{name}")))
    made["quantised pairs left to its kernels"] = on(graph.path, disable_quant_qdq=0)
    made["denormals as zero"] = on(graph.path, set_denormal_as_zero=1)
    if threads > 1:
        made["one thread"] = on_ort(graph.path, output, threads=1)
        made["threads that never spin"] = on(graph.path, **{"intra_op.allow_spinning": 0})
    made["weights stored as fp32"] = on(unpack(graph, folder / graph.path.name))
    if attentions := fuse_attention(graph, fused := folder / f"fused-{graph.path.name}"):
        made[f"attention fused, {attentions} times"] = on(fused)
    try:
        for name, settings in OPENVINO.items():
            made[name] = on_openvino(graph.path, threads, settings)
    except ImportError:
        click.echo("OpenVINO is not installed: pip install openvino\n", err=True)
    if threads > 1:  # last, as they take a core from whoever comes next
        made["threads that spin between runs too"] = on(graph.path, force_spinning_stop=0)
    return made


def in_turn(runs: dict[str, Run], inputs: Inputs, rounds: int) -> tuple[dict[str, float], dict[str, Array]]:
    """The median ratio of each to the first, and the outputs of the last round."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    outputs: dict[str, Array] = {}
    for _ in range(WARMUP + rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            outputs[name] = run(inputs)
            seconds[name].append(time.perf_counter() - start)
        time.sleep(PAUSE_S)
    first = next(iter(seconds.values()))[WARMUP:]
    ratios = {
        name: statistics.median(a / b for a, b in zip(mine[WARMUP:], first, strict=True))
        for name, mine in seconds.items()
    }
    return ratios, outputs


def furthest(outputs: dict[str, Array]) -> dict[str, float]:
    """Relative L2 distance of each output from the first."""
    first = next(iter(outputs.values()))
    return {name: float(np.linalg.norm(value - first) / np.linalg.norm(first)) for name, value in outputs.items()}


def versions() -> str:
    """The libraries that are compared."""
    found = {name: metadata.version(name) for name in ("onnxruntime", "openvino") if _installed(name)}
    return ", ".join(f"{name} {version}" for name, version in found.items())


def _installed(name: str) -> bool:
    return any(distribution.name == name for distribution in metadata.distributions())


def default_graph(bundle: Bundle) -> str:
    """The step graph of the student of most steps."""
    return max(bundle.manifest.students, key=lambda student: student.steps).graph


@click.command()
@click.argument("bundle", callback=known_bundle)
@click.option("--graph", "names", multiple=True, help="A graph of the bundle.  [default: the step of most steps]")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=21, show_default=True)
def main(bundle: str, names: tuple[str, ...], threads: int, rounds: int) -> None:
    """Time the graphs of BUNDLE, a folder or "shipped"."""
    ort.set_default_logger_severity(3)
    opened = load_bundle(find_bundle(bundle))
    click.echo(f"{platform.machine()}, {threads} threads, {versions()}, median of {rounds} rounds")
    for name in names or (default_graph(opened),):
        with tempfile.TemporaryDirectory() as folder:
            graph = opened.graphs()[name]
            runs = variants(graph, threads, Path(folder))
            ratios, apart = dict[int, dict[str, float]](), dict[str, float]()
            for batch in BATCHES:
                ratios[batch], outputs = in_turn(runs, typical_inputs(graph, batch), rounds)
                apart = {k: max(apart.get(k, 0.0), v) for k, v in furthest(outputs).items()}
        click.echo(f"\n| {name} | " + " | ".join(f"batch of {batch}" for batch in BATCHES) + " | relative L2 |")
        click.echo("|---" + "|--:" * (len(BATCHES) + 1) + "|")
        for variant in runs:
            cells = " | ".join(f"{ratios[batch][variant]:.2f}" for batch in BATCHES)
            click.echo(f"| {variant} | {cells} | {apart[variant]:.1e} |")


if __name__ == "__main__":
    main()
