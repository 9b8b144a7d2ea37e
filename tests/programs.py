"""The graphs of tiny bundles as torch programs, on the numbers of the graphs themselves."""

from __future__ import annotations

import warnings
from pathlib import Path

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional

from engines.backends.base import STEP_SCALARS, GraphSpec
from engines.backends.exported import Tensors, trace
from engines.bundle import Bundle, write_bundle


class TinyGraph(nn.Module):
    """What a graph of `make_tiny_bundle` computes; each has one large constant."""

    def __init__(self, graph: GraphSpec) -> None:
        super().__init__()
        self.role = graph.role
        constants = [numpy_helper.to_array(constant) for constant in onnx.load(graph.path).graph.initializer]
        self.register_buffer("table", torch.tensor(max(constants, key=lambda constant: constant.size)))

    def forward(self, inputs: Tensors) -> Tensors:
        match self.role:
            case "text":
                mask = inputs["attention_mask"].unsqueeze(2).float()
                return {"context": self.table[inputs["input_ids"]] * mask}
            case "encode":
                return {"latent": functional.conv2d(functional.avg_pool2d(inputs["image"], 2), self.table)}
            case "decode":
                colours = functional.conv2d(inputs["latent"], self.table)
                return {"image": functional.interpolate(colours, scale_factor=2.0)}
            case "step":
                return {"z_next": self.step(inputs)}

    def step(self, inputs: Tensors) -> Tensor:
        z, known, keep, noise = (inputs[name] for name in ("z", "known", "keep", "noise"))
        time, alpha, sigma, alpha_next, sigma_next, w = (inputs[name].reshape(-1, 1, 1, 1) for name in STEP_SCALARS)
        if "label" in inputs:
            x_cond = self.table[inputs["label"]]
        else:
            x_cond = torch.tanh(inputs["context"].flatten(1) @ self.table).unflatten(1, z.shape[1:])
        x = (sigma * ((w + 1) * x_cond) + alpha * z + 0.01 * time).clip(-1, 1)
        eps = (z - alpha * x) / sigma
        moved, kept = alpha_next * x + sigma_next * eps, alpha_next * known + sigma_next * noise
        return keep * kept + (1 - keep) * moved


def save_program(module: nn.Module, graph: GraphSpec, path: Path) -> Path:
    """Write a module that takes and gives what a graph does."""
    example = {spec.name: torch.from_numpy(spec.zeros(3)) for spec in graph.inputs}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(trace(module, example), path)
    return path


def with_programs(bundle: Bundle, folder: Path) -> Bundle:
    """A copy of a tiny bundle with a program of every graph, in a new folder below `folder`."""
    files = {name: bundle.path / name for name in bundle.manifest.files}
    programs = {}
    for name, graph in bundle.graphs().items():
        path = (folder / name).with_suffix(".pt2")
        files[path.name] = save_program(TinyGraph(graph), graph, path)
        programs[name] = path.name
    description = bundle.manifest.model_copy(update={"programs": programs})
    return write_bundle(folder / "bundle", description, files)
