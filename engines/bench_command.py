"""The subcommand `bench`: a bundle on several backends side by side, as Markdown tables."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from engines.backends import BACKENDS, KEEP_PLANS
from engines.backends.base import MAX_THREADS, EngineError, EngineOptions
from engines.backends.cores import usable_cores
from engines.bench import PROMPTS, Bench, Contender, Parity, Speed, memory_bytes, peak_operations_per_second
from engines.build_command import sizes_option
from engines.bundle import BundleError, find_bundle, load_bundle
from engines.fidelity import FLOOR_DB
from engines.manifest import Manifest
from engines.pipeline import TaskError
from engines.plans import PRECISIONS


def _contenders(context: click.Context, option: click.Parameter, value: str) -> tuple[Contender, ...]:
    """Of `ort,trt:fp16`; one that is repeated counts once."""
    found = []
    for word in value.split(","):
        backend, _, precision = word.partition(":")
        if backend not in BACKENDS:
            raise click.BadParameter(f"{backend!r} is not one of {', '.join(BACKENDS)}")
        if (precision or "fp32") not in PRECISIONS:
            raise click.BadParameter(f"{precision!r} is not one of {', '.join(PRECISIONS)}")
        found.append(Contender(backend, precision or "fp32"))  # type: ignore[arg-type]
    return tuple(dict.fromkeys(found))


@click.command()
@click.argument("bundle")
@click.option(
    "--backend",
    "contenders",
    callback=_contenders,
    default="ort",
    show_default=True,
    help="Backends to compare, each with a precision if not fp32: ort,trt:fp16. The first is what ratios refer to.",
)
@click.option("--steps", type=int, help="Steps of the student.  [default: the most that one has]")
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    help=f"Of the images, in turn; may be repeated.  [default: every class, or {', '.join(map(repr, PROMPTS))}]",
)
@click.option("--batch-sizes", callback=sizes_option, default="1,4,16", show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=9, show_default=True, help="Runs that medians are taken of.")
@click.option(
    "--threads",
    type=click.IntRange(0, MAX_THREADS),
    default=0,
    help="On a CPU; 0 (default): every core it may use.",
)
@click.option("--plans", type=click.Path(path_type=Path, file_okay=False), help="Where compiled plans are kept.")
@click.option("--memory/--no-memory", default=True, show_default=True, help="Measure it too, in a process for each.")
@click.option("--skip", is_flag=True, help="Leave out backends that do not open the bundle or fail, and say why.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def bench(
    bundle: str,
    contenders: tuple[Contender, ...],
    steps: int | None,
    prompts: tuple[str, ...],
    batch_sizes: tuple[int, ...],
    rounds: int,
    threads: int,
    plans: Path | None,
    memory: bool,
    skip: bool,
    as_json: bool,
) -> None:
    """Time whole images of BUNDLE (a folder, or "shipped") on several backends in turn, and compare what they make.

    What a backend compiles is built first, and kept; that may take minutes.

    Prompts are encoded before, as a service keeps those that it has seen: neither seconds nor GFLOP have the text
    encoder's part. The share of the peak is that of large matrix products on the same backend, measured here; it needs
    the package onnx, but for backends of PyTorch, whose products are torch's own. Errors are those against the first of
    pytorch, ort and fake that is compared, in fp32, else the first named.
    """
    if plans is not None and not any(one.backend in KEEP_PLANS for one in contenders):
        raise click.BadParameter(f"none of these keeps plans; {', '.join(KEEP_PLANS)} do", param_hint="--plans")
    options = EngineOptions(threads or usable_cores(), plans=plans)
    try:
        opened = load_bundle(find_bundle(bundle))
        steps = max(student.steps for student in opened.manifest.students) if steps is None else steps
        opened.student(steps)
        running = Bench(opened, contenders, batch_sizes, options, skip, prompts)
        compared = _compare(running, steps, rounds, memory)
    except TaskError as error:
        raise click.BadParameter(f"{error.message}; name others", param_hint="--prompt") from error
    except (BundleError, EngineError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(json.dumps(compared.document(), indent=2, allow_nan=False) if as_json else compared.text())


@dataclass(frozen=True)
class _Comparison:
    """What was measured, in the order of the contenders, and why something was not."""

    manifest: Manifest
    steps: int
    machine: str
    speeds: Sequence[Speed]
    parities: Sequence[Parity]
    reference: Contender
    peaks: dict[Contender, float | None]
    without_peak: dict[Contender, str]
    memory: dict[Contender, dict[str, int]]
    left_out: dict[Contender, str]

    def document(self) -> dict[str, Any]:
        """For programs."""
        return {
            "bundle": f"{self.manifest.name}@{self.manifest.revision}",
            "machine": self.machine,
            "steps": self.steps,
            "speeds": [self._record(speed) for speed in self.speeds],
            "reference": asdict(self.reference),
            "parities": [_finite(asdict(parity)) for parity in self.parities],
            "peaks": {str(one): peak for one, peak in self.peaks.items()},
            "without_peak": {str(one): why for one, why in self.without_peak.items()},
            "memory": {str(one): grown for one, grown in self.memory.items()},
            "left_out": {str(one): why for one, why in self.left_out.items()},
        }

    def _record(self, speed: Speed) -> dict[str, Any]:
        share = speed.share_of(self.peaks[speed.contender])
        return {**asdict(speed), "images_per_second": speed.images_per_second, "share_of_peak": share}

    def text(self) -> str:
        """For people: Markdown."""
        parts = [f"{self.manifest.name} {self.manifest.revision}, {self.steps} steps. {self.machine}."]
        parts.append("\n".join(_speed_table(self.speeds, self.peaks, first=next(iter(self.peaks)))))
        if self.manifest.text is not None:
            parts.append("Prompts were encoded before: neither seconds nor GFLOP have the text encoder's part.")
        if table := _parity_table(self.parities, self.reference):
            parts.append("\n".join(table))
        if lost := [f"{p.contender} at {p.image_psnr_db:.1f} dB" for p in self.parities if p.image_psnr_db < FLOOR_DB]:
            parts.append(f"Whole images below {FLOOR_DB:g} dB, the floor of a graph: {', '.join(lost)}")
        parts += [f"No peak of {one} was measured: {why}" for one, why in self.without_peak.items()]
        parts += [f"Left out: {why}" for why in self.left_out.values()]
        for one, grown in self.memory.items():
            parts.append(
                f"{one} took " + " and ".join(f"{size / 1e6:.0f} MB of the {what}" for what, size in grown.items())
            )
        return "\n\n".join(parts)


def _compare(running: Bench, steps: int, rounds: int, memory: bool) -> _Comparison:
    """Measure all of it, and close what ran. Raises as `Bench` does."""
    try:
        speeds = running.speeds(steps, rounds)
        parities = running.parities(steps)
        reference = running.reference
    finally:
        running.close()
    compared = tuple(running.pipelines)
    without_peak = dict[Contender, str]()
    peaks = {contender: _peak(contender, running.options, without_peak) for contender in compared}
    taken = dict[Contender, dict[str, int]]()
    for one in compared if memory else ():
        with running.trying(one):
            taken[one] = memory_bytes(running.bundle.path, one, running.batch_sizes, running.options)
    return _Comparison(
        manifest=running.bundle.manifest,
        steps=steps,
        machine=_machine(running.options.threads),
        speeds=[speed for speed in speeds if speed.contender in compared],
        parities=parities,
        reference=reference,
        peaks=peaks,
        without_peak=without_peak,
        memory=taken,
        left_out=running.left_out,
    )


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    """A record with null for numbers that JSON has not, such as the PSNR of two images that are the same."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()
    }


def _peak(contender: Contender, options: EngineOptions, without: dict[Contender, str]) -> float | None:
    """Operations a second of large matrix products; None, with the reason put into `without`, where there are none."""
    if contender.backend == "fake":
        return None
    try:
        return peak_operations_per_second(contender, options)
    except EngineError as error:
        without[contender] = str(error)
        return None


def _machine(threads: int) -> str:
    words = [f"{platform.machine()}, {threads} CPU {'thread' if threads == 1 else 'threads'}"]
    try:
        from engines.backends.cuda import Cuda

        words.append(Cuda().name)
    except EngineError:
        pass
    return ", ".join(words)


def _speed_table(speeds: Sequence[Speed], peaks: dict[Contender, float | None], first: Contender) -> list[str]:
    base = {speed.batch: speed.seconds for speed in speeds if speed.contender == first}
    lines = [
        f"| backend | images at once | s | images/s | times {first} | GFLOP an image | of the matrix-product peak |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for speed in sorted(speeds, key=lambda speed: (speed.batch, speeds.index(speed))):
        peak = peaks[speed.contender]
        share = f"{speed.share_of(peak):.0%} of {peak / 1e9:.0f} GFLOP/s" if peak else "-"
        lines.append(
            f"| `{speed.contender}` | {speed.batch} | {speed.seconds:.4g} | {speed.images_per_second:.4g} "
            f"| {base[speed.batch] / speed.seconds:.2f} | {speed.operations / speed.batch / 1e9:.3g} | {share} |"
        )
    return lines


def _parity_table(parities: Sequence[Parity], reference: Contender) -> list[str]:
    lines = [
        f"| backend, against {reference} | one step: max | mean | whole image: max of 255 | mean | PSNR, dB |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for parity in parities:
        if parity.contender != reference:
            lines.append(
                f"| `{parity.contender}` | {parity.step_maximum:.3g} | {parity.step_mean:.3g} "
                f"| {parity.image_maximum} | {parity.image_mean:.3g} | {parity.image_psnr_db:.1f} |"
            )
    return lines if len(lines) > 2 else []
