"""The proof that serving equals training: the ids in front of each answer of a store, against those that are served.

A store holds ids and no texts. So the turns of an example are found, their texts decoded, and what encodes to the same
ids again is a conversation that a user could have sent.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ochat_train.conversations.schema import Conversation, Message
from ochat_train.tokens.encode import TokenIds, Turn
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
    """What was compared. num_not_text: conversations left out, since a text of theirs does not decode and encode back.

    num_forging: answers behind text that spells a special token; made as one string, their ids are not compared, since
    the gate refuses them. ways: by the names of WAYS.
    """

    num_conversations: int
    num_not_text: int
    num_forging: int
    ways: dict[str, Way]

    @property
    def is_equal(self) -> bool:
        """Whether something was compared, and no prompt differed."""
        return all(way.num_equal and not way.num_different for way in self.ways.values())

    def __str__(self) -> str:
        lines = [f"prompts of {self.num_conversations:,} conversations of the store, as they are served"]
        if self.num_not_text:
            lines[0] += f"; {self.num_not_text:,} left out, whose texts do not decode and encode back"
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
    num_not_text = num_forging = 0
    equal, different = dict.fromkeys(WAYS, 0), dict.fromkeys(WAYS, 0)
    firsts: dict[str, Difference | None] = dict.fromkeys(WAYS)
    for position in positions:
        ids = store[position].input_ids
        condition_id = int(store.condition_ids[position])
        read = _read(ids, frames[condition_id], store.manifest.conditions[condition_id], tokenizer)
        if read is None:
            num_not_text += 1
            continue
        for number, (prompt, end) in enumerate(_prompts(*read)):
            trained = ids[:end].tolist()
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
    return Parity(len(positions), num_not_text, num_forging, ways)


def _read(
    ids: TokenIds, frame: Frame, condition: str, tokenizer: ChatTokenizer
) -> tuple[Conversation, list[Turn]] | None:
    """The conversation of an example and its turns; None when one of its texts does not encode to its ids."""
    turns = list(find_turns(ids, frame))
    pieces = [ids[turn.text_start : turn.text_end] for turn in turns]
    texts = [tokenizer.pretrained.decode(piece, clean_up_tokenization_spaces=False) for piece in pieces]
    again = tokenizer.encode_texts(texts)
    if not all(np.array_equal(one, other) for one, other in zip(pieces, again, strict=True)):
        return None
    messages = tuple(Message(turn.role, text) for turn, text in zip(turns, texts, strict=True))
    return Conversation("", "", condition, "", messages), turns


def _prompts(conversation: Conversation, turns: list[Turn]) -> Iterator[tuple[Conversation, int]]:
    """For each answer what stands before it, and how many tokens of the example that is."""
    for position, turn in enumerate(turns):
        if turn.role == "assistant":
            before = conversation.messages[:position]
            yield Conversation("", "", conversation.condition, "", before), turn.text_start


def _difference(name: str, answer: int, trained: list[int], served: list[int], tokenizer: ChatTokenizer) -> Difference:
    parts = (position for position, (one, other) in enumerate(zip(trained, served, strict=False)) if one != other)
    position = next(parts, min(len(trained), len(served)))
    shown = [tokenizer.pretrained.convert_ids_to_tokens(ids[position : position + 12]) for ids in (trained, served)]
    return Difference(name, answer, position, *shown)
