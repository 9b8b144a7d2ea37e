"""The CLIP score: its formula, on a CLIP of random weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPProcessor

from tests.training.small_models import CLIP_TOKENS, write_clip
from training.evaluation import clip_score
from training.evaluation.clip_score import ClipScorer
from training.evaluation.features import FeatureError, Pixels

CPU = torch.device("cpu")
SEED = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("models") / "tiny-clip", seed=SEED)


def pictures(count: int) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (count, 10, 10, 3), np.uint8)


def test_a_score_is_a_hundred_times_the_cosine_of_the_embeddings_and_not_below_zero(folder: Path) -> None:
    images, prompts = pictures(6), ["a", "red", "cat", "sun", "moon", "tree"]
    model, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
    expected = []
    for image, prompt in zip(images, prompts, strict=True):
        inputs = processor(text=[prompt], images=[image], return_tensors="pt")
        with torch.inference_mode():
            expected.append(float(model(**inputs).logits_per_image / model.logit_scale.exp()))
    scores = ClipScorer(folder, CPU)(images, prompts)
    assert scores == pytest.approx([100 * max(cosine, 0) for cosine in expected], abs=1e-3)
    assert min(expected) < 0 < max(expected)


def test_the_score_of_an_image_does_not_depend_on_its_company(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, prompts = pictures(7), ["owl", "fox", "a bee", "ant", "elk", "cow", "pig"]
    scorer = ClipScorer(folder, CPU)
    together = scorer(images, prompts)
    monkeypatch.setattr(clip_score, "BATCH_IMAGES", 3)
    assert scorer(images, prompts) == pytest.approx(together, abs=1e-3)
    assert scorer(images, prompts[::-1]) != pytest.approx(together, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_are_computed_in_fp32_whatever_is_stored(folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    shutil.copytree(folder, tmp_path / "half")
    CLIPModel.from_pretrained(folder).to(dtype).save_pretrained(tmp_path / "half")
    shutil.copytree(tmp_path / "half", tmp_path / "whole")
    CLIPModel.from_pretrained(tmp_path / "half").float().save_pretrained(tmp_path / "whole")
    images, prompts = pictures(6), ["a", "red", "cat", "sun", "moon", "tree"]
    half, whole = (ClipScorer(tmp_path / name, CPU)(images, prompts) for name in ("half", "whole"))
    np.testing.assert_array_equal(half, whole)


def test_a_clip_that_lacks_weights_or_is_damaged_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "clip")
    weights = tmp_path / "clip" / "model.safetensors"
    values = load_file(weights)
    save_file({name: v for name, v in values.items() if not name.startswith("vision_model")}, weights, {"format": "pt"})
    with pytest.raises(FeatureError, match="no whole CLIP model: its weights lack vision_model"):
        ClipScorer(tmp_path / "clip", CPU)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(FeatureError, match="holds no CLIP model and processor: "):
        ClipScorer(tmp_path / "clip", CPU)


def test_prompts_are_cut_at_the_length_that_clip_reads(folder: Path) -> None:
    scorer = ClipScorer(folder, CPU)
    long = "x" * CLIP_TOKENS
    images = np.repeat(pictures(1), 3, axis=0)
    first, second, other = scorer(images, [long + "ab", long + "yz", "y" + long])
    assert first == pytest.approx(second, abs=1e-3)
    assert first != pytest.approx(other, abs=1e-3)


def test_other_weights_or_another_processor_are_another_identity(folder: Path, tmp_path: Path) -> None:
    identity = ClipScorer(folder, CPU).identity
    assert "tiny-clip" in identity
    assert ClipScorer(write_clip(tmp_path / "tiny-clip", SEED), CPU).identity == identity
    assert ClipScorer(write_clip(tmp_path / "tiny-clip", seed=1), CPU).identity != identity
    config = write_clip(tmp_path / "tiny-clip", SEED) / "processor_config.json"
    config.write_text(config.read_text().replace("0.48145466", "0.5"))
    assert ClipScorer(tmp_path / "tiny-clip", CPU).identity != identity


def test_a_folder_without_a_clip_model_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(FeatureError, match="holds no CLIP model and processor") as caught:
        ClipScorer(tmp_path, CPU)
    assert "\n" not in str(caught.value)
