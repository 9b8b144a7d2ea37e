"""The loop: a killed run resumes to the same bits, rates follow the recipe, a loss that is not finite stops it."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from training.data.entries import DataError
from training.data.order import BatchOrder
from training.draws import Draws
from training.errors import Stopped, TrainingError
from training.loop import learning_rate, shares, train
from training.progress import Pace
from training.sections import Optimisation, ScaleRecipe
from training.state import Validation

RECIPE = Optimisation(updates=12, batch_size=4, learning_rate=1e-2, ema=0.9, warmup=2)
EVERY_UPDATE = Pace(log_every=1, checkpoint_every_s=-1.0)


@contextmanager
def handled(number: int, handler: Any) -> Iterator[None]:
    """Have a signal handled so within, however the tests were started."""
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


class Killed(Exception):
    """Stands for a kill: raised out of the loss, the loop gets no chance to tidy up."""


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def loss(module: nn.Module, update: int, draws: Draws) -> Tensor:
    x = draws.normal(torch.empty(len(draws), 3))
    return (module(x) - x[:, :2].sin()).square().mean()


def run(folder: Path, killed_at: int | None = None, recipe: Optimisation = RECIPE) -> nn.Module:
    def maybe_killed(module: nn.Module, update: int, draws: Draws) -> Tensor:
        if update == killed_at:
            raise Killed
        return loss(module, update, draws)

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


def test_an_average_of_sharded_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    with pytest.raises(TrainingError, match="set ema to 0"):
        run(tmp_path)


def test_processes_share_batches_equally_or_not_at_all() -> None:
    second: Any = SimpleNamespace(num_processes=2, process_index=1)
    assert shares(16, second, micro_batch=5) == [range(8, 13), range(13, 16)]
    with pytest.raises(TrainingError, match="2 processes cannot share batches of 15 rows equally"):
        shares(15, second)


def test_an_average_that_is_asked_for_later_begins_there(tmp_path: Path) -> None:
    plain, killed = RECIPE.model_copy(update={"ema": 0.0}), 6
    with pytest.raises(Killed):
        run(tmp_path, killed, plain)
    averaged = run(tmp_path).state_dict()
    last = run(tmp_path / "plain", recipe=plain).state_dict()
    assert not torch.equal(averaged["weight"], last["weight"])


def test_a_checkpoint_of_another_network_is_not_gone_on_from(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(tmp_path, 3)
    with pytest.raises(TrainingError, match=r"of another network.*remove checkpoint\.pt and checkpoint-previous\.pt"):
        train(nn.Linear(3, 4), loss, RECIPE, tmp_path, accelerator=Accelerator(cpu=True), seed=3)
    assert (tmp_path / "checkpoint.pt").exists()


def test_a_checkpoint_for_which_there_is_no_memory_is_not_called_another_networks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Killed):
        run(tmp_path, 3)
    monkeypatch.setattr("training.state.set_model_state_dict", Mock(side_effect=torch.OutOfMemoryError("no memory")))
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        run(tmp_path)


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


def train_with(
    faults: dict[int, float | Killed], folder: Path, pace: Pace = EVERY_UPDATE, **changes: object
) -> nn.Module:
    """Train with the loss of some updates multiplied by a factor, or killed there."""

    def faulty(module: nn.Module, update: int, draws: Draws) -> Tensor:
        fault = faults.get(update, 1.0)
        if isinstance(fault, Killed):
            raise fault
        return loss(module, update, draws) * fault

    recipe = RECIPE.model_copy(update=changes)
    return train(network(), faulty, recipe, folder, accelerator=Accelerator(cpu=True), seed=3, pace=pace)


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_an_update_that_is_not_finite_is_skipped_and_counted(tmp_path: Path, factor: float) -> None:
    trained = train_with({5: factor, 7: factor}, tmp_path)
    assert all(value.isfinite().all() for value in trained.state_dict().values())
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [0] * 5 + [1, 1] + [2] * 5
    assert [line["loss"] is None for line in lines] == [update in (5, 7) for update in range(12)]


def test_a_skipped_update_leaves_no_trace_in_the_weights(tmp_path: Path) -> None:
    before = train_with({}, tmp_path / "five", updates=5, decay="constant")
    after = train_with({5: math.nan}, tmp_path / "six", updates=6, decay="constant")
    for name, value in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], value)


def test_a_checkpoint_before_the_first_update_that_is_not_skipped_leaves_no_trace(tmp_path: Path) -> None:
    first: dict[int, float | Killed] = dict.fromkeys(range(3), math.nan)
    undisturbed = train_with(first, tmp_path / "never", pace=Pace(checkpoint_every_s=1e9))
    saved = train_with(first, tmp_path / "saved")
    with pytest.raises(Killed):
        train_with({**first, 2: Killed()}, tmp_path / "killed")
    resumed = train_with(first, tmp_path / "killed")
    for name, value in undisturbed.state_dict().items():
        assert torch.equal(saved.state_dict()[name], value)
        assert torch.equal(resumed.state_dict()[name], value)


def test_a_loss_that_jumps_is_skipped(tmp_path: Path) -> None:
    changes = {"updates": 40, "decay": "constant", "learning_rate": 1e-4}
    trained = train_with({39: 1e6}, tmp_path / "jump", **changes)
    undisturbed = train_with({}, tmp_path / "calm", **changes | {"updates": 39})
    for name, value in undisturbed.state_dict().items():
        assert torch.equal(trained.state_dict()[name], value)


def test_more_skips_than_the_limit_stop_the_run_with_a_message(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"3 updates were skipped, the last one 9, .* learning_rate, in the recipe"):
        train_with({2: math.nan, 5: math.nan, 8: math.nan}, tmp_path, skip_limit=2)


@pytest.mark.parametrize("limit", [2, 10], ids=["too many", "to the end"])
def test_what_is_never_finite_is_not_laid_to_the_learning_rate(tmp_path: Path, limit: int) -> None:
    for _ in range(2):  # the second time goes on from a checkpoint
        with pytest.raises(TrainingError, match=r"not finite from the first update on.* teacher's weights") as refused:
            train_with(dict.fromkeys(range(5), math.nan), tmp_path, updates=5, skip_limit=limit)
        assert "learning_rate" not in str(refused.value)


def test_a_stage_that_settles_and_was_never_trained_is_not_done(tmp_path: Path) -> None:
    """However often it is started."""
    nothing = Validation(lambda network: 1.0, every=1, patience=3)
    recipe = RECIPE.model_copy(update={"skip_limit": 10})

    def never(module: nn.Module, update: int, draws: Draws) -> Tensor:
        return loss(module, update, draws) * math.nan

    for _ in range(2):
        with pytest.raises(TrainingError, match="not finite from the first update on"):
            train(
                network(),
                never,
                recipe,
                tmp_path,
                accelerator=Accelerator(cpu=True),
                seed=3,
                pace=EVERY_UPDATE,
                validation=nothing,
            )


@pytest.mark.parametrize("field", ["weight_decay", "learning_rate"])
def test_what_the_recipe_says_when_it_goes_on_counts(tmp_path: Path, field: str) -> None:
    def resumed(folder: str, changed: float) -> Tensor:
        with pytest.raises(Killed):
            run(tmp_path / folder, 6)
        return run(tmp_path / folder, recipe=RECIPE.model_copy(update={field: changed})).state_dict()["weight"]

    assert not torch.equal(resumed("little", 1e-3), resumed("much", 1.0))


def test_a_stage_that_ends_with_skips_alone_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="ends with updates that were all skipped, the last with a loss of nan"):
        train_with(dict.fromkeys(range(6, 12), math.nan), tmp_path / "all")
    train_with(dict.fromkeys(range(6, 11), math.nan), tmp_path / "nearly")


def test_a_stage_whose_last_update_is_a_skip_too_many_is_not_kept(tmp_path: Path) -> None:
    """However often it is started: what goes on is what was kept before."""
    skips: dict[int, float | Killed] = dict.fromkeys(range(9, 12), math.nan)
    for _ in range(2):
        with pytest.raises(TrainingError, match="3 updates were skipped, the last one 12"):
            train_with(skips, tmp_path, skip_limit=2)
    train_with({}, tmp_path, skip_limit=2)


@pytest.mark.parametrize("error", [DataError("too many shards are lost"), None], ids=["lost shards", "skips"])
def test_what_was_trained_before_a_run_gives_up_is_kept(tmp_path: Path, error: Exception | None) -> None:
    def load(update: int, draws: Draws) -> float:
        if update >= 7 and error is not None:
            raise error
        return math.nan if update >= 7 else 1.0

    def failing(module: nn.Module, factor: float, draws: Draws) -> Tensor:
        return loss(module, 0, draws) * factor

    with pytest.raises((DataError, TrainingError)):
        train(
            network(), failing, RECIPE.model_copy(update={"skip_limit": 2}), tmp_path / "run",
            accelerator=Accelerator(cpu=True), seed=3, load=load, pace=Pace(checkpoint_every_s=3600.0),
        )  # fmt: skip
    kept = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert kept["update"] == (7 if error else 10)
    run(tmp_path / "run")


def test_skips_are_remembered_by_a_run_that_resumes(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train_with({2: math.nan, 7: Killed()}, tmp_path, skip_limit=1)
    with pytest.raises(TrainingError, match="2 updates were skipped"):
        train_with({8: math.nan}, tmp_path, skip_limit=1)


def test_small_parts_of_a_batch_add_up_to_the_whole(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole").state_dict()
    for rows in (1, 3, 4, 99):
        parts = train(
            network(), loss, RECIPE, tmp_path / f"parts-{rows}", accelerator=Accelerator(cpu=True), seed=3,
            scale=ScaleRecipe(micro_batch=rows), pace=EVERY_UPDATE,
        ).state_dict()  # fmt: skip
        for name, value in whole.items():
            assert torch.allclose(parts[name], value, atol=1e-6)


def test_a_stage_ends_when_validation_brings_nothing_and_keeps_the_best(tmp_path: Path) -> None:
    left, seen = iter([3.0, 1.0, 2.0, 2.0, 0.5]), []

    def distance(module: nn.Module) -> float:
        seen.append({name: value.clone() for name, value in module.state_dict().items()})
        return next(left)

    trained = train(
        network(), loss, RECIPE, tmp_path, accelerator=Accelerator(cpu=True), seed=3, pace=EVERY_UPDATE,
        validation=Validation(distance, every=2, patience=2),
    )  # fmt: skip
    assert len(seen) == 4, "two in a row brought nothing"
    for name, value in seen[1].items():
        assert torch.equal(trained.state_dict()[name], value)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_validation_that_is_not_finite_ends_the_run_which_goes_on_when_it_is_mended(
    tmp_path: Path, wrong: float
) -> None:
    def validated(folder: str, distances: list[float]) -> nn.Module:
        left = iter(distances)
        return train(
            network(), loss, RECIPE, tmp_path / folder, accelerator=Accelerator(cpu=True), seed=3, pace=EVERY_UPDATE,
            validation=Validation(lambda module: next(left), every=4, patience=1),
        )  # fmt: skip

    with pytest.raises(TrainingError, match=r"broken: .* after update 8 is (nan|inf), not finite.* mend the data"):
        validated("broken", [2.0, wrong])
    assert torch.load(tmp_path / "broken" / "checkpoint.pt", weights_only=True)["update"] == 7
    mended, undisturbed = validated("broken", [1.0, 3.0]), validated("whole", [2.0, 1.0, 3.0])
    for name, value in undisturbed.state_dict().items():
        assert torch.equal(mended.state_dict()[name], value)


@pytest.mark.parametrize(("distances", "kept"), [([2.0, 1.0, 0.5], 12), ([2.0, 1.0, 3.0], 10)])
def test_the_last_update_is_validated_too_and_the_log_says_which_is_kept(
    tmp_path: Path, distances: list[float], kept: int
) -> None:
    left, seen = iter(distances), dict[int, Tensor]()

    def distance(module: nn.Module) -> float:
        seen[(5, 10, 12)[len(seen)]] = module.state_dict()["weight"].clone()
        return next(left)

    trained = train(
        network(), loss, RECIPE, tmp_path, accelerator=Accelerator(cpu=True), seed=3, pace=Pace(log_every=1),
        validation=Validation(distance, every=5, patience=9),
    )  # fmt: skip
    assert torch.equal(trained.state_dict()["weight"], seen[kept])
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["kept"] == kept


def test_a_stage_whose_validation_is_switched_off_keeps_its_last_network_and_the_log_says_so(tmp_path: Path) -> None:
    left = iter([1.0, 2.0])
    with pytest.raises(StopIteration):
        train(
            network(), loss, RECIPE, tmp_path, accelerator=Accelerator(cpu=True), seed=3, pace=EVERY_UPDATE,
            validation=Validation(lambda module: next(left), every=2, patience=9),
        )  # fmt: skip
    run(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["kept"] for line in lines] == [1, 2, 2, 2, 2, *range(6, 13)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves_and_the_run_goes_on_to_the_same_bits(tmp_path: Path, number: int) -> None:
    undisturbed = run(tmp_path / "whole")

    def signalled(module: nn.Module, update: int, draws: Draws) -> Tensor:
        if update == 6:
            for _ in range(2 if number == signal.SIGTERM else 1):  # a launcher passes on what all were sent
                os.kill(os.getpid(), number)
        return loss(module, update, draws)

    slow = Pace(checkpoint_every_s=1e9)
    with handled(number, signal.SIG_DFL), pytest.raises(Stopped, match="after update 7"):
        train(network(), signalled, RECIPE, tmp_path / "left", accelerator=Accelerator(cpu=True), seed=3, pace=slow)
    assert torch.load(tmp_path / "left" / "checkpoint.pt", weights_only=True)["update"] == 7
    resumed = run(tmp_path / "left")
    for name, value in undisturbed.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_the_process_was_started_to_ignore_is_ignored(tmp_path: Path, number: int) -> None:
    def signalled(module: nn.Module, update: int, draws: Draws) -> Tensor:
        os.kill(os.getpid(), number)
        return loss(module, update, draws)

    with handled(number, signal.SIG_IGN):
        train(network(), signalled, RECIPE, tmp_path, accelerator=Accelerator(cpu=True), seed=3, pace=Pace())
        assert signal.getsignal(number) is signal.SIG_IGN
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["update"] == 12


def test_a_run_that_is_not_to_go_on_saves_only_where_it_is_stopped(tmp_path: Path) -> None:
    passing = Pace(checkpoint_every_s=math.inf)
    done = train(network(), loss, RECIPE, tmp_path / "a", accelerator=Accelerator(cpu=True), seed=3, pace=passing)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["log.jsonl"]
    for name, value in run(tmp_path / "b").state_dict().items():
        assert torch.equal(done.state_dict()[name], value)

    def signalled(module: nn.Module, update: int, draws: Draws) -> Tensor:
        if update == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(module, update, draws)

    with pytest.raises(Stopped, match="after update 7; the same command goes on"):
        train(network(), signalled, RECIPE, tmp_path / "c", accelerator=Accelerator(cpu=True), seed=3, pace=passing)
    assert (tmp_path / "c" / "checkpoint.pt").exists()


def test_a_signal_during_the_last_save_is_heeded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = torch.save

    def signalled(state: Any, path: Path) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        save(state, path)

    monkeypatch.setattr(torch, "save", signalled)
    slow = Pace(checkpoint_every_s=1e9)
    with pytest.raises(Stopped, match="after update 12; the same command goes on"):
        train(network(), loss, RECIPE, tmp_path, accelerator=Accelerator(cpu=True), seed=3, pace=slow)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["update"] == 12


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


def test_a_batch_may_span_several_epochs() -> None:
    whole, single = BatchOrder(3, 8, seed=0), BatchOrder(3, 1, seed=0)
    assert whole.at(1).tolist() == [int(single.at(place)) for place in range(8, 16)]


def test_an_empty_set_is_refused() -> None:
    with pytest.raises(TrainingError, match="empty"):
        BatchOrder(0, 4, seed=0)


@pytest.mark.parametrize(
    "line",
    [b'{"update": 8, "los', b"\xff\xfe\x00\n", bytes(64) + b"\n", b'{"upd\xffte": 1}\n', b'{"updqte": 1}\n', b"1\n"],
)
def test_a_damaged_line_of_the_log_does_not_stop_a_resume(tmp_path: Path, line: bytes) -> None:
    with pytest.raises(Killed):
        run(tmp_path, killed_at=7)
    log = tmp_path / "log.jsonl"
    log.write_bytes(log.read_bytes() + line)
    run(tmp_path)
    assert [json.loads(line)["update"] for line in log.read_text().splitlines()] == list(range(1, 13))


def test_the_end_of_training_is_saved_and_a_picture_that_cannot_be_made_stops_nothing(tmp_path: Path) -> None:
    faults = iter(
        [OSError("No space left on device"), DataError("too many shards are lost"), torch.OutOfMemoryError("CUDA")]
    )

    def unwritable(module: nn.Module, path: Path) -> None:
        raise next(faults)

    train(
        network(), loss, RECIPE, tmp_path, accelerator=Accelerator(cpu=True), seed=3, sample=unwritable,
        pace=Pace(sample_every=4, checkpoint_every_s=1e9),
    )  # fmt: skip
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["update"] == RECIPE.updates
