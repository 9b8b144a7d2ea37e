"""Which graphs a precision may not have: judged by all of what they predict, at the ends of what they may be asked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engines.backends.base import Array, EngineError, GraphSpec, TensorSpec
from engines.bundle import Bundle
from engines.compile import prepare
from engines.fidelity import check_fidelity, checked_inputs, typical_inputs
from tests.bundles import WORDS, GraphBuilder, cosine_grid, make_tiny_bundle

WIDTH = 8
ROWS = tuple(TensorSpec(name=name, dtype="float32", shape=("batch", WIDTH)) for name in ("z", "z_next"))
SCALARS = ("guidance", "alpha_next", "sigma_next")


def step_of(g: GraphBuilder, x: str, folder: Path, guidance: tuple[float, ...] = (0, 2, 7)) -> GraphSpec:
    """A step graph that predicts `x` and takes what is in z for its noise."""
    for name in SCALARS[1:]:
        g.op("Reshape", name, g.constant([-1, 1], np.int64), out=f"{name}_of_row")
    parts = g.op("Mul", "alpha_next_of_row", x), g.op("Mul", "sigma_next_of_row", "z")
    g.op("Add", *parts, out="z_next")
    inputs = (ROWS[0], *(TensorSpec(name=name, dtype="float32", shape=("batch",)) for name in SCALARS))
    path = g.save(folder / "step.onnx", inputs, ROWS[1:])
    return GraphSpec("step", path, inputs, ROWS[1:], guidance=guidance)


def with_guidance_embedded(folder: Path, guidance: tuple[float, ...]) -> GraphSpec:
    """x = z + w, by way of 12,000 w, which is within fp16, whose largest value is 65,504, for w of 5 and less."""
    g = GraphBuilder()
    w = g.op("Reshape", "guidance", g.constant([-1, 1], np.int64))
    hidden = g.op("MatMul", w, g.constant(np.full((1, WIDTH), 12000)))
    embedded = g.op("MatMul", hidden, g.constant(np.full((WIDTH, 1), 1 / (12000 * WIDTH))))
    # Clipped, so that what overflows gives a wrong value and not one that is not finite.
    return step_of(g, g.op("Add", "z", g.op("Clip", embedded, g.constant(-100), g.constant(100))), folder, guidance)


def test_a_precision_that_fails_at_the_largest_w_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"step\.onnx: in fp16 it is at .* dB to fp32, below 30 dB"):
        prepare(with_guidance_embedded(tmp_path, (0, 2, 7)), "fp16", tmp_path)


def test_a_precision_that_fails_beyond_the_largest_w_is_not(tmp_path: Path) -> None:
    assert prepare(with_guidance_embedded(tmp_path, (0, 2, 5)), "fp16", tmp_path)[1]


def test_the_noise_that_a_step_passes_on_does_not_hide_what_it_predicts(tmp_path: Path) -> None:
    """x = z / 10, by way of z / 10 + 32, of which bf16 keeps quarters: z_next would have little of x, and much of z."""
    g = GraphBuilder()
    shifted = g.op("Add", g.op("Mul", "z", g.constant(0.1)), g.constant(32))
    x = g.op("Sub", g.op("MatMul", shifted, g.constant(np.eye(WIDTH))), g.constant(32))
    w = g.op("Mul", g.op("Reshape", "guidance", g.constant([-1, 1], np.int64)), g.constant(0))
    with pytest.raises(EngineError, match=r"step\.onnx: in bf16 it is at .* dB to fp32, below 30 dB"):
        prepare(step_of(g, g.op("Add", x, w), tmp_path), "bf16", tmp_path)


def test_an_outlier_does_not_hide_that_all_else_is_lost() -> None:
    """As the first token of CLIP has one; its own error counts in its own range."""
    whole = np.random.default_rng(0).standard_normal((2, 77, 768)) * 0.05
    whole[:, 0, 7] = 800
    lost = np.where(whole == 800, whole, 0)
    with pytest.raises(EngineError, match=r"text\.onnx: in fp8 it is at .* dB to fp32, below 30 dB"):
        check_fidelity("text.onnx", "fp8", [lost], [whole])
    assert check_fidelity("text.onnx", "bf16", [np.where(whole == 800, 802, whole)], [whole]) > 30


@pytest.mark.parametrize("spikes", [0, 1])
def test_what_is_nearly_or_wholly_constant_has_a_fidelity(spikes: int) -> None:
    whole = np.zeros((2, 1000), np.float32)
    whole[:spikes] = np.eye(2, 1000, dtype=np.float32)[:spikes]
    assert check_fidelity("decode.onnx", "fp16", [whole + 1e-3], [whole]) == pytest.approx(60, abs=0.1)


def test_steps_are_checked_where_they_are_first_and_last_called_and_at_every_w(tmp_path: Path) -> None:
    bundle = make_tiny_bundle(tmp_path, "class", steps=(1, 4), stochastic=(4,), encoders=(4,))
    noise, clean = cosine_grid(1).places
    finest = cosine_grid(8).places
    for name, first, last, end in (
        ("step-1.onnx", noise, noise, clean),
        ("step-4.onnx", noise, finest[-2], clean),
        ("encoder-4.onnx", clean, cosine_grid(4).places[1], noise),
    ):
        batches = checked_inputs(bundle.graphs()[name])
        assert [batch["guidance"].tolist() for batch in batches] == [[0, 0], [2, 2], [7, 7]]
        for batch in batches:
            assert_places(batch, ("time", "alpha", "sigma"), first, last)
            assert_places(batch, ("alpha_next", "sigma_next"), end[1:], end[1:])
            assert batch["label"].tolist() == [0, 3]
            assert not batch["keep"].any()


def assert_places(batch: dict[str, Array], names: tuple[str, ...], *rows: tuple[float, ...]) -> None:
    np.testing.assert_allclose(np.stack([batch[name] for name in names], axis=1), rows, atol=1e-6)


def test_texts_are_checked_with_the_last_word(text_bundle: Bundle) -> None:
    graph = text_bundle.graphs()["text.onnx"]
    (batch,) = checked_inputs(graph)
    assert batch["input_ids"][0, -1] == batch["input_ids"].max() == len(WORDS) + 3
    assert batch["attention_mask"][0].all()
    assert {name: (array.dtype, array.shape) for name, array in batch.items()} == {
        name: (array.dtype, array.shape) for name, array in typical_inputs(graph, 2).items()
    }
