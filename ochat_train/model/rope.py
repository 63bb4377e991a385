"""Rotary embeddings whose frequencies depend on a sequence's length, for packed sequences."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ochat_train.model.ulysses import Exchange


def rotate_each_alone(lm: nn.Module, exchange: Exchange | None = None) -> None:
    """Let the rotary embeddings of `lm` see one sequence at a time, in place, where their frequencies need that.

    LongRoPE has one set of frequencies for short sequences and another for long ones, dynamic NTK scaling has one for
    each length. transformers' modules choose by the largest position of the row, so that in a packed row a sequence's
    result would depend on its neighbours. All others are left as they are. exchange: of the ranks that have shares of a
    batch.
    """
    for module in lm.modules():
        kinds = getattr(module, "rope_type", None)  # by kind of layer, where these differ
        names = kinds.values() if isinstance(kinds, dict) else [kinds]
        if any(name is not None and (name == "longrope" or "dynamic" in name) for name in names):
            module.forward = OneByOne(module.forward, exchange)


class OneByOne:
    """A rotary embedding's forward on each of the packed sequences, joined.

    It waits for the device, to read where the sequences begin.
    """

    def __init__(self, forward: Any, exchange: Exchange | None) -> None:
        self.forward, self.exchange = forward, exchange

    def __call__(self, x: Tensor, position_ids: Tensor, *args: Any, **options: Any) -> Any:
        """cos and sin, [1, T, D] each, or what else the module returns, for position_ids i64[1, T]."""
        if position_ids.is_meta:  # only the sizes are asked for
            return inspect.unwrap(self.forward.__func__)(self.forward.__self__, x, position_ids, *args, **options)
        if self.exchange is not None:  # a share may begin within a sequence, so that all shares are computed
            position_ids = self.exchange.all_to_all(position_ids.repeat(self.exchange.size, 1)).view(1, -1)
        starts = (position_ids[0] == 0).nonzero().flatten().tolist()
        ends = [*starts[1:], position_ids.shape[1]]
        outputs = []
        for start, end in zip(starts, ends, strict=True):
            # A single position sets frequencies back that an earlier sequence has left.
            self.forward(x, position_ids[:, start : start + 1], *args, **options)
            outputs.append(self.forward(x, position_ids[:, start:end], *args, **options))
        if isinstance(outputs[0], tuple):
            return tuple(self._own(torch.cat(parts, dim=1)) for parts in zip(*outputs, strict=True))
        return self._own(torch.cat(outputs, dim=1))

    def _own(self, whole: Tensor) -> Tensor:
        """This rank's share of [1, T, D]."""
        if self.exchange is None:
            return whole
        shares = self.exchange.all_to_all(whole.unflatten(1, (self.exchange.size, -1))[0])
        return shares[self.exchange.place, None]
