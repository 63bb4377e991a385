"""Chat templates: how a conversation becomes segments of text and special tokens, each with a loss weight.

A template is data, not code, so that its two readers cannot drift apart: `segments` (training) walks it in Python,
`jinja` (serving) writes it as the chat template of the exported tokenizer.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal

from ochat_train.conversations.schema import Conversation, Role

# Where a template writes the condition. "first": as OpenChat V3.1 does, in words, before the system text.
ConditionPlace = Literal["header", "system", "user_prefix", "assistant_prefix", "first"]
_PREFIXED: Mapping[str, Role] = {"user_prefix": "user", "assistant_prefix": "assistant"}


@dataclass(frozen=True, slots=True)
class Segment:
    """What is encoded on its own: one special token, or text that never yields a special token."""

    text: str
    weight: float
    is_special: bool


@dataclass(frozen=True, slots=True)
class TemplatePart:
    """Text or a special token around the text of a turn; `{role}` is the role's name with its condition."""

    text: str
    is_special: bool = False


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """One chat format.

    A conversation is `bos` and then for the system text and each turn: header, text, `end_token`, `after_end`.
    `addable` special tokens are added to a tokenizer that lacks them; a tokenizer that lacks any other is refused.

    condition_in: the condition stands in the headers of all turns but the system's, before the role's name; in a system
    turn of its own before all others ("system"); or in a line before the text of each turn of the user or of the
    assistant ("user_prefix", "assistant_prefix").
    """

    name: str
    bos: str
    end_token: str
    header: tuple[TemplatePart, ...]
    role_names: Mapping[Role, str]
    addable: tuple[str, ...]
    system_header: tuple[TemplatePart, ...] = ()
    after_end: tuple[TemplatePart, ...] = ()
    inference_condition: str = ""
    condition_in: ConditionPlace = "header"

    @property
    def turn_tokens(self) -> tuple[str, ...]:
        """The special tokens that turns are made of: the end token, and those of headers and after the end token."""
        parts = (*self.header, *self.system_header, *self.after_end)
        return tuple(dict.fromkeys([self.end_token, *(part.text for part in parts if part.is_special)]))

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """Every special token of the template, each once, in a fixed order."""
        return tuple(dict.fromkeys(token for token in (self.bos, *self.turn_tokens) if token))

    def segments(self, conversation: Conversation, *, for_reply: bool = False) -> Iterator[Segment]:
        """The conversation's segments in order; with `for_reply`, up to where the assistant begins its answer.

        The text and the end token of a turn have its weight, where None is 0, since `assign_source` set all others.
        Everything else has weight 0.
        """
        condition = conversation.condition
        yield from self.prefix_segments(condition, conversation.system)
        for message in conversation.messages:
            yield from self._turn(message.role, condition, message.text, message.weight or 0.0)
        if for_reply:
            yield from self.header_segments("assistant", condition)

    def prefix_segments(self, condition: str, system: str) -> Iterator[Segment]:
        """The segments before the first turn: the beginning, the condition if it comes first, the system text."""
        if self.bos:
            yield Segment(self.bos, 0.0, True)
        if self.condition_in == "first" and condition:
            yield Segment(f"Assistant is {condition}", 0.0, False)
            yield Segment(self.end_token, 0.0, True)
        if self.condition_in == "system" and condition:
            yield from self._turn("system", condition, condition, 0.0)
        if system:
            yield from self._turn("system", condition, system, 0.0)

    def header_segments(self, role: Role, condition: str) -> Iterator[Segment]:
        """The segments before the text of a turn."""
        if role == "system":
            parts, name = self.system_header, self.role_names[role]
        else:
            shown = condition if self.condition_in == "header" else ""
            parts, name = self.header, f"{shown} {self.role_names[role]}".strip()
        for part in parts:
            yield Segment(part.text.replace("{role}", name), 0.0, part.is_special)
        if condition and role == _PREFIXED.get(self.condition_in):
            yield Segment(f"{condition}\n", 0.0, False)

    def after_end_segments(self) -> Iterator[Segment]:
        """The segments after the end token of a turn."""
        for part in self.after_end:
            yield Segment(part.text, 0.0, part.is_special)

    def _turn(self, role: Role, condition: str, text: str, weight: float) -> Iterator[Segment]:
        yield from self.header_segments(role, condition)
        yield Segment(text, weight, False)
        yield Segment(self.end_token, weight, True)
        yield from self.after_end_segments()

    def jinja(self, inference_condition: str, *, joint: "Joint") -> str:
        """The template in Jinja, for `tokenizer.apply_chat_template(messages, condition=...)`.

        `condition` defaults to `inference_condition`. Training encodes segments one by one, but a Jinja template yields
        one string: `joint` says what must be between two segments for the tokenizer to split the string there.
        transformers' tag `generation` marks what has a loss if an assistant's turn has a weight.
        """
        after_turn = self.after_end[-1].is_special if self.after_end else True
        header = self._jinja_parts(self.header, after_turn, joint)
        system_header = self._jinja_parts(self.system_header, after_turn, joint)
        said = _output(f"said.text + {literal(self.end_token)}")
        system_text = joint.jinja_text(self.system_header[-1].is_special if self.system_header else True) + said
        role = "(condition + ' ' + role) | trim" if self.condition_in == "header" else "role"
        names = ", ".join(f"'{key}': {literal(name)}" for key, name in self.role_names.items() if key != "system")
        is_prefixed = self.condition_in == "assistant_prefix"
        prefix = "{%- if condition -%}" + self._jinja_prefix(joint) + "{%- endif -%}" if is_prefixed else ""
        after_end = _output(self._jinja_parts(self.after_end, True, joint)) if self.after_end else ""
        set_system = "{%- set role = " + literal(self.role_names["system"]) + " -%}" if system_header else ""
        system_start = set_system + (_output(system_header) if system_header else "")
        return "".join(
            [
                "{%- if condition is not defined -%}",
                "{%- set condition = " + literal(inference_condition) + " -%}{%- endif -%}",
                "{%- set names = {" + names + "} -%}",
                _output(literal(self.bos)) if self.bos else "",
                self._jinja_condition_turn(system_start, after_end, joint),
                "{%- for message in messages -%}",
                _READ_TEXT,
                "{%- if message['role'] == 'system' -%}",
                system_start + system_text,
                "{%- elif message['role'] in names -%}",
                "{%- set role = names[message['role']] -%}{%- set role = " + role + " -%}",
                _output(header),
                self._jinja_turn(said, joint),
                "{%- else -%}{{- raise_exception('unknown role: ' + message['role']) -}}{%- endif -%}",
                after_end,
                "{%- endfor -%}",
                "{%- if add_generation_prompt -%}{%- set role = names['assistant'] -%}{%- set role = " + role + " -%}",
                _output(header) + prefix + "{%- endif -%}",
            ]
        )

    def _jinja_condition_turn(self, system_start: str, after_end: str, joint: "Joint") -> str:
        """What stands before all messages because of the condition."""
        if self.condition_in == "first":
            lead, start, after_end = joint.before_text(True) + "Assistant is ", "", ""
        elif self.condition_in == "system":
            is_special = self.system_header[-1].is_special if self.system_header else True
            lead, start = joint.before_text(is_special), system_start
        else:
            return ""
        turn = start + _output(literal(lead) + " + condition + " + literal(self.end_token)) + after_end
        return "{%- if condition -%}" + turn + "{%- endif -%}"

    def _jinja_turn(self, said: str, joint: "Joint") -> str:
        """What follows the header of a message that is no system message; `generation` marks an answer."""

        def turn(is_after_special: bool) -> str:
            text = joint.jinja_text(is_after_special) + said
            marked = "{%- generation -%}" + text + "{%- endgeneration -%}"
            return "{%- if message['role'] == 'assistant' -%}" + marked + "{%- else -%}" + text + "{%- endif -%}"

        plain = turn(self.header[-1].is_special)
        if self.condition_in not in _PREFIXED:
            return plain
        test = "{%- if condition and message['role'] == '" + _PREFIXED[self.condition_in] + "' -%}"
        return test + self._jinja_prefix(joint) + turn(False) + "{%- else -%}" + plain + "{%- endif -%}"

    def _jinja_prefix(self, joint: "Joint") -> str:
        """The condition in a line of its own, after a header."""
        return _output(literal(joint.before_text(self.header[-1].is_special)) + " + condition + " + literal("\n"))

    @staticmethod
    def _jinja_parts(parts: tuple[TemplatePart, ...], after_special: bool, joint: "Joint") -> str:
        """A Jinja expression for the parts, in which `role` is the role's name; empty if there are none."""
        terms: list[str] = []
        for part in parts:
            lead = "" if part.is_special else joint.before_text(after_special)
            before, has_role, after = part.text.partition("{role}")
            terms += [literal(text) for text in (lead, before) if text]
            terms += ["role"] * bool(has_role) + [literal(after)] * bool(after)
            after_special = part.is_special
        return " + ".join(terms)


@dataclass(frozen=True, slots=True)
class Joint:
    """What a tokenizer needs before a text inside a string, to encode it as it encodes the text alone.

    A SentencePiece-like tokenizer adds a space before a text (`Hello` -> `▁Hello`). So after another text that space
    must be written; after a special token most tokenizers add it themselves. An empty text gets none, and with some
    tokenizers neither does a text that begins with one of the characters in `unless`.
    """

    after_text: str = ""
    after_special: str = ""
    unless: str = ""

    def before_text(self, is_after_special: bool) -> str:
        """The string before a text that begins with none of `unless`, after a special token or another text."""
        return self.after_special if is_after_special else self.after_text

    def jinja_text(self, is_after_special: bool) -> str:
        """The Jinja source of what is written before the text `said.text` of a message."""
        lead = self.before_text(is_after_special)
        tests = ["said.text", *(f"not said.text.startswith({literal(first)})" for first in self.unless)]
        return "{%- if " + " and ".join(tests) + " -%}" + _output(literal(lead)) + "{%- endif -%}" if lead else ""


# The text of `message`: a string, or OpenAI's list of parts. The loop has this form because vLLM and SGLang search for
# it and then pass parts as they are. Without it they join the parts with characters of their own.
_READ_TEXT = (
    "{%- set said = namespace(text='') -%}"
    "{%- if message['content'] is string -%}{%- set said.text = message['content'] -%}"
    "{%- elif message['content'] -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'text' and part['text'] is string -%}{%- set said.text = said.text + part['text'] -%}"
    "{%- else -%}{{- raise_exception('a part of a message is no text, its type: ' ~ part['type']) -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- else -%}{{- raise_exception('a message has no text, its role: ' ~ message['role']) -}}{%- endif -%}"
)


def _output(expression: str) -> str:
    return "{{- " + expression + " -}}"


def literal(text: str) -> str:
    """A text as a literal of Jinja."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r")
    return f"'{escaped}'"


def num_common(first: str, second: str) -> int:
    """How many characters both texts begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


_NAMES: Mapping[Role, str] = {"user": "User", "assistant": "Assistant", "tool": "Tool", "system": "System"}


def _openchat(
    name: str,
    inference_condition: str,
    *,
    bos: str = "<s>",
    end_token: str = "<|end_of_turn|>",
    condition_in: ConditionPlace = "header",
) -> ChatTemplate:
    return ChatTemplate(
        name=name,
        bos=bos,
        end_token=end_token,
        header=(TemplatePart("{role}:"),),
        role_names=_NAMES,
        addable=(end_token,),
        inference_condition=inference_condition,
        condition_in=condition_in,
    )


_LLAMA_3_HEADER = (
    TemplatePart("<|start_header_id|>", is_special=True),
    TemplatePart("{role}"),
    TemplatePart("<|end_header_id|>", is_special=True),
    TemplatePart("\n\n"),
)
_LOWER_NAMES: Mapping[Role, str] = {role: name.lower() for role, name in _NAMES.items()}
_CHATML_HEADER = (TemplatePart("<|im_start|>", is_special=True), TemplatePart("{role}\n"))

TEMPLATES: Mapping[str, ChatTemplate] = {
    template.name: template
    for template in (
        _openchat("openchat_v3.2", "GPT4"),
        _openchat("openchat_v3.1", "GPT4", condition_in="first"),
        _openchat("openchat_v3.2_mistral", "GPT4 Correct"),
        _openchat("openchat_3.5", "GPT4 Correct"),  # the name under which openchat_v3.2_mistral is served
        _openchat("openchat_v3.2_gemma_new", "GPT4 Correct", bos="<bos>", end_token="<end_of_turn>"),
        ChatTemplate(
            name="openchat_3.6",
            bos="<|begin_of_text|>",
            end_token="<|eot_id|>",
            header=_LLAMA_3_HEADER,
            system_header=_LLAMA_3_HEADER,
            role_names=_NAMES,
            addable=("<|eot_id|>",),
            inference_condition="GPT4 Correct",
        ),
        # The formats below have no condition of their own; it is put before the role's name, as in openchat_3.6. As
        # OpenChat wrote them: three without a header of the system text, and Gemma's without a line break after turns.
        ChatTemplate(
            name="chatml",
            bos="",
            end_token="<|im_end|>",
            header=_CHATML_HEADER,
            system_header=_CHATML_HEADER,
            after_end=(TemplatePart("\n"),),
            role_names=_LOWER_NAMES,
            addable=("<|im_start|>", "<|im_end|>"),
            inference_condition="GPT4",
        ),
        ChatTemplate(
            name="llama3_instruct",
            bos="<|begin_of_text|>",
            end_token="<|eot_id|>",
            header=_LLAMA_3_HEADER,
            role_names=_LOWER_NAMES,
            addable=("<|eot_id|>",),
        ),
        ChatTemplate(
            name="gemma_it",
            bos="<bos>",
            end_token="<end_of_turn>",
            header=(TemplatePart("<start_of_turn>", is_special=True), TemplatePart("{role}\n")),
            role_names={**_LOWER_NAMES, "assistant": "model"},
            addable=("<end_of_turn>",),
        ),
        ChatTemplate(
            name="zephyr_mistral",
            bos="<s>",
            end_token="</s>",
            header=(TemplatePart("<|{role}|>\n"),),
            role_names=_LOWER_NAMES,
            addable=("</s>",),
        ),
    )
}
