"""The CUDA runtime on made-up bindings: what is made is given back, however it goes."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from engines.backends import cuda as module
from engines.backends.base import EngineError
from engines.backends.cuda import Cuda

OPPOSITES = {
    "cudaStreamCreateWithFlags": "cudaStreamDestroy",
    "cudaStreamEndCapture": "cudaGraphDestroy",
    "cudaGraphInstantiate": "cudaGraphExecDestroy",
}


class Bindings:
    """Counts calls by name; every one gives status 0 and the name's own handle, unless it is told to fail."""

    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=0)  # noqa: N815
    cudaDeviceAttr = SimpleNamespace(  # noqa: N815
        cudaDevAttrComputeCapabilityMajor=75, cudaDevAttrComputeCapabilityMinor=76
    )

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.failing = ""

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> tuple[int, Any]:
            self.calls[name] += 1
            return (int(name == self.failing), len(self.calls))

        return call

    @property
    def kept(self) -> dict[str, int]:
        """What was made and not given back."""
        kept = {made: self.calls[made] - self.calls[gone] for made, gone in OPPOSITES.items()}
        return {name: count for name, count in kept.items() if count}


@pytest.fixture
def bindings(monkeypatch: pytest.MonkeyPatch) -> Bindings:
    made = Bindings()
    monkeypatch.setattr(module, "import_module", lambda name: made)
    return made


def test_whoever_only_asks_for_the_device_makes_no_stream(bindings: Bindings) -> None:
    assert Cuda().target.startswith("sm")
    assert not bindings.kept
    Cuda().close()
    assert bindings.calls["cudaStreamDestroy"] == 0


def test_streams_and_captured_launches_are_given_back(bindings: Bindings) -> None:
    device = Cuda()
    launches = [device.capture(lambda: None) for _ in range(2)]
    assert bindings.kept == {"cudaStreamCreateWithFlags": 1, "cudaGraphInstantiate": 2}
    for launch in launches:
        launch()
        launch.close()
    device.close()
    device.close()
    assert bindings.calls["cudaGraphLaunch"] == 2
    assert not bindings.kept


def test_a_capture_that_fails_leaves_nothing(bindings: Bindings) -> None:
    def fail() -> None:
        raise EngineError("it could not be launched")

    device = Cuda()
    with pytest.raises(EngineError, match="could not be launched"):
        device.capture(fail)
    assert bindings.kept == {"cudaStreamCreateWithFlags": 1}
    bindings.failing = "cudaGraphInstantiate"
    with pytest.raises(EngineError, match="cudaGraphInstantiate failed"):
        device.capture(lambda: None)
    assert bindings.calls["cudaGraphDestroy"] == 2
