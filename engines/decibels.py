"""One measure of how far numbers are from others, for steps and for images."""

from __future__ import annotations

import math


def psnr_db(mean_square: float, peak: float = 1.0) -> float:
    """The peak signal-to-noise ratio in decibels of a mean square error; infinite where there is none."""
    return 20 * math.log10(peak) - 10 * math.log10(mean_square) if mean_square > 0 else math.inf
