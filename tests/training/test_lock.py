"""One process trains in a folder at a time, and where there are no locks it goes on without."""

from __future__ import annotations

import errno
import fcntl
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from training.errors import TrainingError
from training.lock import LOCK, training_alone

HOLD = """
import fcntl, os, sys, time
fcntl.flock(os.open(sys.argv[1], os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)
print("held", flush=True)
time.sleep(600)
"""


def test_a_folder_is_trained_in_by_one_process_and_free_once_it_is_killed(tmp_path: Path) -> None:
    with training_alone(tmp_path):
        held = subprocess.run([sys.executable, "-c", HOLD, str(tmp_path / LOCK)], capture_output=True, text=True)
        assert "BlockingIOError" in held.stderr
    command = [sys.executable, "-c", HOLD, str(tmp_path / LOCK)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(TrainingError, match="another process is training in"), training_alone(tmp_path):
                pytest.fail("two at once")
        finally:
            holder.send_signal(signal.SIGKILL)
    for _ in range(2):
        with training_alone(tmp_path):
            pass


def test_without_locks_a_run_goes_on_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(number: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    (tmp_path / "unfit" / LOCK).mkdir(parents=True)
    with training_alone(tmp_path / "unfit"):
        pass
    monkeypatch.setattr(fcntl, "flock", lacking)
    with training_alone(tmp_path), training_alone(tmp_path):
        pass
