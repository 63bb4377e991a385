"""Weighted negative log-likelihood over the head, a chunk at a time, as sums."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ochat_train.model.rows import HeadWithRows, put_row_logits

# Tokens whose logits exist at one time: 1024 x 32,000 fp32 logits are 131 MB.
CHUNK_TOKENS = 1024


class LossSums(NamedTuple):
    """Sums over one micro-batch, never means: ranks and micro-batches add up.

    A named tuple, because DeepSpeed's ZeRO-3 hooks look for tensors in tuples, not in dataclasses.

    nll: scalar f32 with gradient, sum of weight * nll. by_condition: f32[2, 3, K] without gradient, for K conditions.
    by_condition[0] has the sums of weight * x, by_condition[1] those of x alone, each over the positions with
    weight != 0, where x is in turn nll; 1, so that these rows are the sum of weights and the number of tokens; and
    whether the label is the likeliest token, which is known in eval mode alone and 0 in training.
    """

    nll: Tensor
    by_condition: Tensor


class LossHead(nn.Module):
    """The language model's head and the loss in one module, so that [T, vocab] never exists.

    It shares the head's parameters (a Parameter may belong to two modules): under ZeRO-3 DeepSpeed then gathers them
    around this module's forward and backward.
    """

    row_ids: Tensor

    def __init__(self, head: nn.Linear, *, softcap: float | None, num_conditions: int) -> None:
        super().__init__()
        self.weight = head.weight  # [V, C]
        self.bias = head.bias
        self.rows = head.rows if isinstance(head, HeadWithRows) else None  # [n, C]
        self.register_buffer("row_ids", head.row_ids if isinstance(head, HeadWithRows) else None, persistent=False)
        self.softcap = softcap
        self.num_conditions = num_conditions

    def forward(self, hidden: Tensor, labels: Tensor, loss_weights: Tensor, condition_ids: Tensor) -> LossSums:
        """The sums for hidden [T, C], labels i64[T], loss_weights f32[T], condition_ids i32[T].

        Equal to, with logits = softcapped(hidden @ weight.T + bias), the product in the weights' dtype and the rest in
        fp32:

            nll = cross_entropy(logits, labels, reduction="none");  sum(loss_weights * nll)
        """
        weighted = loss_weights.nonzero().squeeze(1)  # only positions with a loss go through the head
        hidden, labels = hidden[weighted], labels[weighted]
        loss_weights, condition_ids = loss_weights[weighted], condition_ids[weighted].long()
        chunks = [
            # Logits are recomputed in the backward pass instead of being kept.
            checkpoint(self._chunk, hidden_chunk, labels_chunk, use_reentrant=False)
            for hidden_chunk, labels_chunk in zip(hidden.split(CHUNK_TOKENS), labels.split(CHUNK_TOKENS), strict=True)
        ]
        # Without a weighted token there is one empty chunk: the sum is 0, and gradients of 0 still reach every rank's
        # reduction.
        nll, is_correct = (torch.cat(parts) for parts in zip(*chunks, strict=True))
        values = torch.stack([nll, torch.ones_like(nll), is_correct]).detach()  # [3, t]
        values = torch.stack([values * loss_weights, values]).double()
        # index_add adds one by one: in f32, 32,768 weights of 0.1 would come out 2.6e-4 too large.
        zeros = torch.zeros(2, 3, self.num_conditions, dtype=torch.float64, device=hidden.device)
        return LossSums((nll * loss_weights).sum(), zeros.index_add(2, condition_ids, values).float())

    def _chunk(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """f32[t] the negative log-likelihood of each label; f32[t] whether it is the likeliest, 0 in training."""
        logits = F.linear(hidden, self.weight, self.bias)
        if self.rows is not None:
            logits = put_row_logits(logits, hidden, self.rows, self.row_ids, self.bias)
        logits = logits.float()
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        nll = F.cross_entropy(logits, labels, reduction="none")
        is_correct = torch.zeros_like(nll) if self.training else (logits.argmax(dim=-1) == labels).float()
        return nll, is_correct.detach()
