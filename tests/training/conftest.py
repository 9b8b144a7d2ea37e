"""Fixtures of the training tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest


@pytest.fixture(autouse=True, scope="session")
def small_reports() -> Iterator[None]:
    """What a run shows of itself, its tables of rounds and its pictures, is of fewer samples than outside of tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.rounds.LEAST_REFERENCE_STEPS", 16)
        patch.setattr("training.rounds.ROWS", 6)
        patch.setattr("training.distill.SAMPLE_ROWS", 2)
        patch.setattr("training.distill.SAMPLE_COLUMNS", 2)
        yield


@pytest.fixture(scope="session")
def torch_fidelity() -> ModuleType:
    """torch-fidelity. It imports torchvision, of which its Inception uses nothing: empty modules do, if need be.

    The registry has torchvision for the CUDA build of torch alone; beside another build it cannot be imported.
    """
    names = ["torchvision", *(f"torchvision.{name}" for name in ("datasets", "transforms", "transforms.functional"))]
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        modules = {name: ModuleType(name) for name in names}
        for dataset in ("CIFAR10", "CIFAR100", "STL10"):
            setattr(modules["torchvision.datasets"], dataset, object)
        modules["torchvision"].__dict__["transforms"] = modules["torchvision.transforms"]
        modules["torchvision.transforms"].__dict__["functional"] = modules["torchvision.transforms.functional"]
    else:
        modules = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        found: ModuleType = pytest.importorskip("torch_fidelity")
    return found
