"""A wall clock of a process that can be stepped, while the machine's own goes on. Needs a C compiler and glibc."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

_SOURCE = Path(__file__).with_name("clock.c")


def why_no_clock() -> str | None:
    """What is missing for it, None where nothing is."""
    if sys.platform != "linux":
        return "stepping a process's clock needs Linux"
    return None if shutil.which("cc") else "stepping a process's clock needs a C compiler (cc)"


class Clock:
    """Processes started with its ``environment`` are told the wall time of now, plus what `step` said.

    Their monotonic clock is the machine's, as it is where an administrator or NTP steps the wall clock.
    """

    def __init__(self, folder: Path) -> None:
        library = folder / "clock.so"
        if not library.exists():
            command = ["cc", "-shared", "-fPIC", "-O2", "-o", str(library), str(_SOURCE), "-ldl"]
            subprocess.run(command, check=True)
        self._file = folder / "ahead_s"
        self._file.write_bytes(bytes(8))
        self.environment = {"LD_PRELOAD": str(library), "FAULTS_CLOCK": str(self._file)}

    def step(self, ahead_s: int) -> None:
        """From now on it is so many seconds ahead of the machine's."""
        with self._file.open("r+b", buffering=0) as file:
            os.pwrite(file.fileno(), ahead_s.to_bytes(8, sys.byteorder, signed=True), 0)
