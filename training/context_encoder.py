"""MiniLM's token states as context. Students that were trained on it carry this file; it imports nothing of fewstep."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import BertConfig, BertModel


class ContextEncoder(BertModel):  # type: ignore[misc]  # transformers exports it as Any
    """A BERT whose token states are normalised per token, and zero where there is no token.

    A few of MiniLM's states are large outliers; the normalisation bounds every token's state to length sqrt(D).
    """

    def __init__(self, config: BertConfig) -> None:
        """`config` is that of the BERT; diffusers' pipelines read there that they are to pass the mask."""
        config.use_attention_mask = True
        super().__init__(config)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        """Context (B, L, D) of token ids and mask (B, L)."""
        states = super().forward(input_ids=input_ids, attention_mask=attention_mask, return_dict=False)[0]
        return (nn.functional.layer_norm(states, states.shape[-1:]) * attention_mask[..., None].to(states),)
