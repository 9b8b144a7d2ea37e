"""How well images show what their prompts say, by a CLIP model in a local folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import CLIPModel, CLIPProcessor

from engines.hashes import sha256_of
from training.evaluation.features import BATCH_IMAGES, FeatureError, Pixels
from training.store import hash_of


class ClipScorer:
    """CLIPScore (Hessel et al. 2021) of image and prompt: 100 max(cos, 0), the scale that is usual for generators."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        """Load a transformers folder of CLIPModel and CLIPProcessor. Raises FeatureError if it is not one."""
        try:
            model, read = CLIPModel.from_pretrained(folder, local_files_only=True, output_loading_info=True)
            self._processor: Any = CLIPProcessor.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # whatever torn files make the libraries raise
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise FeatureError(f"{folder} holds no CLIP model and processor: {reason}") from error
        if lacking := sorted(read["missing_keys"]):  # which have random values
            raise FeatureError(f"{folder} holds no whole CLIP model: its weights lack {lacking[0]}")
        self.device, self._model = device, model.float().to(device).eval().requires_grad_(False)
        self._tokens = model.config.text_config.max_position_embeddings
        # The processor and its tokenizer have a part in the score too.
        hashes = {file.name: sha256_of(file) for file in sorted(folder.iterdir()) if file.is_file()}
        self.identity = f"CLIP of {folder.resolve().name}, files {hash_of(hashes)[:12]}"

    def __call__(self, images: Pixels, prompts: Sequence[str]) -> NDArray[np.float32]:
        """Scores (N,) in 0..100 of images (N, H, W, 3) and their N prompts, which are cut at CLIP's length."""
        scores = np.empty(len(images), np.float32)
        starts = range(0, len(images), BATCH_IMAGES)
        for start in tqdm(starts, desc="CLIP", unit="batch", leave=False, delay=2, disable=None):
            rows = slice(start, start + BATCH_IMAGES)
            scores[rows] = self._batch(images[rows], prompts[rows])
        return scores

    @torch.inference_mode()
    def _batch(self, images: Pixels, prompts: Sequence[str]) -> NDArray[np.float32]:
        inputs = self._processor(
            text=list(prompts),
            images=list(images),
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=self._tokens,
        )
        embeddings = self._model(**inputs.to(self.device))
        cosine = torch.cosine_similarity(embeddings.image_embeds, embeddings.text_embeds)
        scores: NDArray[np.float32] = (100 * cosine.clamp(min=0)).float().cpu().numpy()
        return scores
