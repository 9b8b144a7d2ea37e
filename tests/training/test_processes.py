"""Runs as processes: one that is killed, and several that share the work."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from training.data.shard_writer import TensorShardWriter
from training.run import NETWORK

ROOT = Path(__file__).parents[2]
WORKER = "tests.training.worker"


def start(
    folder: Path, processes: int = 1, *, module: str = WORKER, arguments: tuple[str, ...] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}", "-m", module]
    return subprocess.run(
        [sys.executable, *(launcher if processes > 1 else ["-m", module]), *arguments, str(folder)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def weights(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(folder / "weights.pt", weights_only=True)
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The weights of one process that was left alone."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert start(folder).returncode == 0
    return weights(folder)


def test_a_run_killed_at_a_random_update_resumes_to_the_same_bits(
    tmp_path: Path, undisturbed: dict[str, Tensor]
) -> None:
    """Checkpoints are seven updates apart: those since the last one are lost, and done again."""
    at = 7 * random.randrange(4) + random.randrange(1, 7)
    print(f"killed at update {at}")
    killed = start(tmp_path, KILLED_AT=str(at), CHECKPOINT_EVERY="7")
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "weights.pt").exists()
    kept = tmp_path / "checkpoint.pt"
    assert (torch.load(kept, weights_only=True)["update"] if kept.exists() else 0) == at - at % 7
    resumed = start(tmp_path, CHECKPOINT_EVERY="7")
    assert resumed.returncode == 0, resumed.stderr
    for name, value in undisturbed.items():
        assert torch.equal(weights(tmp_path)[name], value), name


@pytest.mark.slow
def test_a_streamed_run_killed_amid_an_epoch_resumes_to_the_same_bits(tmp_path: Path) -> None:
    """Thirty updates see 170 rows four times and more, two shards of 17 at a time."""
    shards = tmp_path / "shards"
    with TensorShardWriter(str(shards), 17, "labels") as writer:
        for row in torch.randn(170, 8, generator=torch.Generator().manual_seed(0)):
            writer.write({"x": row.reshape(2, 2, 2).numpy()})
    assert start(tmp_path / "alone", SHARDS=str(shards)).returncode == 0
    at = random.randrange(1, 30)
    print(f"killed at update {at}")
    assert start(tmp_path / "killed", SHARDS=str(shards), KILLED_AT=str(at)).returncode == -signal.SIGKILL
    resumed = start(tmp_path / "killed", SHARDS=str(shards))
    assert resumed.returncode == 0, resumed.stderr
    for name, value in weights(tmp_path / "alone").items():
        assert torch.equal(weights(tmp_path / "killed")[name], value), name


@pytest.mark.slow
def test_a_disk_that_takes_no_checkpoint_does_not_stop_the_run(tmp_path: Path, undisturbed: dict[str, Tensor]) -> None:
    """Files may have 3,000 bytes, so that a checkpoint fails and the log does not, until the training is over."""
    shared = start(tmp_path, FILE_BYTES="3000")
    assert shared.returncode == 0, shared.stderr
    assert "was not written, training goes on" in shared.stdout
    assert not list(tmp_path.glob("*.partial"))
    for name, value in undisturbed.items():
        assert torch.equal(weights(tmp_path)[name], value), name


def test_two_processes_equal_one_at_the_same_batch(tmp_path: Path, undisturbed: dict[str, Tensor]) -> None:
    shared = start(tmp_path, processes=2)
    assert shared.returncode == 0, shared.stderr
    for name, value in undisturbed.items():
        assert torch.allclose(weights(tmp_path)[name], value, rtol=0, atol=1e-5), name
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 30, "one process writes"


@pytest.mark.slow
def test_a_run_of_sharded_weights_equals_one_process_and_resumes_when_killed(tmp_path: Path) -> None:
    """Fully sharded, as for networks that one device cannot hold."""
    assert start(tmp_path / "alone", EMA="0").returncode == 0
    assert start(tmp_path / "shared", processes=2, SHARDED="1", EMA="0", KILLED_AT="17").returncode != 0
    assert not (tmp_path / "shared" / "weights.pt").exists()
    resumed = start(tmp_path / "shared", processes=2, SHARDED="1", EMA="0")
    assert resumed.returncode == 0, resumed.stderr
    for name, value in weights(tmp_path / "alone").items():
        assert torch.allclose(weights(tmp_path / "shared")[name], value, rtol=0, atol=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"SHARDED": "1", "EMA": "0"}], ids=["whole", "sharded"])
def test_data_that_end_in_one_process_end_all_with_what_was_trained(tmp_path: Path, settings: dict[str, str]) -> None:
    ended = start(tmp_path, processes=2, LOST_RANK="1", LOST_AT="17", CHECKPOINT_EVERY_S="3600", **settings)
    assert ended.returncode != 0
    assert "too many shards are lost" in ended.stderr
    assert "another process has no data" in ended.stderr
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert kept["update"] == 17
    assert kept["network"].keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}


@pytest.mark.slow
def test_sharded_weights_in_bf16_are_asked_at_the_times_that_they_are_given(tmp_path: Path) -> None:
    """By the policy that FSDP gets from a launcher's environment: accelerate's own would round them to bf16."""
    launched = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    shared = start(tmp_path, processes=2, SHARDED="1", EMA="0", PRECISION="bf16", **launched)
    assert shared.returncode == 0, shared.stderr
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["loss"] < json.loads(lines[0])["loss"]


RECIPE = """
name = "shared"
conditioning = "class"
data = { source = "digits", size = 8 }
network = { channels = [8], norm_groups = 4 }
teacher = { updates = 8, batch_size = 16, learning_rate = 1e-3, ema = 0.9 }
stage1 = { updates = 4, batch_size = 16, learning_rate = 1e-3 }
export = { licence = "CC-BY-4.0", steps = [1] }

[stage2]
start = 2
rounds = [{ steps = 1, updates = 4, batch_size = 16, learning_rate = 1e-3, validate_every = 2 }]
"""


@pytest.mark.slow
def test_two_processes_distil_the_student_that_one_does(tmp_path: Path) -> None:
    """Every stage, by the command, each process with half of every batch."""
    (tmp_path / "shared.toml").write_text(RECIPE)
    found = []
    for processes in (1, 2):
        folder = tmp_path / f"run-{processes}"
        shared = start(
            folder, processes, module="fewstep", arguments=("distill", str(tmp_path / "shared.toml"), "--out")
        )
        assert shared.returncode == 0, shared.stderr
        found.append({stage: network(folder / stage) for stage in ("teacher", "stage1", "student-1")})
    for stage, alone in found[0].items():
        assert (found[1][stage] - alone).norm() < 1e-5 * alone.norm(), stage


def network(stage: Path) -> Tensor:
    """All weights of a stage."""
    weights = load_file(next((stage / NETWORK).glob("*.safetensors")))
    return torch.cat([weights[name].flatten() for name in sorted(weights)])
