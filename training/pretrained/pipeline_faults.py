"""Why a pipeline cannot be a teacher: the error that says so, and what may be wrong with its network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class TeacherError(Exception):
    """A pipeline that cannot be a teacher; the message says why."""


def first_line(error: Exception) -> str:
    """The first line of what an error says; its kind where it says nothing."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def network_faults(config: Mapping[str, Any], text: bool, part: str) -> list[tuple[bool, str]]:
    """What may be wrong with a network, and how it is said."""
    channels, out = config["in_channels"], config.get("out_channels") or config["in_channels"]
    embedded = config.get("class_embed_type")
    added = config.get("addition_embed_type")
    faults = [
        (config.get("time_cond_proj_dim") is not None, "it takes the guidance weight as an input: it is a student"),
        (embedded is not None, f"classes embedded by {embedded!r} are not known"),
        (added not in (None, "text", "text_time"), f"conditions added by {added!r} are not known"),
        (
            config.get("encoder_hid_dim_type") not in (None, "text_proj"),
            f"{config.get('encoder_hid_dim_type')!r} before the cross-attention is not known",
        ),
        (config.get("time_embedding_type", "positional") != "positional", "its time embedding is not positional"),
        (bool(config.get("center_input_sample")), "it centres its input, which is not known"),
        (
            bool(config.get("dual_cross_attention")),
            "it attends to two contexts (dual_cross_attention), which is not known",
        ),
    ]
    blocks = [
        *config.get("down_block_types", ()),
        *config.get("up_block_types", ()),
        config.get("mid_block_type") or "",
    ]
    if not text and config.get("_class_name") == "UNet2DConditionModel":
        takes_text = added == "text" or config.get("encoder_hid_dim") is not None
        attends = any("CrossAttn" in block for block in blocks)
        faults.append((attends or takes_text, "it attends to a text that classes do not give"))
    if text:
        fits = channels in (out, 2 * out + 1)
        faults += [
            (not fits, f"a network of {channels} channels in and {out} out is neither text-to-image nor inpainting"),
            (bool(config.get("num_class_embeds")), "it takes text and classes at once, which is not known"),
        ]
    else:
        fits = out in (channels, 2 * channels) if part == "transformer" else out == channels
        faults.append((not fits, f"a network of {channels} channels in and {out} out is not known"))
    return faults
