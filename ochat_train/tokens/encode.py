"""Conversations to token ids with a loss weight each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ochat_train.conversations.schema import Conversation, Role
from ochat_train.conversations.template import ChatTemplate, Segment
from ochat_train.tokens.tokenizer import ChatTokenizer, TextEncoder

TokenIds = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Example:
    """One training sequence.

    input_ids: i32[L]. loss_weights: f32[L], where loss_weights[t] is the weight of predicting input_ids[t] from the
    tokens before it. It is NOT shifted, and loss_weights[0] is 0, because no token comes before the first one.
    """

    input_ids: TokenIds
    loss_weights: npt.NDArray[np.float32]

    @property
    def weight_sum(self) -> float:
        """The sum of the weights, in f64."""
        return float(self.loss_weights.sum(dtype=np.float64))


class Turn(NamedTuple):
    """Where a turn is in an example, in tokens: its header, its text, then the end token with what follows it."""

    role: Role
    start: int
    text_start: int
    text_end: int
    end: int

    @property
    def length(self) -> int:
        """The number of tokens."""
        return self.end - self.start

    @property
    def weighted_end(self) -> int:
        """Where its text and end token end, which are all of it that may have a weight."""
        return min(self.text_end + 1, self.end)

    @property
    def frame_length(self) -> int:
        """The number of tokens besides the text."""
        return self.length - (self.text_end - self.text_start)


@dataclass(frozen=True, slots=True)
class Encoded:
    """A whole conversation as one example, and where its turns are.

    edges: i64[1 + 4 N] for N turns: the offset at which the prefix ends (the beginning, the condition where it comes
    first, and the system message), then for each turn those at which its header, its text, its end token and the turn
    end. Example: `<s> User: Hi <|end|> Bot: Hello <|end|>`, a token a word, has edges [1, 2, 3, 4, 4, 5, 6, 7, 7].
    can_split: whether the prefix is all that each part of it must begin with.
    """

    example: Example
    roles: tuple[Role, ...]
    edges: npt.NDArray[np.int64]
    can_split: bool = True

    @property
    def prefix_length(self) -> int:
        """The number of tokens before the first turn."""
        return int(self.edges[0])

    @property
    def turns(self) -> list[Turn]:
        """The turns in order; each starts where the one before it ends."""
        edges = self.edges.tolist()
        return [
            Turn(role, *bounds)
            for role, *bounds in zip(self.roles, edges[::4], edges[1::4], edges[2::4], edges[4::4], strict=False)
        ]


def encode(
    conversations: Sequence[Conversation], template: ChatTemplate, tokenizer: ChatTokenizer | TextEncoder
) -> list[Encoded]:
    """Each conversation as token ids and weights.

    Every text of the template and of the conversation is encoded on its own, all texts of the batch at once on all
    cores; special tokens are looked up. Equal to joining `tokenizer.encode_texts([segment.text])`, or the special
    token's id, for each of `template.segments(conversation)`.
    """
    # What the template adds repeats in every turn: its ids are joined once.
    prefixes = {key: list(template.prefix_segments(*key)) for key in {(c.condition, c.system) for c in conversations}}
    headers = {
        key: list(template.header_segments(*key))
        for key in {(m.role, c.condition) for c in conversations for m in c.messages}
    }
    after_end = list(template.after_end_segments())
    added = [segment for segments in (*prefixes.values(), *headers.values(), after_end) for segment in segments]
    texts = [segment.text for segment in added if not segment.is_special]
    texts = list(dict.fromkeys([*texts, *(message.text for c in conversations for message in c.messages)]))
    ids_of = dict(zip(texts, tokenizer.encode_texts(texts), strict=True))
    special = {token: np.array([id_], dtype=np.int32) for token, id_ in tokenizer.special_ids.items()}

    def join(segments: list[Segment]) -> TokenIds:
        ids = [special[segment.text] if segment.is_special else ids_of[segment.text] for segment in segments]
        return np.concatenate([np.empty(0, dtype=np.int32), *ids])

    prefix_ids = {key: join(segments) for key, segments in prefixes.items()}
    header_ids = {key: join(segments) for key, segments in headers.items()}
    end_ids, after_end_ids = special[template.end_token], join(after_end)

    encoded = []
    for conversation in conversations:
        condition = conversation.condition
        parts, weights = [prefix_ids[condition, conversation.system]], [0.0]
        for message in conversation.messages:
            weight = message.weight or 0.0
            parts += (header_ids[message.role, condition], ids_of[message.text], end_ids, after_end_ids)
            weights += (0.0, weight, weight, 0.0)
        lengths = [len(part) for part in parts]
        example = Example(np.concatenate(parts), np.repeat(np.array(weights, dtype=np.float32), lengths))
        example.loss_weights[:1] = 0.0
        roles = tuple(message.role for message in conversation.messages)
        encoded.append(Encoded(example, roles, np.cumsum(lengths)))
    return encoded
