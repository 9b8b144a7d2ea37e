"""What is loaded of a pipeline's folder, whatever else lies in it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import pipelines
from training.networks import save_network
from training.pretrained.pipeline_files import loaded_files, other_variants
from training.pretrained.pipelines import save_pipeline
from training.pretrained.teachers import TeacherPipeline


def test_a_clone_of_a_repository_is_the_teacher_that_a_download_of_it_is(tmp_path: Path) -> None:
    """Its folders have the weights in other formats and variants too, none of which are loaded."""
    folder, device = pipelines.stable_diffusion(tmp_path / "sd"), torch.device("cpu")

    def named(variant: str | None = None) -> tuple[str, str]:
        opened = TeacherPipeline.open(str(folder), variant=variant)
        return opened.identity, opened.prompts(device).identity

    downloaded = named()
    for part, stem in (("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"), ("text_encoder", "")):
        for name in (
            f"{stem or 'pytorch_model'}.bin",
            f"{stem or 'model'}.fp16.safetensors",
            "README.md",
            "model.onnx",
        ):
            (folder / part / name).write_text(name)
    assert named() == downloaded
    of_variant = named("fp16")
    assert not set(of_variant) & set(downloaded)
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_text("another")
    assert named() == downloaded
    assert named("fp16")[0] != of_variant[0]
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_text("another")
    assert named()[0] != downloaded[0]


def test_what_lies_in_folders_of_a_part_is_never_loaded(tmp_path: Path) -> None:
    """Such as a backup: neither the teacher nor its students have any of it."""
    folder, student, device = pipelines.stable_diffusion(tmp_path / "sd"), tmp_path / "student", torch.device("cpu")

    def named() -> tuple[str, str]:
        opened = TeacherPipeline.open(str(folder))
        return opened.identity, opened.prompts(device).identity

    before = named()
    pipelines.unet().save_pretrained(folder / "unet" / "old")
    pipelines.autoencoder().save_pretrained(folder / "vae" / "old")
    pipelines.text_encoder(pipelines.tokenizer(tmp_path)).save_pretrained(folder / "text_encoder" / "old")
    pipelines.tokenizer(tmp_path).save_pretrained(folder / "tokenizer" / "old")
    assert named() == before
    opened = TeacherPipeline.open(str(folder))
    save_network(opened.denoiser(), student / "unet")
    save_pipeline(student, opened.denoiser(), opened, max_tokens=8)
    for part in ("vae", "text_encoder"):
        (weights,) = (student / part).glob("*.safetensors")
        assert weights.read_bytes() == (folder / part / weights.name).read_bytes()


@pytest.mark.parametrize(
    ("names", "variant", "others"),
    [
        ("model.fp16.safetensors", None, ["fp16"]),
        ("model.fp16.safetensors", "fp16", []),
        ("model.fp16.safetensors pytorch_model.bin", None, []),
        ("pytorch_model.fp16.bin model.ema.safetensors openvino_model.x.bin", None, ["ema", "fp16"]),
        ("model.fp16-00001-of-00002.safetensors model.safetensors.index.fp16.json", None, ["fp16"]),
        ("model-00001-of-00002.fp16.safetensors model.safetensors.index.fp16.json", "ema", ["fp16"]),
        ("model-00001-of-00002.safetensors model.safetensors.index.json", None, []),
        ("vocab.json merges.txt", None, []),
    ],
)
def test_the_variants_of_a_part_that_has_no_weights_to_load(
    tmp_path: Path, names: str, variant: str | None, others: list[str]
) -> None:
    for name in names.split():
        (tmp_path / name).touch()
    assert other_variants(tmp_path, variant) == others


@pytest.mark.parametrize(
    ("names", "variant", "loaded"),
    [
        ("model.safetensors pytorch_model.bin", None, "model.safetensors"),
        ("pytorch_model.bin openvino_model.bin", None, "pytorch_model.bin"),
        ("model.fp16.bin model.safetensors", "fp16", "model.fp16.bin"),
        ("model.safetensors", "fp16", "model.safetensors"),
        (
            "model-00001-of-00002.safetensors model-00002-of-00002.safetensors model.safetensors.index.json x.json",
            None,
            "model-00001-of-00002.safetensors model-00002-of-00002.safetensors model.safetensors.index.json",
        ),
        (
            "model.fp16-00001-of-00001.safetensors model.safetensors.index.fp16.json model.safetensors.index.json",
            "fp16",
            "model.fp16-00001-of-00001.safetensors model.safetensors.index.fp16.json",
        ),
        ("vocab.json merges.txt", None, "merges.txt vocab.json"),
    ],
)
def test_the_files_that_are_loaded_of_a_part(tmp_path: Path, names: str, variant: str | None, loaded: str) -> None:
    for name in names.split():
        (tmp_path / name).touch()
    assert " ".join(file.name for file in loaded_files(tmp_path, variant)) == loaded
