"""Networks: what compiling leaves as it is, and what is had from an eps where there is next to no image in z."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import pipelines
from training.diffusion import Schedule, eps_from_v, x_from_v
from training.guidance import Condition
from training.mixture import ExactDenoiser, GaussianMixture
from training.networks import NetworkDenoiser, build_unet, compile_network, student_from
from training.pretrained.teachers import TeacherPipeline
from training.sections import NetworkRecipe


def gradients(network: nn.Module, device: str) -> dict[str, Tensor]:
    """Of a loss at noise that is the same each time."""
    noise = torch.Generator().manual_seed(0)
    z, t, label = torch.randn(4, 3, 4, 4, generator=noise).to(device), torch.rand(4, generator=noise), torch.arange(4)
    output = network(z, 900 * t.to(device), None, class_labels=label.to(device), return_dict=False)[0]
    output.square().mean().backward()
    return {name: value.grad.cpu() for name, value in network.named_parameters() if value.grad is not None}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is deprecated.*torch.compile:DeprecationWarning")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_compiled_network_has_the_gradients_of_the_plain_one(device: str) -> None:
    """Beneath an upsampling too, in a network wide enough for inductor to change memory layouts."""
    if not (device == "cpu" or torch.cuda.is_available()):
        pytest.skip(f"torch {torch.__version__} finds no CUDA device")
    torch.manual_seed(0)
    plain = build_unet(NetworkRecipe(channels=(8, 72), norm_groups=8), (3, 4, 4), None, 10).to(device)
    compiled = copy.deepcopy(plain)
    compile_network(compiled)
    theirs = gradients(compiled, device)
    for name, ours in gradients(plain, device).items():
        assert (theirs[name] - ours).norm() <= 1e-3 * ours.norm() + 1e-5, name


class ExactEps(NetworkDenoiser):
    """A network whose eps is exact, but for an error as a trained one has it."""

    ERROR = 1e-4

    def __init__(self, exact: ExactDenoiser) -> None:
        network: Any = SimpleNamespace(config={})
        super().__init__(network, exact.schedule, "eps")
        self.exact = exact

    def _call(self, z: Tensor, timestep: Tensor, condition: Condition, w: Tensor) -> Tensor:
        t = (timestep + 1) / self.schedule.timesteps
        v = self.exact(z, t, condition, w)
        return eps_from_v(z, v, *self.schedule.at(t, z)) + self.ERROR


@pytest.mark.parametrize("schedule", [Schedule.cosine(1000), Schedule.scaled_linear()], ids=["cosine", "linear"])
@pytest.mark.parametrize("t", [0.5, 0.9, 0.99, 0.999, 1.0])
def test_an_eps_gives_the_exact_x_wherever_the_schedule_ends(schedule: Schedule, t: float) -> None:
    mixture = GaussianMixture.on_a_circle(16)
    exact = ExactDenoiser(mixture, schedule)
    z = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    label, times = {"label": torch.arange(64) % mixture.classes}, torch.full((64,), t)
    alpha, sigma = schedule.at(times, z)
    ours, theirs = (denoiser(z, times, label, torch.zeros(64)) for denoiser in (ExactEps(exact), exact))
    assert (x_from_v(z, ours - theirs, alpha, sigma) - alpha * z).norm() < 0.1 * x_from_v(
        z, theirs, alpha, sigma
    ).norm()


OLD_DIT = {
    "cross_attention_dim": None,
    "double_self_attention": False,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "use_linear_projection": False,
}


@pytest.mark.parametrize(
    ("part", "foreign"), [("transformer", OLD_DIT), ("unet", {"unheard_of": 2})], ids=["an old DiT", "a UNet"]
)
def test_a_student_has_none_of_the_settings_that_its_teachers_network_does_not_know(
    tmp_path: Path, part: str, foreign: dict[str, Any]
) -> None:
    """Which diffusers keeps with the others."""
    make = pipelines.dit if part == "transformer" else pipelines.stable_diffusion
    folder, named = make(tmp_path / part), {"_class_name": "Transformer2DModel"} if part == "transformer" else {}
    for name, changes in (
        (f"{part}/config.json", foreign | named),
        ("model_index.json", {part: ["diffusers", *named.values()]} if named else {}),
    ):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))
    teacher = TeacherPipeline.open(str(folder)).denoiser()
    student = student_from(teacher).network
    assert foreign.keys() <= teacher.network.config.keys()
    assert not foreign.keys() & student.config.keys()
    assert all(torch.equal(student.state_dict()[name], value) for name, value in teacher.network.state_dict().items())
