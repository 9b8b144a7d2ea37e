"""Torch modules as torch.export programs: weights as trained, inputs and outputs by name, checked against torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from engines.backends.exported import runnable, trace
from training.exporting.graphs import (
    TOLERANCE,
    Example,
    ExportError,
    Parity,
    check_finite,
    named_outputs,
    quiet,
    worst_error,
)

PROGRAM_SUFFIX = ".pt2"


class _Named(nn.Module):
    """A module that takes and gives tensors by name."""

    def __init__(self, module: nn.Module, example: Example) -> None:
        super().__init__()
        self.module, self.example = module, example

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        given = [inputs[name] for name in self.example.input_names]
        return named_outputs(self.module, given, self.example.output_names)


def export_program(module: nn.Module, example: Example, path: Path) -> Parity:
    """Write `module` as a program of {input name: tensor} -> {output name: tensor}, of any batch that it can take.

    Raises ExportError, and writes nothing, where what was written differs from `module`.
    """
    check_finite(module, path.name)
    with quiet():
        inputs = dict(zip(example.input_names, example.at(3), strict=True))
        torch.export.save(trace(_Named(module.eval(), example), inputs), path)
        program = runnable(torch.export.load(path))
    error = worst_error(module, example, program)
    if error > TOLERANCE["fp32"]:
        path.unlink()
        raise ExportError(f"{path.name} differs from torch: relative error {error:.2g} > {TOLERANCE['fp32']:.2g}")
    return Parity(path.name, "fp32", error)
