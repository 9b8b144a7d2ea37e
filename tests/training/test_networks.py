"""Networks: what compiling leaves as it is."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from training.networks import build_unet, compile_network
from training.recipe import NetworkRecipe


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
