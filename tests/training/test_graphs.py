"""Graphs: equal to torch at every batch size, small when asked, refused when they differ."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import engines.weights
from training.diffusion import Schedule, blend_known, ddim_step
from training.exporting import graphs
from training.exporting.graphs import Example, ExportError, StepGraph, Tracer, export_graph, write_graph
from training.networks import NetworkDenoiser, build_unet, student_from
from training.sections import NetworkRecipe

NETWORK = NetworkRecipe(channels=(16, 32), norm_groups=8)
ODD = NetworkRecipe(channels=(16, 16, 32), norm_groups=8, prediction="x")
"""Of a side of 10 places its levels see 10, 5 and 3; it predicts x."""


def student(recipe: NetworkRecipe = NETWORK, side: int = 8) -> NetworkDenoiser:
    torch.manual_seed(0)
    teacher = NetworkDenoiser(build_unet(recipe, (3, side, side), None, 10), Schedule.cosine(), recipe.prediction)
    made = student_from(teacher, recipe.prediction)
    nn.init.normal_(made.network.time_embedding.cond_proj.weight, std=0.1)  # A trained student heeds w.
    return made.eval().requires_grad_(False)


def step_example(graph: StepGraph, side: int = 8) -> Example:
    schedule = Schedule.cosine(1024)
    channels = {"z": 3, "known": 3, "keep": 1, "noise": 3}

    def make(batch: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(batch)
        place = torch.randint(1, 1024, (batch,), generator=generator)
        values = {name: torch.randn(batch, c, side, side, generator=generator) for name, c in channels.items()}
        values |= {"time": place / 1024, "alpha": schedule.alphas[place], "sigma": schedule.sigmas[place]}
        values |= {"alpha_next": schedule.alphas[place - 1], "sigma_next": schedule.sigmas[place - 1]}
        values |= {"guidance": torch.rand(batch, generator=generator) * 4, "label": place % 10}
        values["keep"] = (values["keep"] > 1).float()
        return tuple(values[name] for name in graph.input_names)

    return Example(make, graph.input_names, ("z_next",))


class Linear(nn.Module):
    """A module small enough to look into: one large and one small weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(64, 48)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x)
        return output


LINEAR = Example(lambda b: (torch.randn(b, 64, generator=torch.Generator().manual_seed(b)),), ("x",), ("y",))


def test_step_graph_is_the_sampler_in_torch() -> None:
    graph = StepGraph(student(), ("label",))
    example = step_example(graph)
    given = dict(zip(graph.input_names, example.at(4), strict=True))
    now = [given[name].reshape(-1, 1, 1, 1) for name in ("alpha", "sigma", "alpha_next", "sigma_next")]
    with torch.no_grad():
        v = graph.denoiser(given["z"], given["time"], {"label": given["label"]}, given["guidance"])
        stepped = ddim_step(given["z"], v, *now)
        expected = blend_known(stepped, given["known"], given["keep"], given["noise"], *now[2:])
        assert torch.equal(graph(*example.at(4)), expected)


@pytest.mark.parametrize(("network", "side"), [(NETWORK, 8), (ODD, 10)])
def test_step_graph_exports_within_the_tightest_tolerance(tmp_path: Path, network: NetworkRecipe, side: int) -> None:
    graph = StepGraph(student(network, side), ("label",))
    parity = export_graph(graph, step_example(graph, side), tmp_path / "step.onnx", ("fp32",))
    assert parity.error < 1e-5
    session = onnxruntime.InferenceSession(tmp_path / "step.onnx", providers=["CPUExecutionProvider"])
    assert tuple(node.name for node in session.get_inputs()) == graph.input_names
    assert all(node.shape[0] == "batch" for node in session.get_inputs())


class Twice(nn.Module):
    """Two layers of one shape, between which a norm's weights are folded into the graph."""

    def __init__(self, width: int, bias: float) -> None:
        super().__init__()
        torch.manual_seed(round(bias))
        self.first, self.norm, self.second = nn.Linear(width, 8), nn.GroupNorm(2, 8), nn.Linear(8, 8)
        nn.init.constant_(self.first.bias, bias)
        nn.init.zeros_(self.second.bias)
        nn.init.normal_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.second(self.norm(self.first(x)[..., None])[..., 0])
        return output


def test_modules_of_one_make_are_traced_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where weights that are alike in the first, and become one there, differ in the second."""
    traced, trace = list[nn.Module](), graphs._trace
    monkeypatch.setattr(graphs, "_trace", lambda module, example: traced.append(module) or trace(module, example))
    tracer = Tracer()
    first, second, wider = Twice(4, 0.0), Twice(4, 1.0), Twice(6, 1.0)
    for module, width in ((first, 4), (second, 4), (wider, 6)):
        example = Example(lambda b, width=width: (torch.randn(b, width),), ("x",), ("y",))
        tracer.write(module, example, tmp_path / "shared.onnx")
        together = onnx.load(tmp_path / "shared.onnx")
        Tracer().write(module, example, tmp_path / "alone.onnx")
        alone = onnx.load(tmp_path / "alone.onnx")
        assert together.graph.node == alone.graph.node
        assert together.graph.initializer == alone.graph.initializer
    assert traced == [first, first, second, wider, wider]


@pytest.mark.parametrize(("weights", "dtype"), [("fp16", np.float16), ("int8", np.int8)])
def test_large_weights_are_stored_small(tmp_path: Path, weights: graphs.Weights, dtype: type) -> None:
    parity = export_graph(Linear(), LINEAR, tmp_path / "y.onnx", (weights,))
    stored = [numpy_helper.to_array(i) for i in onnx.load(tmp_path / "y.onnx").graph.initializer]
    large = [value for value in stored if value.size == 64 * 48]
    assert [value.dtype for value in large] == [dtype]
    assert 1e-7 < parity.error < graphs.TOLERANCE[weights]


@pytest.mark.parametrize(("width", "size", "dtype"), [(176, 1, np.int8), (176, 1e-3, np.int8), (61, 1, np.float16)])
def test_blocks_divide_the_weights_or_they_are_stored_as_fp16(
    width: int, size: float, dtype: type, tmp_path: Path
) -> None:
    value = np.random.default_rng(0).standard_normal((width, width)).astype(np.float32) * np.float32(size)
    graph = helper.make_graph(
        [helper.make_node("Identity", ["w"], ["y"])],
        "g",
        [],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, value.shape)],
        [numpy_helper.from_array(value, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), tmp_path / "g.onnx")
    stored = write_graph(tmp_path / "g.onnx", tmp_path / "stored.onnx", "int8")
    weights = [numpy_helper.to_array(i) for i in onnx.load(stored).graph.initializer]
    assert max(weights, key=lambda array: array.size).dtype == dtype
    session = onnxruntime.InferenceSession(stored, providers=["CPUExecutionProvider"])
    assert np.abs(session.run(["y"], {})[0] - value).max() < 0.02 * size


def test_the_smallest_storage_within_tolerance_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert export_graph(Linear(), LINEAR, tmp_path / "y.onnx").weights == "int8"
    monkeypatch.setattr(graphs, "TOLERANCE", {"int8": 1e-4, "fp16": 2e-3, "fp32": 1e-4})
    assert export_graph(Linear(), LINEAR, tmp_path / "y.onnx").weights == "fp16"


def test_a_graph_that_differs_is_not_written(tmp_path: Path) -> None:
    class Drifting(Linear):
        """Not the same function when it runs as when it was traced."""

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1.0 if torch.compiler.is_exporting() else 1.1)

    with pytest.raises(ExportError, match="differs from torch"):
        export_graph(Drifting(), LINEAR, tmp_path / "y.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("weights", graphs.SMALLEST_FIRST)
def test_large_graphs_have_their_weights_in_files_beside_them(
    tmp_path: Path, weights: graphs.Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = export_graph(Linear(), LINEAR, tmp_path / "inside.onnx", (weights,))
    monkeypatch.setattr(graphs, "LARGEST_GRAPH_BYTES", 1000)
    monkeypatch.setattr(engines.weights, "SHARD_BYTES", 2000)
    outside = export_graph(Linear(), LINEAR, tmp_path / "y.onnx", (weights,))
    assert outside.error == pytest.approx(inside.error, rel=1e-6)
    shards = sorted(tmp_path.glob("y.onnx.weights-*"))
    assert [shard.name for shard in shards[:1]] == ["y.onnx.weights-00"]
    assert (tmp_path / "y.onnx").stat().st_size < (tmp_path / "inside.onnx").stat().st_size / 2
    a, b = (
        {i.name: numpy_helper.to_array(i) for i in onnx.load(tmp_path / f"{name}.onnx").graph.initializer}
        for name in ("inside", "y")
    )
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[name], b[name]) for name in a)


def test_several_weights_fill_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines.weights, "SHARD_BYTES", 20_000)
    writer = engines.weights.Writer(tmp_path / "g.onnx", outside=True)
    values = [np.full((k, 1000), k, np.float32) for k in (2, 3, 9, 1)]
    tensors = [writer.add(f"w{k}", value, TensorProto.FLOAT, value.shape) for k, value in enumerate(values)]
    assert len(list(tmp_path.iterdir())) == 3
    assert all(file.stat().st_size <= 36_000 for file in tmp_path.iterdir())
    for tensor, value in zip(tensors, values, strict=True):
        assert isinstance(found := engines.weights.value_of(tensor, tmp_path), np.memmap)
        assert np.array_equal(found, value)
    small = writer.add("small", np.arange(3), TensorProto.INT64, (3,))
    assert engines.weights.value_of(small, tmp_path).tolist() == [0, 1, 2]


def test_one_row_that_differs_is_enough(tmp_path: Path) -> None:
    class OneRow(Linear):
        """Wrong by a tenth in the last row of a batch, when it runs."""

        def forward(self, x: Tensor) -> Tensor:
            output = super().forward(x)
            if not torch.compiler.is_exporting():
                output = torch.cat([output[:-1], 1.1 * output[-1:]])
            return output

    with pytest.raises(ExportError, match=r"0\.09"):
        export_graph(OneRow(), LINEAR, tmp_path / "y.onnx", ("fp32",))


def test_a_graph_whose_output_is_no_number_is_not_written(tmp_path: Path) -> None:
    class Overflowing(Linear):
        """Finite in torch, infinite minus infinite as it was traced."""

        def forward(self, x: Tensor) -> Tensor:
            output = super().forward(x)
            return output * 1e38 * 1e38 - output * 1e38 * 1e38 if torch.compiler.is_exporting() else output

    with pytest.raises(ExportError, match="inf > "):
        export_graph(Overflowing(), LINEAR, tmp_path / "y.onnx", ("fp32",))
    assert not list(tmp_path.iterdir())


def test_a_network_that_is_not_finite_is_not_exported(tmp_path: Path) -> None:
    module = Linear()
    with torch.no_grad():
        module.layer.weight[0, 0] = torch.nan
    with pytest.raises(ExportError, match="are not finite"):
        export_graph(module, LINEAR, tmp_path / "y.onnx")
    assert not list(tmp_path.iterdir())
