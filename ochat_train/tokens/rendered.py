"""Conversations to token ids through the base's own chat template: one string, encoded as `apply_chat_template` does.

Answers are found by rendering what comes before each of them. What a text spells never becomes control: a special token
in a text is rendered as a placeholder, and the text around it is encoded alone.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ochat_train.conversations.base_template import BaseTemplate, TemplateRefused
from ochat_train.conversations.schema import Conversation, Role
from ochat_train.conversations.spell_out import read_calls, read_definitions
from ochat_train.conversations.template import ChatTemplate
from ochat_train.tokens.encode import Encoded, Example, encode
from ochat_train.tokens.strings import Refused, StringEncoder, Tokens
from ochat_train.tokens.tokenizer import ChatTokenizer, TextEncoder

Outcome = tuple[Encoded, ...] | Refused


def encode_all(
    conversations: Sequence[Conversation], template: ChatTemplate | BaseTemplate, tokenizer: ChatTokenizer | TextEncoder
) -> list[Outcome]:
    """Each conversation as examples, one with a template of pieces, or why there are none."""
    if isinstance(template, ChatTemplate):
        return [(encoded,) for encoded in encode(conversations, template, tokenizer)]
    encoder = tokenizer.text if isinstance(tokenizer, ChatTokenizer) else tokenizer
    return encode_rendered(conversations, template, encoder.strings)


@dataclass(frozen=True, slots=True)
class _Chat:
    """A conversation as a template takes it. is_hidden: whether a text of it spells a special token."""

    conversation: Conversation
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    condition: str
    is_hidden: bool

    @property
    def names(self) -> list[str]:
        """The names of tools that are defined."""
        return [tool["function"]["name"] for tool in self.tools]

    @property
    def num_system(self) -> int:
        """1 if the system text of the conversation is the first message, else 0."""
        return len(self.messages) - len(self.conversation.messages)


class _Turn(NamedTuple):
    """A turn in a rendered string, in characters: where its text begins and ends, and where it ends."""

    role: Role
    text_start: int
    text_end: int
    end: int


@dataclass(frozen=True, slots=True)
class _Part:
    """The conversation up to an answer, with the answers that are trained in it.

    prefix_length: characters before the first turn; None where what every part of a split conversation must begin with,
    such as the system text, does not stand there.
    turns: each begins where the one before it ends. spans: (start, end, weight) of what has a loss.
    """

    text: str
    prefix_length: int | None
    turns: tuple[_Turn, ...]
    spans: tuple[tuple[int, int, float], ...]


def encode_rendered(
    conversations: Sequence[Conversation], template: BaseTemplate, encoder: StringEncoder
) -> list[Outcome]:
    """Each conversation as examples, or why there are none.

    The ids are those of `apply_chat_template` on the messages up to the last answer with a weight. An answer has its
    weight from where its prompt ends, or the template's tag `generation` begins, to its end token. There is more than
    one example where the template writes an answer, or what stands before it, otherwise once others follow: then each
    holds the answers that stand in it as they would be generated. Refused where a prompt is no prefix of its answer
    (`template_unstable`), where the template raises or leaves out a text (`template_refused`), or where a text spells a
    special token and cannot be encoded alone (`spells_control`).
    """
    made: list[list[_Part] | Refused] = []
    hidden: list[bool] = []
    for conversation in conversations:
        try:
            chat = _to_chat(conversation, encoder)
            parts = _find_parts(chat, template)
            hidden.append(chat.is_hidden)
        except TemplateRefused as error:
            parts = Refused("template_refused", str(error))
            hidden.append(False)
        made.append(parts)
    strings = [(part.text, is_hidden) for parts, is_hidden in zip(made, hidden, strict=True) for part in _parts(parts)]
    tokens = iter(encoder.encode([text for text, _ in strings], is_hidden=[is_hidden for _, is_hidden in strings]))
    results: list[Outcome] = []
    for parts in made:
        found = [(part, next(tokens)) for part in _parts(parts)]
        refused = next((each for _, each in found if isinstance(each, Refused)), None)
        if isinstance(parts, Refused) or refused is not None:
            results.append(parts if isinstance(parts, Refused) else refused)  # type: ignore[arg-type]
        else:
            results.append(tuple(_to_encoded(part, each) for part, each in found if isinstance(each, Tokens)))
    return results


def encode_rendered_prompt(
    conversation: Conversation, template: BaseTemplate, encoder: StringEncoder
) -> npt.NDArray[np.int32]:
    """The ids up to where the assistant would begin to answer. Raises TemplateRefused."""
    chat = _to_chat(conversation, encoder)
    text = template.render(chat.messages, condition=chat.condition, tools=chat.tools, for_reply=True)
    (tokens,) = encoder.encode([text], is_hidden=[chat.is_hidden])
    if isinstance(tokens, Refused):
        raise TemplateRefused(tokens.detail)
    return tokens.ids


def _parts(parts: list[_Part] | Refused) -> list[_Part]:
    return [] if isinstance(parts, Refused) else parts


def _to_chat(conversation: Conversation, encoder: StringEncoder) -> _Chat:
    """The conversation with placeholders for the special tokens that it spells."""
    messages: list[dict[str, Any]] = []
    if conversation.system:
        messages.append({"role": "system", "content": conversation.system})
    for message in conversation.messages:
        messages.append({"role": message.role, "content": message.text})
        if message.reasoning:
            messages[-1]["reasoning_content"] = message.reasoning
        if message.calls:
            calls = [{"type": "function", "function": call} for call in read_calls(message.calls)]
            messages[-1]["tool_calls"] = calls
    whole = [messages, read_definitions(conversation.tools), conversation.condition]
    hidden = _map_texts(whole, encoder.hide)
    is_hidden = hidden != whole
    if is_hidden and encoder.has_placeholder(json.dumps(whole, ensure_ascii=False)):
        raise TemplateRefused("a text spells a special token, and one has characters of Unicode's last private planes")
    messages, tools, condition = hidden
    return _Chat(conversation, messages, tools, condition, is_hidden)


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """The JSON value with every text in it changed, names of fields included."""
    if isinstance(value, dict):
        return {change(name): _map_texts(inner, change) for name, inner in value.items()}
    if isinstance(value, list):
        return [_map_texts(inner, change) for inner in value]
    return change(value) if isinstance(value, str) else value


def _find_parts(chat: _Chat, template: BaseTemplate) -> list[_Part] | Refused:
    """The parts in which the answers with a weight are trained, the longest first."""
    weights = [0.0] * chat.num_system + [message.weight or 0.0 for message in chat.conversation.messages]
    roles = [message["role"] for message in chat.messages]
    if others := [role for role, weight in zip(roles, weights, strict=True) if weight and role != "assistant"]:
        return Refused("template_refused", f"a turn of the role {others[0]} has a weight, and only answers are trained")
    answers = _Answers(chat, template)
    left = [number for number, weight in enumerate(weights) if weight]
    parts: list[_Part] = []
    while left:
        last = left[-1]
        text, marks = answers.whole(last)
        kept = [number for number in left if answers.is_in(number, text)]
        if last not in kept:
            prompt = answers.prompt(last)
            start = next((n for n, pair in enumerate(zip(prompt, text, strict=False)) if pair[0] != pair[1]), len(text))
            return Refused(
                "template_unstable",
                f"the prompt before turn {last + 1} ends with {prompt[start:][:40]!r}, where training has "
                f"{text[start:][:40]!r}",
            )
        if lost := answers.find_lost(last, text, kept):
            return Refused("template_refused", lost)
        prefix_length, turns = answers.find_turns(last, text)
        said = [number for number, role in enumerate(roles[: last + 1]) if role == "assistant"]
        begins = dict(zip(said, (start for start, _ in marks), strict=True)) if len(marks) == len(said) else {}
        starts = {number: max(len(answers.prompt(number)), begins.get(number, 0)) for number in kept}
        spans = tuple((start, answers.end(number), weights[number]) for number, start in starts.items())
        if any(start >= end for start, end, _ in spans):
            return Refused("template_refused", "no special token ends an answer")
        parts.append(_Part(text, prefix_length, tuple(turns), spans))
        left = [number for number in left if number not in kept]
    return parts


class _Answers:
    """The answers of one conversation in the strings that a template makes of its beginnings, each rendered once."""

    def __init__(self, chat: _Chat, template: BaseTemplate) -> None:
        assert template.shape is not None
        self._chat, self._template, self._shape = chat, template, template.shape
        self._wholes: dict[int, tuple[str, list[tuple[int, int]]]] = {}
        self._prompts: dict[int, str] = {}

    def whole(self, number: int) -> tuple[str, list[tuple[int, int]]]:
        """The messages up to and including this one, and the marks in them."""
        if number not in self._wholes:
            self._wholes[number] = self._template.render_marked(
                self._chat.messages[: number + 1], condition=self._chat.condition, tools=self._chat.tools
            )
        return self._wholes[number]

    def prompt(self, number: int) -> str:
        """What stands before the answer when it is generated."""
        if number not in self._prompts:
            self._prompts[number] = self._template.render(
                self._chat.messages[:number], condition=self._chat.condition, tools=self._chat.tools, for_reply=True
            )
        return self._prompts[number]

    def end(self, number: int) -> int:
        """Where the answer ends in what is generated: after its end token, or after its last special token."""
        start, text = len(self.prompt(number)), self.whole(number)[0]
        if (place := text.rfind(self._template.end_token, start)) >= 0:
            return place + len(self._template.end_token)
        found = [(text.rfind(token, start), len(token)) for token in self._template.turn_tokens]
        return max((place + length for place, length in found if place >= 0), default=start)

    def is_in(self, number: int, text: str) -> bool:
        """Whether the text has the answer and all before it as they are when it is generated."""
        own = self.whole(number)[0][: self.end(number)]
        return own.startswith(self.prompt(number)) and text.startswith(own)

    def find_lost(self, last: int, text: str, kept: Sequence[int]) -> str:
        """Which text up to this turn is not in the string, in words; an answer that is not kept may lose parts."""
        for number, message in enumerate(self._chat.messages[: last + 1]):
            is_context = message["role"] == "assistant" and number not in kept
            texts = [] if is_context else [message["content"], message.get("reasoning_content", "")]
            texts += [call["function"]["name"] for call in message.get("tool_calls", ())]
            if any(said.strip() not in text for said in texts):
                return f"the template leaves out a text of turn {number + 1}, of the role {message['role']}"
        if any(name not in text for name in self._chat.names):
            return "the template leaves out the definition of a tool"
        return ""

    def find_turns(self, last: int, text: str) -> tuple[int | None, list[_Turn]]:
        """The length of the prefix, and the turns; what stands between two answers is one turn."""
        shape, messages = self._shape, self._chat.messages
        turns: list[_Turn] = []
        first = self._chat.num_system
        prefix_length = self._find_prefix(first, text)
        place = prefix_length or 0
        for number in range(first, last + 1):
            start = self._find_start(number, text)
            if start is None:
                continue
            asked = start - len(shape.assistant_header) if text[:start].endswith(shape.assistant_header) else start
            if asked > place:
                roles = [message["role"] for message in messages[first:number]]
                header, tail = len(shape.user_header), len(shape.user_tail)
                begin = place + header if text.startswith(shape.user_header, place) else place
                end = asked - tail if text[begin:asked].endswith(shape.user_tail) else asked
                turns.append(_Turn("user" if "user" in roles or not roles else roles[0], begin, end, asked))
            end_token = self._template.end_token
            stop = self.end(number) if self.is_in(number, text) else text.find(end_token, start) + len(end_token)
            if stop <= start:
                break
            rest = shape.answer_tail.partition(end_token)[2]
            place = stop + len(rest) if text.startswith(rest, stop) else stop
            text_end = stop - len(end_token) if text[:stop].endswith(end_token) else stop
            turns.append(_Turn("assistant", start, text_end, place))
            first = number + 1
        return prefix_length, turns

    def _find_start(self, number: int, text: str) -> int | None:
        """Where this message begins if it is an answer whose prompt stands in the text; else None."""
        if self._chat.messages[number]["role"] != "assistant":
            return None
        try:
            prompt = self.prompt(number)
        except TemplateRefused:  # of a beginning that no template takes, such as no message at all
            return None
        return len(prompt) if text.startswith(prompt) else None

    def _find_prefix(self, first: int, text: str) -> int | None:
        """Where the first turn begins; None unless all that is no turn stands before it."""
        chat, shape = self._chat, self._shape
        if chat.messages[first]["role"] == "user":
            place = text.find(shape.user_header) if shape.user_header else -1
        else:
            place = (self._find_start(first, text) or 0) - len(shape.assistant_header)
        texts = [message["content"].strip() for message in chat.messages[:first]] + chat.names
        texts += [chat.condition] * (self._template.condition_in == "system")
        return place if place >= 0 and all(said in text[:place] for said in texts) else None


def _to_encoded(part: _Part, tokens: Tokens) -> Encoded:
    """The part as an example."""

    def count_before(place: int) -> int:
        """How many tokens stand before a character; one across it does not."""
        number = int(np.searchsorted(tokens.ends, place, side="right"))
        while number and tokens.starts[number - 1] >= place:  # a token of no character
            number -= 1
        return number

    weights = np.zeros(len(tokens.ids), np.float32)
    for start, end, weight in part.spans:
        weights[count_before(start) : count_before(end)] = weight
    weights[:1] = 0.0
    edges = [count_before(part.prefix_length or 0)]
    for turn in part.turns:
        stop, text_stop = count_before(turn.end), count_before(turn.text_end)
        edges += [count_before(turn.text_start), text_stop, min(text_stop + 1, stop), stop]
    roles = tuple(turn.role for turn in part.turns)
    example = Example(tokens.ids, weights)
    return Encoded(example, roles, np.array(edges, np.int64), can_split=part.prefix_length is not None)
