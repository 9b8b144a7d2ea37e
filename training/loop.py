"""The one training loop: any loss, any network, any number of processes. Knows no diffusion.

A run is a pure function of (seed, update): the batch and the noise of every update are derived from them, so a
resumed run repeats the updates it lost exactly, and rows fall the same however they are shared among processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from training.capture import capture_network
from training.checkpoints import Checkpoints
from training.data.entries import DataError
from training.draws import Draws
from training.errors import Stopped, TrainingError
from training.guard import signals
from training.networks import compile_network
from training.progress import Pace, Report
from training.sections import Optimisation, ScaleRecipe
from training.state import State, Validation

Network = TypeVar("Network", bound=nn.Module)
StepLoss = Callable[[nn.Module, Any, Draws], Tensor]
Load = Callable[[int, Draws], Any]
SavePicture = Callable[[Any, Path], None]


def learning_rate(recipe: Optimisation, update: int) -> float:
    """The learning rate of an update: linear warm-up, then constant, linear or cosine decay to zero."""
    if update < recipe.warmup:
        return recipe.learning_rate * (update + 1) / recipe.warmup
    left = 1 - (update - recipe.warmup) / max(1, recipe.updates - recipe.warmup)
    factor = {"constant": 1.0, "linear": left, "cosine": 0.5 * (1 - math.cos(math.pi * left))}[recipe.decay]
    return recipe.learning_rate * factor


def shares(batch_size: int, accelerator: Accelerator, micro_batch: int | None = None) -> list[range]:
    """The rows of a batch that this process passes through the network, part by part.

    Raises TrainingError where the processes cannot share the batch equally.
    """
    count, rest = divmod(batch_size, accelerator.num_processes)
    if rest:
        raise TrainingError(f"{accelerator.num_processes} processes cannot share batches of {batch_size} rows equally")
    start, most = accelerator.process_index * count, micro_batch or count
    return [range(first, min(first + most, start + count)) for first in range(start, start + count, most)]


def train(
    network: Network,
    loss: StepLoss,
    recipe: Optimisation,
    folder: Path,
    *,
    accelerator: Accelerator,
    seed: int,
    load: Load = lambda update, draws: update,
    sample: SavePicture | None = None,
    validation: Validation | None = None,
    scale: ScaleRecipe = ScaleRecipe(),
    pace: Pace = Pace(),
) -> Network:
    """Minimise `loss(network, loaded, draws)`; return the trained network, averaged if the recipe says so.

    The loss is a mean over the rows of `draws`, which are this process's share of the batch; `load(update, draws)`
    reads their data, by default none. Continues from the last checkpoint in `folder`, and removes nothing: the caller
    decides when a stage is done. With a validation the best network is returned. Where weights are sharded (FSDP) only
    the main process gets the whole network, and no samples are made on the way. Raises TrainingError when too many
    updates had to be skipped, Stopped on SIGTERM or SIGINT, and DataError, in all processes, when `load` does in one:
    each time what was trained is saved before. Raises TrainingError too, and saves nothing more, for a validation that
    is not finite and for a best network that cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = State(network.to(accelerator.device), recipe, accelerator, Checkpoints(folder))
    if scale.compile:
        compile_network(network)
    if scale.capture:
        capture_network(network)
    state.load()
    parts = shares(recipe.batch_size, accelerator, scale.micro_batch)
    with Report(folder, recipe, state.update, pace, main=accelerator.is_main_process) as report, signals() as leave:
        state.report = report
        while state.update < recipe.updates and not state.settled(validation):
            rate = learning_rate(recipe, state.update)
            value, norm = _update(state, load, loss, parts, rate, recipe.clip, seed)
            state.update += 1
            if state.guard.exhausted:
                report.tell(state.update, value, norm, rate, state.guard.skipped, state.kept(validation))
                reason = state.guard.reason(folder, state.update, value, norm)
                if state.update < recipe.updates:  # Else the next start would take it for done.
                    state.guard.pardon()
                    state.save()
                raise TrainingError(reason)
            if state.update == recipe.updates and state.guard.is_stuck:
                raise TrainingError(state.guard.reason(folder, state.update, value, norm))
            last = state.update == recipe.updates
            if validation and (last or state.update % validation.every == 0):
                state.validate(validation)
            report.tell(state.update, value, norm, rate, state.guard.skipped, state.kept(validation))
            if state.settled(validation) and state.guard.is_untrained:
                raise TrainingError(state.guard.reason(folder, state.update, value, norm))
            shown = sample and accelerator.is_main_process and not state.is_sharded
            if shown and sample and state.update % pace.sample_every == 0:
                save_picture(sample, state.result, folder / f"samples-{state.update:07d}.png")
            if state.any(leave.asked):
                raise _stopped(folder.name, state.update, is_saved=state.save())
            if state.any(report.checkpoint_is_due):
                state.save()
                report.checkpoint_done()
        is_saved = pace.saves_at_end and state.save()
        if state.any(leave.asked):
            raise _stopped(folder.name, state.update, is_saved=is_saved)
    return cast(Network, state.finish(validation))


def _stopped(stage: str, update: int, *, is_saved: bool) -> Stopped:
    lost = "" if is_saved else "; what was done since the last checkpoint could not be written"
    return Stopped(f"{stage} was stopped after update {update}{lost}; the same command goes on")


def save_picture(sample: SavePicture, network: nn.Module, path: Path) -> None:
    """Save a picture, or tell why there is none: that is no reason to lose the run."""
    try:
        sample(network, path)
    except (OSError, DataError, torch.OutOfMemoryError) as error:
        tqdm.write(f"{path} was not written, training goes on: {error}")


def _update(
    state: State, load: Load, loss: StepLoss, parts: list[range], rate: float, clip: float, seed: int
) -> tuple[float, float]:
    """One update, or none where the guard refuses it; returns the batch's loss and the gradient's norm."""
    accelerator, optimizer = state.accelerator, state.optimizer
    rows, values = sum(len(part) for part in parts), []
    for part in parts:
        last, draws = part is parts[-1], Draws(seed, state.update, part)
        loaded = _loaded(state, load, draws)
        with nullcontext() if last else accelerator.no_sync(state.wrapped):
            with _attention(accelerator), accelerator.autocast():
                value = loss(state.wrapped, loaded, draws) * (len(part) / rows)
            accelerator.backward(value)
        values.append(value.detach())
    norm = accelerator.clip_grad_norm_(state.wrapped.parameters(), clip)
    total = float(accelerator.reduce(torch.stack(values).sum(), "mean"))
    size = float("nan") if norm is None else float(norm)
    if not state.guard.refuses(total, size):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        if state.average:
            state.average.update_parameters(accelerator.unwrap_model(state.wrapped))
    optimizer.zero_grad()
    return total, size


def _loaded(state: State, load: Load, draws: Draws) -> Any:
    """What the loss needs. Where a process cannot have it, all save and raise DataError, before any waits for it."""
    loaded, lacking = None, None
    try:
        loaded = load(state.update, draws)
    except DataError as error:
        lacking = error
    if state.any(lacking is not None):
        state.save()
        raise lacking or DataError("another process has no data: its message says why")
    return loaded


def _attention(accelerator: Accelerator) -> AbstractContextManager[None]:
    """Which attention a forward pass records: in bf16 on a CPU, fused attention's backward is the slower one."""
    if accelerator.device.type == "cpu" and accelerator.mixed_precision == "bf16":
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()
