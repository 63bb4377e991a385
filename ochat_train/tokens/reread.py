"""Examples that a base's own template made, read back as conversations: for the condition probe and for parity.

A store holds ids alone. They are decoded, cut at what the template writes around texts, and rendered again: only what
gives the same ids is used, so nothing is taken for what it is not.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from ochat_train.conversations.base_template import BaseTemplate
from ochat_train.conversations.schema import Conversation, Message
from ochat_train.tokens.encode import Encoded, Example, TokenIds
from ochat_train.tokens.rendered import encode_all
from ochat_train.tokens.strings import Refused
from ochat_train.tokens.tokenizer import ChatTokenizer


@dataclass(frozen=True, slots=True)
class Rendering:
    """The base's own template under one condition; "" is none."""

    tokenizer: ChatTokenizer
    condition: str

    @property
    def template(self) -> BaseTemplate:
        """The tokenizer's template."""
        assert isinstance(self.tokenizer.template, BaseTemplate)
        return self.tokenizer.template


def render_again(example: Example, own: Rendering, other: Rendering) -> Example | None:
    """The example, made under the condition of `own`, as its conversation is under that of `other`.

    None where the ids cannot be read back, as those of a part of a long turn.
    """
    text = _decode(example.input_ids, own)
    messages = read_messages(text, own.template, own.condition, for_reply=False) if text is not None else None
    if not messages:
        return None
    last = replace(messages[-1], weight=1.0)
    encoded = _encode(Conversation("", "", own.condition, "", (*messages[:-1], last)), own)
    if encoded is None or encoded.example.input_ids.tolist() != example.input_ids.tolist():
        return None
    weights = [
        float(example.loss_weights[turn.text_start : turn.weighted_end].max(initial=0.0))
        for turn in encoded.turns
        if turn.role == "assistant"
    ]
    if len(weights) != sum(message.role == "assistant" for message in messages):
        return None
    given = iter(weights)
    weighted = tuple(replace(one, weight=next(given)) if one.role == "assistant" else one for one in messages)
    changed = _encode(Conversation("", "", other.condition, "", weighted), other)
    if changed is None:
        return None
    is_trained = changed.example.loss_weights > 0
    own_weights = example.loss_weights[example.loss_weights > 0]
    if np.count_nonzero(is_trained) != len(own_weights):
        return None
    changed.example.loss_weights[is_trained] = own_weights
    return changed.example


def read_prompts(example: Example, rendering: Rendering) -> Iterator[tuple[tuple[Message, ...] | None, int]]:
    """For each answer with a loss the messages before it, and how many tokens of the example they are.

    None instead of messages where they cannot be read back. A system text is the first message.
    """
    is_trained = np.concatenate([[False], example.loss_weights > 0])
    for end in np.flatnonzero(is_trained[1:] & ~is_trained[:-1]).tolist():
        text = _decode(example.input_ids[:end], rendering)
        if text is None:
            yield None, end
        else:
            yield read_messages(text, rendering.template, rendering.condition, for_reply=True), end


def read_messages(text: str, template: BaseTemplate, condition: str, *, for_reply: bool) -> tuple[Message, ...] | None:
    """The messages in a rendered string, without the condition; None if it is not that of a plain conversation.

    for_reply: it ends where an answer begins, else after the end token of one.
    """
    shape = template.shape
    assert shape is not None
    start = text.find(shape.user_header) if shape.user_header else -1
    between = shape.user_tail + shape.assistant_header
    if start < 0 or not between:
        return None
    system = _read_system(text[:start], template)
    lead = f"{condition}\n" if condition and template.condition_in == "assistant_prefix" else ""
    rest = shape.answer_tail.partition(template.end_token)[2]
    messages: list[Message] = []
    place = start
    while system is not None and text.startswith(shape.user_header, place):
        begin = place + len(shape.user_header)
        end = text.find(between, begin)
        place = end + len(between)
        if end < 0 or not text.startswith(lead, place):
            return None
        messages.append(Message("user", text[begin:end]))
        place += len(lead)
        if place == len(text):
            break
        end = text.find(template.end_token, place)
        if end < 0:
            return None
        messages.append(Message("assistant", text[place:end]))
        place = end + len(template.end_token)
        place += len(rest) if text.startswith(rest, place) else 0
    if system is None or place != len(text) or not messages or (messages[-1].role == "user") != for_reply:
        return None
    return _without_condition(system, messages, template, condition)


def _read_system(head: str, template: BaseTemplate) -> str | None:
    """The system text in what stands before the first turn; None where that is of another kind."""
    shape = template.shape
    assert shape is not None
    if head == shape.head:
        return ""
    before, after = shape.system_before, shape.system_after
    if before is None or after is None or not (head.startswith(before) and head.endswith(after)):
        return None
    return head[len(before) : len(head) - len(after)]


def _without_condition(
    system: str, messages: list[Message], template: BaseTemplate, condition: str
) -> tuple[Message, ...] | None:
    """The messages with the system text first, and without the condition; None if that is not where it should be."""
    shape, place = template.shape, template.condition_in
    assert shape is not None
    if condition and place == "system":
        is_in_turn = shape.system_before is None
        whole = messages[0].text if is_in_turn else system
        said = whole.removeprefix(f"{condition}\n\n")
        if said == whole and (is_in_turn or whole != condition):
            return None
        if is_in_turn:
            messages[0] = replace(messages[0], text=said)
        else:
            system = "" if whole == condition else said
    if condition and place == "user_prefix":
        if not all(message.text.startswith(f"{condition}\n") for message in messages if message.role == "user"):
            return None
        length = len(condition) + 1
        messages = [replace(one, text=one.text[length:]) if one.role == "user" else one for one in messages]
    return (*([Message("system", system)] if system else []), *messages)


def _decode(ids: TokenIds, rendering: Rendering) -> str | None:
    """The string that the ids are; None where no string gives them."""
    decode = rendering.tokenizer.pretrained.decode
    text = str(decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
    (tokens,) = rendering.tokenizer.text.strings.encode([text], is_hidden=[False])
    is_same = not isinstance(tokens, Refused) and np.array_equal(tokens.ids, ids)
    return text if is_same else None


def _encode(conversation: Conversation, rendering: Rendering) -> Encoded | None:
    """The conversation as one example up to its last token with a weight; None if it is none, or several."""
    (outcome,) = encode_all([conversation], rendering.template, rendering.tokenizer)
    if isinstance(outcome, Refused) or len(outcome) != 1:
        return None
    (encoded,) = outcome
    end = int(np.flatnonzero(encoded.example.loss_weights)[-1]) + 1
    example = Example(encoded.example.input_ids[:end], encoded.example.loss_weights[:end])
    return replace(encoded, example=example)
