"""The torch programs of a bundle on a device, graph by graph: as they come, with launches captured, and compiled.

Printed are the greatest error against ONNX Runtime in fp32 on the CPU, of the first run and of those after it, and the
time of a run. A way that fails has its reason in the table.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

import click
import numpy as np
import torch

from benchmarks.arguments import known_bundle
from benchmarks.cost import whole_numbers
from engines.backends import open_engine
from engines.backends.base import Array, Engine, EngineOptions, GraphSpec
from engines.backends.exported import Device
from engines.backends.pytorch import PytorchEngine, captures
from engines.backends.standin import wait_until_built
from engines.bundle import find_bundle, load_bundle
from engines.fidelity import typical_inputs
from engines.plans import Precision, Profile

PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "bf16")
COMPILED = {"cpu": "pytorch-aot", "cuda": "pytorch-cuda"}

Open = Callable[[], Engine]


def ways(
    graph: GraphSpec, precision: Precision, device: Device, sizes: Sequence[int], compile: bool
) -> dict[str, Open]:
    """How a program can be run on a device."""
    each = EngineOptions(threads=torch.get_num_threads(), precision=precision, profile=Profile(tuple(sizes)))
    whole = replace(each, profile=Profile((max(sizes),), dynamic=True))
    found: dict[str, Open] = {"as it comes": lambda: PytorchEngine(graph, whole, device)}
    if captures(device):
        found["captured"] = lambda: PytorchEngine(graph, each, device)
    if compile:
        found["compiled"] = lambda: _built(graph, each, COMPILED[device])
    return found


def _built(graph: GraphSpec, options: EngineOptions, backend: str) -> Engine:
    with ExitStack() as closing:
        engine = closing.enter_context(open_engine(backend, graph, options))
        wait_until_built(engine)
        closing.pop_all()
    return engine


def lines(graph: GraphSpec, name: str, open_: Open, sizes: Sequence[int], rounds: int) -> Iterator[str]:
    """A line of the table for each batch; one line where the program cannot be run."""
    try:
        with open_() as engine, open_engine("ort", graph) as exact:
            for rows in sizes:
                inputs = typical_inputs(graph, rows)
                expected = exact.run(inputs)
                errors = [_error(engine.run(inputs), expected) for _ in range(3)]
                seconds = statistics.median(_timed(engine, inputs) for _ in range(rounds))
                yield f"| {name} | {rows} | {errors[0]:.1e} | {np.max(errors[1:]):.1e} | {1000 * seconds:.3g} |"
    except Exception as error:  # whatever it is, the other ways go on
        reason = " ".join(str(error).split()).replace("|", "/")
        yield f"| {name} | {reason} | | | |"


def _error(found: Mapping[str, Array], expected: Mapping[str, Array]) -> float:
    return float(np.max([np.abs(found[name] - value).max() for name, value in expected.items()]))  # NaN if one is


def _timed(engine: Engine, inputs: Mapping[str, Array]) -> float:
    start = time.perf_counter()
    engine.run(inputs)
    return time.perf_counter() - start


@click.command()
@click.argument("bundle", callback=known_bundle)
@click.option("--device", type=click.Choice(list(COMPILED)), default="cpu", show_default=True)
@click.option("--precision", "precisions", type=click.Choice(PRECISIONS), multiple=True, help="[default: all]")
@click.option("--batch-sizes", "sizes", default="1,4,16", show_default=True, callback=whole_numbers)
@click.option("--rounds", type=click.IntRange(1), default=30, show_default=True, help="Runs a median is of.")
@click.option("--compile", "compile_", is_flag=True, help="Compile each too, which takes up to minutes.")
def main(
    bundle: str, device: Device, precisions: tuple[Precision, ...], sizes: tuple[int, ...], rounds: int, compile_: bool
) -> None:
    """Run the programs of BUNDLE (a folder, or "shipped")."""
    if device == "cuda" and not torch.cuda.is_available():
        raise click.ClickException(f"torch {torch.__version__} finds no CUDA device")
    loaded = load_bundle(find_bundle(bundle))
    graphs = [graph for graph in loaded.graphs().values() if graph.program is not None]
    if not graphs:
        raise click.ClickException("the bundle has no programs: write them with `fewstep export RECIPE OUT --programs`")
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    click.echo(f"{loaded.manifest.name} {loaded.manifest.revision}, torch {torch.__version__}, {name}\n")
    click.echo("| program | images at once | error, first run | later runs | ms |\n|---|--:|--:|--:|--:|")
    for graph in graphs:
        for precision in precisions or PRECISIONS:
            for way, open_ in ways(graph, precision, device, sizes, compile_).items():
                for line in lines(graph, f"{graph.path.stem}, {precision}, {way}", open_, sizes, rounds):
                    click.echo(line)


if __name__ == "__main__":
    main()
