"""Reasoning, calls of tools and definitions of tools become text, in the form of the base's own chat template."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import takewhile
from typing import Any, Literal

import orjson

from ochat_train.conversations.schema import Message
from ochat_train.conversations.sharegpt import Turns

_SYSTEM, _USER, _ANSWER = "\u2983system\u2984", "\u2983user\u2984", "\u2983answer\u2984"  # no template has such texts
_DATE = "26 Jul 2024"  # for templates that would write today's, so that the same dump gives the same text every day


@dataclass(frozen=True, slots=True)
class Spelling:
    """How it is written, and what of it is trained.

    chat_template: the base's own, in Jinja, or None. special_tokens: texts that the tokenizer takes for control; a form
    that needs one is not used, since no text is ever control. reasoning: "drop" or "keep". tool_calls: "context" gives
    calls no loss unless the record gives them a weight, "train" the loss of answers.
    """

    chat_template: str | None = None
    special_tokens: tuple[str, ...] = ()
    reasoning: Literal["drop", "keep"] = "drop"
    tool_calls: Literal["context", "train"] = "context"


AS_WRITTEN = Spelling()


def spell_out(turns: Turns, spelling: Spelling) -> Turns:
    """The turns with reasoning, calls and definitions of tools in their texts.

    Definitions follow the system text. Where they, a call or the reasoning have no form in the base's template they are
    written as the record has them, reasoning between <think> and </think>. A call that is no part of the loss becomes a
    turn of its own behind its text. Added to `repairs`: tools_in_system, reasoning_kept, reasoning_dropped, and
    calls_untrained where calls became context because nothing says that they are trained.

    Worked example: assistant text "Let me look.", calls [{"name": "f", "arguments": {}}] becomes, with "train" and
    Qwen's template, 'Let me look.\\n<tool_call>\\n{"name": "f", "arguments": {}}\\n</tool_call>'.
    """
    if not turns.tools and not any(message.calls or message.reasoning for message in turns.messages):
        return turns
    repairs = dict.fromkeys(turns.repairs)
    messages: list[Message] = []
    for message in turns.messages:
        text, reasoning, calls = message.text, message.reasoning, message.calls
        if reasoning:
            repairs["reasoning_kept" if spelling.reasoning == "keep" else "reasoning_dropped"] = None
            reasoning = reasoning if spelling.reasoning == "keep" else ""
        is_context = bool(calls) and message.weight is None and spelling.tool_calls == "context"
        if calls and not is_context:
            text, reasoning, calls = _write_answer(spelling, text, reasoning, calls), "", ""
        elif reasoning:
            text = _write_answer(spelling, text, reasoning, "")
        if text or not calls:
            messages.append(Message(message.role, text, message.weight))
        if calls:
            repairs["calls_untrained"] = None
            messages.append(Message(message.role, _write_answer(spelling, "", "", calls), 0.0))
    system = turns.system
    if turns.tools:
        repairs["tools_in_system"] = None
        leading = [message.role == "system" and not message.weight for message in messages]
        last = (leading.index(False) if False in leading else len(messages)) - 1
        if last < 0:
            system = _write_system(spelling, system, turns.tools)
        else:  # behind the last of the system turns that `repair_turns` will join
            messages[last] = replace(messages[last], text=_write_system(spelling, messages[last].text, turns.tools))
    return replace(turns, system=system, messages=tuple(messages), repairs=tuple(repairs), tools="")


@lru_cache(maxsize=1024)  # the same tools stand beside many conversations
def _write_system(spelling: Spelling, system: str, tools: str) -> str:
    """The system text with the definitions in it."""
    definitions = [
        tool if "function" in tool else {"type": "function", "function": tool} for tool in _read_objects(tools)
    ]
    messages = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": _USER}]
    bare, full = _render(spelling, messages), _render(spelling, messages, tools=definitions)
    if definitions and bare and full:
        start = _num_common(bare, full)
        num_after = _num_common(bare[start:][::-1], full[start:][::-1])
        before, after = full[:start], full[len(full) - num_after :]
        added = full[start : len(full) - num_after].replace(bare[start : len(bare) - num_after] or "\0", "", 1)
        if _USER in after and not any(token in added for token in spelling.special_tokens if token) and added.strip():
            if _SYSTEM in before:
                return system + added if system else added.strip()
            if _SYSTEM in after:
                gap = after[: after.index(_SYSTEM)]
                return added + ("" if gap.strip() else gap) + system if system else added.strip()
    return f"{system}\n\n{tools}" if system else tools


def _num_common(first: str, second: str) -> int:
    """How many characters both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


@lru_cache(maxsize=1024)
def _write_answer(spelling: Spelling, text: str, reasoning: str, calls: str) -> str:
    """The text of an answer with its reasoning before it and its calls behind it."""
    asked = {"role": "user", "content": _USER}
    answer: dict[str, Any] = {"role": "assistant", "content": text}
    called = _read_objects(calls)
    if called:
        answer["tool_calls"] = [{"type": "function", "function": _named(call)} for call in called]
    if reasoning:
        answer |= {"reasoning_content": reasoning}
    bare = _render(spelling, [asked, {"role": "assistant", "content": _ANSWER}])
    prompt = _render(spelling, [asked], add_generation_prompt=True)
    full = _render(spelling, [asked, answer]) if bool(called) == bool(calls) else None
    if bare and prompt and full and _ANSWER in bare and bare.startswith(prompt) and full.startswith(prompt):
        lead, _, end = bare[len(prompt) :].partition(_ANSWER)
        written = full[len(prompt) : len(full) - len(end)] if full.endswith(end) else ""
        if not reasoning:  # a template may begin every answer with an empty one
            written = written.removeprefix(lead)
        said = [reasoning.strip(), text.strip(), *(str(_named(call)["name"]) for call in called)]
        is_control = any(token in written for token in spelling.special_tokens if token)
        if written.strip() and all(part in written for part in said) and not is_control:
            return written
    if reasoning:
        return f"<think>\n{reasoning}\n</think>\n\n{_write_answer(spelling, text, '', calls)}"
    if text and calls:
        return f"{text}\n{_write_answer(spelling, '', '', calls)}"
    return text + calls


def _render(spelling: Spelling, messages: Sequence[dict[str, Any]], **more: Any) -> str | None:
    """The messages in the base's template; None where there is none, or where it refuses them."""
    if spelling.chat_template is None:
        return None
    # here, since few dumps have tools and it takes a second
    from transformers.utils.chat_template_utils import render_jinja_template

    variables: dict[str, Any] = {"bos_token": "", "eos_token": "", "date_string": _DATE, "tools_in_user_message": False}
    try:
        rendered: Any = render_jinja_template(
            [list(messages)], chat_template=spelling.chat_template, **variables, **more
        )
    except Exception:  # what a template raises is its own affair
        return None
    return str(rendered[0][0])


def _read_objects(text: str) -> list[dict[str, Any]]:
    """The objects in JSON, without nulls in them, which a table writes for what is not there; [] for another text."""
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return []
    objects = value if isinstance(value, list) else [value]
    if not all(isinstance(one, dict) and one for one in objects):
        return []
    return [_without_nulls(one) for one in objects]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _named(call: dict[str, Any]) -> dict[str, Any]:
    """A call as {name, arguments}, the arguments as an object where they are one in JSON."""
    function = call.get("function")
    named: dict[str, Any] = function if isinstance(function, dict) else call
    arguments: Any = next(
        (named[key] for key in ("arguments", "parameters", "input") if named.get(key) is not None), {}
    )
    if isinstance(arguments, str):
        objects = _read_objects(arguments)
        arguments = objects[0] if len(objects) == 1 else arguments if arguments.strip("{} \n") else {}
    return {"name": named.get("name", ""), "arguments": arguments}
