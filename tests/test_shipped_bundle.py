"""The bundle that ships: whole, small, and drawing what it is asked for."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from engines.bundle import load_bundle, shipped_bundle
from engines.pipeline import Edit, Generate, Inpaint, Pipeline, TaskError

SEEDS = range(6)
CHANNELS = {"red heart": 0, "green heart": 1, "blue heart": 2}


@pytest.fixture(scope="module")
def pipeline() -> Iterator[Pipeline]:
    with Pipeline.open(shipped_bundle()) as opened:
        yield opened


def colour(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    """How much more of each channel the drawing has than of the others on average, its white ground left out."""
    ink = 255 - image.min(axis=2).astype(float)
    mean: NDArray[np.float64] = (image * ink[..., None]).sum((0, 1)) / ink.sum()
    return mean - mean.mean()


def draw(pipeline: Pipeline, prompt: str, steps: int, w: float) -> list[NDArray[np.uint8]]:
    return pipeline.run([Generate(prompt, steps, w, seed) for seed in SEEDS])


def test_it_is_whole_small_and_says_whom_it_owes() -> None:
    bundle = load_bundle(shipped_bundle())
    assert sum(file.stat().st_size for file in bundle.path.iterdir()) <= 60e6
    assert {attribution.licence for attribution in bundle.manifest.attributions} >= {"Apache-2.0", "MIT", "CC-BY-4.0"}
    assert bundle.manifest.provenance.quality_table in (bundle.path / "README.md").read_text()
    assert "teacher | 50" in bundle.manifest.provenance.quality_table


@pytest.mark.parametrize(
    ("prompt", "code"),
    [("\u200b", "empty_prompt"), ("\0", "empty_prompt"), ("\u0301", "empty_prompt"), ("\U0001f34e", "unknown_words")],
)
def test_a_prompt_that_says_nothing_to_it_is_refused(pipeline: Pipeline, prompt: str, code: str) -> None:
    with pytest.raises(TaskError) as caught:
        pipeline.validate(Generate(prompt, 4, 2.0, seed=0))
    assert caught.value.code == code


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("prompt", list(CHANNELS))
def test_it_draws_the_colour_it_is_asked_for(pipeline: Pipeline, prompt: str, steps: int) -> None:
    margins = np.mean([colour(image) for image in draw(pipeline, prompt, steps, 2.0)], axis=0)
    assert int(margins.argmax()) == CHANNELS[prompt], margins


def test_more_guidance_moves_the_image_towards_the_prompt(pipeline: Pipeline) -> None:
    def margin(w: float) -> float:
        drawn = {prompt: draw(pipeline, prompt, 4, w) for prompt in CHANNELS}
        return float(np.mean([colour(image)[CHANNELS[prompt]] for prompt in drawn for image in drawn[prompt]]))

    assert margin(4.0) > margin(0.0)


def test_the_seed_makes_the_image_alone_and_in_company(pipeline: Pipeline) -> None:
    alone = pipeline.run([Generate("dog", 4, 2.0, seed=5)])[0].astype(int)
    blank = np.full((*pipeline.manifest.image_shape[1:], 3), 255, np.uint8)
    repaint = np.zeros(blank.shape[:2], bool)
    repaint[:16] = True
    company = pipeline.run(
        [
            Edit("cat", 4, 1.0, seed=1, image=blank, strength=0.5),
            Generate("dog", 4, 2.0, seed=5),
            Inpaint("sun", 4, 3.0, seed=2, image=blank, repaint=repaint),
            Generate("dog", 4, 2.0, seed=6),
        ]
    )
    assert np.abs(company[1] - alone).max() <= 2
    assert np.abs(company[3] - alone).max() > 2
    assert (company[2][16:] == 255).all()
