"""Conversations to token ids with a loss weight each."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ochat_train.conversations.schema import Conversation
from ochat_train.conversations.template import ChatTemplate, Segment
from ochat_train.tokens.tokenizer import ChatTokenizer


@dataclass(frozen=True, slots=True)
class Example:
    """One training sequence.

    input_ids: i32[L]. loss_weights: f32[L], where loss_weights[t] is the weight of predicting input_ids[t] from what
    stands before it. It is NOT shifted, and loss_weights[0] is 0, because nothing stands before the first token.
    """

    input_ids: npt.NDArray[np.int32]
    loss_weights: npt.NDArray[np.float32]

    @property
    def weight_sum(self) -> float:
        """The sum of the weights, in f64."""
        return float(self.loss_weights.sum(dtype=np.float64))


@dataclass(frozen=True, slots=True)
class Encoded:
    """An example, and the lengths at which it could be cut behind a whole answer, ascending."""

    example: Example
    answer_ends: tuple[int, ...]

    def cut(self, max_tokens: int) -> Example | None:
        """The example up to the last whole answer within `max_tokens`; None when not one answer fits."""
        if len(self.example.input_ids) <= max_tokens:
            return self.example
        fitting = [end for end in self.answer_ends if end <= max_tokens]
        if not fitting:
            return None
        return Example(self.example.input_ids[: fitting[-1]], self.example.loss_weights[: fitting[-1]])


def encode(conversations: Sequence[Conversation], template: ChatTemplate, tokenizer: ChatTokenizer) -> list[Encoded]:
    """Each conversation as token ids and weights.

    Every text piece of the template is encoded on its own, all pieces of the batch at once on all cores; special
    pieces are looked up. Equal to `tokenizer.encode_texts([segment.text])` segment by segment.
    """
    batch = [list(template.segments(conversation)) for conversation in conversations]
    # Headers repeat in every turn: each distinct text is encoded once.
    unique = list(dict.fromkeys(s.text for segments in batch for s in segments if not s.is_special))
    ids_of = dict(zip(unique, tokenizer.encode_texts(unique), strict=True))
    special = {token: np.array([id_], dtype=np.int32) for token, id_ in tokenizer.special_ids.items()}
    return [
        _join(segments, [special[s.text] if s.is_special else ids_of[s.text] for s in segments]) for segments in batch
    ]


def _join(segments: list[Segment], ids: list[npt.NDArray[np.int32]]) -> Encoded:
    ends = np.cumsum([len(piece) for piece in ids])
    weights = np.repeat(
        np.array([segment.weight for segment in segments], dtype=np.float32), [len(piece) for piece in ids]
    )
    weights[0] = 0.0
    answer_ends = tuple(int(end) for end, segment in zip(ends, segments, strict=True) if segment.ends_answer)
    return Encoded(Example(np.concatenate(ids), weights), answer_ends)
