"""diffusers' own LCM distillation script as a process: what it is told, and when each of its updates was done."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import torch

from benchmarks.stages import W_RANGE, WARMUP

STAND_INS = Path(__file__).parent / "stand_ins"
PROGRESS = re.compile(r"Steps:[^\r\n]*?\| *(\d+)/\d+ \[")
LONGEST_LINE = 2000
IN_FULL_PRECISION = """
import runpy, sys, torch
torch.set_autocast_dtype(sys.argv[1], torch.float32)
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""The script runs as it is, but the autocast around its teacher's calls computes in fp32, which is none."""


@dataclass(frozen=True)
class Example:
    """train_lcm_distill_sd_wds.py at work on a checkpoint and shards of images; `packages` go before all others."""

    script: Path
    checkpoint: Path
    shards: Path
    size: int
    batch_size: int
    precision: str
    threads: int
    packages: Path | None = None

    def seconds(self, updates: int, full_precision: bool) -> list[float]:
        """Seconds of each update after the first ones. Raises ClickException where the script fails."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        start = ["-c", IN_FULL_PRECISION, device] if full_precision else []
        with TemporaryDirectory() as folder:
            command = [sys.executable, *start, str(self.script), *self._arguments(WARMUP + updates, folder)]
            process = subprocess.Popen(
                command, cwd=folder, env=self._environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
            said: list[tuple[float, str]] = []
            with process:
                times = update_times(_chunks(process, said))
        if process.returncode or len(times) != WARMUP + updates + 1:
            lines = [
                line for line in "".join(text for _, text in said).splitlines() if not PROGRESS.match(line.strip())
            ]
            why = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
            raise click.ClickException(f"{self.script} did {len(times) - 1} of {WARMUP + updates} updates: {why}")
        return [later - earlier for earlier, later in pairwise(times)][WARMUP:]

    def _arguments(self, updates: int, out: str) -> Iterator[str]:
        shards = sorted(self.shards.glob("*.tar"))
        options = {
            "pretrained_teacher_model": self.checkpoint.absolute(),
            "train_shards_path_or_url": f"{self.shards.absolute()}/{{{shards[0].stem}..{shards[-1].stem}}}.tar",
            "output_dir": out,
            "resolution": self.size,
            "train_batch_size": self.batch_size,
            "max_train_steps": updates,
            "max_train_samples": 2 * updates * self.batch_size,
            "dataloader_num_workers": 1,
            "checkpointing_steps": 10**9,
            "validation_steps": 10**9,
            "learning_rate": 1e-6,
            "mixed_precision": {"fp32": "no", "bf16": "bf16"}[self.precision],
            "w_min": W_RANGE[0],
            "w_max": W_RANGE[1],
            "seed": 0,
        }
        yield from (f"--{name}={value}" for name, value in options.items())

    def _environment(self) -> dict[str, str]:
        threads = {name: str(self.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        path = [str(self.packages.absolute())] if self.packages else []
        path += [] if torchvision_is_there() else [str(STAND_INS)]
        path += [os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else []
        return {**os.environ, **threads, "PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1"}


def torchvision_is_there() -> bool:
    """Whether the real one can be imported; its build for CUDA cannot, beside a torch for the CPU."""
    try:
        import_module("torchvision")
    except (ImportError, RuntimeError):
        return False
    return True


def update_times(chunks: Iterable[tuple[float, str]]) -> list[float]:
    """When the progress bar first said 0, 1, 2, ... updates, out of (time in seconds, text) as it came."""
    first: dict[int, float] = {}
    text = ""
    for when, chunk in chunks:
        text = (text + chunk)[-LONGEST_LINE:]
        for found in PROGRESS.finditer(text):
            first.setdefault(int(found[1]), when)
    return [first[count] for count in sorted(first)]


def _chunks(process: subprocess.Popen[bytes], said: list[tuple[float, str]]) -> Iterator[tuple[float, str]]:
    """What the process writes, as it comes; `said` keeps it."""
    assert process.stderr is not None
    while data := os.read(process.stderr.fileno(), 1 << 16):
        said.append((time.monotonic(), data.decode(errors="replace")))
        yield said[-1]
