"""Tiny bundles that really load: graphs of a few nodes, a tokenizer of a few words."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from engines.backends.base import TensorSpec
from engines.bundle import (
    Attribution,
    Bundle,
    Description,
    Grid,
    GuidanceRange,
    Provenance,
    Student,
    TextEncoder,
    step_specs,
    write_bundle,
)

Conditioning = Literal["text", "class"]
Space = Literal["pixel", "latent"]

MAX_TOKENS = 8
CONTEXT_DIM = 6
WORDS = [
    "a",
    "the",
    "red",
    "green",
    "blue",
    "cat",
    "dog",
    "sun",
    "moon",
    "heart",
    "star",
    "tree",
    "house",
    "face",
    "smiling",
    "big",
    "small",
    "of",
    "and",
]
CLASSES = ("zero", "one", "two", "three")
LATENT_CHANNELS = 4

_TYPES = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64, "int32": TensorProto.INT32}


def make_tiny_bundle(
    folder: Path,
    conditioning: Conditioning = "text",
    space: Space = "pixel",
    size: int = 16,
    steps: tuple[int, ...] = (1, 2, 4),
    name: str = "tiny",
    stochastic: tuple[int, ...] = (),
    encoders: tuple[int, ...] = (),
) -> Bundle:
    """Write a bundle of ``size`` x ``size`` images to ``folder`` / ``name``; latents are size / 2.

    Its graphs run on onnxruntime in microseconds and obey the step semantics. Guidance is w in [0, 7]. Students of the
    steps in ``stochastic`` are for the stochastic sampler too, and those of the steps in ``encoders`` have an encoder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = folder / f"{name}-parts"
    parts.mkdir()
    description = tiny_description(conditioning, space, size, steps, name, stochastic, encoders)
    files = {"README.md": parts / "README.md"}
    files["README.md"].write_text(f"# {name}\n\nA bundle for tests.\n", encoding="utf-8")
    for student in description.students:
        files[student.graph] = save_step_graph(parts / student.graph, description, salt=student.steps)
        if student.encoder is not None:
            files[student.encoder] = save_encoder_graph(parts / student.encoder, description, salt=student.steps)
    if description.text is not None:
        files["tokenizer.json"] = save_tokenizer(parts / "tokenizer.json")
        files["text.onnx"] = save_text_graph(parts / "text.onnx")
    if space == "latent":
        files["encode.onnx"] = save_encode_graph(parts / "encode.onnx", description)
        files["decode.onnx"] = save_decode_graph(parts / "decode.onnx", description)
    return write_bundle(folder / name, description, files)


def tiny_description(
    conditioning: Conditioning = "text",
    space: Space = "pixel",
    size: int = 16,
    steps: tuple[int, ...] = (1, 2, 4),
    name: str = "tiny",
    stochastic: tuple[int, ...] = (),
    encoders: tuple[int, ...] = (),
) -> Description:
    """The description of a tiny bundle."""
    latent = space == "latent"
    text = TextEncoder(graph="text.onnx", tokenizer="tokenizer.json", max_tokens=MAX_TOKENS)
    prompted = conditioning == "text"
    context = TensorSpec(name="context", dtype="float32", shape=("batch", MAX_TOKENS, CONTEXT_DIM))
    label = TensorSpec(name="label", dtype="int64", shape=("batch",))
    return Description(
        name=name,
        space=space,
        conditioning=conditioning,
        image_shape=(3, size, size),
        latent_shape=(LATENT_CHANNELS, size // 2, size // 2) if latent else (3, size, size),
        students=tuple(
            Student(
                steps=n,
                graph=f"step-{n}.onnx",
                grid=cosine_grid(n),
                stochastic=cosine_grid(2 * n) if n in stochastic else None,
                encoder=f"encoder-{n}.onnx" if n in encoders else None,
            )
            for n in steps
        ),
        guidance=GuidanceRange(minimum=0, maximum=7, default=2),
        condition=(context,) if prompted else (label,),
        text=text if prompted else None,
        classes=() if prompted else CLASSES,
        encode="encode.onnx" if latent else None,
        decode="decode.onnx" if latent else None,
        weights_dtype="float32",
        licence="Apache-2.0",
        attributions=(Attribution(name="nobody", licence="CC0-1.0", source="https://example.org"),),
        provenance=Provenance(recipe="tests", data="none", commit="0" * 40, created="2025-01-01T00:00:00Z"),
    )


def cosine_grid(steps: int) -> Grid:
    """Alpha = cos(pi t / 2), sigma = sin(pi t / 2) at t = 1 - k / steps."""
    times = [1 - k / steps for k in range(steps + 1)]
    alphas = [max(math.cos(math.pi / 2 * t), 1e-3) for t in times]
    sigmas = [math.sin(math.pi / 2 * t) for t in times]
    return Grid(times=tuple(times), alphas=tuple(alphas), sigmas=tuple(sigmas))


def save_tokenizer(path: Path) -> Path:
    """A lower-casing word tokenizer: [CLS] words [SEP]; unknown words are [UNK]."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: index for index, word in enumerate(specials + list(WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    tokenizer.save(str(path))
    return path


class GraphBuilder:
    """Collects ONNX nodes; every method returns the name of what it made."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype=dtype), name))
        return name

    def op(self, kind: str, *inputs: str, out: str = "", **attributes: Any) -> str:
        out = out or f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [out], **attributes))
        return out

    def save(self, path: Path, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> Path:
        graph = helper.make_graph(self.nodes, path.stem, _values(inputs), _values(outputs), initializer=self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
        onnx.checker.check_model(model)
        onnx.save(model, str(path))
        return path


def _values(specs: tuple[TensorSpec, ...]) -> list[onnx.ValueInfoProto]:
    return [helper.make_tensor_value_info(spec.name, _TYPES[spec.dtype], list(spec.shape)) for spec in specs]


def save_text_graph(path: Path) -> Path:
    """Context = table[ids] * mask."""
    g = GraphBuilder()
    table = np.random.default_rng(0).standard_normal((len(WORDS) + 4, CONTEXT_DIM))
    vectors = g.op("Gather", g.constant(table), "input_ids")
    mask = g.op("Unsqueeze", g.op("Cast", "attention_mask", to=TensorProto.FLOAT), g.constant([2], np.int64))
    g.op("Mul", vectors, mask, out="context")
    tokens = ("batch", MAX_TOKENS)
    inputs = tuple(TensorSpec(name=n, dtype="int64", shape=tokens) for n in ("input_ids", "attention_mask"))
    return g.save(path, inputs, (TensorSpec(name="context", dtype="float32", shape=(*tokens, CONTEXT_DIM)),))


def save_encode_graph(path: Path, description: Description) -> Path:
    """2 x 2 means, then three colours mixed into the latent's channels."""
    g = GraphBuilder()
    means = g.op("AveragePool", "image", kernel_shape=[2, 2], strides=[2, 2])
    g.op("Conv", means, g.constant(_mixing()[:, :, None, None]), out="latent")
    return g.save(path, *_coder_specs(description))


def save_decode_graph(path: Path, description: Description) -> Path:
    """The pseudo-inverse of the mixing, then every cell repeated to 2 x 2 pixels."""
    g = GraphBuilder()
    colours = g.op("Conv", "latent", g.constant(np.linalg.pinv(_mixing())[:, :, None, None]))
    scales = g.constant([1, 1, 2, 2])
    g.op("Resize", colours, "", scales, out="image", mode="nearest")
    latent, image = _coder_specs(description)[::-1]
    return g.save(path, latent, image)


def _mixing() -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.random.default_rng(1).standard_normal((LATENT_CHANNELS, 3))


def _coder_specs(description: Description) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    image = TensorSpec(name="image", dtype="float32", shape=("batch", *description.image_shape))
    latent = TensorSpec(name="latent", dtype="float32", shape=("batch", *description.latent_shape))
    return (image,), (latent,)


def save_step_graph(path: Path, description: Description, salt: int = 0) -> Path:
    """A step graph with the predictor x = clip(sigma (1 + w) x_cond + alpha z), then DDIM, then keep."""
    g = GraphBuilder()
    row = _per_row(g)
    guided = _guided_x(g, row, description, salt)
    raw = g.op("Add", g.op("Mul", row["sigma"], guided), g.op("Mul", row["alpha"], "z"))
    # The time enters with a small weight, so that no input of the graph is unused.
    raw = g.op("Add", raw, g.op("Mul", row["time"], g.constant(0.01)))
    x = g.op("Clip", raw, g.constant(-1), g.constant(1))
    eps = g.op("Div", g.op("Sub", "z", g.op("Mul", row["alpha"], x)), row["sigma"])
    return _save_step(g, path, row, x, eps, description)


def save_encoder_graph(path: Path, description: Description, salt: int = 0) -> Path:
    """A step graph with the predictor v = x_cond (1 + w), which is defined where there is no noise, then DDIM."""
    g = GraphBuilder()
    row = _per_row(g)
    guided = _guided_x(g, row, description, salt)
    v = g.op("Add", guided, g.op("Mul", row["time"], g.constant(0.01)))
    x = g.op("Sub", g.op("Mul", row["alpha"], "z"), g.op("Mul", row["sigma"], v))
    eps = g.op("Add", g.op("Mul", row["sigma"], "z"), g.op("Mul", row["alpha"], v))
    return _save_step(g, path, row, x, eps, description)


def _per_row(g: GraphBuilder) -> dict[str, str]:
    column = g.constant([-1, 1, 1, 1], np.int64)
    names = ("alpha", "sigma", "alpha_next", "sigma_next", "guidance", "time")
    return {name: g.op("Reshape", name, column) for name in names}


def _guided_x(g: GraphBuilder, row: dict[str, str], description: Description, salt: int) -> str:
    return g.op("Mul", g.op("Add", row["guidance"], g.constant(1)), _conditional_x(g, description, salt))


def _save_step(g: GraphBuilder, path: Path, row: dict[str, str], x: str, eps: str, description: Description) -> Path:
    moved = g.op("Add", g.op("Mul", row["alpha_next"], x), g.op("Mul", row["sigma_next"], eps))
    kept = g.op("Add", g.op("Mul", row["alpha_next"], "known"), g.op("Mul", row["sigma_next"], "noise"))
    g.op("Add", g.op("Mul", "keep", kept), g.op("Mul", g.op("Sub", g.constant(1), "keep"), moved), out="z_next")
    return g.save(path, *step_specs(description))


def _conditional_x(g: GraphBuilder, description: Description, salt: int) -> str:
    channels, height, width = description.latent_shape
    generator = np.random.default_rng(100 + salt)
    if description.conditioning == "class":
        table = generator.uniform(-0.5, 0.5, (len(description.classes), channels, height, width))
        return g.op("Gather", g.constant(table), "label")
    size = MAX_TOKENS * CONTEXT_DIM
    flat = g.op("Reshape", "context", g.constant([-1, size], np.int64))
    weight = generator.standard_normal((size, channels * height * width)) / math.sqrt(size)
    image = g.op("Tanh", g.op("MatMul", flat, g.constant(weight)))
    return g.op("Reshape", image, g.constant([-1, channels, height, width], np.int64))
