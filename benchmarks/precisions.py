"""How far one step and whole images are from fp32 in each precision, with every value rounded where it rounds.

Graphs are cast as `fewstep build` casts them, and emulated on the CPU: what is left out is what a chip adds by the
order in which it sums.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import click
import numpy as np
import onnxruntime as ort

from benchmarks.arguments import known_bundle
from engines.backends import open_engines
from engines.backends.base import Engine, EngineError, EngineOptions
from engines.backends.ort import OrtEngine
from engines.bench import PROMPTS, Contender, Made, Parity, parity
from engines.bundle import Bundle, find_bundle, load_bundle
from engines.compile import rewrite, unpack
from engines.fidelity import typical_inputs
from engines.pipeline import Generate, Pipeline
from engines.plans import PRECISIONS


class Emulated(OrtEngine):
    """A graph that computes in fp32, with every value rounded where a precision rounds it."""

    def _open(self, options: EngineOptions) -> ort.InferenceSession:
        self._lone = None
        settings = ort.SessionOptions()
        settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # these remove the rounding
        settings.intra_op_num_threads = options.threads
        settings.log_severity_level = 3
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / self._graph.path.name
            unpacked = unpack(self._graph, path.with_name(f"unpacked-{path.name}"))
            rewrite(unpacked, options.precision, path, emulated=True)
            return ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])


def parities(bundle: Bundle, steps: int, rows: int, threads: int) -> Iterator[Parity | str]:
    """Of every precision below fp32: against PyTorch in fp32 where the bundle has programs, else ONNX Runtime.

    Of one that its graphs cannot have, why.
    """
    graphs, reference = bundle.graphs(), "pytorch" if bundle.manifest.programs else "ort"
    expected = _made(bundle, open_engines(reference, graphs, EngineOptions(threads)).engines, steps, rows)
    for precision in PRECISIONS[1:]:
        try:
            engines = {name: Emulated(graph, EngineOptions(threads, precision)) for name, graph in graphs.items()}
        except EngineError as error:
            yield f"{precision} is left out: {error}"
        else:
            yield parity(Contender("emulated", precision), steps, _made(bundle, engines, steps, rows), expected)


def _made(bundle: Bundle, engines: Mapping[str, Engine], steps: int, rows: int) -> Made:
    """One call of the step graph on typical inputs, and images of every class or prompt in turn."""
    manifest, step = bundle.manifest, bundle.student(steps).graph
    words = manifest.classes or PROMPTS
    tasks = [Generate(words[seed % len(words)], steps, manifest.guidance.default, seed) for seed in range(rows)]
    with Pipeline(bundle, engines) as pipeline:
        z = engines[step].run(typical_inputs(bundle.graphs()[step], rows))["z_next"]
        return Made(z.astype(np.float64), np.stack(pipeline.run(tasks)))


def _table(lines: Sequence[Parity], reference: str) -> Iterator[str]:
    yield f"| against {reference} | steps | one step: max | mean | whole image: max of 255 | mean | PSNR, dB |"
    yield "|---|--:|--:|--:|--:|--:|--:|"
    for line in lines:
        yield (
            f"| {line.contender.precision} | {line.steps} | {line.step_maximum:.3g} | {line.step_mean:.3g} "
            f"| {line.image_maximum} | {line.image_mean:.3g} | {line.image_psnr_db:.1f} |"
        )


@click.command()
@click.argument("bundle", callback=known_bundle)
@click.option("--rows", default=8, show_default=True, type=click.IntRange(1), help="Images of each kind.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1), help="Threads of an engine.")
def main(bundle: str, rows: int, threads: int) -> None:
    """Print how far BUNDLE (a folder, or "shipped") is from fp32 in each precision, for each of its students."""
    opened = load_bundle(find_bundle(bundle))
    steps = sorted({student.steps for student in opened.manifest.students}, reverse=True)
    found = [each for count in steps for each in parities(opened, count, rows, threads)]
    lines, left_out = ([each for each in found if isinstance(each, kind)] for kind in (Parity, str))
    reference = "PyTorch in fp32" if opened.manifest.programs else "ONNX Runtime in fp32"
    click.echo(f"{opened.manifest.name} {opened.manifest.revision}, {rows} images of each kind.\n")
    click.echo("\n".join([*_table(lines, reference), "", *dict.fromkeys(left_out)]).rstrip())


if __name__ == "__main__":
    main()
