"""A check that serving equals training: the ids before each answer of a store against those that servers make.

A store holds ids and no texts. So the turns of an example are found, their texts decoded, and what encodes to the same
ids again is a conversation that a user could have sent.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from ochat_train.conversations.schema import Conversation, Message
from ochat_train.tokens.chat_template import ControlText, encode_as_one_string, encode_prompt
from ochat_train.tokens.encode import Example
from ochat_train.tokens.recondition import Frame, find_turns, frame_of
from ochat_train.tokens.reread import Rendering, read_prompts
from ochat_train.tokens.store import TokenStore
from ochat_train.tokens.tokenizer import ChatTokenizer

# How a server may make ids of a chat: see `encode_prompt`, `encode_as_one_string`.
WAYS: dict[str, Callable[[Conversation, ChatTokenizer], list[int]]] = {
    "piece by piece": encode_prompt,
    "as one string": encode_as_one_string,
}


@dataclass(frozen=True, slots=True)
class Difference:
    """The first prompt that is served with other ids: the tokens from the first that differs, at most 12 of each."""

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


@dataclass(slots=True)
class Way:
    """The result for one way to make ids: answers whose prompts are equal, that differ, and the first difference."""

    num_equal: int = 0
    num_different: int = 0
    first: Difference | None = None


@dataclass(slots=True)
class PromptParity:
    """What was compared, in prompts: what comes before each answer of `num_conversations` examples.

    num_empty: no message comes before the answer, as in a part of a split conversation that begins with it, so no
    server can be asked for it. num_not_text: a text does not decode and encode back. Neither is compared. num_forging:
    a text spells a special token; as one string these are not compared, since the gate refuses them. ways: by the names
    of WAYS.
    """

    num_conversations: int
    num_empty: int = 0
    num_not_text: int = 0
    num_forging: int = 0
    ways: dict[str, Way] = field(default_factory=lambda: {name: Way() for name in WAYS})

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


def check_parity(store: TokenStore, tokenizer: ChatTokenizer, *, num: int) -> PromptParity:
    """Compare the prompts of all answers of `num` conversations, evenly spaced over the split."""
    frames = [frame_of(tokenizer, condition) for condition in store.manifest.conditions]
    control = ControlText(tokenizer)
    positions = np.unique(np.linspace(0, len(store) - 1, min(num, len(store))).astype(np.int64)).tolist()
    parity = PromptParity(len(positions))
    for position in positions:
        example = store[position]
        ids, condition_id = example.input_ids, int(store.condition_ids[position])
        for number, (messages, end) in enumerate(prompts_of(example, frames[condition_id], tokenizer)):
            if not messages:
                parity.num_not_text += messages is None
                parity.num_empty += messages is not None
                continue
            trained = ids[:end].tolist()
            prompt = Conversation("", "", store.manifest.conditions[condition_id], "", messages)
            is_forging = control.find(prompt) is not None
            parity.num_forging += is_forging
            for name, encode in WAYS.items():
                if is_forging and encode is encode_as_one_string:
                    continue
                served, way = encode(prompt, tokenizer), parity.ways[name]
                way.num_equal += served == trained
                way.num_different += served != trained
                if served != trained and way.first is None:
                    way.first = _difference(store.name(position), number, trained, served, tokenizer)
    return parity


def prompts_of(
    example: Example, frame: Frame | Rendering, tokenizer: ChatTokenizer
) -> Iterator[tuple[tuple[Message, ...] | None, int]]:
    """For each answer the messages before it, and how many tokens of the example they are.

    None instead of messages when one of their texts does not encode to its ids: the second half of a text that a split
    has cut may not.
    """
    if not isinstance(frame, Frame):
        yield from read_prompts(example, frame)
        return
    ids = example.input_ids
    turns = list(find_turns(ids, frame))
    texts_ids = [ids[turn.text_start : turn.text_end] for turn in turns]
    texts = [tokenizer.pretrained.decode(text_ids, clean_up_tokenization_spaces=False) for text_ids in texts_ids]
    messages: tuple[Message, ...] | None = ()
    for turn, text, text_ids, again in zip(turns, texts, texts_ids, tokenizer.encode_texts(texts), strict=True):
        if turn.role == "assistant":
            yield messages, turn.text_start
        if messages is not None:
            messages = (*messages, Message(turn.role, text)) if np.array_equal(text_ids, again) else None


def _difference(name: str, answer: int, trained: list[int], served: list[int], tokenizer: ChatTokenizer) -> Difference:
    unequal = (position for position, (one, other) in enumerate(zip(trained, served, strict=False)) if one != other)
    position = next(unequal, min(len(trained), len(served)))
    shown = [tokenizer.pretrained.convert_ids_to_tokens(ids[position : position + 12]) for ids in (trained, served)]
    return Difference(name, answer, position, *shown)
