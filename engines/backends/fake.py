"""The fake backend: deterministic arithmetic in place of a network. Needs no weights; for tests and demos.

It obeys the specs and the semantics of every role, so a pipeline on it behaves as on a real backend: the same
inputs give the same outputs, another condition or guidance gives another image.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np
from numpy.typing import NDArray

from engines.backends.base import (
    STEP_ROWS,
    STEP_SCALARS,
    Array,
    EngineError,
    EngineOptions,
    GraphEngine,
    GraphSpec,
)


class FakeEngine(GraphEngine):
    """An Engine that ignores the graph file and computes a made-up function of the inputs, row by row."""

    def __init__(self, graph: GraphSpec, options: EngineOptions) -> None:
        """Take the specs of ``graph``. Threads do not matter, as there is too little work to share.

        Raises EngineError for another precision than fp32.
        """
        if options.precision != "fp32":
            raise EngineError(f"the fake backend computes in fp32 only, not in {options.precision}")
        super().__init__(graph)
        self._open = True

    def _run(self, inputs: Mapping[str, Array], batch: int) -> dict[str, Array]:
        if not self._open:
            raise self._closed()
        compute = {"text": _text, "encode": _resample, "decode": _resample, "step": _step}[self._graph.role]
        return {spec.name: compute(inputs, spec.sized(batch)).astype(spec.dtype, copy=False) for spec in self.outputs}

    def close(self) -> None:
        """Close the engine."""
        self._open = False


@cache
def _projection(size_in: int, size_out: int) -> NDArray[np.float64]:
    generator = np.random.Generator(np.random.Philox(key=size_in))
    matrix: NDArray[np.float64] = generator.standard_normal((size_in, size_out)) / np.sqrt(size_in)
    return matrix


def _text(inputs: Mapping[str, Array], shape: tuple[int, ...]) -> Array:
    """Any context of ``shape``, from the ids under the mask."""
    words = np.sin(inputs["input_ids"].astype(np.float64)) * inputs["attention_mask"]
    return np.tanh(words @ _projection(words.shape[1], int(np.prod(shape[1:])))).reshape(shape)


def _resample(inputs: Mapping[str, Array], shape: tuple[int, ...]) -> Array:
    """Block means one way, repetition the other; channel c comes from channel c modulo those there are."""
    (source,) = inputs.values()
    batch, channels, height, width = shape
    array = source[:, np.arange(channels) % source.shape[1]]
    down = (max(source.shape[2] // height, 1), max(source.shape[3] // width, 1))
    array = array.reshape(batch, channels, source.shape[2] // down[0], down[0], source.shape[3] // down[1], down[1])
    array = array.mean(axis=(3, 5))
    array = array.repeat(height // array.shape[2], axis=2)
    return np.asarray(array.repeat(width // array.shape[3], axis=3))


def _step(inputs: Mapping[str, Array], shape: tuple[int, ...]) -> Array:
    """A predictor of x with guidance, then the step that every step graph takes."""
    alpha, sigma, w = (_per_row(inputs[name]) for name in ("alpha", "sigma", "guidance"))
    guided = (1 + w) * _conditional_x(inputs, shape)
    z, noisy = inputs["z"], sigma > 0
    x = np.where(noisy, np.clip(sigma * guided + alpha * z, -1, 1), z)
    # Clean data, where encoding begins, tell nothing of their noise.
    eps = np.where(noisy, (z - alpha * x) / np.maximum(sigma, np.float32(1e-6)), guided)
    return step(x, eps, inputs)


def _conditional_x(inputs: Mapping[str, Array], shape: tuple[int, ...]) -> NDArray[np.float64]:
    names = sorted(inputs.keys() - {*STEP_SCALARS, *STEP_ROWS})
    batch = shape[0]
    flat = np.concatenate([inputs[name].reshape(batch, -1).astype(np.float64) for name in names], axis=1)
    # Both waves, so that no value of the condition means a blank image.
    features = np.concatenate([np.sin(flat), np.cos(flat)], axis=1)
    coarse = np.tanh(features @ _projection(features.shape[1], shape[1] * 4)).reshape(batch, shape[1], 2, 2)
    rows = np.arange(shape[2]) * 2 // shape[2]
    columns = np.arange(shape[3]) * 2 // shape[3]
    return 0.5 * coarse[:, :, rows][:, :, :, columns]


def step(x: Array, eps: Array, inputs: Mapping[str, Array]) -> Array:
    """The semantics of a step graph, given the predicted x and eps: DDIM (eta = 0), then the kept cells put back.

    z' = alpha_next x + sigma_next eps; z_next = keep (alpha_next known + sigma_next noise) + (1 - keep) z'.
    """
    alpha_next, sigma_next = _per_row(inputs["alpha_next"]), _per_row(inputs["sigma_next"])
    moved = alpha_next * x + sigma_next * eps
    kept = alpha_next * inputs["known"] + sigma_next * inputs["noise"]
    return np.asarray(inputs["keep"] * kept + (1 - inputs["keep"]) * moved)


def _per_row(scalars: Array) -> Array:
    return scalars.reshape(-1, 1, 1, 1)
