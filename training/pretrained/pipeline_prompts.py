"""The text encoders of Stable Diffusion pipelines, as prompt encoders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.tokenization_utils_base import LARGE_INTEGER

from training.guidance import Condition
from training.pretrained.pipeline_faults import TeacherError, first_line
from training.prompts import TextGraph, Tokens

_TRIED = ("a photo of a red apple", "two dogs")


class PipelinePrompts:
    """The text encoders of a Stable Diffusion pipeline as a PromptEncoder, by the pipeline's own `encode_prompt`.

    `context` (N, L, D), and `pooled` (N, P) for SDXL. Loaded when first used.
    """

    def __init__(self, folder: Path, identity: str, load: Callable[[], Any]) -> None:
        """`load` gives the pipeline in `folder` without its network."""
        self.folder, self.identity, self._load_pipeline = folder, identity, load

    @cached_property
    def _pipeline(self) -> Any:
        pipeline = self._load_pipeline()
        for part in ("tokenizer", "tokenizer_2"):
            if getattr(getattr(pipeline, part, None), "model_max_length", 0) > LARGE_INTEGER:
                raise TeacherError(f"{self.folder}: its {part} names no model_max_length")
        return pipeline

    @cached_property
    def null(self) -> Condition:
        """What the pipeline itself guides away from. Encoders that are loaded for it alone are let go of."""
        others_need_it = "_pipeline" in self.__dict__
        _, context, *more = self._encoded(["a"], null=True)
        if not others_need_it:
            self.release()
        return {name: rows[0] for name, rows in _named([context, *more[1:]]).items()}

    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Context, and pooled text, of captions."""
        return _named(self._encoded(captions, null=False)[0::2])

    def release(self) -> None:
        """Let go of the encoders until they are needed again."""
        self.__dict__.pop("_pipeline", None)

    def too_long(self, captions: Sequence[str]) -> int:
        """How many of the captions have more tokens than the encoder takes."""
        tokenizer = self._pipeline.tokenizer or self._pipeline.tokenizer_2
        return sum(len(tokenizer(caption).input_ids) > tokenizer.model_max_length for caption in captions)

    def text_graph(self) -> TextGraph:
        """The text encoder, or both, and their tokenizers.

        Raises TeacherError where these read prompts as no bundle can.
        """
        pipeline = self._pipeline
        tokens, length = self._tokens(pipeline.tokenizer), pipeline.tokenizer.model_max_length
        second = getattr(pipeline, "text_encoder_2", None)
        if second is None:
            module = ContextGraph(pipeline.text_encoder.cpu(), tokens.pad_id)
            return TextGraph(module.eval(), length, (tokens,))
        pair = PairGraph(pipeline.text_encoder.cpu(), second.cpu(), tokens.pad_id)
        return TextGraph(pair.eval(), length, (tokens, self._tokens(pipeline.tokenizer_2)), ("context", "pooled"))

    def _tokens(self, tokenizer: Any) -> Tokens:
        added = tokenizer.added_tokens_encoder
        several = [token for token in added if f"{token}_1" in added]
        for wrong, reason in (
            (bool(several), f"reads {min(several, default='')} as several tokens (textual inversion)"),
            (tokenizer.padding_side != "right", f"pads prompts on the {tokenizer.padding_side}"),
        ):
            if wrong:
                raise TeacherError(
                    f"{self.folder}: its tokenizer {reason}, which a bundle's does not: run its students with diffusers"
                )
        return Tokens(tokenizer.backend_tokenizer.to_str(), tokenizer.pad_token_id)

    @torch.no_grad()
    def _encoded(self, captions: Sequence[str], *, null: bool) -> Sequence[Tensor]:
        """Context and its null, and for SDXL pooled text and its null. Raises TeacherError if it cannot be had."""
        pipeline = self._pipeline
        try:
            found: Sequence[Tensor] = pipeline.encode_prompt(
                prompt=list(captions), device=pipeline.device, num_images_per_prompt=1, do_classifier_free_guidance=null
            )
        except Exception as error:  # whatever tokenizers that do not fit their encoders make the libraries raise
            raise TeacherError(f"{self.folder}: its text encoders take no prompts: {first_line(error)}") from error
        return found


def _named(arrays: Sequence[Tensor]) -> dict[str, Tensor]:
    return {name: rows.float().cpu() for name, rows in zip(("context", "pooled"), arrays, strict=False)}


def same_text(one: PipelinePrompts, other: PipelinePrompts) -> bool:
    """Whether the encoders of two pipelines are the same, or make the same of a few prompts, but for rounding."""
    if one.identity == other.identity:
        return True
    ours, theirs = ([prompts.null, prompts.encode(_TRIED)] for prompts in (one, other))
    for prompts in (one, other):
        prompts.release()
    return all(
        a.keys() == b.keys() and all(a[name].shape == b[name].shape and _near(a[name], b[name]) for name in a)
        for a, b in zip(ours, theirs, strict=True)
    )


def _near(a: Tensor, b: Tensor) -> bool:
    return float((a - b).norm()) <= 0.05 * float(b.norm())


class ContextGraph(nn.Module):
    """Context of (input_ids, attention_mask) as the pipeline makes it: padding is attended to, if by its own token."""

    def __init__(self, encoder: nn.Module, pad_id: int) -> None:
        super().__init__()
        self.encoder, self.pad_id = encoder, pad_id
        self.masks = bool(getattr(encoder.config, "use_attention_mask", False))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Context (B, L, D) of ids and mask (B, L)."""
        padded = torch.where(attention_mask > 0, input_ids, self.pad_id)
        context: Tensor = self.encoder(padded, attention_mask=attention_mask if self.masks else None)[0]
        return context


class PairGraph(nn.Module):
    """Context and pooled text of (input_ids, attention_mask, input_ids_2), as SDXL's pipeline makes them.

    The context is what both encoders have before their last layer, side by side. The first one that projects pools:
    the second, as a rule.
    """

    def __init__(self, encoder: nn.Module, second: nn.Module, pad_id: int) -> None:
        super().__init__()
        self.encoder, self.second, self.pad_id = encoder, second, pad_id

    def forward(self, input_ids: Tensor, attention_mask: Tensor, input_ids_2: Tensor) -> tuple[Tensor, Tensor]:
        """Context (B, L, D) and pooled text (B, P) of ids and mask (B, L)."""
        padded = torch.where(attention_mask > 0, input_ids, self.pad_id)
        first = self.encoder(padded, output_hidden_states=True)
        second = self.second(input_ids_2, output_hidden_states=True)
        pooled = first[0] if first[0].ndim == 2 else second[0]
        return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), pooled
