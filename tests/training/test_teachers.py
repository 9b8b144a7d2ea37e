"""Pipelines as guided teachers: what they are conditioned on and predict, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests import pipelines
from training.diffusion import diffuse, eps_from_v, x_from_v
from training.draws import Draws
from training.guidance import GuidedTeacher
from training.losses import Batch, output_matching_loss, progressive_loss
from training.networks import load_network, save_network, student_from
from training.pretrained.teachers import TeacherError, TeacherPipeline

MAKERS: dict[str, Callable[[Path], Path]] = {
    "sd1": pipelines.stable_diffusion,
    "sd2": lambda folder: pipelines.stable_diffusion(folder, "v_prediction"),
    "inpainting": lambda folder: pipelines.stable_diffusion(folder, in_channels=9),
    "sdxl": pipelines.stable_diffusion_xl,
    "dit": pipelines.dit,
    "class-unet": pipelines.class_unet,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    return {name: make(root / name) for name, make in MAKERS.items()}


def rows(teacher: TeacherPipeline, count: int = 3) -> tuple[Tensor, dict[str, Tensor]]:
    """z and a condition that the teacher's network takes."""
    draws = Draws(0, 0, range(count))
    side = teacher.network_config["sample_size"]
    z = draws.normal(torch.empty(count, teacher.channels, side, side))
    if not teacher.is_text:
        return z, {"label": torch.arange(count)}
    condition = teacher.prompts(torch.device("cpu")).encode(["a red square", "a blue circle", "green"][:count])
    if teacher.is_xl:
        condition["size"] = torch.tensor([32.0, 32, 0, 0, 32, 32]).expand(count, 6)
    if teacher.is_inpainting:
        condition |= {"mask": (z[:, :1] > 0).float(), "masked": draws.normal(z)}
    return z, condition


@pytest.mark.parametrize("name", MAKERS)
def test_a_denoisers_v_is_had_from_what_its_network_predicts(folders: dict[str, Path], name: str) -> None:
    teacher = TeacherPipeline.open(str(folders[name]))
    denoiser = teacher.denoiser()
    z, condition = rows(teacher)
    t = torch.tensor([0.25, 0.5, 1.0])
    alpha, sigma = teacher.schedule.at(t, z)
    with torch.no_grad():
        v = denoiser(z, t, condition, torch.zeros(3))
        output = denoiser._call(z, t * 1000 - 1, condition, torch.zeros(3))
    recovered = v if teacher.prediction == "v" else eps_from_v(z, v, alpha, sigma)
    assert v.shape == z.shape
    assert torch.allclose(recovered, output, atol=1e-3)


@pytest.mark.parametrize("name", MAKERS)
def test_an_untrained_student_ignores_w_and_a_trained_one_survives_saving(
    folders: dict[str, Path], name: str, tmp_path: Path
) -> None:
    teacher = TeacherPipeline.open(str(folders[name]))
    student = student_from(teacher.denoiser()).eval()
    z, condition = rows(teacher)
    t, w = torch.full((3,), 0.5), torch.tensor([0.0, 1.0, 4.0])
    with torch.no_grad():
        assert torch.equal(student(z, t, condition, w), student(z, t, condition, torch.zeros(3)))
        for name_, parameter in student.named_parameters():
            if "cond_proj" in name_ or "projections" in name_:
                parameter.normal_(0, 0.1)
        trained = student(z, t, condition, w)
        assert not torch.allclose(trained[1:], student(z, t, condition, torch.zeros(3))[1:])
        save_network(student, tmp_path / "network")
        loaded = load_network(tmp_path / "network", teacher.schedule).eval()
        assert torch.equal(loaded(z, t, condition, w), trained)
        copied = student_from(loaded).eval()
        assert torch.equal(copied(z, t, condition, w), trained)


def test_a_student_of_a_dit_drops_no_labels_by_itself(folders: dict[str, Path]) -> None:
    teacher = TeacherPipeline.open(str(folders["dit"]))
    student = student_from(teacher.denoiser()).train()
    z, condition = rows(teacher)
    t, w = torch.full((3,), 0.5), torch.zeros(3)
    first = student(z, t, condition, w)
    assert all(torch.equal(student(z, t, condition, w), first) for _ in range(20))


def test_two_networks_with_the_weights_of_one_give_the_same_student_losses(tmp_path: Path) -> None:
    """One network with a null class, and the same network as a second pipeline."""
    one = TeacherPipeline.open(str(pipelines.class_unet(tmp_path / "one")))
    two = TeacherPipeline.open(str(pipelines.class_unet(tmp_path / "two")))
    network, null = one.denoiser(), {"label": torch.tensor(one.classes.null(None))}
    x, condition = rows(one)
    batch = Batch(x, condition)
    student = student_from(network).eval()
    teachers = [GuidedTeacher(network, network, null), GuidedTeacher(network, two.denoiser(), null)]
    w_range = (0.0, 4.0)
    for loss in (
        lambda teacher: output_matching_loss(student, teacher, one.schedule, batch, w_range, Draws(0, 1, range(3))),
        lambda teacher: progressive_loss(student, teacher, one.schedule, batch, 4, w_range, Draws(0, 1, range(3))),
    ):
        first, second = (loss(teacher) for teacher in teachers)
        assert torch.allclose(first, second, rtol=0, atol=1e-6)


def test_a_flow_is_read_at_its_own_state_and_time(tmp_path: Path) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    teacher = TeacherPipeline.open(str(pipelines.stable_diffusion(tmp_path / "flow", scheduler=scheduler)))
    assert teacher.prediction == "flow"
    denoiser = teacher.denoiser()
    x, condition = rows(teacher)
    eps = Draws(0, 1, range(3)).normal(x)
    s = torch.tensor([0.3, 0.6, 0.9])
    t = s / (3.0 - 2.0 * s)  # the time whose shifted one is s
    alpha, sigma = teacher.schedule.at(t, x)
    with torch.no_grad():
        v = denoiser(diffuse(x, eps, alpha, sigma), t, condition, torch.zeros(3))
        state = (1 - s).reshape(-1, 1, 1, 1) * x + s.reshape(-1, 1, 1, 1) * eps
        u = denoiser.network(state, 1000 * s, encoder_hidden_states=condition["context"], return_dict=False)[0]
    z = diffuse(x, eps, alpha, sigma)
    implied = eps_from_v(z, v, alpha, sigma) - x_from_v(z, v, alpha, sigma)
    assert torch.allclose(implied, u, atol=1e-3)


@pytest.mark.parametrize("kind", [FlowMatchHeunDiscreteScheduler, FlowMatchLCMScheduler])
def test_a_flow_is_the_same_flow_with_whatever_sampler_of_it(tmp_path: Path, kind: Any) -> None:
    scheduler = kind(shift=3.0)
    teacher = TeacherPipeline.open(str(pipelines.stable_diffusion(tmp_path / "flow", scheduler=scheduler)))
    alphas, sigmas = teacher.schedule.alphas[1:].flip(0), teacher.schedule.sigmas[1:].flip(0)
    assert teacher.prediction == "flow"
    assert torch.allclose(sigmas / (alphas + sigmas), scheduler.sigmas, atol=1e-5)
    assert torch.allclose(scheduler.timesteps, 1000 * scheduler.sigmas)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_every_prediction_of_diffusers_gives_the_x_of_its_scheduler(tmp_path: Path, prediction: str) -> None:
    teacher = TeacherPipeline.open(str(pipelines.class_unet(tmp_path / "unet", prediction=prediction)))
    denoiser, (z, condition) = teacher.denoiser(), rows(teacher)
    scheduler = DDIMScheduler(prediction_type=prediction, clip_sample=False)
    scheduler.set_timesteps(1000)
    t = torch.full((3,), 0.4)
    with torch.no_grad():
        output = denoiser.network(z, t * 1000 - 1, class_labels=condition["label"], return_dict=False)[0]
        v = denoiser(z, t, condition, torch.zeros(3))
    x = scheduler.step(output, 399, z).pred_original_sample
    assert torch.allclose(x_from_v(z, v, *teacher.schedule.at(t, z)), x, atol=1e-4)


def changed(folder: Path, file: str, **values: Any) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


UNET, SCHEDULER = "unet/config.json", "scheduler/scheduler_config.json"


@pytest.mark.parametrize(
    ("file", "values", "reason"),
    [
        (UNET, {"time_cond_proj_dim": 256}, "it is a student"),
        (UNET, {"in_channels": 8}, "8 channels in and 4 out is neither"),
        (UNET, {"class_embed_type": "projection"}, "classes embedded by 'projection'"),
        (UNET, {"addition_embed_type": "image"}, "added by 'image'"),
        (UNET, {"encoder_hid_dim_type": "image_proj"}, "'image_proj' before the cross-attention"),
        (UNET, {"num_class_embeds": 3}, "text and classes at once"),
        (UNET, {"time_embedding_type": "fourier"}, "not positional"),
        (UNET, {"dual_cross_attention": True}, "attends to two contexts"),
        (SCHEDULER, {"prediction_type": "flow"}, "predicts flow"),
        (SCHEDULER, {"_class_name": "EDMEulerScheduler"}, "no alphas_cumprod"),
        (SCHEDULER, {"_class_name": "NoSuchScheduler"}, "no alphas_cumprod"),
        (SCHEDULER, {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True}, "alpha is 0"),
        ("model_index.json", {"unet": ["diffusers", "UNet1DModel"]}, "its network is UNet1DModel"),
        ("model_index.json", {"vae": ["diffusers", "AutoencoderTiny"]}, "AutoencoderTiny"),
        ("model_index.json", {"vae": [None, None]}, "without an autoencoder"),
        ("vae/config.json", {"latents_mean": [0.0] * 4}, "autoencoder with latents_mean"),
        ("vae/config.json", {"shift_factor": 0.1}, "autoencoder with shift_factor"),
        (SCHEDULER, {"beta_schedule": "odd"}, "its scheduler PNDMScheduler"),
        (
            SCHEDULER,
            {"_class_name": "EulerDiscreteScheduler", "rescale_betas_zero_snr": True},
            "alpha is 0",
        ),
        (SCHEDULER, {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 0}, "shift = 0 is not positive"),
        (SCHEDULER, {"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}, "from noise to image"),
        (SCHEDULER, {"_class_name": "FlowMatchLCMScheduler", "scale_factors": [0.5, 1]}, "of several sizes"),
        (SCHEDULER, {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True}, "the noise of a flow"),
        (
            SCHEDULER,
            {
                "_class_name": "EulerDiscreteScheduler",
                "timestep_type": "continuous",
                "prediction_type": "v_prediction",
            },
            "told the logarithm of its noise",
        ),
        (UNET, {"cross_attention_dim": 24}, "a context of width 24, and its text encoders give one of 16"),
        (UNET, {"cross_attention_dim": [16, 24]}, "a context of width 24"),
        ("model_index.json", {"unet": ["diffusers"]}, "a setting is missing or faulty"),
        (UNET, {"block_out_channels": None, "in_channels": None}, "setting is missing or faulty|neither"),
    ],
)
def test_what_cannot_be_a_teacher_is_refused_with_the_reason(
    tmp_path: Path, file: str, values: dict[str, Any], reason: str
) -> None:
    folder = pipelines.stable_diffusion(tmp_path / "sd")
    changed(folder, file, **values)
    with pytest.raises(TeacherError, match=reason) as refused:
        TeacherPipeline.open(str(folder))
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    "values", [{"addition_embed_type": "text"}, {"encoder_hid_dim": 16, "encoder_hid_dim_type": "text_proj"}]
)
def test_a_class_network_that_takes_text_outside_of_its_blocks_is_refused(
    tmp_path: Path, values: dict[str, Any]
) -> None:
    folder = pipelines.class_unet(tmp_path / "unet")
    changed(folder, UNET, _class_name="UNet2DConditionModel", **values)
    with pytest.raises(TeacherError, match="attends to a text that classes do not give"):
        TeacherPipeline.open(str(folder))


def test_a_flow_that_shifts_by_the_image_is_refused(tmp_path: Path) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    folder = pipelines.stable_diffusion(tmp_path / "sd", scheduler=scheduler)
    with pytest.raises(TeacherError, match="depends on the image's size"):
        TeacherPipeline.open(str(folder))


@pytest.mark.parametrize("missing", [UNET, SCHEDULER, "model_index.json"])
def test_a_pipeline_with_a_file_missing_is_refused(tmp_path: Path, missing: str) -> None:
    folder = pipelines.stable_diffusion(tmp_path / "sd")
    (folder / missing).unlink()
    with pytest.raises(TeacherError, match=missing.rsplit("/", maxsplit=1)[-1]):
        TeacherPipeline.open(str(folder))


def test_weights_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    folder = pipelines.stable_diffusion(tmp_path / "sd")
    weights = next((folder / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(TeacherError, match="sd/unet"):
        TeacherPipeline.open(str(folder)).denoiser()


def test_classes_are_found_by_name_or_by_order(folders: dict[str, Path], tmp_path: Path) -> None:
    teacher = TeacherPipeline.open(str(folders["dit"]))
    assert teacher.classes.null(None) == pipelines.CLASSES
    assert teacher.classes.numbers(["ant", "cat", "dog"]).tolist() == [0, 1, 2]
    assert teacher.classes.numbers(["0", "2"]).tolist() == [0, 2]
    with pytest.raises(TeacherError, match="has 4 classes, the images have 2: name the classes"):
        teacher.classes.numbers(["cat", "dog"])
    with pytest.raises(TeacherError, match="no class '4'"):
        teacher.classes.numbers(["0", "4"])
    with pytest.raises(TeacherError, match="9 is none of them"):
        teacher.classes.null(9)
    named = pipelines.dit(tmp_path / "named")
    changed(named, "model_index.json", id2label={"0": "tench, Tinca", "1": "crane, bird", "2": "crane"})
    teacher = TeacherPipeline.open(str(named))
    assert teacher.classes.numbers(["crane, bird", "Tinca", "2"]).tolist() == [1, 0, 2]
    with pytest.raises(TeacherError, match="'crane' may be any of the classes 1, 2"):
        teacher.classes.numbers(["crane"])
    with pytest.raises(TeacherError, match="no class 'cat'"):
        teacher.classes.numbers(["cat"])


def test_classes_that_are_named_by_numbers_are_not_taken_in_the_order_of_words(tmp_path: Path) -> None:
    teacher = TeacherPipeline.open(str(pipelines.class_unet(tmp_path / "unet", classes=13)))
    names = sorted(str(number) for number in range(12))
    assert teacher.classes.numbers(names).tolist() == [int(name) for name in names]


def test_the_order_of_classes_is_not_taken_where_some_are_numbers(folders: dict[str, Path]) -> None:
    teacher = TeacherPipeline.open(str(folders["class-unet"]))
    assert teacher.classes.numbers(["2", "0", "1"]).tolist() == [2, 0, 1]
    with pytest.raises(TeacherError, match="class '1' is a number of the teacher's, and 'cat' is none"):
        teacher.classes.numbers(["1", "2", "cat"])


def test_an_autoencoder_that_is_not_the_networks_is_refused(tmp_path: Path) -> None:
    folder = pipelines.stable_diffusion(tmp_path / "sd")
    changed(folder, "vae/config.json", latent_channels=8)
    with pytest.raises(TeacherError, match="autoencoder has 8 channels, its network 4"):
        TeacherPipeline.open(str(folder))
    quantised = pipelines.class_unet(tmp_path / "ldm")
    changed(quantised, "model_index.json", vqvae=["diffusers", "VQModel"])
    with pytest.raises(TeacherError, match="its autoencoder is a vqvae"):
        TeacherPipeline.open(str(quantised))


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("model_index.json", {"id2label": ["cat", "dog"]}),
        ("model_index.json", {"id2label": {"x": "cat"}}),
        ("transformer/config.json", {"num_embeds_ada_norm": "ten"}),
        ("transformer/config.json", {"sample_size": None}),
        ("transformer/config.json", {"patch_size": None}),
    ],
)
def test_settings_of_a_wrong_type_are_refused_when_it_is_opened(
    tmp_path: Path, file: str, values: dict[str, Any]
) -> None:
    folder = pipelines.dit(tmp_path / "dit")
    changed(folder, file, **values)
    with pytest.raises(TeacherError, match="a setting is missing or faulty"):
        TeacherPipeline.open(str(folder))


def test_a_second_network_that_is_called_otherwise_is_refused(folders: dict[str, Path]) -> None:
    first = TeacherPipeline.open(str(folders["sd1"]))
    first.check_pair(TeacherPipeline.open(str(folders["sd2"])))
    for name, says in (
        ("inpainting", "in_channels differs: 4"),
        ("sdxl", "cross_attention_dim"),
        ("dit", "prompts"),
    ):
        with pytest.raises(TeacherError, match=says):
            first.check_pair(TeacherPipeline.open(str(folders[name])))


@pytest.mark.parametrize("number", [-1, pipelines.CLASSES + 1])
def test_a_name_of_a_class_that_the_network_lacks_is_refused(tmp_path: Path, number: int) -> None:
    folder = pipelines.class_unet(tmp_path / "unet")
    changed(folder, "model_index.json", id2label={"0": "ant", str(pipelines.CLASSES): "none"})
    TeacherPipeline.open(str(folder))
    changed(folder, "model_index.json", id2label={"0": "ant", str(number): "bee"})
    with pytest.raises(TeacherError, match=f"names class {number}, and its network has 4"):
        TeacherPipeline.open(str(folder))


def test_a_second_network_of_another_text_encoder_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    first = TeacherPipeline.open(str(folders["sd1"]))
    shutil.copytree(folders["sd1"], tmp_path / "same")
    weights = next((tmp_path / "same" / "text_encoder").glob("*.safetensors"))
    values = load_file(weights)
    save_file({name: value * (1 + 1e-4) for name, value in values.items()}, weights, {"format": "pt"})
    first.check_pair(TeacherPipeline.open(str(tmp_path / "same")))
    save_file({name: value.flip(0) for name, value in values.items()}, weights, {"format": "pt"})
    with pytest.raises(TeacherError, match="different text encoders"):
        first.check_pair(TeacherPipeline.open(str(tmp_path / "same")))


def test_a_grey_autoencoder_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["dit"], tmp_path / "grey")
    changed(tmp_path / "grey", "vae/config.json", in_channels=1, out_channels=1)
    with pytest.raises(TeacherError, match="its autoencoder is of 1 colours, not of 3"):
        TeacherPipeline.open(str(tmp_path / "grey"))


def test_a_second_network_in_other_latents_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    second = pipelines.dit(tmp_path / "dit")
    first = TeacherPipeline.open(str(folders["dit"]))
    first.check_pair(TeacherPipeline.open(str(second)))
    torch.manual_seed(1)
    pipelines.autoencoder().save_pretrained(second / "vae")
    with pytest.raises(TeacherError, match="different autoencoders"):
        first.check_pair(TeacherPipeline.open(str(second)))


def test_an_eps_on_a_cosine_schedule_is_a_teacher_whose_guided_v_is_bounded(tmp_path: Path) -> None:
    folder = pipelines.class_unet(tmp_path / "unet")
    changed(folder, SCHEDULER, beta_schedule="squaredcos_cap_v2")
    teacher = TeacherPipeline.open(str(folder))
    network, null = teacher.denoiser(), {"label": torch.tensor(teacher.classes.null(None))}
    z, condition = rows(teacher)
    guided, w = GuidedTeacher(network, network, null), torch.full((3,), 4.0)
    with torch.no_grad():
        sizes = [float(guided(z, torch.full((3,), t), condition, w).norm()) for t in (0.996, 1.0)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)


def test_what_a_teacher_predicts_by_is_its_identity(tmp_path: Path) -> None:
    folder = pipelines.stable_diffusion(tmp_path / "sd")
    first = TeacherPipeline.open(str(folder)).identity
    assert TeacherPipeline.open(str(folder)).identity == first
    changed(folder, "vae/config.json", scaling_factor=0.5)
    second = TeacherPipeline.open(str(folder)).identity
    changed(folder, SCHEDULER, prediction_type="v_prediction")
    assert len({first, second, TeacherPipeline.open(str(folder)).identity}) == 3


@pytest.mark.parametrize(("name", "side", "says"), [("sd1", 33, "multiple of 4"), ("dit", 64, "side 32, not 64")])
def test_images_that_do_not_fit_are_refused(folders: dict[str, Path], name: str, side: int, says: str) -> None:
    with pytest.raises(TeacherError, match=says):
        TeacherPipeline.open(str(folders[name])).check_side(side)


def test_an_index_that_is_no_object_and_a_config_without_channels_are_refused(tmp_path: Path) -> None:
    folder = pipelines.stable_diffusion(tmp_path / "sd")
    config = json.loads((folder / UNET).read_text())
    del config["in_channels"]
    (folder / UNET).write_text(json.dumps(config))
    with pytest.raises(TeacherError, match="a setting is missing"):
        TeacherPipeline.open(str(folder))
    (folder / "model_index.json").write_text("[]")
    with pytest.raises(TeacherError, match="is not a JSON object"):
        TeacherPipeline.open(str(folder))


def test_another_null_prompt_is_another_teacher(tmp_path: Path) -> None:
    folder = pipelines.stable_diffusion_xl(tmp_path / "sdxl")
    index = json.loads((folder / "model_index.json").read_text())
    found = []
    for given in ({}, {"force_zeros_for_empty_prompt": True}, {"force_zeros_for_empty_prompt": False}):
        index.pop("force_zeros_for_empty_prompt", None)
        (folder / "model_index.json").write_text(json.dumps(index | given))
        teacher = TeacherPipeline.open(str(folder))
        prompts = teacher.prompts(torch.device("cpu"))
        found.append((teacher.identity, prompts.identity, not prompts.null["pooled"].any()))
    assert found[0] == found[1]
    assert found[0][2]
    assert not found[2][2]
    assert all(a != b for a, b in zip(found[1], found[2], strict=True))


def test_the_refiner_of_sdxl_is_refused(tmp_path: Path) -> None:
    folder = pipelines.stable_diffusion_xl(tmp_path / "sdxl")
    changed(folder, UNET, projection_class_embeddings_input_dim=pipelines.WIDTH + 5 * 8)
    with pytest.raises(TeacherError, match="refiner"):
        TeacherPipeline.open(str(folder))


def test_a_network_whose_weights_lack_some_is_refused(tmp_path: Path) -> None:
    folder = pipelines.class_unet(tmp_path / "unet")
    file = next((folder / "unet").glob("*.safetensors"))
    kept = load_file(file)
    del kept["conv_in.weight"]
    save_file(kept, file)
    with pytest.raises(TeacherError, match="conv_in"):
        TeacherPipeline.open(str(folder)).denoiser()


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_weights_that_a_config_has_no_place_for_are_refused(
    folders: dict[str, Path], tmp_path: Path, part: str
) -> None:
    """Such as those of a LoRA that was not fused: the teacher would be another without them."""
    shutil.copytree(folders["sd1"], tmp_path / "copy")
    file = next((tmp_path / "copy" / part).glob("*.safetensors"))
    save_file(load_file(file) | {"conv_in.lora_layer.up.weight": torch.ones(1)}, file)
    teacher = TeacherPipeline.open(str(tmp_path / "copy"))
    with pytest.raises(TeacherError, match=r"no place for its weights conv_in\.lora_layer\.up\.weight"):
        teacher.denoiser() if part == "unet" else teacher.autoencoder()


@pytest.mark.parametrize("name", ["sd1", "class-unet"])
def test_a_variant_that_no_part_has_is_refused(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    shutil.copytree(folders[name], tmp_path / "copy")
    weights = next((tmp_path / "copy" / "unet").glob("*.safetensors"))
    weights.rename(weights.with_suffix(".fp16.safetensors"))
    teacher = TeacherPipeline.open(str(tmp_path / "copy"), variant="fp16")
    teacher.denoiser()
    if teacher.is_text:  # of which there is no such variant
        teacher.prompts(torch.device("cpu")).encode(["a"])
    with pytest.raises(TeacherError, match="copy has no weights of the variant 'fp61'"):
        TeacherPipeline.open(str(tmp_path / "copy"), variant="fp61")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_of_a_variant_that_goes_unnamed_are_refused(
    folders: dict[str, Path], tmp_path: Path, part: str
) -> None:
    shutil.copytree(folders["sd1"], tmp_path / "copy")
    weights = next((tmp_path / "copy" / part).glob("*.safetensors"))
    weights.rename(weights.with_suffix(".fp16.safetensors"))
    with pytest.raises(TeacherError, match=f"its {part} has weights of the variant fp16 only: name it as variant"):
        TeacherPipeline.open(str(tmp_path / "copy"))
    TeacherPipeline.open(str(tmp_path / "copy"), variant="fp16")


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "DDIMScheduler"])
def test_a_schedule_that_is_rescaled_to_end_in_noise_ends_there(tmp_path: Path, name: str) -> None:
    """Some schedulers put a number there that may be above the one before."""
    folder = pipelines.stable_diffusion(tmp_path / "sd", "v_prediction")
    changed(folder, SCHEDULER, _class_name=name, beta_schedule="linear", beta_end=0.02, rescale_betas_zero_snr=True)
    alphas = TeacherPipeline.open(str(folder)).schedule.alphas
    assert abs(float(alphas[-1])) < 1e-6
    assert (alphas.diff() < 0).all()


def test_what_bounds_the_x_of_a_teachers_steps_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By default too, and not where the scheduler knows no such setting."""
    folder, said = pipelines.class_unet(tmp_path / "unet"), []
    for values in (
        {"_class_name": "DDPMScheduler", "clip_sample": True},
        {"_class_name": "DPMSolverMultistepScheduler", "clip_sample": True, "thresholding": True},
        {"_class_name": "EulerDiscreteScheduler"},
        {"_class_name": "DDIMScheduler", "clip_sample": False, "thresholding": False},
    ):
        changed(folder, SCHEDULER, **values)
        TeacherPipeline.open(str(folder))
        said.append(capsys.readouterr().out.replace(f"{folder}: its scheduler's ", ""))
    rest = "is not heeded: students learn the sampler without it\n"
    assert said == [f"clip_sample {rest}", f"thresholding {rest}", "", ""]
    pipelines.dit(tmp_path / "dit")
    (tmp_path / "dit" / SCHEDULER).write_text(json.dumps({"_class_name": "DDIMScheduler"}))
    TeacherPipeline.open(str(tmp_path / "dit"))
    assert f"clip_sample {rest}" in capsys.readouterr().out


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    folder = pipelines.class_unet(tmp_path / "unet")
    with pytest.raises(TeacherError, match="unet is a folder, which has no revision 'main'"):
        TeacherPipeline.open(str(folder), revision="main")


def test_a_student_drops_nothing_at_random(tmp_path: Path) -> None:
    teacher = TeacherPipeline.open(str(pipelines.stable_diffusion(tmp_path / "sd", dropout=0.5)))
    z, condition = rows(teacher)
    student = student_from(teacher.denoiser()).train()
    t, w = torch.full((3,), 0.5), torch.zeros(3)
    assert torch.equal(student(z, t, condition, w), student(z, t, condition, w))
