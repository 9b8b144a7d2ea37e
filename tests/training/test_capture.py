"""Captured networks: the plain one's answers and gradients, whatever comes after one another."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from training.capture import CALLS_BEFORE, capture_network
from training.diffusion import Schedule
from training.networks import NetworkDenoiser, build_unet, student_from
from training.sections import NetworkRecipe

CALLS = CALLS_BEFORE + 3


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} finds no CUDA device")
    return str(request.param)


@pytest.fixture
def pair(device: str) -> tuple[NetworkDenoiser, NetworkDenoiser]:
    """A student, and its captured double."""
    torch.manual_seed(0)
    unet = build_unet(NetworkRecipe(channels=(8, 16), norm_groups=8), (3, 8, 8), None, 10)
    plain = student_from(NetworkDenoiser(unet, Schedule.cosine())).to(device)
    captured = copy.deepcopy(plain)
    capture_network(captured)
    return plain, captured


def arguments(seed: int, rows: int, device: str) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
    noise = torch.Generator().manual_seed(seed)
    z, t, w = torch.randn(rows, 3, 8, 8, generator=noise), torch.rand(rows, generator=noise), torch.rand(rows)
    null = torch.tensor(10, device=device).expand(rows)  # one number for all rows, as a null condition is
    return z.to(device), t.to(device), {"label": null}, w.to(device)


def test_a_captured_network_answers_as_the_plain_one(pair: tuple[NetworkDenoiser, NetworkDenoiser]) -> None:
    plain, captured = pair
    device = str(next(plain.parameters()).device)
    kept = []
    with torch.no_grad():
        for call in range(CALLS):
            for rows in (4, 2):
                inputs = arguments(10 * call + rows, rows, device)
                kept.append((captured(*inputs), plain(*inputs)))
    for ours, theirs in kept:  # compared at the end: no call overwrites the answer to another
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_a_captured_network_learns_as_the_plain_one(pair: tuple[NetworkDenoiser, NetworkDenoiser]) -> None:
    """Its weights change between the calls, which the replay must see."""
    optimizers = [torch.optim.SGD(network.parameters(), lr=0.05) for network in pair]
    device = str(next(pair[0].parameters()).device)
    for call in range(CALLS):
        inputs = arguments(call, 4, device)
        for network, optimizer in zip(pair, optimizers, strict=True):
            network(*inputs).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for ours, theirs in zip(*(network.parameters() for network in pair), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
