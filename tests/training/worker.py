"""A small training run as a process of its own: to be killed, or to be one of several. Writes its final weights."""

from __future__ import annotations

import os
import resource
import signal
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from training.draws import Draws
from training.loop import train
from training.recipe import Optimisation
from training.report import Pace

RECIPE = Optimisation(updates=30, batch_size=24, learning_rate=1e-2, ema=0.9, warmup=2)


def loss(module: nn.Module, update: int, draws: Draws) -> Tensor:
    """Sines from data and noise of each row."""
    if update == int(os.environ.get("KILLED_AT", "-1")):
        os.kill(os.getpid(), signal.SIGKILL)
    x = draws.normal(torch.empty(len(draws), 8))
    shift = draws.uniform().float()[:, None]
    target: Tensor = (x + shift).sin()[:, :2]
    output: Tensor = module(x)
    return (output - target).square().mean()


def main(folder: Path) -> None:
    """Train in `folder`, and write weights.pt there."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
    accelerator = Accelerator(cpu=True)
    pace = Pace(log_every=1, checkpoint_every_s=-1.0)
    if limit := int(os.environ.get("FILE_BYTES", "0")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    trained = train(network, loss, RECIPE, folder, accelerator=accelerator, seed=3, pace=pace)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    if accelerator.is_main_process:
        torch.save(trained.state_dict(), folder / "weights.pt")
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
