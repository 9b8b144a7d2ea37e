"""The text encoders of pipelines: what they give of prompts, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from tests import pipelines
from training.exporting.graphs import ExportError
from training.exporting.text_graphs import checked_text_graph, text_example
from training.pretrained.teachers import TeacherError, TeacherPipeline


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    makers = {"sd1": pipelines.stable_diffusion, "sdxl": pipelines.stable_diffusion_xl}
    return {name: make(root / name) for name, make in makers.items()}


def changed(folder: Path, file: str, **values: object) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_the_null_condition_is_what_the_stock_pipeline_guides_away_from(folders: dict[str, Path], name: str) -> None:
    teacher = TeacherPipeline.open(str(folders[name]))
    prompts = teacher.prompts(torch.device("cpu"))
    if name == "sd1":
        assert torch.allclose(prompts.null["context"], prompts.encode([""])["context"][0], atol=1e-6)
    else:
        assert all(not value.any() for value in prompts.null.values())
        assert set(prompts.null) == {"context", "pooled"}


@pytest.mark.parametrize("first", [CLIPTextModel, CLIPTextModelWithProjection])
def test_the_text_graph_pools_by_the_encoder_that_the_stock_pipeline_pools_by(tmp_path: Path, first: Any) -> None:
    folder = pipelines.stable_diffusion_xl(tmp_path / "sdxl", first)
    prompts = TeacherPipeline.open(str(folder)).prompts(torch.device("cpu"))
    inputs = text_example(prompts.text_graph()).at(3)
    encoded = prompts.encode(["", "a", "a red"])
    with torch.no_grad():
        context, pooled = prompts.text_graph().module(*inputs)
    assert torch.allclose(context, encoded["context"], atol=1e-5)
    assert torch.allclose(pooled, encoded["pooled"], atol=1e-5)
    assert set(checked_text_graph(prompts).outputs) == {"context", "pooled"}


def test_a_first_encoder_of_another_width_does_not_pool_for_sdxl(tmp_path: Path) -> None:
    folder = pipelines.stable_diffusion_xl(tmp_path / "sdxl", CLIPTextModelWithProjection)
    changed(folder, "text_encoder/config.json", projection_dim=pipelines.WIDTH + 1)
    with pytest.raises(TeacherError, match="told other things than SDXL's base"):
        TeacherPipeline.open(str(folder))


def test_a_text_graph_that_reads_prompts_otherwise_than_the_pipeline_is_refused(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = TeacherPipeline.open(str(folders["sd1"])).prompts(torch.device("cpu"))
    graph = checked_text_graph(prompts)
    graph.module.pad_id = 3  # type: ignore[assignment]
    monkeypatch.setattr(prompts, "text_graph", lambda: graph)
    with pytest.raises(ExportError, match="a bundle would read prompts otherwise than the teacher does") as refused:
        checked_text_graph(prompts)
    assert len(str(refused.value).splitlines()) == 1


def test_prompts_that_a_bundle_would_read_otherwise_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    """Textual inversions of one vector are tokens as others are."""
    stock = StableDiffusionPipeline.from_pretrained(folders["sd1"])
    stock.load_textual_inversion({"<dog>": torch.randn(1, pipelines.WIDTH)}, token="<dog>")
    stock.save_pretrained(tmp_path / "one")
    stock.load_textual_inversion({"<cat>": torch.randn(2, pipelines.WIDTH)}, token="<cat>")
    stock.save_pretrained(tmp_path / "two")
    shutil.copytree(folders["sd1"], tmp_path / "left")
    changed(tmp_path / "left", "tokenizer/tokenizer_config.json", padding_side="left")
    opened = {name: TeacherPipeline.open(str(tmp_path / name)) for name in ("one", "two", "left")}
    prompts = {name: pipeline.prompts(torch.device("cpu")) for name, pipeline in opened.items()}
    checked_text_graph(prompts["one"])
    for name, reason in (("two", "reads <cat> as several tokens"), ("left", "pads prompts on the left")):
        with pytest.raises(TeacherError, match=f"{name}: its tokenizer {reason}.*: run its students with diffusers"):
            checked_text_graph(prompts[name])


def test_text_encoders_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    folder = pipelines.stable_diffusion(tmp_path / "sd")
    weights = next((folder / "text_encoder").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(TeacherError, match="sd/text_encoder: "):
        TeacherPipeline.open(str(folder)).prompts(torch.device("cpu")).encode(["a"])


@pytest.mark.parametrize(
    ("name", "part", "weight"),
    [
        ("sd1", "text_encoder", "encoder.layers.1.mlp.fc1.weight"),
        ("sdxl", "text_encoder", "embeddings.token_embedding.weight"),
        ("sdxl", "text_encoder_2", "text_projection.weight"),
    ],
)
def test_a_text_encoder_whose_weights_lack_some_is_refused(
    folders: dict[str, Path], tmp_path: Path, name: str, part: str, weight: str
) -> None:
    shutil.copytree(folders[name], tmp_path / "copy")
    file = tmp_path / "copy" / part / "model.safetensors"
    kept = load_file(file)
    (lost,) = (given for given in kept if given.endswith(weight))
    save_file({given: value for given, value in kept.items() if given != lost}, file, {"format": "pt"})
    with pytest.raises(TeacherError, match=rf"copy/{part}: its weights lack .*{weight}") as refused:
        TeacherPipeline.open(str(tmp_path / "copy")).prompts(torch.device("cpu")).encode(["a"])
    assert len(str(refused.value).splitlines()) == 1


def test_a_text_encoder_named_as_of_old_is_whole(folders: dict[str, Path], tmp_path: Path) -> None:
    """With a prefix that transformers has dropped, and positions that it now counts by itself."""
    shutil.copytree(folders["sd1"], tmp_path / "old")
    file = tmp_path / "old" / "text_encoder" / "model.safetensors"
    old = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in load_file(file).items()}
    positions = {"text_model.embeddings.position_ids": torch.arange(pipelines.TOKENS)[None]}
    contexts = []
    for more in (positions, {}):
        save_file(old | more, file, {"format": "pt"})
        prompts = TeacherPipeline.open(str(tmp_path / "old")).prompts(torch.device("cpu"))
        contexts.append(prompts.encode(["a red square"])["context"])
    stock = TeacherPipeline.open(str(folders["sd1"])).prompts(torch.device("cpu")).encode(["a red square"])["context"]
    assert all(torch.equal(context, stock) for context in contexts)


def test_both_encoders_of_sdxl_make_the_context_that_its_network_attends_to(tmp_path: Path) -> None:
    folder = pipelines.stable_diffusion_xl(tmp_path / "sdxl")
    changed(folder, "unet/config.json", cross_attention_dim=pipelines.WIDTH)
    with pytest.raises(TeacherError, match="a context of width 16, and its text encoders give one of 32"):
        TeacherPipeline.open(str(folder))


@pytest.mark.parametrize(
    ("length", "reason"),
    [
        (77, "its text encoders take no prompts: "),
        (10**30, "its tokenizer names no model_max_length"),
        (None, "its tokenizer names no model_max_length"),
    ],
    ids=["positions", "endless", "not said"],
)
def test_a_tokenizer_whose_prompts_are_too_long_for_its_encoder_is_refused(
    folders: dict[str, Path], tmp_path: Path, length: int | None, reason: str
) -> None:
    shutil.copytree(folders["sd1"], tmp_path / "long")
    changed(tmp_path / "long", "tokenizer/tokenizer_config.json", model_max_length=length)
    prompts = TeacherPipeline.open(str(tmp_path / "long")).prompts(torch.device("cpu"))
    for encode in (lambda: prompts.encode(["a red square"]), lambda: prompts.null):
        with pytest.raises(TeacherError, match=f"long: {reason}") as refused:
            encode()
        assert len(str(refused.value).splitlines()) == 1


def test_another_text_encoder_is_another_identity(tmp_path: Path) -> None:
    folder = pipelines.stable_diffusion(tmp_path / "sd")
    device = torch.device("cpu")
    first = TeacherPipeline.open(str(folder)).prompts(device).identity
    assert TeacherPipeline.open(str(folder)).prompts(device).identity == first
    pipelines.text_encoder(pipelines.tokenizer(tmp_path)).save_pretrained(folder / "text_encoder")
    assert TeacherPipeline.open(str(folder)).prompts(device).identity != first


def test_text_encoders_stay_no_longer_than_the_null_condition_needs_them(folders: dict[str, Path]) -> None:
    """Unless captions are being encoded."""
    prompts = TeacherPipeline.open(str(folders["sd1"])).prompts(torch.device("cpu"))
    assert set(prompts.null) == {"context"}
    assert "_pipeline" not in vars(prompts)
    prompts = TeacherPipeline.open(str(folders["sd1"])).prompts(torch.device("cpu"))
    prompts.encode(["a"])
    assert set(prompts.null) == {"context"}
    assert "_pipeline" in vars(prompts)
