"""Safety checks for the tests, as an operator's own module would have them."""

from __future__ import annotations

import asyncio
import sys

import numpy as np
from numpy.typing import NDArray

seen: list[tuple[str, NDArray[np.uint8] | None]] = []

NOT_A_CHECK = "text"


def refuse_dogs(prompt: str, image: NDArray[np.uint8] | None) -> str | None:
    """Takes note of everything, and refuses prompts of dogs."""
    seen.append((prompt, image))
    return "no dogs" if "dog" in prompt else None


def refuse_images(prompt: str, image: NDArray[np.uint8] | None) -> str | None:
    """Refuses every image, and no prompt."""
    return None if image is None else "no images"


def refuse_images_badly(prompt: str, image: NDArray[np.uint8] | None) -> str | None:
    """Refuses every image, in text that no UTF-8 has."""
    return None if image is None else "no \ud800 images"


def refuse_everything(prompt: str, image: NDArray[np.uint8] | None) -> str | None:
    """Refuses every prompt and every image."""
    return "nothing is let through"


def fail_on_prompts(prompt: str, image: NDArray[np.uint8] | None) -> str | None:
    """Breaks before anything is made."""
    raise RuntimeError(f"cannot judge {prompt}")


def fail_to_ask(prompt: str, image: NDArray[np.uint8] | None) -> str | None:
    """Cannot reach whom it asks."""
    raise ConnectionError(f"nobody answers at http://127.0.0.1:9/judge?prompt={prompt}")


def fail_on_images(prompt: str, image: NDArray[np.uint8] | None) -> str | None:
    """Breaks when something is made."""
    if image is not None:
        raise RuntimeError("cannot judge")
    return None


def give_up_on_prompts(prompt: str, image: NDArray[np.uint8] | None) -> str | None:
    """Ends as one that awaits somebody does when that is cancelled."""
    raise asyncio.CancelledError


def exit_on_images(prompt: str, image: NDArray[np.uint8] | None) -> str | None:
    """Ends as a program does."""
    return None if image is None else sys.exit(3)


def forget_to_answer(prompt: str, image: NDArray[np.uint8] | None) -> bool:
    """Answers True where a reason is expected; it must not be taken for consent."""
    return image is not None
