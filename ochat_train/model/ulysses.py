"""Ulysses sequence parallelism: a rank has a share of the tokens, and in attention all tokens of a share of the heads.

Before attention the ranks of a group exchange tokens for heads, and after it heads for tokens (Jacobs et al.,
"DeepSpeed Ulysses", arXiv 2309.14509). All other layers work on each token by itself, which `check_split` of probe.py
makes sure of.
"""

import math
from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from ochat_train.model.sdpa import AttentionOptions, repeat_heads


class Exchange(Protocol):
    """What the ranks of a group do together. size: of the group; place: of this rank in it."""

    size: int
    place: int

    def all_to_all(self, parts: Tensor) -> Tensor:
        """[size, ...]: part i from rank i, which parts [size, ...] of each rank are for; with a gradient."""

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the group, on each rank, without gradient."""


class Reversed:
    """A group of one whose ranks hold the tokens in reversed order, to see whether a model minds their order."""

    size, place = 1, 0

    def all_to_all(self, parts: Tensor) -> Tensor:
        """parts [1, T, ...] with the tokens in reversed order."""
        return parts.flip(1)

    def sum(self, values: Tensor) -> Tensor:
        """The values."""
        return values


class Sized:
    """A group of `size` on one device, whose exchanges take as many bytes and give no values."""

    place = 0

    def __init__(self, size: int) -> None:
        self.size = size

    def all_to_all(self, parts: Tensor) -> Tensor:
        """A copy."""
        return parts.clone()

    def sum(self, values: Tensor) -> Tensor:
        """The values."""
        return values


def attend_in_group(
    attend: Callable[[Tensor, Tensor, Tensor, AttentionOptions], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: AttentionOptions,
    exchange: Exchange,
) -> Tensor:
    """`attend` over all T tokens of a group, of which this rank has t = T / size: [t, Hq, D].

    q [t, Hq, D], k and v [t, Hkv, D]; options: of all T tokens and all heads. Where the group does not divide the
    Hkv heads of k and v, each is repeated, as often as must be: to the least common multiple. Raises ValueError when it
    does not divide the Hq heads.
    """
    num_heads, size = q.shape[1], exchange.size
    if num_heads % size:
        raise ValueError(f"packing.sequence_parallel {size} does not divide {num_heads} attention heads")
    if k.shape[1] % size:
        k, v = repeat_heads(k, v, math.lcm(k.shape[1], size))
    if options.sinks is not None:
        options = options._replace(sinks=options.sinks.chunk(size)[exchange.place])
    q, k, v = (_to_heads(part, exchange) for part in (q, k, v))
    out = attend(q, k, v, options)  # [T, Hq / size, D]
    parts = exchange.all_to_all(out.unflatten(0, (size, -1)))  # [size, t, Hq / size, D]: of the heads of each rank
    return parts.transpose(0, 1).flatten(1, 2)


def _to_heads(part: Tensor, exchange: Exchange) -> Tensor:
    """[T, H / size, D] of all tokens of the group from [t, H, D]."""
    by_rank = part.unflatten(1, (exchange.size, -1)).transpose(0, 1).contiguous()  # [size, t, H / size, D]
    return exchange.all_to_all(by_rank).flatten(0, 1)
