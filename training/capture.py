"""CUDA graphs of small networks, most of whose time would go into launching kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

CALLS_BEFORE = 3


def capture_network(network: nn.Module) -> None:
    """Capture in place, forward and backward: arguments of shapes that come again have their kernels replayed.

    Only calls whose arguments are all CUDA tensors are captured; elsewhere nothing is launched. Weights may change
    where they lie, and must not be moved. Gradients are of one call: those of several do not add up.
    """
    network.forward = Captured(network)


class _Call(nn.Module):
    """A module under its own forward, which capturing may replace."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self._forward = module, forward

    def forward(self, *inputs: Any) -> Any:
        return self._forward(*inputs)


class Captured:
    """A module's forward, which replays a graph for arguments of a kind that came a few times before."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._eager = module, module.forward
        self._calls: Counter[Hashable] = Counter()
        self._graphs: dict[Hashable, Callable[..., Any]] = {}

    def __call__(self, *inputs: Any) -> Any:
        """The module's answer to tensors, or to dictionaries of them."""
        leaves = tree_leaves(inputs)
        if not all(isinstance(leaf, Tensor) and leaf.is_cuda for leaf in leaves):
            return self._eager(*inputs)
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        key = shapes, self._module.training, torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        self._calls[key] += 1
        if self._calls[key] <= CALLS_BEFORE:
            return self._eager(*inputs)
        if key not in self._graphs:
            self._graphs[key] = self._captured(inputs)
        return tree_map(torch.clone, self._graphs[key](*inputs))  # the next replay overwrites what this one gave

    def _captured(self, inputs: Any) -> Callable[..., Any]:
        own = tree_map(lambda value: value.detach().clone(memory_format=torch.contiguous_format), inputs)
        call = _Call(self._module, self._eager).train(self._module.training)
        # Gradients come from the stream that captures, on purpose; torch 2.11 warns of it, older ones do not.
        if hasattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch"):
            torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
        graphed: Callable[..., Any] = torch.cuda.make_graphed_callables(call, own, allow_unused_input=True)
        return graphed
