"""Random numbers that depend on where they are used, not on when or by which process they are drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import torch
from torch import Generator, Tensor

BLOCK_ROWS = 64

# The streams of `generator_at`. Two have one number where what they give never meets: a permutation and a noise, or
# places of another kind. Their numbers stay as they are, as runs are repeated by them.
ORDER_STREAM = 1
"""The order of items, or of shards, in each epoch; by the seed of a stage."""
IMAGES_STREAM = 4
"""The images by which an autoencoder's scale is measured; by the seed of the run."""
DRAWS_STREAM = 5
"""What each row of an update draws; by the seed of a stage, at an update and a block of rows."""
ITEMS_STREAM = 5
"""The order of items in each window of shards; by the seed of a stage, at a window."""
VALIDATION_STREAM = 6
"""The noise by which rounds are compared; by the seed of the run."""
NOISE_STREAM = 4
"""The noise that each image of an evaluation begins with; by the seed of the evaluation, at an image."""
ADDED_NOISE_STREAM = 7
"""The noise that the stochastic sampler adds in an evaluation; by its seed, at a batch."""


def stage_seed(seed: int, stage: str) -> int:
    """The seed of one stage of a run, so that no two stages draw the same numbers."""
    return int.from_bytes(hashlib.sha256(f"{seed} {stage}".encode()).digest()[:7])


def generator_at(seed: int, place: int, stream: int = 0) -> Generator:
    """The generator of one place, such as an update. Distinct (seed, place, stream) give independent streams."""
    return _generator(seed, stream, place)


def _generator(seed: int, *key: int) -> Generator:
    (mixed,) = np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)
    return Generator().manual_seed(int(mixed) >> 1)


class Draws:
    """The random numbers of some rows of one update's batch.

    Each block of rows has its own generator, so a row's numbers do not depend on how the batch is split among
    processes or in time: as long as the same draws are made in the same order, row i gets the same ones.
    """

    def __init__(self, seed: int, update: int, rows: range) -> None:
        """`rows` are consecutive places in the whole batch."""
        self.rows = rows
        first, last = rows.start // BLOCK_ROWS, (rows.stop - 1) // BLOCK_ROWS
        self._offset = rows.start - first * BLOCK_ROWS
        self._generators = [_generator(seed, DRAWS_STREAM, update, block) for block in range(first, last + 1)]

    def of(self, whole: Tensor) -> Tensor:
        """These rows of what the whole batch has (batch_size, *)."""
        return whole[self.rows.start : self.rows.stop]

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.rows)

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal numbers of the shape (rows, *), type and device of `like`."""
        return self._draw(lambda generator: torch.randn(BLOCK_ROWS, *like.shape[1:], generator=generator)).to(like)

    def uniform(self) -> Tensor:
        """Numbers of [0, 1), (rows,) in float64 on the CPU."""
        return self._draw(lambda generator: torch.rand(BLOCK_ROWS, generator=generator, dtype=torch.float64))

    def integers(self, count: int) -> Tensor:
        """Numbers of 0..count - 1, (rows,) in int64 on the CPU."""
        return (self.uniform() * count).long()

    def _draw(self, block: Callable[[Generator], Tensor]) -> Tensor:
        drawn = torch.cat([block(generator) for generator in self._generators])
        return drawn[self._offset : self._offset + len(self.rows)]
