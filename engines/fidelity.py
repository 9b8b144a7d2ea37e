"""How near two runs of a graph are, on inputs like a service's and at the ends of what it may ask."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import numpy as np

from engines.backends.base import Array, Engine, EngineError, GraphSpec
from engines.decibels import psnr_db
from engines.manifest import ATTENTION_MASK, IDS, LABEL, SECOND_IDS
from engines.plans import Precision
from engines.tokenizer import TokenizerError, vocabulary_size

FLOOR_DB = 30.0
"""The least peak signal-to-noise ratio, to the graph in fp32, of the output of a graph in a lower precision."""
CHECKED_ROWS = 2


def check_finite(name: str, outputs: Sequence[Array]) -> None:
    """Raise EngineError where a graph gives, on typical inputs and in fp32, values that are not finite."""
    if not all(np.isfinite(array).all() for array in outputs):
        raise EngineError(f"{name}: in fp32 it gives values that are not finite")


def check_fidelity(name: str, precision: Precision, lowered: Sequence[Array], whole: Sequence[Array]) -> float:
    """The PSNR in dB of a graph's outputs in a precision, to those in fp32.

    Raises EngineError below `FLOOR_DB`, and where those in fp32 are not finite.
    """
    check_finite(name, whole)
    fidelity = min(fidelity_db(a, b) for a, b in zip(lowered, whole, strict=True))
    if not fidelity >= FLOOR_DB:
        raise EngineError(f"{name}: in {precision} it is at {fidelity:.1f} dB to fp32, below {FLOOR_DB:g} dB")
    return fidelity


def check_engine(engine: Engine, reference: Engine, graph: GraphSpec, precision: Precision, rows: int) -> None:
    """Hold an engine on a graph in a precision to one in fp32, so many rows at a time.

    Raises EngineError as `check_fidelity` does, and as either engine.
    """
    for inputs in (typical_inputs(graph, 1), *checked_inputs(graph)):
        check_fidelity(graph.path.name, precision, _run_by(rows, engine, inputs), _run_by(rows, reference, inputs))


def _run_by(rows: int, engine: Engine, inputs: Mapping[str, Array]) -> list[Array]:
    batch = len(next(iter(inputs.values())))
    parts = [
        engine.run({name: array[start : start + rows] for name, array in inputs.items()})
        for start in range(0, batch, rows)
    ]
    return [np.concatenate([part[name] for part in parts]) for name in parts[0]]


def fidelity_db(actual: Array, expected: Array) -> float:
    """The peak signal-to-noise ratio, the peak being the range of what is expected; -inf where values are not finite.

    It is the worse of that of all values and that of all but their outermost hundredths: in the range of a few outliers
    the loss of all else would be nothing.
    """
    if not np.isfinite(actual).all():
        return -math.inf
    squares = np.square(actual.astype(np.float64) - expected)
    low, high = (float(value) for value in np.percentile(expected, (1, 99), method="nearest"))
    inner = squares[(low <= expected) & (expected <= high)]
    peak = float(np.ptp(expected)) or 1.0
    return min(psnr_db(float(squares.mean()), peak), psnr_db(float(inner.mean()), high - low or peak))


def checked_inputs(graph: GraphSpec) -> list[dict[str, Array]]:
    """Batches of `CHECKED_ROWS` at the ends of what a service may ask of a graph: one for each w, the largest last.

    The rows of a step are at the first and the last place where it is called, and go to the end of its path at once:
    then z_next is what the network predicts, and no part of z hides it. They have the first and the last class, and the
    first text ends in the last id of its tokenizer. Raises EngineError as `typical_inputs` does.
    """
    inputs = typical_inputs(graph, CHECKED_ROWS)
    *called, (_, alpha_next, sigma_next) = graph.places
    time, alpha, sigma = np.array(called).T
    ends = {
        **{"time": time, "alpha": alpha, "sigma": sigma},
        **{"alpha_next": np.full(CHECKED_ROWS, alpha_next), "sigma_next": np.full(CHECKED_ROWS, sigma_next)},
        LABEL: np.array([0, graph.classes - 1]),
    }
    for name in inputs.keys() & {IDS, SECOND_IDS}:
        inputs[name][0, -1] = _vocabulary(graph, name) - 1
    inputs |= {name: ends[name].astype(inputs[name].dtype) for name in inputs.keys() & ends.keys()}
    if "guidance" not in inputs:
        return [inputs]
    return [inputs | {"guidance": np.full(CHECKED_ROWS, w, np.float32)} for w in graph.guidance]


def asked_of(graph: GraphSpec) -> str:
    """What is asked of a graph, as plans are keyed by it: the shapes, dtypes and values of `checked_inputs`, hashed."""
    digest = hashlib.sha256()
    for inputs in checked_inputs(graph):
        for name, array in sorted(inputs.items()):
            digest.update(f"{name} {array.dtype} {array.shape} ".encode() + array.tobytes())
    return digest.hexdigest()


def typical_inputs(graph: GraphSpec, batch: int) -> dict[str, Array]:
    """Inputs as a service gives them: noise at different places of a variance-preserving grid, w of 0 and more.

    Classes come in turn; of texts, the first is as long as any, and the last a quarter of that. Raises EngineError for
    a tokenizer that cannot be read or has no tokens.
    """
    generator = np.random.default_rng(0)
    time = np.linspace(1, 0.25, batch, dtype=np.float32)
    alpha, sigma = np.cos(time * np.pi / 2), np.sin(time * np.pi / 2)
    scalars = {
        "time": time,
        "alpha": alpha,
        "sigma": sigma,
        "alpha_next": np.cos(time * np.pi / 4),
        "sigma_next": np.sin(time * np.pi / 4),
        "guidance": np.arange(batch, dtype=np.float32),
    }
    inputs: dict[str, Array] = {}
    for spec in graph.inputs:
        shape = spec.sized(batch)
        if spec.name in scalars:
            inputs[spec.name] = scalars[spec.name].astype(np.float32)
        elif spec.name == "keep":
            inputs[spec.name] = np.zeros(shape, np.float32)
        elif spec.name == LABEL:
            inputs[spec.name] = np.arange(batch, dtype=spec.dtype) % graph.classes
        elif spec.name == ATTENTION_MASK:
            lengths = np.ceil(np.linspace(1, 0.25, batch) * shape[1])
            inputs[spec.name] = (np.arange(shape[1]) < lengths[:, None]).astype(spec.dtype)
        elif spec.dtype == "float32":
            inputs[spec.name] = generator.standard_normal(shape, np.float32)
        else:
            inputs[spec.name] = generator.integers(0, _vocabulary(graph, spec.name), shape, spec.dtype)
    return inputs


def _vocabulary(graph: GraphSpec, name: str) -> int:
    """How many ids there are for an input of a text graph; 2 where its tokenizer is not known."""
    if not graph.tokenizers:
        return 2
    try:
        size = vocabulary_size(graph.tokenizers[-1 if name == SECOND_IDS else 0])
    except TokenizerError as error:
        raise EngineError(str(error)) from error
    if not size:
        raise EngineError(f"{graph.path.name}: its tokenizer has no tokens")
    return size
