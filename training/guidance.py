"""Classifier-free guidance: two predictions made one. w is the paper's weight; w = 0 is no guidance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from training.diffusion import expand

Condition = Mapping[str, Tensor]


class Denoiser(Protocol):
    """Predicts v with shape (B, *) from z (B, *), times t (B,) in [0, 1], a condition and, if a student, w (B,)."""

    def __call__(self, z: Tensor, t: Tensor, condition: Condition, w: Tensor) -> Tensor:
        """Return v, of the shape of `z`."""
        ...


def guided(conditional: Tensor, unconditional: Tensor, w: Tensor) -> Tensor:
    """(1 + w) conditional - w unconditional, with w of shape (B,) (Ho & Salimans 2022; Meng et al. 2023, section 3.1).

    v, eps and x are affine in one another at fixed z_t, so guiding any of them guides them all.
    """
    w = expand(w, conditional)
    return (1 + w) * conditional - w * unconditional


class GuidedTeacher:
    """A Denoiser made of a conditional and an unconditional one; the latter sees the null condition.

    One network with a null condition is given as both.
    """

    def __init__(self, conditional: Denoiser, unconditional: Denoiser, null: Condition) -> None:
        """`null` holds the null condition of one row: each array without its batch dimension.

        What it does not name, such as the mask of an inpainting network, the unconditional one sees as it is.
        """
        self.conditional, self.unconditional, self.null = conditional, unconditional, null

    def __call__(self, z: Tensor, t: Tensor, condition: Condition, w: Tensor) -> Tensor:
        """The guided v."""
        null = {**condition, **{name: of_rows(value, z) for name, value in self.null.items()}}
        return guided(self.conditional(z, t, condition, w), self.unconditional(z, t, null, w), w)


def of_rows(value: Tensor, like: Tensor) -> Tensor:
    """The value of one row for each row of `like` (B, *), on its device."""
    return value.to(like.device).expand(like.shape[0], *value.shape)  # a length would be fixed by a trace
