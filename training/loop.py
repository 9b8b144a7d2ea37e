"""The one training loop: any loss, any network, any number of processes. Knows no diffusion.

A run is a pure function of (seed, update): the batch and the noise of every update are derived from them, so a
resumed run repeats the updates it lost exactly, and rows fall the same however they are shared among processes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from training.capture import capture_network
from training.checkpoints import Checkpoints
from training.data.entries import DataError
from training.draws import Draws, generator_at
from training.guard import Guard, signals
from training.networks import compile_network
from training.progress import Pace, Report
from training.sections import Optimisation, ScaleRecipe

Network = TypeVar("Network", bound=nn.Module)
StepLoss = Callable[[nn.Module, Any, Draws], Tensor]
Load = Callable[[int, Draws], Any]
SavePicture = Callable[[Any, Path], None]


class TrainingError(Exception):
    """A run that cannot go on; the message says why and what to do."""


class Stopped(Exception):
    """A signal asked the run to leave, and it saved its work."""


@dataclass(frozen=True)
class Validation:
    """A distance, lower is better, taken every `every` updates and after the last one.

    `patience` of them in a row without a gain end the stage.
    """

    distance: Callable[[nn.Module], float]
    every: int
    patience: int


class BatchOrder:
    """Which items form the batch of an update: epochs of seeded permutations, addressable at any update."""

    def __init__(self, items: int, batch_size: int, seed: int) -> None:
        """Over `items` items. Raises TrainingError when there are none."""
        if items < 1:
            raise TrainingError("the data set is empty")
        self.items, self.batch_size, self.seed = items, batch_size, seed
        self._epochs: dict[int, Tensor] = {}

    def at(self, update: int) -> Tensor:
        """The item indices (batch_size,) of an update."""
        place, stop = update * self.batch_size, (update + 1) * self.batch_size
        parts = []
        while place < stop:
            epoch, first = divmod(place, self.items)
            parts.append(self._permutation(epoch)[first : first + stop - place])
            place += len(parts[-1])
        return torch.cat(parts)

    def ahead(self, update: int) -> Tensor:
        """Nothing: all items are there."""
        return torch.empty(0, dtype=torch.int64)

    def _permutation(self, epoch: int) -> Tensor:
        if epoch not in self._epochs:
            self._epochs = {e: p for e, p in self._epochs.items() if e == epoch - 1}
            self._epochs[epoch] = torch.randperm(self.items, generator=generator_at(self.seed, epoch, 1))
        return self._epochs[epoch]


def learning_rate(recipe: Optimisation, update: int) -> float:
    """The learning rate of an update: linear warm-up, then constant, linear or cosine decay to zero."""
    if update < recipe.warmup:
        return recipe.learning_rate * (update + 1) / recipe.warmup
    left = 1 - (update - recipe.warmup) / max(1, recipe.updates - recipe.warmup)
    factor = {"constant": 1.0, "linear": left, "cosine": 0.5 * (1 - math.cos(math.pi * left))}[recipe.decay]
    return recipe.learning_rate * factor


def averaged(network: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average whose decay grows to `decay` with the number of updates."""

    def lerp(average: Any, current: Any, count: Any) -> None:
        rate = min(decay, (1 + float(count)) / (10 + float(count)))
        torch._foreach_lerp_(average, current, 1 - rate)

    return AveragedModel(network, multi_avg_fn=lerp)


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
    state = _State(network.to(accelerator.device), recipe, accelerator, Checkpoints(folder))
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
                state.guard.pardon()
                state.save()
                raise TrainingError(reason)
            if state.update == recipe.updates and state.guard.is_stuck:
                raise TrainingError(state.guard.reason(folder, state.update, value, norm))
            last = state.update == recipe.updates
            if validation and (last or state.update % validation.every == 0):
                state.validate(validation)
            report.tell(state.update, value, norm, rate, state.guard.skipped, state.kept(validation))
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
    state: _State, load: Load, loss: StepLoss, parts: list[range], rate: float, clip: float, seed: int
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


def _loaded(state: _State, load: Load, draws: Draws) -> Any:
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


_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclass
class _State:
    """What is trained, and all that a checkpoint holds."""

    network: nn.Module
    recipe: Optimisation
    accelerator: Accelerator
    checkpoints: Checkpoints
    update: int = 0
    best: float = math.inf
    best_update: int = 0
    stale: int = 0
    wrapped: nn.Module = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)
    average: AveragedModel | None = field(init=False)
    guard: Guard = field(init=False)
    whole: nn.Module | None = field(init=False)
    report: Report | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        recipe, accelerator = self.recipe, self.accelerator
        if recipe.ema and self.is_sharded:
            raise TrainingError("an average (ema) cannot be kept of weights that are sharded: set ema to 0")
        # What is sharded cannot be put together again in place.
        self.whole = copy.deepcopy(self.network).cpu() if self.is_sharded else None
        self.average = averaged(self.network, recipe.ema) if recipe.ema else None
        self.guard = Guard(recipe.spike, recipe.skip_limit)
        optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
        )
        self.wrapped, self.optimizer = accelerator.prepare(self.network, optimizer)

    @property
    def is_sharded(self) -> bool:
        """Whether no process has all weights."""
        return bool(self.accelerator.distributed_type == DistributedType.FSDP)

    def any(self, here: bool) -> bool:
        """Whether it is so in any process."""
        if self.accelerator.num_processes == 1:
            return here
        flag = torch.tensor(float(here), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)

    def save(self) -> bool:
        """Write a checkpoint, for which every process is needed; False, in the main one, if it was not written."""
        if self.report:  # else a kill may leave a checkpoint of updates that the log never tells of
            self.report.write()
        weights, optimizer = self._gathered(), None
        if self._optimizer.state:  # else torch would take a step to have one, which the run would go on from
            optimizer = get_optimizer_state_dict(self.wrapped, self._optimizer, options=_WHOLE)
        is_written = not self.accelerator.is_main_process or self.checkpoints.save(
            {
                "network": weights,
                "optimizer": optimizer,
                "average": self.average.state_dict() if self.average else None,
                "guard": self.guard.state(),
                "update": self.update,
                "best": self.best,
                "best_update": self.best_update,
                "stale": self.stale,
            }
        )
        self.accelerator.wait_for_everyone()  # a launcher ends the one that writes soon after another has left
        return is_written

    def load(self) -> None:
        """Go on from the last checkpoint. Raises TrainingError, in all processes, if they read different ones."""
        state = self._read()
        if state is None:
            return
        set_model_state_dict(self.wrapped, state["network"], options=_WHOLE)
        if state["optimizer"] is not None:
            set_optimizer_state_dict(self.wrapped, self._optimizer, state["optimizer"], options=_WHOLE)
        if self.average and state["average"] is not None:
            self.average.load_state_dict(state["average"])
        elif self.average:  # it was asked for since: it begins here
            self.average = averaged(self.network, self.recipe.ema)
        self.guard.restore(state["guard"])
        self.update, self.best, self.stale = state["update"], state["best"], state["stale"]
        self.best_update = state.get("best_update", 0)  # which older checkpoints lack
        if math.isfinite(self.best) and not self.checkpoints.has_best:
            tqdm.write(f"{self.checkpoints.folder} has lost its best network: it is sought anew from here on")
            self.best, self.best_update, self.stale = math.inf, 0, 0

    def _read(self) -> dict[str, Any] | None:
        state, unread = None, None
        try:
            state = self.checkpoints.load()
        except OSError as error:
            unread = error
        update = -1 if unread else state["update"] if state else 0
        found = self.accelerator.gather(torch.tensor([update], device=self.accelerator.device)).tolist()
        if len(set(found)) > 1:
            listed = ", ".join("unreadable" if update < 0 else str(update) for update in found)
            raise TrainingError(
                f"{self.checkpoints.folder}: the processes do not find the same checkpoint (by process, after update: "
                f"{listed}); see that each of them can read the folder's checkpoints, and start them again"
            ) from unread
        if unread:
            raise unread
        return state

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        """The optimiser itself, which accelerate wraps."""
        return cast(torch.optim.Optimizer, getattr(self.optimizer, "optimizer", self.optimizer))

    @property
    def result(self) -> nn.Module:
        """The network to keep: the average where there is one."""
        if self.average:
            return self.average.module
        unwrapped: nn.Module = self.accelerator.unwrap_model(self.wrapped)
        return unwrapped

    def validate(self, validation: Validation) -> None:
        """Take the distance, the same in all processes, and keep the network if it is the best one so far.

        One that a full disk does not take is not the best: the next validation tries again. Raises TrainingError for a
        distance that is not finite. No checkpoint has its update then, so that a run that goes on takes it again.
        """
        network = self.wrapped if self.is_sharded else self.result
        distance = torch.tensor(validation.distance(network), device=self.accelerator.device)
        value = float(self.accelerator.reduce(distance, "mean"))
        if not math.isfinite(value):
            raise TrainingError(
                f"{self.checkpoints.folder.name}: the distance of the validation after update {self.update} is "
                f"{value}, not finite, so the data hold, or a network makes, values that are not (weights cannot: such "
                "updates are skipped); mend the data, and the same command goes on from the last checkpoint"
            )
        if value >= self.best:
            self.stale += 1
            return
        weights = self._gathered() if self.is_sharded else network.state_dict()
        lost = self.accelerator.is_main_process and not self.checkpoints.save_best(weights)
        if not self.any(lost):
            self.best, self.best_update, self.stale = value, self.update, 0

    def kept(self, validation: Validation | None) -> int:
        """The update whose network is kept if training ends now."""
        return self.best_update if self._keeps_best(validation) else self.update

    def _keeps_best(self, validation: Validation | None) -> bool:
        """Whether the best network is kept: validations may have found one and not be asked for any more."""
        return validation is not None and math.isfinite(self.best)

    def settled(self, validation: Validation | None) -> bool:
        """Whether the last validations brought nothing."""
        return validation is not None and self.stale >= validation.patience

    def finish(self, validation: Validation | None) -> nn.Module:
        """The result, out of accelerate's hands."""
        if self.whole is None:
            self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)
            result = self.result
        else:
            result = self.whole
            weights = self._gathered()
            if self.accelerator.is_main_process:
                result.load_state_dict(weights)
        self.accelerator.wait_for_everyone()
        self.accelerator.free_memory()
        if self._keeps_best(validation):
            result.load_state_dict(self._best_weights())
            self.accelerator.wait_for_everyone()  # the caller may remove what others still read
        return result.to(self.accelerator.device).eval()

    def _best_weights(self) -> dict[str, Tensor]:
        try:
            return self.checkpoints.load_best()
        except OSError as error:
            raise TrainingError(str(error)) from error

    def _gathered(self) -> dict[str, Any]:
        """All weights, on the CPU of the main process; every process must ask."""
        return get_model_state_dict(self.wrapped, options=_WHOLE)
