"""The proof that serving equals training: the ids in front of each answer of a store, against those that are served.

A store holds ids and no texts. So the turns of an example are found, their texts decoded, and what encodes to the same
ids again is a conversation that a user could have sent.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ochat_train.conversations.schema import Conversation, Message
from ochat_train.tokens.encode import TokenIds
from ochat_train.tokens.prompt import ControlText, encode_as_one_string, encode_prompt
from ochat_train.tokens.recondition import Frame, find_turns, make_frame
from ochat_train.tokens.store import TokenStore
from ochat_train.tokens.tokenizer import ChatTokenizer

# How a server may make ids of a chat: see `encode_prompt`, `encode_as_one_string`.
WAYS: dict[str, Callable[[Conversation, ChatTokenizer], list[int]]] = {
    "piece by piece": encode_prompt,
    "as one string": encode_as_one_string,
}


@dataclass(frozen=True, slots=True)
class Difference:
    """The first prompt that is served with other ids: the tokens from where they part, at most 12 of each."""

    conversation: str
    answer: int
    position: int
    trained: list[str]
    served: list[str]

    def __str__(self) -> str:
        return (
            f"conversation {self.conversation}, answer {self.answer}, from token {self.position} on\n"
            f"  trained: {' '.join(self.trained)}\n  served:  {' '.join(self.served)}"
        )


@dataclass(frozen=True, slots=True)
class Way:
    """What came of one way to make ids: answers whose prompts are equal, differ, and the first difference."""

    num_equal: int
    num_different: int
    first: Difference | None


@dataclass(frozen=True, slots=True)
class Parity:
    """What was compared, in prompts: what stands before each answer of `num_conversations` examples.

    num_empty: no message stands there, and no server can be asked that; a part of a split conversation may begin with
    an answer. num_not_text: a text does not decode and encode back. Neither is compared. num_forging: a text spells a
    special token; as one string these are not compared, since the gate refuses them. ways: by the names of WAYS.
    """

    num_conversations: int
    num_empty: int
    num_not_text: int
    num_forging: int
    ways: dict[str, Way]

    @property
    def num_compared(self) -> int:
        """Prompts that were compared in one way at least."""
        return max(way.num_equal + way.num_different for way in self.ways.values())

    @property
    def num_different(self) -> int:
        """Prompts that differ, of the way that has most of them."""
        return max(way.num_different for way in self.ways.values())

    @property
    def is_equal(self) -> bool:
        """Whether something was compared, and no prompt differed."""
        return self.num_compared > 0 and self.num_different == 0

    def __str__(self) -> str:
        reasons = {
            "no message before the answer": self.num_empty,
            "texts that do not decode and encode back": self.num_not_text,
        }
        left_out = "; ".join(f"{number:,} with {reason}" for reason, number in reasons.items() if number)
        lines = [
            f"prompts of {self.num_conversations:,} conversations of the store, as they are served: "
            f"{self.num_compared:,} compared, {self.num_empty + self.num_not_text:,} not"
            + (f" ({left_out})" if left_out else "")
        ]
        for name, way in self.ways.items():
            lines.append(f"  {name}: {way.num_equal:,} equal to training, {way.num_different:,} different")
            if name == "as one string" and self.num_forging:
                lines[-1] += f", {self.num_forging:,} refused for text that spells a special token"
            if way.first is not None:
                lines.append(f"  the first: {way.first}")
        return "\n".join(lines)


def check_parity(store: TokenStore, tokenizer: ChatTokenizer, *, num: int) -> Parity:
    """Compare the prompts of all answers of `num` conversations, evenly spaced over the split."""
    frames = [make_frame(tokenizer, condition) for condition in store.manifest.conditions]
    control = ControlText(tokenizer)
    positions = np.unique(np.linspace(0, len(store) - 1, min(num, len(store))).astype(np.int64)).tolist()
    num_empty = num_not_text = num_forging = 0
    equal, different = dict.fromkeys(WAYS, 0), dict.fromkeys(WAYS, 0)
    firsts: dict[str, Difference | None] = dict.fromkeys(WAYS)
    for position in positions:
        ids = store[position].input_ids
        condition_id = int(store.condition_ids[position])
        for number, (messages, end) in enumerate(_prompts(ids, frames[condition_id], tokenizer)):
            if not messages:
                num_not_text += messages is None
                num_empty += messages is not None
                continue
            trained = ids[:end].tolist()
            prompt = Conversation("", "", store.manifest.conditions[condition_id], "", messages)
            is_forging = control.find(prompt) is not None
            num_forging += is_forging
            for name, encode in WAYS.items():
                if is_forging and encode is encode_as_one_string:
                    continue
                served = encode(prompt, tokenizer)
                equal[name] += served == trained
                different[name] += served != trained
                if served != trained and firsts[name] is None:
                    firsts[name] = _difference(store.name(position), number, trained, served, tokenizer)
    ways = {name: Way(equal[name], different[name], firsts[name]) for name in WAYS}
    return Parity(len(positions), num_empty, num_not_text, num_forging, ways)


def _prompts(ids: TokenIds, frame: Frame, tokenizer: ChatTokenizer) -> Iterator[tuple[tuple[Message, ...] | None, int]]:
    """For each answer the messages before it, and how many tokens of the example they are.

    None when a text of theirs does not encode to its ids, as the second half of a text that a split has cut may not.
    """
    turns = list(find_turns(ids, frame))
    pieces = [ids[turn.text_start : turn.text_end] for turn in turns]
    texts = [tokenizer.pretrained.decode(piece, clean_up_tokenization_spaces=False) for piece in pieces]
    again = tokenizer.encode_texts(texts)
    messages: tuple[Message, ...] | None = ()
    for turn, text, piece, encoded in zip(turns, texts, pieces, again, strict=True):
        if turn.role == "assistant":
            yield messages, turn.text_start
        if messages is not None:
            messages = (*messages, Message(turn.role, text)) if np.array_equal(piece, encoded) else None


def _difference(name: str, answer: int, trained: list[int], served: list[int], tokenizer: ChatTokenizer) -> Difference:
    parts = (position for position, (one, other) in enumerate(zip(trained, served, strict=False)) if one != other)
    position = next(parts, min(len(trained), len(served)))
    shown = [tokenizer.pretrained.convert_ids_to_tokens(ids[position : position + 12]) for ids in (trained, served)]
    return Difference(name, answer, position, *shown)
