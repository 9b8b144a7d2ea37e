"""One step of a Stable-Diffusion-shaped student in torch: eager, compiled, and ahead of time; and what limits it.

The step is that of a bundle's step graph: the network, and the sampler in fp32. Its weights are random. Two floors
stand beside each time: the operations at the speed of large matrix products, and the weights, read once, at the speed
of a large copy. Both ceilings are measured on the device, in the same run.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.cost import DTYPES, HALVINGS, conditions, count_flops, measured_peak, narrowed, whole_numbers
from engines.decibels import psnr_db
from training.diffusion import Schedule
from training.exporting.graphs import StepGraph
from training.guidance import Condition
from training.networks import NetworkDenoiser, student_from

WARMUP = 3
COPIED_BYTES = {"cuda": 4 * 2**30, "cpu": 2**28}
ARITHMETIC_FROM, BUSY_FROM = 0.6, 0.8
"""From which share of the peak arithmetic is the limit, and to which share of busy time launching kernels is."""

Step = Callable[..., Tensor]


class InPrecision(nn.Module):
    """A denoiser whose network computes in `dtype`; what it is given and what it gives are fp32."""

    def __init__(self, denoiser: NetworkDenoiser, dtype: torch.dtype) -> None:
        super().__init__()
        self.denoiser, self.dtype = denoiser.to(dtype), dtype

    def forward(self, z: Tensor, t: Tensor, condition: Condition, w: Tensor) -> Tensor:
        """Predict v (B, c, h, w)."""
        lowered = {name: value.to(self.dtype) for name, value in condition.items()}
        v: Tensor = self.denoiser(z.to(self.dtype), t, lowered, w)
        return v.float()


@dataclass(frozen=True)
class Timing:
    """Median seconds of a step in one of the ways, and the share of them in which the device was busy, if known."""

    way: str
    rows: int
    seconds: float
    busy: float | None = None


@dataclass(frozen=True)
class Distance:
    """How far the values of a step are from those in fp32; the peak is the range of these."""

    maximum: float
    mean: float
    psnr_db: float

    @classmethod
    def between(cls, actual: Tensor, expected: Tensor) -> Distance:
        """Of one tensor from another."""
        difference = (actual - expected).abs()
        error = difference.square().mean().item()
        peak = (expected.max() - expected.min()).item()
        return cls(difference.max().item(), difference.mean().item(), psnr_db(error, peak))


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches: operations and copied bytes (read and written) a second."""

    operations: float
    bytes: float

    @classmethod
    def measured(cls, device: torch.device, dtype: torch.dtype) -> Ceilings:
        """By a large product and a large copy."""
        source = torch.empty(COPIED_BYTES[device.type] // 4, device=device).normal_()
        target = torch.empty_like(source)
        copies = timed(lambda: target.copy_(source), device, repeats=10)
        return cls(measured_peak(device, dtype), 2 * COPIED_BYTES[device.type] / min(copies))


def timed(call: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Seconds of each call, the device's work included."""
    seconds = []
    for k in range(WARMUP + repeats):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if k >= WARMUP:
            seconds.append(time.perf_counter() - start)
    return seconds


def busy_share(call: Callable[[], object], device: torch.device) -> float | None:
    """The share of a call's time in which kernels run; None on a CPU, which is always busy."""
    if device.type != "cuda":
        return None
    seconds = min(timed(call, device, 3))
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        call()
        torch.cuda.synchronize()
    kernels = sum(event.self_device_time_total for event in found.key_averages()) / 1e6
    return min(1.0, kernels / seconds)


def make_step(width: float, dtype: torch.dtype, device: torch.device) -> StepGraph:
    """A step graph with the network of Stable Diffusion 1.5, or a share of its channels, and random weights."""
    torch.manual_seed(0)
    with device:  # where random numbers are quicker
        network = UNet2DConditionModel(**narrowed(width))
    student = student_from(NetworkDenoiser(network, Schedule.scaled_linear(), "eps")).eval()
    denoiser = student if dtype == torch.float32 else InPrecision(student, dtype)
    return StepGraph(denoiser, ("context",)).to(device).requires_grad_(False)  # type: ignore[arg-type]


def inputs_of(step: StepGraph, width: float, side: int, rows: int, device: torch.device) -> tuple[Tensor, ...]:
    """Rows at different places of the grid."""
    generator = torch.Generator().manual_seed(rows)
    angle = torch.linspace(1.5, 0.2, rows)
    shaped = {name: torch.randn(rows, 4, side, side, generator=generator) for name in ("z", "known", "noise")}
    values: Mapping[str, Tensor] = {
        **shaped,
        **conditions(narrowed(width), rows, torch.device("cpu")),
        "time": angle / 1.6,
        "alpha": angle.cos(),
        "sigma": angle.sin(),
        "alpha_next": (angle / 2).cos(),
        "sigma_next": (angle / 2).sin(),
        "guidance": 2 * angle,
        "keep": torch.zeros(rows, 1, side, side),
    }
    return tuple(values[name].to(device) for name in step.input_names)


def eager(step: StepGraph, inputs: Sequence[Tensor], package: Path) -> Step:
    """As it is."""
    return step


def compiled(step: StepGraph, inputs: Sequence[Tensor], package: Path) -> Step:
    """By torch.compile; on CUDA its launches are captured in a graph."""
    return torch.compile(step, mode="reduce-overhead" if inputs[0].is_cuda else "default")


def ahead_of_time(step: StepGraph, inputs: Sequence[Tensor], package: Path) -> Step:
    """By torch.export and AOTInductor, for this shape; a package that is there already is taken as it is."""
    if not package.exists():
        program = torch.export.export(step, tuple(inputs))
        part = package.with_suffix(".part.pt2")
        Path(torch._inductor.aoti_compile_and_package(program, package_path=str(part))).rename(package)
    loaded: Step = torch._inductor.aoti_load_package(str(package))
    return loaded


WAYS: Mapping[str, Callable[[StepGraph, Sequence[Tensor], Path], Step]] = {
    "eager": eager,
    "compiled": compiled,
    "aot": ahead_of_time,
}


def limit(timing: Timing, share: float, floors: tuple[float, float]) -> str:
    """What most of the time goes into, in words."""
    if timing.busy is not None and timing.busy < BUSY_FROM:
        return f"launching kernels: the device is busy {timing.busy:.0%} of the time"
    if share >= ARITHMETIC_FROM:
        return "arithmetic"
    if floors[1] > floors[0]:
        return "reading the weights, and what lies between kernels"
    return "kernels that move activations, and products too small to fill the device"


HEAD = (
    "| way | rows | ms | rows/s | of the peak | floor by arithmetic, ms | floor by weights, ms | limit "
    "| error to fp32 eager: max | mean | PSNR, dB |\n|---|--:|--:|--:|--:|--:|--:|---|--:|--:|--:|"
)


def line(timing: Timing, distance: Distance, flops: float, weight_bytes: int, ceilings: Ceilings) -> str:
    """A line of the table that `HEAD` begins, `flops` being those of a row of the batch."""
    floors = flops * timing.rows / ceilings.operations, weight_bytes / ceilings.bytes
    share = floors[0] / timing.seconds
    return (
        f"| {timing.way} | {timing.rows} | {timing.seconds * 1e3:.3g} | {timing.rows / timing.seconds:.3g} "
        f"| {share:.0%} | {floors[0] * 1e3:.3g} | {floors[1] * 1e3:.3g} | {limit(timing, share, floors)} "
        f"| {distance.maximum:.3g} | {distance.mean:.3g} | {distance.psnr_db:.1f} |"
    )


def _ways(context: click.Context, option: click.Parameter, value: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(value.split(",")))
    if unknown := [name for name in names if name not in WAYS]:
        raise click.BadParameter(f"{unknown[0]!r} is not one of {', '.join(WAYS)}")
    return names


@click.command()
@click.option("--width", default=1.0, show_default=True, help="Share of Stable Diffusion 1.5's channels.")
@click.option("--size", type=click.IntRange(64), default=512, show_default=True, help="Pixels of an image's side.")
@click.option("--rows", callback=whole_numbers, default="1,4,16", show_default=True, help="Batch sizes.")
@click.option("--precision", type=click.Choice(list(DTYPES)), default="bf16", show_default=True)
@click.option("--ways", callback=_ways, default=",".join(WAYS), show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=20, show_default=True)
@click.option(
    "--packages",
    type=click.Path(file_okay=False, path_type=Path),
    help="Keep what is compiled ahead of time there, and take what is there.",
)
def main(
    width: float, size: int, rows: tuple[int, ...], precision: str, ways: tuple[str, ...], repeats: int,
    packages: Path | None,
) -> None:  # fmt: skip
    """Time one step in several ways, and compare what they give with fp32."""
    device, dtype = torch.device("cuda" if torch.cuda.is_available() else "cpu"), DTYPES[precision]
    side = size >> HALVINGS
    torch.backends.cudnn.allow_tf32 = False  # fp32 is what the rest is compared with, and its peak is that of fp32
    if size % 64:
        raise click.ClickException(f"images have a side that is a multiple of 64, not {size}")
    flops = count_flops(narrowed(width), side, gradient_checkpointing=False).call
    exact, step = (make_step(width, kind, device) for kind in (torch.float32, dtype))
    weight_bytes = sum(value.nbytes for value in step.parameters())
    ceilings = Ceilings.measured(device, dtype)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    click.echo(
        f"{name}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}, {precision}, images of {size} px, "
        f"{width:g} of the channels, {weight_bytes / 1e6:.0f} MB of weights, {flops / 1e12:.3g} TFLOP a row; a product "
        f"of matrices reaches {ceilings.operations / 1e12:.3g} TFLOP/s, a copy {ceilings.bytes / 1e9:.4g} GB/s. "
        f"Medians of {repeats}.\n\n{HEAD}"
    )
    expected: dict[int, Tensor] = {}
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.enter_context(torch._dynamo.config.patch(cache_size_limit=64))
        folder = packages or Path(stack.enter_context(TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        for way in sorted(ways, key=list(WAYS).index):  # the quickest to make first: a run may be cut off
            for count in rows:
                inputs = inputs_of(step, width, side, count, device)
                if count not in expected:
                    expected[count] = exact(*inputs)
                made = WAYS[way](step, inputs, folder / f"{width:g}-{size}-{count}-{precision}-{device.type}.pt2")
                call = lambda made=made, inputs=inputs: made(*inputs)  # noqa: E731
                distance = Distance.between(call().float(), expected[count])
                seconds = statistics.median(timed(call, device, repeats))
                timing = Timing(way, count, seconds, busy_share(call, device))
                click.echo(line(timing, distance, flops, weight_bytes, ceilings))


if __name__ == "__main__":
    main()
