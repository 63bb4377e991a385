"""The embedding and the head of a frozen model in which the rows of a few tokens are trained."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class EmbeddingWithRows(nn.Embedding):
    """The embedding `base`, in which `rows` [n, C] stand in place of the rows `row_ids` of the weight.

    The weight stays the Parameter of `base`, under the same name, so that it can be frozen while the rows learn. They
    begin as those of the weight. row_ids: distinct, i64[n].
    """

    row_ids: Tensor

    def __init__(self, base: nn.Embedding, row_ids: Tensor) -> None:
        super().__init__(base.num_embeddings, base.embedding_dim, base.padding_idx, device="meta")
        self.weight = base.weight  # [V, C]
        self.rows = nn.Parameter(base.weight.detach()[row_ids])
        self.register_buffer("row_ids", row_ids)

    def forward(self, input: Tensor) -> Tensor:
        """Equal to F.embedding(input, weight with the rows in it), without a copy of the weight."""
        is_row = torch.eq(input[..., None], self.row_ids)  # [..., n]: tokens that a template adds are few
        embedded = F.embedding(is_row.int().argmax(dim=-1), self.rows)
        return torch.where(is_row.any(dim=-1)[..., None], embedded, super().forward(input))


class HeadWithRows(nn.Linear):
    """The head `base` with `rows` as in EmbeddingWithRows; tied to an embedding, the two share one Parameter."""

    row_ids: Tensor

    def __init__(self, base: nn.Linear, row_ids: Tensor, tied: EmbeddingWithRows | None) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias  # [V, C], [V]
        self.rows = nn.Parameter(base.weight.detach()[row_ids]) if tied is None else tied.rows
        self.register_buffer("row_ids", row_ids)

    def forward(self, input: Tensor) -> Tensor:
        """Equal to F.linear(input, weight with the rows in it, bias)."""
        row_logits = F.linear(input, self.rows, None if self.bias is None else self.bias[self.row_ids])
        return super().forward(input).index_copy(-1, self.row_ids, row_logits)
