"""Programs: equal to torch at every batch size, refused when they differ."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from engines.backends.exported import runnable
from tests.training.test_graphs import LINEAR, Linear, step_example, student
from training.exporting.graphs import BATCH_SIZES, ExportError, StepGraph
from training.exporting.programs import export_program


def test_a_step_is_the_sampler_in_torch(tmp_path: Path) -> None:
    graph = StepGraph(student(), ("label",))
    example = step_example(graph)
    parity = export_program(graph, example, tmp_path / "step.pt2")
    assert (parity.graph, parity.weights) == ("step.pt2", "fp32")
    assert parity.error < 1e-6
    program = runnable(torch.export.load(tmp_path / "step.pt2"))
    for batch in (*BATCH_SIZES, 63):
        inputs = example.at(batch)
        with torch.inference_mode():
            outputs = program(dict(zip(example.input_names, inputs, strict=True)))
            torch.testing.assert_close(outputs, {"z_next": graph(*inputs)})


def test_a_program_that_differs_is_not_written(tmp_path: Path) -> None:
    class Drifting(Linear):
        """Not the same function when it runs as when it was traced."""

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1.0 if torch.compiler.is_exporting() else 1.1)

    with pytest.raises(ExportError, match=r"y\.pt2 differs from torch: relative error 0\.09"):
        export_program(Drifting(), LINEAR, tmp_path / "y.pt2")
    assert not list(tmp_path.iterdir())


def test_a_network_that_is_not_finite_is_not_exported(tmp_path: Path) -> None:
    module = Linear()
    with torch.no_grad():
        module.layer.weight[0, 0] = torch.nan
    with pytest.raises(ExportError, match="are not finite"):
        export_program(module, LINEAR, tmp_path / "y.pt2")
    assert not list(tmp_path.iterdir())
