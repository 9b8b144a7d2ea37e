"""Attention as ONNX Runtime's own node: what the exporter writes out as products and a softmax, put together again."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import helper

from engines.backends.base import GraphSpec
from engines.compile import unpack

CARRIED = ("Transpose", "Reshape", "Mul")
"""What lies between a projection and the product of queries and keys: heads are split off, and both are scaled."""


def fuse_attention(source: GraphSpec, target: Path) -> int:
    """Write a graph with its attention fused; return how many there were.

    Only softmaxes of a bare product are taken: a mask, or scores that are reshaped, stay as they are.
    """
    model = onnx.shape_inference.infer_shapes(onnx.load(unpack(source, target)), data_prop=True)
    graph = model.graph
    maker = {name: node for node in graph.node for name in node.output}
    shapes = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in graph.value_info}
    user = {name: node for node in graph.node for name in node.input}
    fused = 0
    for softmax in [node for node in graph.node if node.op_type == "Softmax"]:
        scores, weighted = maker.get(softmax.input[0]), user[softmax.output[0]]
        heads = shapes.get(softmax.input[0], [])
        if scores is None or scores.op_type != "MatMul" or weighted.op_type != "MatMul" or len(heads) != 4:
            continue
        joined = user[user[weighted.output[0]].output[0]]  # transposed, then reshaped to (batch, tokens, heads x dim)
        inputs = [_projection(name, maker) for name in (*scores.input, weighted.input[1])]
        if joined.op_type != "Reshape" or not heads[1]:
            continue
        node = helper.make_node(
            "MultiHeadAttention", inputs, list(joined.output), domain="com.microsoft", num_heads=heads[1]
        )
        graph.node.insert(list(graph.node).index(joined), node)
        graph.node.remove(joined)
        fused += 1
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, target)
    return fused


def _projection(name: str, maker: dict[str, onnx.NodeProto]) -> str:
    while (node := maker.get(name)) is not None and node.op_type in CARRIED:
        name = node.input[0]
    return name
