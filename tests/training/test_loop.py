"""The loop: a killed run resumes to the same bits, rates follow the recipe, a loss that is not finite stops it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Generator, Tensor, nn

from training.loop import BatchOrder, Pace, TrainingError, generator_at, learning_rate, train
from training.recipe import Optimisation

RECIPE = Optimisation(updates=12, batch_size=4, learning_rate=1e-2, ema=0.9, warmup=2)
EVERY_UPDATE = Pace(log_every=1, checkpoint_every_s=-1.0)


class Killed(Exception):
    """Stands for a kill: raised out of the loss, the loop gets no chance to tidy up."""


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def loss(module: nn.Module, update: int, generator: Generator) -> Tensor:
    x = torch.randn(4, 3, generator=generator)
    return (module(x) - x[:, :2].sin()).square().mean()


def run(folder: Path, killed_at: int | None = None, recipe: Optimisation = RECIPE) -> nn.Module:
    def maybe_killed(module: nn.Module, update: int, generator: Generator) -> Tensor:
        if update == killed_at:
            raise Killed
        return loss(module, update, generator)

    return train(network(), maybe_killed, recipe, folder, accelerator=Accelerator(cpu=True), seed=3, pace=EVERY_UPDATE)


@pytest.mark.parametrize("killed_at", [0, 1, 7, 11])
def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path, killed_at: int) -> None:
    undisturbed = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "killed", killed_at)
    resumed = run(tmp_path / "killed")
    for name, value in undisturbed.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value)


def test_the_average_is_what_is_returned(tmp_path: Path) -> None:
    averaged = run(tmp_path / "ema").state_dict()
    last = run(tmp_path / "plain", recipe=RECIPE.model_copy(update={"ema": 0.0})).state_dict()
    assert not torch.equal(averaged["weight"], last["weight"])


def test_the_log_tells_each_update(tmp_path: Path) -> None:
    run(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == list(range(1, 13))
    assert [line["images"] for line in lines] == list(range(4, 52, 4))


def test_it_minimises(tmp_path: Path) -> None:
    recipe = RECIPE.model_copy(update={"updates": 400})
    train(network(), loss, recipe, tmp_path, accelerator=Accelerator(cpu=True), seed=3, pace=Pace(log_every=50))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.3 * losses[0]


def test_a_loss_that_is_not_finite_stops_the_run_before_the_weights_are_touched(tmp_path: Path) -> None:
    def faulty(module: nn.Module, update: int, generator: Generator) -> Tensor:
        return loss(module, update, generator) * (math.nan if update == 5 else 1.0)

    module = network()
    with pytest.raises(TrainingError, match="update 5"):
        train(module, faulty, RECIPE, tmp_path, accelerator=Accelerator(cpu=True), seed=3, pace=EVERY_UPDATE)
    assert all(value.isfinite().all() for value in module.state_dict().values())


@pytest.mark.parametrize(
    ("decay", "middle", "end"), [("constant", 1.0, 1.0), ("linear", 0.5, 0.0), ("cosine", 0.5, 0.0)]
)
def test_learning_rate(decay: str, middle: float, end: float) -> None:
    recipe = Optimisation.model_validate({"updates": 110, "learning_rate": 1.0, "warmup": 10, "decay": decay})
    assert learning_rate(recipe, 0) == 0.1
    assert learning_rate(recipe, 10) == 1
    assert learning_rate(recipe, 60) == pytest.approx(middle)
    assert learning_rate(recipe, 109) == pytest.approx(end, abs=0.011)


def test_batches_visit_every_item_once_an_epoch_at_any_address() -> None:
    order = BatchOrder(10, 4, seed=0)
    positions = torch.cat([order.at(update) for update in range(5)])
    assert sorted(positions[:10].tolist()) == sorted(positions[10:].tolist()) == list(range(10))
    assert positions[:10].tolist() != positions[10:].tolist()
    assert torch.equal(BatchOrder(10, 4, seed=0).at(3), order.at(3))
    assert not torch.equal(BatchOrder(10, 4, seed=1).at(3), order.at(3))


def test_an_empty_set_is_refused() -> None:
    with pytest.raises(TrainingError, match="empty"):
        BatchOrder(0, 4, seed=0)


def test_generators_differ_by_seed_update_and_stream() -> None:
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    draws = {float(torch.rand(1, generator=generator_at(*key))) for key in keys}
    assert len(draws) == len(keys)


def test_a_torn_line_of_the_log_does_not_stop_a_resume(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(tmp_path, killed_at=7)
    log = tmp_path / "log.jsonl"
    log.write_text(log.read_text() + '{"update": 8, "los')
    run(tmp_path)
    assert [json.loads(line)["update"] for line in log.read_text().splitlines()] == list(range(1, 13))
