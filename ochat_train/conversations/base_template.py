"""The base tokenizer's own chat template, in Jinja: rendered for training by the very source that is served.

Around the base's source stand a few lines of ours: they put the condition where the recipe says, and fix what would
change from day to day or from the base's tokenizer to the exported one.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from typing import Any, Literal

from ochat_train.conversations.template import literal, num_common

BasePlace = Literal["system", "user_prefix", "assistant_prefix"]
_OWN = "{#- ochat_train: the base's own template -#}{{ '' }}"  # no "-#}" right before it: it begins as it is
_AT_THE_END = "{% if add_generation_prompt and condition %}{{ condition + '\\n' }}{% endif %}"
_DATE = date(2024, 7, 26)  # for templates that write today's: a prompt must be what was trained, on any day
_SAID = tuple(f"\u2983{number}\u2984" for number in range(6))  # texts of turns, in no template
_SYSTEM, _CONDITION = "\u2983system\u2984", "\u2983condition\u2984"


class TemplateRefused(ValueError):
    """The template raised an error for a conversation."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a template writes around the texts of plain conversations, found by rendering some.

    head: before the first turn of a conversation without a system text. system_before, system_after: around a system
    text, up to the first turn; None where the template takes none, or writes it into a turn. answer_tail: after an
    answer that others follow. is_apart: whether it writes an earlier answer otherwise than the last one, or what stands
    before it. has_system: whether it takes a system text. turn_tokens: the special tokens in the headers and tails.
    """

    head: str
    user_header: str
    user_tail: str
    assistant_header: str
    answer_tail: str
    system_before: str | None
    system_after: str | None
    has_system: bool
    is_apart: bool
    turn_tokens: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BaseTemplate:
    """A chat template in Jinja, as the base's tokenizer has it.

    source: empty until `read`. end_token: the special token that ends an answer. variables: the special tokens that
    templates know by names, such as bos_token. The other fields are those of a ChatTemplate.
    """

    condition_in: BasePlace = "system"
    source: str = ""
    end_token: str = ""
    variables: tuple[tuple[str, str], ...] = ()
    shape: Shape | None = field(default=None, compare=False)

    name = "base"
    inference_condition = ""
    addable: tuple[str, ...] = ()

    @property
    def bos(self) -> str:
        """The special token that begins a conversation; empty if there is none."""
        bos = dict(self.variables).get("bos_token", "")
        return bos if self.shape is not None and self.shape.head.startswith(bos) else ""

    @property
    def turn_tokens(self) -> tuple[str, ...]:
        """The special tokens that turns are made of."""
        return self.shape.turn_tokens if self.shape is not None else (self.end_token,)

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """Every special token of the template that training needs to know."""
        return tuple(dict.fromkeys(token for token in (self.bos, *self.turn_tokens) if token))

    def read(self, pretrained: Any) -> "BaseTemplate":
        """The template with what the tokenizer says: its source, unless it is known, and its special tokens.

        Raises ValueError where the tokenizer has no chat template, or one that cannot be trained.
        """
        source = self.source or _own_source(pretrained)
        named = self.variables or tuple(
            sorted(
                (name, str(token)) for name, token in pretrained.special_tokens_map.items() if isinstance(token, str)
            )
        )
        template = replace(self, source=source, variables=named)
        # Some bases do not mark the tokens of their headers as special; the tokenizer then learns to.
        special = [str(token) for token in pretrained.added_tokens_decoder.values() if str(token).strip()]
        shape = _find_shape(template, special, str(pretrained.name_or_path))
        return replace(template, shape=shape[0], end_token=shape[1])

    def jinja(self, inference_condition: str) -> str:
        """The source for `tokenizer.apply_chat_template(messages, condition=...)`.

        `condition` defaults to `inference_condition`. With an empty one it renders as the base's own, but for the date.
        """
        own = self.source.removesuffix("\n")  # Jinja removes it at the end of a source
        lines = [f"{{%- set {name} = {literal(token)} -%}}" for name, token in self.variables if name in own]
        lines += [_fix_date(own)] if "strftime_now" in own else []
        lines += ["{%- if condition is not defined -%}{%- set condition = " + literal(inference_condition)]
        lines += [" -%}{%- endif -%}", _PLACES[self.condition_in], _OWN, own]
        if self.condition_in == "assistant_prefix":
            lines += [_AT_THE_END]
        return "".join(lines)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        condition: str,
        tools: Sequence[dict[str, Any]] | None = None,
        for_reply: bool = False,
    ) -> str:
        """The messages as one string, with `for_reply` up to where the assistant begins. Raises TemplateRefused."""
        return self.render_marked(messages, condition=condition, tools=tools, for_reply=for_reply)[0]

    def render_marked(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        condition: str,
        tools: Sequence[dict[str, Any]] | None = None,
        for_reply: bool = False,
    ) -> tuple[str, list[tuple[int, int]]]:
        """The same, and where the tag `generation` of the template stands in it: in characters, [start, end)."""
        # Imported here, since it takes a second and other templates do without.
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered: Any = render_jinja_template(
                [[dict(message) for message in messages]],
                tools=list(tools) if tools else None,
                chat_template=self.jinja(""),
                return_assistant_tokens_mask=_has_marks(self.source),
                add_generation_prompt=for_reply,
                condition=condition,
            )
        except Exception as error:  # a template may raise anything
            raise TemplateRefused(" ".join(str(error).split()) or type(error).__name__) from None
        texts, marks = rendered
        return str(texts[0]), [(int(start), int(end)) for start, end in (marks[0] if marks else [])]

    def check_condition(self) -> None:
        """Raise ValueError if the template cannot have a condition where the recipe puts it."""
        where = f"condition_in: {self.condition_in} does not fit this base's chat template"
        remedy = "; give another of system, user_prefix and assistant_prefix"
        try:
            prompt = self.render(_chat(3), condition=_CONDITION, for_reply=True)
            whole = self.render(_chat(4), condition=_CONDITION)
        except TemplateRefused as error:
            raise ValueError(f"{where}: {error}{remedy}") from None
        if _CONDITION not in prompt:
            raise ValueError(f"{where}: it does not write it{remedy}")
        if not whole.startswith(prompt):
            raise ValueError(f"{where}: the prompt of an answer would not be what stands before it in training{remedy}")

    def arguments(self) -> frozenset[str]:
        """Which of "tools", "calls" and "reasoning" the template writes itself, in a conversation that has them."""
        asked = _chat(1)
        call = {"type": "function", "function": {"name": _SAID[2], "arguments": {_SAID[3]: _SAID[4]}}}
        tool = {"name": _SAID[2], "description": _SAID[3], "parameters": {"type": "object", "properties": {}}}
        answer = {"role": "assistant", "content": _SAID[1]}
        tried: dict[str, tuple[list[Any], list[Any] | None]] = {
            "tools": ([*asked, answer], [{"type": "function", "function": tool}]),
            "calls": ([*asked, answer | {"content": "", "tool_calls": [call]}], None),
            "reasoning": ([*asked, answer | {"reasoning_content": _SAID[2] + _SAID[3]}], None),
        }
        found = set()
        for name, (messages, tools) in tried.items():
            try:
                prompt = self.render(asked, condition="", tools=tools, for_reply=True)
                whole = self.render(messages, condition="", tools=tools)
            except TemplateRefused:
                continue
            if whole.startswith(prompt) and _SAID[2] in whole and _SAID[3] in whole:
                found.add(name)
        return frozenset(found)

    def notes(self) -> list[str]:
        """What to know of the template: what it adds to texts or takes from them."""
        assert self.shape is not None
        spaced = [{"role": "user", "content": f" {_SAID[0]} "}]
        notes = [f"answers end with {self.end_token}"]
        if arguments := sorted(self.arguments()):
            notes.append(f"it writes {', '.join(arguments)} itself")
        if _has_marks(self.source):
            notes.append("its tag generation says where answers begin")
        head = self.shape.head
        for token in self.special_tokens:
            head = head.replace(token, "")
        if len(head.split()) > 2:
            notes.append("it writes a system text of its own where a conversation has none")
        if not self.shape.has_system:
            notes.append("it takes no system text, so conversations with one are dropped")
        if "strftime_now" in self.source:
            notes.append(f"it writes the date, which is {_DATE:%d %b %Y} in training and as it is served")
        if f" {_SAID[0]} " not in self.render(spaced, condition="", for_reply=True):
            notes.append("it trims texts")
        if self.shape.is_apart:
            notes.append(
                "it writes an earlier answer otherwise than the last one, so each answer that is trained becomes an "
                "example of its own"
            )
        return notes


def _own_source(pretrained: Any) -> str:
    own = pretrained.chat_template
    if isinstance(own, dict):  # several by name
        own = own.get("default")
    if not own:
        raise ValueError(
            f"template: base needs a chat template, and the tokenizer {pretrained.name_or_path} has none; choose a "
            "built-in template, or name in tokenizer: the tokenizer of the base's chat model"
        )
    own = str(own).rpartition(_OWN)[2].removesuffix(_AT_THE_END)  # of a model that was exported here
    if "condition is not defined" in own:
        raise ValueError(
            f"the chat template of {pretrained.name_or_path} has a condition already; give template: the name that the "
            "model was trained with"
        )
    return own


def _has_marks(source: str) -> bool:
    return re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None


def _chat(num_turns: int) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[number % 2], "content": _SAID[number]} for number in range(num_turns)]


def _find_shape(template: BaseTemplate, special: Sequence[str], base: str) -> tuple[Shape, str]:
    """What the template writes around texts, and its end token. Raises ValueError where it cannot be trained."""
    refused = f"the chat template of {base} cannot be trained: "
    remedy = "; choose a template of pieces, such as template: chatml"
    try:
        whole = template.render(_chat(6), condition="")
        prompts = [template.render(_chat(number), condition="", for_reply=True) for number in (1, 3)]
        ends = [template.render(_chat(number), condition="") for number in (2, 4)]
        asked = template.render(_chat(3), condition="")
    except TemplateRefused as error:
        raise ValueError(f"{refused}it refuses a plain conversation: {error}{remedy}") from None
    places = [whole.find(said) for said in _SAID]
    if places != sorted(places) or places[0] < 0:
        raise ValueError(f"{refused}it does not write all turns of a plain conversation, in their order{remedy}")
    for prompt, end in zip(prompts, ends, strict=True):
        if not end.startswith(prompt):
            start = num_common(prompt, end)
            raise ValueError(
                f"{refused}it is not prefix-stable: a prompt ends with {prompt[start:][:40]!r}, where an answer begins "
                f"with {end[start:][:40]!r}{remedy}"
            )

    after_said = ends[1].partition(_SAID[3])[2]
    end_token = _first_of(special, after_said)
    if not end_token:
        raise ValueError(f"{refused}no special token ends an answer, so none would learn to stop{remedy}")
    after_user = prompts[1].partition(_SAID[2])[2]
    if prompts[1] != asked and prompts[1].startswith(asked):
        user_tail = asked.partition(_SAID[2])[2]
    else:
        token = _first_of(special, after_user)
        user_tail = after_user[: after_user.index(token) + len(token)] if token else ""
    before_user = whole[places[1] + len(_SAID[1]) : places[2]]
    first = whole[: places[0]]
    stable_end = ends[1][: ends[1].index(end_token, ends[1].index(_SAID[3])) + len(end_token)]
    if before_user.startswith(after_said):
        answer_tail = after_said
    else:  # up to what the header of the first turn begins with
        start = before_user.find(end_token) + len(end_token) if end_token in before_user else 0
        answer_tail = before_user[: len(before_user) - num_common(first[::-1], before_user[start:][::-1])]
    user_header = before_user[len(answer_tail) :]
    assistant_header = after_user[len(user_tail) :]
    before, after, has_system = _find_system(template, user_header)
    around = user_header + user_tail + assistant_header + answer_tail + after_said
    shape = Shape(
        head=first.removesuffix(user_header),
        user_header=user_header,
        user_tail=user_tail,
        assistant_header=assistant_header,
        answer_tail=answer_tail,
        system_before=before,
        system_after=after,
        has_system=has_system,
        is_apart=not whole.startswith(stable_end),
        turn_tokens=tuple(dict.fromkeys([end_token, *(token for token in special if token in around)])),
    )
    return shape, end_token


def _find_system(template: BaseTemplate, user_header: str) -> tuple[str | None, str | None, bool]:
    """What stands before and after a system text, and whether the template takes one."""
    try:
        whole = template.render([{"role": "system", "content": _SYSTEM}, *_chat(2)], condition="")
    except TemplateRefused:
        return None, None, False
    before, found, after = whole.partition(_SYSTEM)
    after = after.partition(_SAID[0])[0]
    if not found or not user_header or not after.endswith(user_header):
        return None, None, bool(found)
    return before, after.removesuffix(user_header), True


def _first_of(tokens: Sequence[str], text: str) -> str:
    """The token that stands first in the text, the longest if there are several; empty if there is none."""
    found = [(text.index(token), -len(token), token) for token in tokens if token and token in text]
    return min(found)[2] if found else ""


# ---- The lines around the base's source ----


def _fix_date(source: str) -> str:
    formats = {found[1] for found in re.findall(r"strftime_now\(\s*(['\"])(.*?)\1", source)}
    known = ", ".join(f"{literal(form)}: {literal(_DATE.strftime(form))}" for form in sorted(formats))
    other = literal(_DATE.strftime("%d %b %Y"))
    return "{%- macro strftime_now(form) -%}{{- {" + known + "}.get(form, " + other + ") -}}{%- endmacro -%}"


def _prefix(role: str) -> str:
    """Jinja that writes the condition in a line before the text of each message of a role."""
    return (
        "{%- if condition -%}{%- set conditioned = namespace(messages=[]) -%}{%- for message in messages -%}"
        "{%- if message['role'] == '" + role + "' and message['content'] is string -%}"
        "{%- set message = dict(message, content=condition + '\\n' + message['content']) -%}"
        "{%- elif message['role'] == '" + role + "' and message['content'] -%}"
        "{%- set parts = [{'type': 'text', 'text': condition + '\\n'}] + message['content'] -%}"
        "{%- set message = dict(message, content=parts) -%}"
        "{%- endif -%}"
        "{%- set conditioned.messages = conditioned.messages + [message] -%}{%- endfor -%}"
        "{%- set messages = conditioned.messages -%}{%- endif -%}"
    )


_PLACES: Mapping[str, str] = {
    "user_prefix": _prefix("user"),
    "assistant_prefix": _prefix("assistant"),
    "system": (
        "{%- if condition -%}{%- if messages and messages[0]['role'] == 'system' -%}"
        "{%- if messages[0]['content'] is string -%}"
        "{%- set conditioned = condition + '\\n\\n' + messages[0]['content'] -%}"
        "{%- else -%}"
        "{%- set conditioned = [{'type': 'text', 'text': condition + '\\n\\n'}] + messages[0]['content'] -%}"
        "{%- endif -%}"
        "{%- set messages = [dict(messages[0], content=conditioned)] + messages[1:] -%}"
        "{%- else -%}{%- set messages = [{'role': 'system', 'content': condition}] + messages -%}"
        "{%- endif -%}{%- endif -%}"
    ),
}
