"""An example under another condition than its own: the same texts after other headers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ochat_train.conversations.base_template import BaseTemplate
from ochat_train.conversations.schema import Conversation, Message, Role
from ochat_train.conversations.template import ChatTemplate
from ochat_train.tokens.encode import Example, TokenIds, Turn, encode
from ochat_train.tokens.reread import Rendering, render_again
from ochat_train.tokens.store import Examples
from ochat_train.tokens.tokenizer import ChatTokenizer

_ROLES: tuple[Role, ...] = ("user", "assistant", "tool", "system")


@dataclass(frozen=True, slots=True)
class Frame:
    """What a template puts around the texts of a conversation under one condition, as i32[...] token ids.

    beginning: before the first turn, without the system message. headers: of a turn of each role; that of a system
    message depends on no condition, and may be empty. end_id and after_end follow each text.
    """

    beginning: TokenIds
    headers: Mapping[Role, TokenIds]
    end_id: int
    after_end: TokenIds


def make_frame(tokenizer: ChatTokenizer, condition: str) -> Frame:
    """The frame of the tokenizer's template under a condition; "" is none."""
    assert isinstance(tokenizer.template, ChatTemplate)
    silent = Conversation("", "", condition, "", tuple(Message(role, "") for role in _ROLES))
    encoded = encode([silent], tokenizer.template, tokenizer)[0]
    ids, turns = encoded.example.input_ids, encoded.turns
    return Frame(
        beginning=ids[: encoded.prefix_length],
        headers={turn.role: ids[turn.start : turn.text_start] for turn in turns},
        end_id=tokenizer.end_id,
        after_end=ids[turns[0].text_end + 1 : turns[0].end],
    )


def recondition(example: Example, own: Frame, other: Frame) -> Example:
    """The example, made under the frame `own`, as it would be under `other`.

    Equal to encoding its conversation with the other condition. Texts, end tokens and their weights stay as they are;
    those of a part of a split conversation are cut where they were.
    """
    ids, weights = [other.beginning], [np.zeros(len(other.beginning), np.float32)]
    for turn in find_turns(example.input_ids, own):
        header = other.headers[turn.role]
        ids += (header, example.input_ids[turn.text_start : turn.end])
        weights += (np.zeros(len(header), np.float32), example.loss_weights[turn.text_start : turn.end])
    return Example(np.concatenate(ids), np.concatenate(weights))


def find_turns(ids: TokenIds, frame: Frame) -> Iterator[Turn]:
    """The turns of an example that was made under the frame, system messages included.

    Only turns end in an end token, because text never becomes a special token. So every turn is found, and it begins
    with its header: the longest of those that fit. One case is ambiguous: where a template gives system messages no
    header, one whose text, or the part of it that a split left, begins like the header of another turn is read as that
    turn. The last turn of a part of a split conversation may lack its end token.
    """
    assert np.array_equal(ids[: len(frame.beginning)], frame.beginning), "the example has another condition"
    start = len(frame.beginning)
    ends = [position for position in np.flatnonzero(ids == frame.end_id).tolist() if position >= start]
    for text_end in [*ends, len(ids)]:
        if start == len(ids):
            return
        text_starts = {role: start + len(header) for role, header in frame.headers.items()}
        fitting = [role for role, end in text_starts.items() if np.array_equal(ids[start:end], frame.headers[role])]
        assert fitting, "a turn begins without a header of the template"
        role = max(fitting, key=text_starts.__getitem__)
        end = min(text_end + 1 + len(frame.after_end), len(ids))
        yield Turn(role, start, text_starts[role], text_end, end)
        start = end


def frame_of(tokenizer: ChatTokenizer, condition: str) -> Frame | Rendering:
    """What is around texts under a condition: the frame of a template of pieces, or the base's own template."""
    if isinstance(tokenizer.template, BaseTemplate):
        return Rendering(tokenizer, condition)
    return make_frame(tokenizer, condition)


class Reconditioned:
    """Examples under other conditions, each made when it is read.

    frames: (own, other) of each condition id. lengths: i32[n], of the examples under the other condition, and more than
    any limit where one cannot be made. weight_sums and condition_ids: of the examples as they were made.
    """

    def __init__(self, examples: Examples, frames: Sequence[tuple[Frame | Rendering, Frame | Rendering]]) -> None:
        self.weight_sums, self.condition_ids = examples.weight_sums, examples.condition_ids
        self._examples, self._frames = examples, frames
        made = (self._make(position) for position in range(len(examples)))
        lengths = (len(example.input_ids) if example else np.iinfo(np.int32).max for example in made)
        self.lengths: npt.NDArray[np.int32] = np.fromiter(lengths, np.int32, len(examples))

    def __len__(self) -> int:
        return len(self.condition_ids)

    def __getitem__(self, position: int) -> Example:
        example = self._make(position)
        assert example is not None, "its length says that it is left out"
        return example

    def _make(self, position: int) -> Example | None:
        example, (own, other) = self._examples[position], self._frames[self.condition_ids[position]]
        if isinstance(own, Frame) and isinstance(other, Frame):
            return recondition(example, own, other)
        assert isinstance(own, Rendering) and isinstance(other, Rendering)
        return render_again(example, own, other)


class Selected:
    """The examples at `positions`, i64[n]."""

    def __init__(self, examples: Examples, positions: npt.NDArray[np.int64]) -> None:
        self.lengths = examples.lengths[positions]
        self.weight_sums = examples.weight_sums[positions]
        self.condition_ids = examples.condition_ids[positions]
        self._examples, self._positions = examples, positions.tolist()

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, position: int) -> Example:
        return self._examples[self._positions[position]]
