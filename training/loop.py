"""The one training loop: any loss, any network; checkpoints, exact resume, a JSONL log. Knows no diffusion.

A run is a pure function of (seed, update): the batch and the noise of every update are derived from them, so a
resumed run repeats the updates it lost exactly.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar, cast

import numpy as np
import torch
from accelerate import Accelerator
from torch import Generator, Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from training.recipe import Optimisation
from training.store import whole_file

CHECKPOINT = "checkpoint.pt"

Network = TypeVar("Network", bound=nn.Module)
StepLoss = Callable[[nn.Module, int, Generator], Tensor]
Sampler = Callable[[nn.Module, Path], None]


class TrainingError(Exception):
    """A run that cannot go on; the message says why and what to do."""


@dataclass(frozen=True)
class Pace:
    """How often a run writes: log lines and samples by updates, checkpoints by seconds."""

    log_every: int = 20
    sample_every: int = 500
    checkpoint_every_s: float = 120.0


def generator_at(seed: int, update: int, stream: int = 0) -> Generator:
    """The generator of one update. Distinct (seed, update, stream) give independent streams."""
    (mixed,) = np.random.SeedSequence([seed, update, stream]).generate_state(1, np.uint64)
    return Generator().manual_seed(int(mixed) >> 1)


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
        positions = torch.arange(update * self.batch_size, (update + 1) * self.batch_size)
        return torch.stack([self._permutation(int(p) // self.items)[int(p) % self.items] for p in positions])

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


def _attention(accelerator: Accelerator) -> AbstractContextManager[None]:
    """Which attention a forward pass records: in bf16 on a CPU, fused attention's backward is the slower one."""
    if accelerator.device.type == "cpu" and accelerator.mixed_precision == "bf16":
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


@dataclass
class _State:
    """What a checkpoint holds."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    average: AveragedModel | None
    update: int = 0

    def save(self, path: Path) -> None:
        partial = path.with_suffix(".partial")
        state = {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "update": self.update,
        }
        torch.save(state, partial)
        partial.replace(path)

    def load(self, path: Path) -> None:
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average:
            self.average.load_state_dict(state["average"])
        self.update = state["update"]

    @property
    def result(self) -> nn.Module:
        """The network to keep: the average where there is one."""
        return self.average.module if self.average else self.network


def train(
    network: Network,
    loss: StepLoss,
    recipe: Optimisation,
    folder: Path,
    *,
    accelerator: Accelerator,
    seed: int,
    sample: Sampler | None = None,
    pace: Pace = Pace(),
) -> Network:
    """Minimise `loss(network, update, generator)`; return the trained network, averaged if the recipe says so.

    Continues from `folder`/checkpoint.pt if it is there, and removes nothing: the caller decides when a stage is
    done. Raises TrainingError when the loss is not finite.
    """
    network = network.to(accelerator.device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    state = _State(network, optimizer, averaged(network, recipe.ema) if recipe.ema else None)
    folder.mkdir(parents=True, exist_ok=True)
    if (checkpoint := folder / CHECKPOINT).exists():
        state.load(checkpoint)
    wrapped, wrapped_optimizer = accelerator.prepare(network, optimizer)
    with _Report(folder, recipe, state.update, sample, pace) as report:
        while state.update < recipe.updates:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe, state.update)
            with _attention(accelerator), accelerator.autocast():
                value = loss(wrapped, state.update, generator_at(seed, state.update))
            accelerator.backward(value)
            norm = accelerator.clip_grad_norm_(wrapped.parameters(), recipe.clip)
            if norm is None or not (value.isfinite() and norm.isfinite()):
                raise TrainingError(
                    f"{folder.name}: at update {state.update} the loss is {value:.3g} and its gradient's norm {norm}; "
                    "lower the learning rate"
                )
            wrapped_optimizer.step()
            wrapped_optimizer.zero_grad()
            if state.average:
                state.average.update_parameters(accelerator.unwrap_model(wrapped))
            state.update += 1
            report(state, value.item(), norm.item())
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    accelerator.free_memory()
    return cast(Network, state.result.eval())


class _Report:
    """What a run tells while it goes: progress bar, log lines, pictures of samples, checkpoints."""

    def __init__(self, folder: Path, recipe: Optimisation, update: int, sample: Sampler | None, pace: Pace) -> None:
        self.folder, self.recipe, self.sample, self.pace = folder, recipe, sample, pace
        self.log = _Log(folder / "log.jsonl", recipe.batch_size, update)
        self.bar = tqdm(
            total=recipe.updates, initial=update, desc=folder.name, unit="update", dynamic_ncols=True, disable=None
        )
        self.saved_at = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def __call__(self, state: _State, loss: float, norm: float) -> None:
        """Tell of an update that is done."""
        update, pace = state.update, self.pace
        self.log.add(loss, norm)
        self.bar.update()
        if update % pace.log_every == 0 or update == self.recipe.updates:
            self.bar.set_postfix(self.log.write(update, learning_rate(self.recipe, update - 1)))
        if self.sample and update % pace.sample_every == 0:
            self.sample(state.result, self.folder / f"samples-{update:07d}.png")
        if time.monotonic() - self.saved_at > pace.checkpoint_every_s:
            state.save(self.folder / CHECKPOINT)
            self.saved_at = time.monotonic()


def _update_of(line: str) -> float:
    """The update of a line of the log; infinity for one that was cut off."""
    try:
        return float(json.loads(line)["update"])
    except ValueError:
        return math.inf


class _Log:
    """Averages between two lines of the log, and its rate in images per second."""

    def __init__(self, path: Path, batch_size: int, update: int) -> None:
        self.path, self.batch_size = path, batch_size
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.since, self.update = time.monotonic(), update
        if path.exists():  # Updates that a killed run had done after its last checkpoint are done again.
            lines = path.read_text().splitlines(keepends=True)
            with whole_file(path) as partial:
                partial.write_text("".join(line for line in lines if _update_of(line) <= update))

    def add(self, loss: float, norm: float) -> None:
        self.losses.append(loss)
        self.norms.append(norm)

    def write(self, update: int, rate: float) -> dict[str, str]:
        now = time.monotonic()
        count = len(self.losses)
        line = {
            "update": update,
            "images": update * self.batch_size,
            "loss": sum(self.losses) / count,
            "gradient_norm": sum(self.norms) / count,
            "learning_rate": rate,
            "images_per_s": (update - self.update) * self.batch_size / (now - self.since),
        }
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.losses, self.norms, self.since, self.update = [], [], now, update
        return {"loss": f"{line['loss']:.4f}", "images/s": f"{line['images_per_s']:.0f}"}
