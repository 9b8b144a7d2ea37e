"""Networks of patches: what they see, what they give, and that a folder keeps it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from training.diffusion import Schedule
from training.networks import NetworkDenoiser, build_unet, load_network, save_network, student_from
from training.recipe import NetworkRecipe

RECIPE = NetworkRecipe(channels=(16, 32), norm_groups=8, patch=2)
SIDE = 12


def denoiser() -> NetworkDenoiser:
    torch.manual_seed(0)
    return NetworkDenoiser(build_unet(RECIPE, (3, SIDE, SIDE), None, 10), Schedule.cosine()).eval()


def call(network: NetworkDenoiser, z: Tensor) -> Tensor:
    rows = len(z)
    with torch.no_grad():
        output: Tensor = network(z, torch.full((rows,), 0.5), {"label": torch.arange(rows)}, torch.ones(rows))
    return output


def test_a_patch_is_seen_as_one_place_and_given_back_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    z = torch.randn(2, 3, SIDE, SIDE)
    seen: list[Tensor] = []

    def identity(network: UNet2DConditionModel, sample: Tensor, *rest: object, **named: object) -> tuple[Tensor]:
        seen.append(sample)
        return (sample,)

    monkeypatch.setattr(UNet2DConditionModel, "forward", identity)
    assert torch.equal(call(denoiser(), z), z)
    assert seen[0].shape == (2, 12, SIDE // 2, SIDE // 2)
    first_patch = z[0, 0, :2, :2].flatten()
    assert torch.equal(seen[0][0, :4, 0, 0], first_patch)


def test_a_network_of_patches_is_kept_whole_and_its_student_begins_as_it_is(tmp_path: Path) -> None:
    teacher, z = denoiser(), torch.randn(2, 3, SIDE, SIDE)
    save_network(teacher, tmp_path / "teacher")
    loaded = load_network(tmp_path / "teacher", teacher.schedule).eval()
    assert torch.equal(call(loaded, z), call(teacher, z))
    torch.testing.assert_close(call(student_from(teacher).eval(), z), call(teacher, z))
