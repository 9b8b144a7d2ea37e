"""How accelerate's FSDP 2 is to shard a network: such that it computes what the whole one does."""

from __future__ import annotations

import os

import torch
from accelerate import FullyShardedDataParallelPlugin
from torch.distributed.fsdp import MixedPrecisionPolicy

# Of its own accord accelerate casts all that a network is given, and bf16 has no room for a time: t T and 1000 w
# would be off by several. Autocast puts in bf16 what bears it, so that weights and gradients travel as they are.
AS_GIVEN = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)


def sharding() -> FullyShardedDataParallelPlugin | None:
    """The plugin of a run that the launcher wants sharded; None for others."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return None
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version == 2:
        plugin.mixed_precision_policy = AS_GIVEN
    return plugin
