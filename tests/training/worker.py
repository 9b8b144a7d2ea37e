"""A small training run as a process of its own: to be killed, or to be one of several. Writes its final weights."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from training import loop
from training.data.entries import DataError
from training.data.order import ShardOrder
from training.data.stream import ShardStream
from training.draws import Draws
from training.progress import Pace, Report
from training.sections import Optimisation
from training.sharding import sharding

RECIPE = Optimisation(
    updates=30,
    batch_size=24,
    learning_rate=1e-2,
    ema=float(os.environ.get("EMA", "0.9")),
    warmup=2,
)


class ShardedAccelerator(Accelerator):  # type: ignore[misc]
    """What accelerate does with FSDP on GPUs, which it leaves out on CPUs: weights are sharded among the processes."""

    distributed_type = DistributedType.FSDP

    def prepare(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        plugin = sharding("no") or FullyShardedDataParallelPlugin(fsdp_version=2)
        if self.mixed_precision != "no":
            plugin.set_mixed_precision(self.mixed_precision)
        policy = plugin.mixed_precision_policy or MixedPrecisionPolicy()
        for layer in network.children():
            if list(layer.parameters()):
                fully_shard(layer, mp_policy=policy)
        fully_shard(network, mp_policy=policy)
        return network, torch.optim.AdamW(network.parameters(), weight_decay=optimizer.defaults["weight_decay"])

    def unwrap_model(self, model: nn.Module, **_: Any) -> nn.Module:
        return model

    def backward(self, loss: Tensor, **_: Any) -> None:
        torch.autograd.backward(loss)

    def clip_grad_norm_(self, parameters: Any, max_norm: float, **_: Any) -> Tensor:
        norm: Any = nn.utils.clip_grad_norm_(list(parameters), max_norm)
        whole: Tensor = norm.full_tensor()
        return whole


class Layers(nn.Sequential):
    """Layers that want what they are given as it is: a time, rounded to bf16, would be another one."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise TypeError(f"asked in {x.dtype}")
        output: Tensor = super().forward(x)
        return output


class SparseReport(Report):
    """For which a checkpoint is due only after every so many updates."""

    @property
    def checkpoint_is_due(self) -> bool:
        return super().checkpoint_is_due and self._last[0] % int(os.environ.get("CHECKPOINT_EVERY", "1")) == 0


Load = Callable[[int, Draws], Tensor]


def load(update: int, draws: Draws) -> Tensor:
    """Noise for each row, but for the process whose data end; or the end of the process itself."""
    if (os.environ.get("RANK"), str(update)) == (os.environ.get("LOST_RANK"), os.environ.get("LOST_AT")):
        raise DataError("too many shards are lost")
    if update == int(os.environ.get("KILLED_AT", "-1")):
        os.kill(os.getpid(), signal.SIGKILL)
    return draws.normal(torch.empty(len(draws), 8))


def streamed(address: str) -> Load:
    """Rows of shards, in their order, beside `load`."""
    stream = ShardStream(address)
    order = ShardOrder(stream.counts, RECIPE.batch_size, seed=3, window=stream.window)

    def rows(update: int, draws: Draws) -> Tensor:
        load(update, draws)
        x = stream.parts(draws.of(order.at(update)))["x"].flatten(1)
        stream.prefetch(order.ahead(update))
        return x

    return rows


def loss(module: nn.Module, x: Tensor, draws: Draws) -> Tensor:
    """Sines from data and noise of each row."""
    shift = draws.uniform().float()[:, None]
    target: Tensor = (x + shift).sin()[:, :2]
    output: Tensor = module(x)
    return (output - target).square().mean()


def main(folder: Path) -> None:
    """Train in `folder`, and write weights.pt there."""
    torch.manual_seed(0)
    network = Layers(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
    kind = ShardedAccelerator if "SHARDED" in os.environ else Accelerator
    accelerator = kind(cpu=True, mixed_precision=os.environ.get("PRECISION", "no"))
    pace = Pace(log_every=1, checkpoint_every_s=float(os.environ.get("CHECKPOINT_EVERY_S", "-1")))
    if limit := int(os.environ.get("FILE_BYTES", "0")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    given = streamed(os.environ["SHARDS"]) if "SHARDS" in os.environ else load
    loop.Report = SparseReport  # type: ignore[misc]
    trained = loop.train(network, loss, RECIPE, folder, accelerator=accelerator, seed=3, load=given, pace=pace)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    if accelerator.is_main_process:
        torch.save(trained.state_dict(), folder / "weights.pt")
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
