"""What is trained, with all that goes on from a checkpoint: any network, any number of processes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

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
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from training.checkpoints import LAST, PREVIOUS, Checkpoints
from training.errors import TrainingError
from training.guard import Guard
from training.progress import Report
from training.sections import Optimisation

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclass(frozen=True)
class Validation:
    """A distance, lower is better, taken every `every` updates and after the last one.

    `patience` of them in a row without a gain end the stage.
    """

    distance: Callable[[nn.Module], float]
    every: int
    patience: int


def averaged(network: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average whose decay grows to `decay` with the number of updates."""

    def lerp(average: Any, current: Any, count: Any) -> None:
        rate = min(decay, (1 + float(count)) / (10 + float(count)))
        torch._foreach_lerp_(average, current, 1 - rate)

    return AveragedModel(network, multi_avg_fn=lerp)


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether no process has all weights."""
    return bool(accelerator.distributed_type == DistributedType.FSDP)


def check_average(recipe: Optimisation, accelerator: Accelerator) -> None:
    """Raise TrainingError where a stage wants an average of weights of which no process has all."""
    if recipe.ema and is_sharded(accelerator):
        raise TrainingError("an average (ema) cannot be kept of weights that are sharded: set ema to 0")


@dataclass
class State:
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
        check_average(recipe, accelerator)
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
        return is_sharded(self.accelerator)

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
        try:
            set_model_state_dict(self.wrapped, state["network"], options=_WHOLE)
        except RuntimeError as error:
            if type(error) is not RuntimeError:  # no memory, or a process that is gone: the checkpoint is good
                raise
            raise TrainingError(
                f"{self.checkpoints.folder}: its checkpoint is of another network than the recipe's: remove "
                f"{LAST} and {PREVIOUS} to begin the stage anew"
            ) from error
        if state["optimizer"] is not None:
            set_optimizer_state_dict(self.wrapped, self._optimizer, state["optimizer"], options=_WHOLE)
            for group in self._optimizer.param_groups:  # which come with the checkpoint, as the recipe was then
                group["weight_decay"] = self.recipe.weight_decay
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
