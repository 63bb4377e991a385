"""The ranks that share micro-batches, and what they exchange through DeepSpeed's operator."""

import torch.distributed as dist
from deepspeed.sequence.layer import _dim_zero_all_to_all, register_all_to_all_group
from torch import Tensor

from ochat_train.training.engine import World


class Group:
    """The `Exchange` of this rank with the others of a process group.

    DeepSpeed's `UlyssesSPAttentionHF` around the same operator has one head size and number of heads for all layers,
    leaves attention sinks whole, and gathers the positions again in each layer.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group, self.size, self.place = group, group.size(), group.rank()
        register_all_to_all_group(group)

    def all_to_all(self, parts: Tensor) -> Tensor:
        """See `Exchange`."""
        received: Tensor = _dim_zero_all_to_all(self._group, parts)
        return received

    def sum(self, values: Tensor) -> Tensor:
        """See `Exchange`."""
        summed = values.detach().clone()
        dist.all_reduce(summed, group=self._group)
        return summed


def join_group(world: World) -> Group | None:
    """The group of this rank, of neighbouring ranks; None where each rank has micro-batches of its own.

    All ranks call it together.
    """
    if world.sequence_parallel == 1:
        return None
    group, _ = dist.new_subgroups(world.sequence_parallel)
    return Group(group)
