"""The service whose ticks take their time; prompts kill it, lose its device or hang it. For tests that stop it.

python -m tests.service.slow_service TICK_S     with the settings in the environment
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from engines.backends.base import DeviceLostError
from engines.pipeline import Pipeline, Row
from service import roles, server
from service.models.opening import open_pipeline
from service.settings import Settings
from service.telemetry import logs

DEADLY = "the moon"
ILLEGAL = "the sun"
ENDLESS = "the sea"
START_ANEW = "START_ANEW"


def main() -> int:
    tick_s = float(sys.argv[1])

    def open_slow(settings: Settings, path: Path) -> Pipeline:
        pipeline = open_pipeline(settings, path)
        tick = pipeline.tick

        def slow_tick(rows: Sequence[Row]) -> None:
            if any(row.task.condition == DEADLY for row in rows):
                os.kill(os.getpid(), signal.SIGKILL)
            if any(row.task.condition == ILLEGAL for row in rows):
                raise DeviceLostError("an illegal memory access was encountered")
            time.sleep(3600 if any(row.task.condition == ENDLESS for row in rows) else tick_s)
            tick(rows)

        pipeline.tick = slow_tick  # type: ignore[method-assign]
        return pipeline

    roles.open_pipeline = open_slow
    settings = Settings()
    logs.configure("json", "info")
    code = server.run(settings)
    if code == server.LOST and START_ANEW in os.environ:
        server.start_anew()
    return code


if __name__ == "__main__":
    raise SystemExit(main())
