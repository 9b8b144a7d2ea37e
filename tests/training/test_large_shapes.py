"""Graphs with the proportions of Stable Diffusion and SDXL at a tenth of their width: exported, cast, compiled."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from engines.backends.base import EngineError, GraphSpec, TensorSpec
from engines.backends.trt_library import Library, build_plan, find_library
from engines.compile import prepare
from engines.plans import Precision, Profile
from training import networks
from training.diffusion import Schedule
from training.exporting.graphs import Example, StepGraph, export_graph, named_outputs
from training.guidance import Condition
from training.networks import NetworkDenoiser, student_from
from training.pretrained.pipeline_prompts import ContextGraph, PairGraph

LATENT, TOKENS = 16, 77
IDS = ("input_ids", "attention_mask", "input_ids_2")
PROFILE = Profile((1, 4), dynamic=True)
GRAPHS = ("sd-step", "sd-text", "sd-encode", "sd-decode", "sdxl-step", "sdxl-text", "inpainting-step")
"""SDXL's autoencoder has Stable Diffusion's shape."""


class Encoder(nn.Module):
    def __init__(self, autoencoder: AutoencoderKL) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return networks.encode(self.autoencoder, image)


class Decoder(nn.Module):
    def __init__(self, autoencoder: AutoencoderKL) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        return networks.decode(self.autoencoder, latent)


def text(width: int, layers: int, kind: Any = CLIPTextModel) -> nn.Module:
    """CLIP's text encoder at an eighth of its width."""
    config = CLIPTextConfig(
        vocab_size=4096, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=width // 8, max_position_embeddings=TOKENS, projection_dim=width,
        bos_token_id=4094, eos_token_id=4095,
    )  # fmt: skip
    made: nn.Module = kind._from_config(config, attn_implementation="eager").eval()
    return made


def prompts(batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, their mask and ids again, of prompts of several lengths."""
    lengths = 2 + torch.arange(batch)[:, None] % (TOKENS - 1)
    places = torch.arange(TOKENS).expand(batch, TOKENS)
    ids = torch.randint(0, 4095, (batch, TOKENS)).where(places < lengths - 1, 4095)
    return ids, (places < lengths).long(), ids.where(places < lengths, 0)


def unet(**changes: Any) -> UNet2DConditionModel:
    settings: dict[str, Any] = {
        "sample_size": LATENT, "block_out_channels": (32, 64, 128, 128), "cross_attention_dim": 96,
        "attention_head_dim": 8, "layers_per_block": 2, "norm_num_groups": 8,
    }  # fmt: skip
    return UNet2DConditionModel(**settings | changes)


def sdxl_unet() -> UNet2DConditionModel:
    return unet(
        block_out_channels=(32, 64, 128), cross_attention_dim=96 + 160, attention_head_dim=(2, 4, 8),
        transformer_layers_per_block=(1, 2, 10), addition_embed_type="text_time", addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=160 + 6 * 32, use_linear_projection=True,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 32, 64, 64), layers_per_block=2, latent_channels=4, norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    ).eval()  # fmt: skip


def step(
    network: UNet2DConditionModel, conditions: dict[str, tuple[int, ...]], constants: Condition | None = None
) -> tuple[StepGraph, Example]:
    student = student_from(NetworkDenoiser(network.eval(), Schedule.scaled_linear(), "eps"))
    graph = StepGraph(student.eval(), tuple(conditions), constants=constants)

    def make(batch: int) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(batch)
        latent, angle = (4, LATENT, LATENT), torch.linspace(0.2, 1.5, batch)
        shapes = {"z": latent, "known": latent, "noise": latent, **conditions}
        arrays = {name: torch.randn(batch, *shape, generator=generator) for name, shape in shapes.items()}
        scalars = {"time": angle / 1.6, "alpha": angle.cos(), "sigma": angle.sin(), "guidance": angle * 2}
        scalars |= {"alpha_next": (angle / 2).cos(), "sigma_next": (angle / 2).sin()}
        keep = torch.zeros(batch, 1, LATENT, LATENT)
        return tuple({**arrays, **scalars, "keep": keep}[name] for name in graph.input_names)

    return graph, Example(make, graph.input_names, ("z_next",))


def made(name: str) -> tuple[nn.Module, Example]:
    torch.manual_seed(0)
    if name == "sd-step":
        return step(unet(), {"context": (TOKENS, 96)})
    if name == "inpainting-step":
        seen = {"mask": (1, LATENT, LATENT), "masked": (4, LATENT, LATENT)}
        return step(unet(in_channels=9, out_channels=4), {"context": (TOKENS, 96), **seen})
    if name == "sdxl-step":
        size = torch.tensor([1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0])
        return step(sdxl_unet(), {"context": (TOKENS, 96 + 160), "pooled": (160,)}, {"size": size})
    if name == "sd-text":
        return ContextGraph(text(96, 12), 4095), Example(lambda b: prompts(b)[:2], IDS[:2], ("context",))
    if name == "sdxl-text":
        pair = PairGraph(text(96, 12), text(160, 32, CLIPTextModelWithProjection), 4095)
        return pair, Example(prompts, IDS, ("context", "pooled"))
    shape = (3, 8 * LATENT, 8 * LATENT) if name == "sd-encode" else (4, LATENT, LATENT)
    module, given, output = {"sd-encode": (Encoder, "image", "latent"), "sd-decode": (Decoder, "latent", "image")}[name]
    return module(autoencoder()), Example(lambda batch: (torch.randn(batch, *shape),), (given,), (output,))


@pytest.fixture(scope="module")
def graph_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], GraphSpec]:
    """The graph of a name, exported when first asked for."""
    folder = tmp_path_factory.mktemp("large")

    @cache
    def graph(name: str) -> GraphSpec:
        module, example = made(name)
        with torch.inference_mode():
            outputs = named_outputs(module, example.at(1), example.output_names)
        export_graph(module, example, folder / f"{name}.onnx", ("fp16",))
        inputs = zip(example.input_names, example.at(1), strict=True)
        given, gives = (tuple(spec(*pair) for pair in pairs) for pairs in (inputs, outputs.items()))
        return GraphSpec(name.partition("-")[2], folder / f"{name}.onnx", given, gives)  # type: ignore[arg-type]

    return graph


def spec(name: str, array: torch.Tensor) -> TensorSpec:
    dtype = "float32" if array.is_floating_point() else "int64"
    return TensorSpec(name=name, dtype=dtype, shape=("batch", *array.shape[1:]))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def library() -> Library:
    try:
        found = find_library()
    except EngineError as error:
        pytest.skip(str(error))
    if not found.is_rtx:
        pytest.skip(f"{found.name} compiles for the chip that is there only")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("target", ["sm86", "sm89", "sm120"])
@pytest.mark.parametrize("name", GRAPHS)
def test_it_builds(
    graph_of: Callable[[str], GraphSpec], library: Library, name: str, target: str, precision: Precision, tmp_path: Path
) -> None:
    graph = graph_of(name)
    prepared, fidelity = prepare(graph, precision, tmp_path)
    assert len(build_plan(library, prepared, graph.inputs, PROFILE, target)) > 1e5
    print(f"{name}, {target}, {precision}: {fidelity}")
