"""What distilling a large network costs: both stages timed on the device that is there, and a whole run reckoned.

Without a checkpoint the network is Stable Diffusion 1.5's U-Net with random weights. FLOPs are counted on PyTorch's
meta device, of matrix products and convolutions, two for a multiplication with its addition, so that counting takes no
memory. With --peak-tflops nothing is timed: the speed is a share of that peak, which is an assumption.

Latents and prompts are taken as precomputed: reading them, and encoding images, is not in the figures.
"""

from __future__ import annotations

import gc
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.stages import frozen_student, stage1_loss, stage2_loss, time_updates
from training.commands import MIXED_PRECISION
from training.diffusion import Schedule
from training.draws import Draws
from training.guidance import Condition
from training.losses import Batch
from training.networks import GUIDANCE_EMBEDDING_DIM, NetworkDenoiser, student_from
from training.pretrained.teachers import TeacherError, TeacherPipeline
from training.sections import ScaleRecipe

STABLE_DIFFUSION: Mapping[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
TOKENS = 77
HALVINGS = 3
ROUNDS = "2500,2500,2500,2500,10000,20000,20000"  # as in training/recipes/stable-diffusion.toml
FROZEN_CALLS = 2
PRODUCTS = 5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Flops:
    """Of one image: a call of the network, and an update of either stage."""

    call: int
    update: int


@dataclass(frozen=True)
class Speed:
    """Of one stage on one device; `memory` is the most that CUDA gave out, in bytes."""

    stage: str
    images_per_s: float
    memory: int | None = None
    between: tuple[float, float] | None = None


@dataclass(frozen=True)
class Plan:
    """A whole run: updates of stage 1 and of each round of stage 2, and the share of its speed that a device keeps."""

    stage1_updates: int
    rounds: Sequence[int]
    batch_size: int
    efficiency: float
    price_per_hour: float | None = None

    def hours(self, speeds: Sequence[Speed], devices: int) -> tuple[float, float]:
        """Hours of stage 1, and of all rounds of stage 2."""
        first, second = (self.batch_size / (devices * self.efficiency * speed.images_per_s * 3600) for speed in speeds)
        return self.stage1_updates * first, sum(self.rounds) * second

    def table(self, speeds: Sequence[Speed], devices: Sequence[int]) -> str:
        """A Markdown table of hours, device-hours and, at a price, what they cost."""
        priced = self.price_per_hour is not None
        head = ["devices", "rows a device", "stage 1, h", "stage 2, h", "in all, h", "device-hours", "cost"]
        lines = [_row(head[: None if priced else -1]), "|" + "--:|" * (len(head) - (not priced))]
        for count in devices:
            first, second = self.hours(speeds, count)
            total = first + second
            cells = [str(count), f"{self.batch_size / count:g}", f"{first:.1f}", f"{second:.1f}", f"{total:.1f}"]
            cells.append(f"{total * count:.0f}")
            if self.price_per_hour is not None:
                cells.append(f"{total * count * self.price_per_hour:.0f}")
            lines.append(_row(cells))
        return "\n".join(lines)


@dataclass(frozen=True)
class Network:
    """The network of a pipeline, or Stable Diffusion's with a share of its channels and random weights."""

    pipeline: TeacherPipeline | None
    width: float

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """What diffusers makes it of."""
        return self.pipeline.network_config if self.pipeline else narrowed(self.width)

    def __str__(self) -> str:
        narrow = "" if self.width == 1 else f" with {self.width:g} of its channels"
        name = self.pipeline.source if self.pipeline else f"Stable Diffusion 1.5's U-Net{narrow}"
        with torch.device("meta"):
            parameters = sum(p.numel() for p in UNet2DConditionModel.from_config(self.config).parameters())
        return f"{name}, {parameters / 1e6:.0f} M parameters"

    def side(self, size: int) -> int:
        """The side of the latents of images. Raises ClickException where they do not fit."""
        halvings = self.pipeline.autoencoder_halvings if self.pipeline else HALVINGS
        if size % (unit := 1 << (halvings + len(self.config["block_out_channels"]) - 1)):
            raise click.ClickException(f"images have a side that is a multiple of {unit}, not {size}")
        return size >> halvings

    def teacher(self, device: torch.device) -> NetworkDenoiser:
        """The network, loaded or made anew."""
        if self.pipeline:
            return self.pipeline.denoiser().to(device)
        with device:
            network = UNet2DConditionModel(**self.config)
        return NetworkDenoiser(network, Schedule.scaled_linear(), "eps")


def narrowed(width: float) -> dict[str, Any]:
    """Stable Diffusion's configuration with a share of its channels. Raises ClickException where they do not divide."""
    channels = [round(width * count) for count in STABLE_DIFFUSION["block_out_channels"]]
    groups = STABLE_DIFFUSION["norm_num_groups"]
    if not channels[0] or any(count % groups for count in channels):
        raise click.ClickException(f"a width of {width:g} gives {channels} channels, which do not divide by {groups}")
    return {**STABLE_DIFFUSION, "block_out_channels": tuple(channels)}


def conditions(config: Mapping[str, Any], rows: int, device: torch.device) -> Condition:
    """Random contexts (rows, 77, D) for a network, and what SDXL's takes besides."""
    found = {"context": torch.randn(rows, TOKENS, config["cross_attention_dim"], device=device)}
    if config.get("addition_embed_type") == "text_time":
        width = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        found["pooled"] = torch.randn(rows, width, device=device)
        found["size"] = torch.full((rows, 6), 512.0, device=device)
    return found


def count_flops(config: Mapping[str, Any], side: int, gradient_checkpointing: bool) -> Flops:
    """FLOPs for one image of latent side `side`: what is computed again for the gradient counts too."""
    meta = torch.device("meta")
    with meta:
        network = UNet2DConditionModel.from_config({**config, "time_cond_proj_dim": GUIDANCE_EMBEDDING_DIM})
    condition = conditions(config, 1, meta)
    added = {"text_embeds": condition["pooled"], "time_ids": condition["size"]} if "pooled" in condition else None
    z, t = torch.empty(1, config["in_channels"], side, side, device=meta), torch.empty(1, device=meta)
    w = torch.empty(1, GUIDANCE_EMBEDDING_DIM, device=meta)

    def call() -> Tensor:
        output: Tensor = network(
            z, t, encoder_hidden_states=condition["context"], timestep_cond=w, added_cond_kwargs=added
        )[0]
        return output

    with torch.no_grad():
        forward = _counted(call)
    network.train()
    if gradient_checkpointing:
        network.enable_gradient_checkpointing()
    both = _counted(lambda: call().sum().backward())
    return Flops(forward, both + FROZEN_CALLS * forward)


def _counted(work: Callable[[], object]) -> int:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of a few products of square matrices, those of fp32 in the arithmetic of convolutions."""
    on_cpu = 2048 if dtype is torch.float32 else 512  # a CPU without instructions for it is a hundred times slower
    side = 8192 if device.type == "cuda" else on_cpu
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    for _ in range(PRODUCTS):
        start = time.perf_counter()
        _ = a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    torch.backends.cuda.matmul.allow_tf32 = before
    return 2 * side**3 / min(seconds)


def measure(
    stage: str, teacher: NetworkDenoiser, side: int, rows: int, precision: str, scale: ScaleRecipe, updates: int
) -> Speed:
    """The speed of a stage whose frozen network is `teacher`, with rows that were made once."""
    gc.collect()  # of what the stage before left
    accelerator = Accelerator(mixed_precision=MIXED_PRECISION[precision])
    device, config = accelerator.device, teacher.network.config
    teacher.to(device).eval().requires_grad_(False)
    condition = conditions(config, rows, device)
    null = {name: value[0] for name, value in condition.items() if name != "size"}
    batch = Batch(torch.randn(rows, config["in_channels"], side, side, device=device), condition)
    loss = stage1_loss(teacher, null) if stage == "stage 1" else stage2_loss(teacher)

    def batches(update: int, draws: Draws) -> Batch:
        return batch

    with TemporaryDirectory() as folder:
        student = student_from(teacher)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = time_updates(student, loss, batches, rows, updates, Path(folder), accelerator, scale)
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    return Speed(stage, rows / statistics.median(seconds), memory)


def middle(speeds: Sequence[Speed]) -> Speed:
    """Of a stage timed several times: the median speed, its range, and the most memory."""
    rates = [speed.images_per_s for speed in speeds]
    memory = [speed.memory for speed in speeds if speed.memory is not None]
    return Speed(speeds[0].stage, statistics.median(rates), max(memory, default=None), (min(rates), max(rates)))


def measure_in_turn(
    network: Network, side: int, rows: int, precision: str, scale: ScaleRecipe, updates: int, repeats: int
) -> tuple[list[Speed], float]:
    """Both stages, and the FLOP/s of a product of matrices, in turn: machines change their speed as they run."""
    device = Accelerator(mixed_precision=MIXED_PRECISION[precision]).device
    turns, peaks = [], []
    for _ in range(repeats):
        first = measure("stage 1", network.teacher(device), side, rows, precision, scale, updates)
        second = measure("stage 2", frozen_student(network.teacher(device)), side, rows, precision, scale, updates)
        turns.append((first, second))
        peaks.append(measured_peak(device, DTYPES[precision]))
    return [middle(stage) for stage in zip(*turns, strict=True)], statistics.median(peaks)


def speed_table(speeds: Sequence[Speed], flops: Flops, peak: float) -> str:
    """A Markdown table of what was measured."""
    lines = [_row(["", "images/s a device", "TFLOP/s", "share of the peak", "memory, GiB"]), "|---|--:|--:|--:|--:|"]
    for speed in speeds:
        rate = speed.images_per_s * flops.update
        memory = "not measured" if speed.memory is None else f"{speed.memory / 2**30:.1f}"
        low, high = speed.between or (speed.images_per_s, speed.images_per_s)
        images = f"{speed.images_per_s:.3g} ({low:.3g} to {high:.3g})"
        cells = [speed.stage, images, f"{rate / 1e12:.3g}", f"{rate / peak:.0%}", memory]
        lines.append(_row(cells))
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def whole_numbers(ctx: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    """Positive numbers between commas. Raises BadParameter."""
    try:
        found = tuple(int(part) for part in value.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not numbers between commas") from error
    if min(found) < 1:
        raise click.BadParameter("these numbers are at least 1")
    return found


def open_teacher(checkpoint: Path) -> TeacherPipeline:
    """A text-to-image pipeline. Raises ClickException for any other."""
    try:
        pipeline = TeacherPipeline.open(str(checkpoint))
    except TeacherError as error:
        raise click.ClickException(str(error)) from error
    if not pipeline.is_text or pipeline.is_inpainting:
        raise click.ClickException(f"{checkpoint} is not a text-to-image pipeline")
    return pipeline


@click.command()
@click.option("--checkpoint", type=click.Path(exists=True, path_type=Path), help="A Stable Diffusion in a folder.")
@click.option(
    "--width", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True, help="Of channels."
)
@click.option("--size", type=click.IntRange(min=64), default=512, show_default=True, help="Side of images in pixels.")
@click.option("--batch", "rows", type=click.IntRange(1), default=8, show_default=True, help="Rows a device at once.")
@click.option("--precision", type=click.Choice(list(MIXED_PRECISION)), default="bf16", show_default=True)
@click.option("--gradient-checkpointing", is_flag=True)
@click.option("--updates", type=click.IntRange(1), default=10, show_default=True, help="Timed, of a stage in a turn.")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="Turns of each stage.")
@click.option("--peak-tflops", type=click.FloatRange(0, min_open=True), help="Time nothing: reckon for this peak.")
@click.option("--share", type=click.FloatRange(0, 1, min_open=True), default=0.35, show_default=True, help="Of it.")
@click.option("--stage1-updates", type=click.IntRange(1), default=5000, show_default=True)
@click.option("--rounds", default=ROUNDS, show_default=True, callback=whole_numbers, help="Updates of each round.")
@click.option("--global-batch", type=click.IntRange(1), default=512, show_default=True)
@click.option("--devices", default="8,64", show_default=True, callback=whole_numbers)
@click.option("--efficiency", type=click.FloatRange(0, 1, min_open=True), default=0.9, show_default=True)
@click.option("--price-per-hour", type=click.FloatRange(0), help="Of one device, in any currency.")
def main(
    checkpoint: Path | None, width: float, size: int, rows: int, precision: str, gradient_checkpointing: bool,
    updates: int, repeats: int, peak_tflops: float | None, share: float, stage1_updates: int, rounds: tuple[int, ...],
    global_batch: int, devices: tuple[int, ...], efficiency: float, price_per_hour: float | None,
) -> None:  # fmt: skip
    """Time both stages, and reckon what a whole run takes."""
    if unfit := [count for count in devices if global_batch % count]:
        raise click.ClickException(f"{unfit[0]} devices cannot share batches of {global_batch} rows equally")
    if checkpoint and width != 1:
        raise click.ClickException("a checkpoint has the width that it has")
    network = Network(open_teacher(checkpoint) if checkpoint else None, width)
    side, scale = network.side(size), ScaleRecipe(gradient_checkpointing=gradient_checkpointing)
    flops = count_flops(network.config, side, gradient_checkpointing)
    click.echo(
        f"{network}, images of {size} px, {precision}, {'with' if gradient_checkpointing else 'no'} gradient "
        f"checkpointing: {flops.call / 1e12:.3f} TFLOP a call, {flops.update / 1e12:.3f} an image in an update"
    )
    if peak_tflops is not None:
        rate = share * peak_tflops * 1e12 / flops.update
        speeds = [Speed("stage 1", rate), Speed("stage 2", rate)]
        click.echo(f"assumed: {share:.0%} of {peak_tflops:g} TFLOP/s, which is {rate:.1f} images/s a device")
    else:
        speeds, peak = measure_in_turn(network, side, rows, precision, scale, updates, repeats)
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
        click.echo(
            f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {rows} rows a device, median of "
            f"{updates} updates in each of {repeats} turns, and their range; a product of matrices reaches "
            f"{peak / 1e12:.3g} TFLOP/s\n\n{speed_table(speeds, flops, peak)}"
        )
    plan = Plan(stage1_updates, rounds, global_batch, efficiency, price_per_hour)
    click.echo(
        f"\nA run of {stage1_updates} updates of stage 1 and {sum(rounds)} of stage 2 in {len(rounds)} rounds, "
        f"in batches of {global_batch}; assumed: each of several devices keeps {efficiency:.0%} of its speed\n\n"
        + plan.table(speeds, devices)
    )


if __name__ == "__main__":
    main()
