"""A graph of more than 2 GB, which no single protobuf message can hold: exported, opened, run, cast."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engines.backends import open_engine
from engines.backends.base import EngineError, EngineOptions, GraphSpec, TensorSpec
from engines.compile import prepare

WIDTH, LAYERS = 14_000, 3
WEIGHT_BYTES = LAYERS * WIDTH * WIDTH * 4

# In a process of its own, whose memory is its own: VmHWM is the most that it ever took.
EXPORT = """
import sys, threading, time
from pathlib import Path
import torch
from torch import nn
from training.exporting import graphs

def anonymous():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon")) * 1024

class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))
        for k, layer in enumerate(self.layers):
            nn.init.zeros_(layer.weight)
            layer.weight.data.fill_diagonal_(k % 3 + 2.0 if layers < 9 else 1.0)
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

path, width, layers, storage = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
module = Wide()
base, most, done = anonymous(), 0, False
def watch():
    global most
    while not done:
        most = max(most, anonymous())
        time.sleep(0.01)
thread = threading.Thread(target=watch); thread.start()
example = graphs.Example(lambda b: (torch.ones(b, width),), ("x",), ("y",))
graphs.export_graph(module, example, Path(path), (storage,))
done = True; thread.join()
print(most - base)
"""


def export(path: Path, width: int, layers: int, storage: str) -> int:
    """Export a network of linear layers. Returns the most memory that this took beside the network itself."""
    arguments = [str(path), f"{width}", f"{layers}", storage]
    return int(subprocess.check_output([sys.executable, "-W", "ignore", "-c", EXPORT, *arguments], text=True))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[GraphSpec, int]:
    path = tmp_path_factory.mktemp("large") / "y.onnx"
    grown = export(path, WIDTH, LAYERS, "fp32")
    specs = [TensorSpec(name=name, dtype="float32", shape=("batch", WIDTH)) for name in "xy"]
    return GraphSpec("decode", path, (specs[0],), (specs[1],)), grown


@pytest.mark.slow
def test_its_weights_are_in_shards_and_were_never_in_memory_twice(exported: tuple[GraphSpec, int]) -> None:
    graph, grown = exported
    shards = sorted(graph.path.parent.glob("y.onnx.weights-*"))
    assert len(shards) == LAYERS
    assert sum(shard.stat().st_size for shard in shards) >= WEIGHT_BYTES > 2**31
    assert graph.path.stat().st_size < 1e6
    assert grown < 2 * WEIGHT_BYTES / LAYERS < WEIGHT_BYTES


@pytest.mark.slow
def test_weights_that_are_stored_as_int8_are_never_unpacked_all_at_once(tmp_path: Path) -> None:
    width, layers = 4000, 20
    assert export(tmp_path / "y.onnx", width, layers, "int8") < 4 * layers * width**2


@pytest.mark.slow
def test_it_runs(exported: tuple[GraphSpec, int]) -> None:
    x = np.random.default_rng(0).standard_normal((2, WIDTH), np.float32)
    with open_engine("ort", exported[0], EngineOptions(2)) as engine:
        np.testing.assert_allclose(engine.run({"x": x})["y"], 2 * 3 * 4 * x, rtol=1e-6)


@pytest.mark.slow
def test_it_is_cast(exported: tuple[GraphSpec, int], tmp_path: Path) -> None:
    lowered, fidelity = prepare(exported[0], "fp16", tmp_path)
    assert fidelity is not None
    assert fidelity > 60
    files = {file.name: file.stat().st_size for file in tmp_path.glob(f"{lowered.name}*")}
    assert WEIGHT_BYTES / 2 <= sum(files.values()) < WEIGHT_BYTES / 2 + 1e6
    assert len(files) > 1


@pytest.mark.slow
def test_a_shard_that_is_missing_is_a_clear_error(exported: tuple[GraphSpec, int], tmp_path: Path) -> None:
    graph = exported[0]
    alone = tmp_path / "y.onnx"
    alone.write_bytes(graph.path.read_bytes())
    with pytest.raises(EngineError, match=r"y\.onnx: ONNX Runtime cannot load it"):
        open_engine("ort", GraphSpec("decode", alone, graph.inputs, graph.outputs), EngineOptions(1))
