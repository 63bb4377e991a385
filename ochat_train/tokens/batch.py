"""Examples to one packed batch. The only place where labels are shifted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ochat_train.tokens.encode import Example


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """T tokens in B sequences, one after the other, without padding between them.

    input_ids i64[T], position_ids i64[T] (from 0 in each sequence), labels i64[T] (the next token of the same
    sequence; 0 with weight 0 at its end), loss_weights f32[T] (of predicting the label), loss_positions i64[S] (where
    the weight is not 0, ascending; computed on the host, so that the device is not asked), cu_seqlens i32[B+1]
    (borders), max_seqlen (a Python int, so that no layer waits for the device), condition_ids i32[T], num_tokens (of
    examples; the tokens after them fill the batch up). Of a `share`, cu_seqlens and max_seqlen are those of the whole.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    loss_weights: Tensor
    loss_positions: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    condition_ids: Tensor
    num_tokens: int

    def share(self, place: int, num: int) -> Self:
        """The `place`-th of `num` shares of T / num tokens each, for ranks that attend to all of them together."""
        size = len(self.input_ids) // num
        assert size * num == len(self.input_ids)  # collate
        begin = place * size
        names = ("input_ids", "position_ids", "labels", "loss_weights", "condition_ids")
        of_tokens: dict[str, Any] = {name: getattr(self, name)[begin : begin + size] for name in names}
        is_here = (self.loss_positions >= begin) & (self.loss_positions < begin + size)
        return replace(
            self,
            **of_tokens,
            loss_positions=self.loss_positions[is_here] - begin,
            num_tokens=min(max(self.num_tokens - begin, 0), size),
        )

    def to(self, device: torch.device | str) -> Self:
        """The batch on a device. From pinned memory the copy is asynchronous."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self, device: torch.device) -> Self:
        """The batch in page-locked memory, from which a GPU copies by itself; for other devices the batch itself."""
        if device.type != "cuda":
            return self
        with torch.cuda.device(device):  # a new thread defaults to device 0, and would allocate memory there
            return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        changed: dict[str, Any] = {
            field.name: change(value)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **changed)


# On a GPU a batch is padded to a multiple of this number of tokens. Matrix kernels compute tiles of up to 128 rows, so
# a part of a tile takes as long as a whole one, and compiled kernels are faster for multiples of 16. On average this
# adds 64 tokens, 0.2 % of 32,768. Not measured on a GPU.
CUDA_MULTIPLE = 128

# A rank without examples still takes part in every collective of the step: one token of weight 0.
_NOTHING = Example(np.zeros(1, dtype=np.int32), np.zeros(1, dtype=np.float32))


def collate(examples: Sequence[Example], condition_ids: npt.ArrayLike, *, multiple: int = 1) -> PackedBatch:
    """One batch of the examples, in order; `condition_ids` has one id an example.

    T is padded to a multiple of `multiple` by one more sequence of tokens 0. No token of an example attends to it, and
    it has no loss, so it changes no sum and no gradient.

    >>> a = Example(np.array([5, 6, 7], np.int32), np.array([0, 0, 1], np.float32))
    >>> batch = collate([a], [0])
    >>> batch.labels.tolist(), batch.loss_weights.tolist(), batch.loss_positions.tolist()
    ([6, 7, 0], [0.0, 1.0, 0.0], [1])
    >>> collate([a], [0], multiple=4).cu_seqlens.tolist()
    [0, 3, 4]
    """
    num_tokens = sum(len(example.input_ids) for example in examples)
    if not examples:
        examples, condition_ids = [_NOTHING], [0]
    condition_ids = np.asarray(condition_ids, dtype=np.int32)
    if padding := -sum(len(example.input_ids) for example in examples) % multiple:
        nothing = Example(np.zeros(padding, dtype=np.int32), np.zeros(padding, dtype=np.float32))
        examples, condition_ids = [*examples, nothing], np.append(condition_ids, np.int32(0))
    lengths = [len(example.input_ids) for example in examples]
    zero = np.zeros(1, dtype=np.int32)
    labels = [part for example in examples for part in (example.input_ids[1:], zero)]
    weights = [part for example in examples for part in (example.loss_weights[1:], zero)]
    loss_weights = np.concatenate(weights).astype(np.float32)
    return PackedBatch(
        input_ids=torch.from_numpy(np.concatenate([e.input_ids for e in examples]).astype(np.int64)),
        position_ids=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])),
        labels=torch.from_numpy(np.concatenate(labels).astype(np.int64)),
        loss_weights=torch.from_numpy(loss_weights),
        loss_positions=torch.from_numpy(np.flatnonzero(loss_weights)),
        cu_seqlens=torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32)),
        max_seqlen=max(lengths),
        condition_ids=torch.from_numpy(np.repeat(condition_ids, lengths)),
        num_tokens=num_tokens,
    )
