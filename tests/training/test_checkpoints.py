"""Checkpoints: a full disk costs no more than one, and a damaged one is never gone on from."""

from __future__ import annotations

import json
import math
import zipfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from tests.training.test_loop import EVERY_UPDATE, RECIPE, Killed, loss, network, run
from training.checkpoints import Checkpoints
from training.data.entries import DataError
from training.draws import Draws
from training.errors import TrainingError
from training.loop import train
from training.progress import Pace
from training.state import Validation


@pytest.fixture(params=["zeroed", "flipped"])
def how(request: pytest.FixtureRequest) -> str:
    """What a disk may do to a file."""
    return str(request.param)


def damage(path: Path, how: str) -> None:
    """Another content amid the largest part of an archive, which has the length that it had."""
    with zipfile.ZipFile(path) as archive:
        part = max(archive.infolist(), key=lambda part: part.file_size)
    content, place = bytearray(path.read_bytes()), part.header_offset + part.file_size // 2 + 64
    content[place : place + 8] = bytes(8) if how == "zeroed" else bytes([content[place] ^ 1]) + content[place + 1 :][:7]
    path.write_bytes(content)


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    undisturbed = run(tmp_path / "whole")
    save = torch.save

    def full(state: Any, path: Path) -> None:
        if state.get("update") in (4, 5):
            raise RuntimeError("[enforce fail at inline_container.cc] unexpected pos: No space left on device")
        save(state, path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(Killed):
        run(tmp_path / "full", killed_at=5)
    kept = torch.load(tmp_path / "full" / "checkpoint.pt", weights_only=True)
    assert kept["update"] == 3
    assert "training goes on" in capsys.readouterr().out
    resumed = run(tmp_path / "full")
    for name, value in undisturbed.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value)


def test_a_full_disk_costs_a_validation_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distances = iter([3.0, 1.0, 2.0, 2.0, 2.0, 2.0])
    save, tried = torch.save, []

    def full_at_first(state: Any, path: Path) -> None:
        if path.name.startswith("best"):
            tried.append(path)
            if len(tried) <= 2:
                raise OSError("No space left on device")
        save(state, path)

    monkeypatch.setattr(torch, "save", full_at_first)
    train(
        network(), loss, RECIPE, tmp_path, accelerator=Accelerator(cpu=True), seed=3, pace=EVERY_UPDATE,
        validation=Validation(lambda module: next(distances), every=2, patience=2),
    )  # fmt: skip
    assert len(tried) == 3, "the best one that was kept is of the third validation"
    assert next(distances) == 2.0, "two more validations brought nothing"


def test_a_torn_checkpoint_gives_way_to_the_one_before(tmp_path: Path) -> None:
    undisturbed = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "torn", killed_at=7)
    last = tmp_path / "torn" / "checkpoint.pt"
    last.write_bytes(last.read_bytes()[:200])
    resumed = run(tmp_path / "torn")
    for name, value in undisturbed.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value)


def test_a_torn_checkpoint_does_not_replace_the_good_one_at_the_next_save(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for update in (1, 2):
        checkpoints.save({"update": update})
    (tmp_path / "checkpoint.pt").write_bytes(b"torn")
    resumed = Checkpoints(tmp_path)
    assert resumed.load() == {"update": 1}
    resumed.save({"update": 3})
    (tmp_path / "checkpoint.pt").write_bytes(b"torn")
    assert Checkpoints(tmp_path).load() == {"update": 1}
    resumed.save({"update": 4})
    resumed.save({"update": 5})
    assert torch.load(tmp_path / "checkpoint-previous.pt") == {"update": 4}


def test_a_run_whose_checkpoints_are_all_torn_is_not_begun_anew(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(tmp_path, killed_at=7)
    for name in ("checkpoint.pt", "checkpoint-previous.pt"):
        (tmp_path / name).write_bytes(b"torn")
    with pytest.raises(OSError, match="no checkpoint can be read"):
        run(tmp_path)


@pytest.mark.parametrize(
    ("content", "theirs", "found"), [(None, 6, "7, 6"), (None, 0, "7, 0"), (b"torn", 7, "unreadable, 7")]
)
def test_processes_that_do_not_find_the_same_checkpoint_go_on_from_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None, theirs: int, found: str
) -> None:
    with pytest.raises(Killed):
        run(tmp_path, killed_at=7)
    for name in ("checkpoint.pt", "checkpoint-previous.pt") if content else ():
        (tmp_path / name).write_bytes(content or b"")
    monkeypatch.setattr(Accelerator, "gather", lambda _, ours: torch.cat([ours, torch.tensor([theirs])]))
    with pytest.raises(TrainingError, match=rf"do not find the same checkpoint \(by process, after update: {found}\)"):
        run(tmp_path)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = Checkpoints(tmp_path)
    for update in (1, 2):
        checkpoints.save({"update": update, "weights": torch.randn(50, 50)})
    damage(tmp_path / "checkpoint.pt", how)
    kept = Checkpoints(tmp_path).load()
    assert kept is not None
    assert kept["update"] == 1
    told = capsys.readouterr().out
    assert f"{tmp_path / 'checkpoint.pt'} cannot be read: its part" in told
    assert "/data/0 is damaged" in told


def test_a_damaged_best_network_is_named_and_without_it_the_run_goes_on(
    tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def validated(folder: str, *distances: float) -> nn.Module:
        left = iter(distances)
        return train(
            nn.Sequential(network(), nn.Linear(2, 400), nn.Linear(400, 2)), loss, RECIPE, tmp_path / folder,
            accelerator=Accelerator(cpu=True), seed=3, pace=EVERY_UPDATE,
            validation=Validation(lambda module: next(left), every=6, patience=9),
        )  # fmt: skip

    last = validated("last", 2.0, 1.0)
    validated("run", 1.0, 2.0)
    damage(tmp_path / "run" / "best.pt", how)
    for _ in range(2):
        with pytest.raises(TrainingError, match=r"best\.pt cannot be read: its part .* is damaged; remove it, and"):
            validated("run")
    (tmp_path / "run" / "best.pt").unlink()
    capsys.readouterr()
    for name, value in validated("run").state_dict().items():
        assert torch.equal(last.state_dict()[name], value)
    assert "has lost its best network" in capsys.readouterr().out


def test_a_stage_that_lost_its_best_network_goes_on_until_validation_brings_nothing_again(tmp_path: Path) -> None:
    def validated(*distances: float) -> list[float]:
        left = iter(distances)
        train(
            network(), loss, RECIPE, tmp_path, accelerator=Accelerator(cpu=True), seed=3, pace=EVERY_UPDATE,
            validation=Validation(lambda module: next(left), every=2, patience=1),
        )  # fmt: skip
        return list(left)

    assert validated(1.0, 2.0, 0.0) == [0.0]
    assert validated(0.0) == [0.0], "the stage is at its end"
    (tmp_path / "best.pt").unlink()
    assert validated(2.0, 3.0, 0.0) == [0.0]


@pytest.mark.parametrize("ends", ["done", "lost data", "skips"])
def test_what_a_checkpoint_has_is_in_the_log_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str) -> None:
    """Else a run that is killed right after the checkpoint never tells of it."""
    save, saved = torch.save, list[int]()

    def told(state: Any, path: Path) -> None:
        lines = (tmp_path / "log.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["update"] == state["update"]
        saved.append(state["update"])
        save(state, path)

    def load(update: int, draws: Draws) -> float:
        if ends == "lost data" and update == 7:
            raise DataError("too many shards are lost")
        return math.nan if ends == "skips" and update >= 5 else 1.0

    monkeypatch.setattr(torch, "save", told)
    pace = Pace(log_every=5, checkpoint_every_s=1e9 if ends == "done" else -1.0)
    with nullcontext() if ends == "done" else pytest.raises((DataError, TrainingError)):
        train(
            network(), lambda module, factor, draws: loss(module, 0, draws) * factor,
            RECIPE.model_copy(update={"skip_limit": 1}), tmp_path, accelerator=Accelerator(cpu=True), seed=3,
            load=load, pace=pace,
        )  # fmt: skip
    assert saved[-1] == {"done": 12, "lost data": 7, "skips": 7}[ends]


@pytest.mark.parametrize("free", [0, 4096, None])
def test_a_checkpoint_that_is_not_written_says_in_a_line_how_full_the_disk_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], free: int | None
) -> None:
    def full(state: Any, path: Path) -> None:
        path.write_bytes(b"a part")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0\nframe #0: ...")

    def usage(folder: Path) -> SimpleNamespace:
        assert (folder / "checkpoint.pt.partial").exists(), "as it was when the disk was full"
        if free is None:
            raise OSError("the disk does not say")
        return SimpleNamespace(free=free)

    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr("shutil.disk_usage", usage)
    assert not Checkpoints(tmp_path).save({})
    said = "" if free is None else f"{free:,} bytes are free on its disk; "
    assert capsys.readouterr().out == (
        f"{tmp_path / 'checkpoint.pt'} was not written, training goes on: {said}"
        "[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0\n"
    )
    assert not list(tmp_path.iterdir())
