"""What a launcher may ask of accelerate: FSDP 2, such that a network computes what the whole one does, and no more."""

from __future__ import annotations

import os

import torch
from accelerate import FullyShardedDataParallelPlugin
from torch.distributed.fsdp import MixedPrecisionPolicy

from training.errors import TrainingError

# Of its own accord accelerate casts all that a network is given, and bf16 has no room for a time: t T and 1000 w
# would be off by several. Autocast puts in bf16 what bears it, so that weights and gradients travel as they are.
AS_GIVEN = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)


def sharding(mixed_precision: str) -> FullyShardedDataParallelPlugin | None:
    """The plugin of a run that the launcher wants sharded; None for others.

    Raises TrainingError for what a launcher asks for and is not done as it says: the recipe has that instead.
    """
    of_the_recipe = {
        "ACCELERATE_DYNAMO_BACKEND": ({"no"}, "scale.compile"),
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ({"1"}, "scale.micro_batch"),
        "ACCELERATE_MIXED_PRECISION": ({"no", mixed_precision}, "precision"),
    }
    for name, (done, instead) in of_the_recipe.items():
        asked = os.environ.get(name)
        if asked is not None and asked.lower() not in done:
            raise TrainingError(f"the launcher sets {name} to {asked}: leave it out, and set {instead} in the recipe")
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return None
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise TrainingError("FSDP 1 would round times and w: launch with --fsdp_version 2")
    plugin.mixed_precision_policy = AS_GIVEN
    return plugin
