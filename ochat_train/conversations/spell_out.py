"""Reasoning, calls of tools and definitions of tools become text, in the form of the base's own chat template."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import takewhile
from typing import Any, Literal

from ochat_train.conversations.schema import Message, ParsedRecord

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


def spell_out(turns: ParsedRecord, spelling: Spelling) -> ParsedRecord:
    """The turns with reasoning, calls and definitions of tools in their texts.

    Definitions follow the system text. Where they, a call or the reasoning have no form in the base's template they are
    written as the record has them, reasoning between <think> and </think>. A call that is no part of the loss becomes a
    turn of its own after its text. Added to `repairs`: tools_in_system, reasoning_kept, reasoning_dropped, and
    calls_untrained where calls became context because nothing says that they are trained.

    Worked example: assistant text "Let me look.", calls [{"name": "f", "arguments": {}}] becomes, with "train" and
    Qwen's template, 'Let me look.\\n<tool_call>\\n{"name": "f", "arguments": {}}\\n</tool_call>'.
    """
    if not turns.tools and not any(message.calls or message.reasoning for message in turns.messages):
        return turns
    repairs = dict.fromkeys(turns.repairs)
    messages: list[Message] = []
    for message in turns.messages:
        text, weight, reasoning, calls = message.text, message.weight, message.reasoning, message.calls
        if reasoning:
            repairs["reasoning_kept" if spelling.reasoning == "keep" else "reasoning_dropped"] = None
            reasoning = reasoning if spelling.reasoning == "keep" else ""
        is_context = bool(calls) and weight is None and spelling.tool_calls == "context"
        if is_context:
            repairs["calls_untrained"] = None
            if text:
                messages.append(Message(message.role, _write_answer(spelling, text, reasoning, "")))
            # A thought that ends in a call is context with it: trained alone it would teach to stop there.
            text, weight, reasoning = "", 0.0, "" if text else reasoning
        messages.append(Message(message.role, _write_answer(spelling, text, reasoning, calls), weight))
    system = turns.system
    if turns.tools:
        repairs["tools_in_system"] = None
        leading = [message.role == "system" and not message.weight for message in messages]
        last = (leading.index(False) if False in leading else len(messages)) - 1
        if last < 0:
            system = _write_system(spelling, system, turns.tools)
        else:  # after the last of the system turns that `repair_turns` will join
            messages[last] = replace(messages[last], text=_write_system(spelling, messages[last].text, turns.tools))
    return replace(turns, system=system, messages=tuple(messages), repairs=tuple(repairs), tools="")


@lru_cache(maxsize=1024)  # the same tools stand beside many conversations
def _write_system(spelling: Spelling, system: str, tools: str) -> str:
    """The system text with the definitions in it."""
    definitions = _read_definitions(tools)
    # With its quotation marks: a system text may well speak of the weather without defining a tool of that name.
    if definitions and all(json.dumps(definition["function"]["name"]) in system for definition in definitions):
        return system  # which holds them already
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


@lru_cache(maxsize=8)
def _frame_of_answers(spelling: Spelling) -> tuple[str | None, str | None]:
    """The base's template up to where an answer begins, and with an answer."""
    asked = {"role": "user", "content": _USER}
    prompt = _render(spelling, [asked], add_generation_prompt=True)
    return prompt, _render(spelling, [asked, {"role": "assistant", "content": _ANSWER}])


def _num_common(first: str, second: str) -> int:
    """How many characters both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def _write_answer(spelling: Spelling, text: str, reasoning: str, calls: str) -> str:
    """The text of an answer with its reasoning before it and its calls after it."""
    if not reasoning and not calls:
        return text
    asked = {"role": "user", "content": _USER}
    prompt, bare = _frame_of_answers(spelling)
    answer: dict[str, Any] = {"role": "assistant", "content": text}
    called = _read_calls(calls)
    if called:
        answer["tool_calls"] = [{"type": "function", "function": call} for call in called]
    if reasoning:
        answer |= {"reasoning_content": reasoning}
    full = _render(spelling, [asked, answer]) if bool(called) == bool(calls) else None
    if bare and prompt and full and _ANSWER in bare and bare.startswith(prompt) and full.startswith(prompt):
        lead, _, end = bare[len(prompt) :].partition(_ANSWER)
        written = full[len(prompt) : len(full) - len(end)] if full.endswith(end) else ""
        if not reasoning:  # a template may begin every answer with an empty one
            written = written.removeprefix(lead)
        is_control = any(token in written for token in spelling.special_tokens if token)
        names = [call["name"] for call in called]
        is_whole = (
            reasoning.strip() in written
            and text.strip() in written
            and all(written.count(name) >= names.count(name) for name in names)
            and all(_holds(written, call["arguments"]) for call in called)
        )
        if written.strip() and is_whole and not is_control:
            return written
    if reasoning:
        return f"<think>\n{reasoning}\n</think>\n\n{_write_answer(spelling, text, '', calls)}"
    if text and calls:
        return f"{text}\n{_write_answer(spelling, '', '', calls)}"
    if len(called) > 1 and spelling.chat_template is not None:  # some templates take one call at a time
        try:
            each = [json.dumps(call, ensure_ascii=False, separators=(",", ":")) for call in called]
        except RecursionError:
            return text + calls
        alone = [_write_answer(spelling, "", "", call) for call in each]
        if alone != each:  # each has a form: without one it stays as it is
            return "\n".join(alone)
    return text + calls


def _holds(written: str, value: Any) -> bool:
    """Whether all names and values in the arguments of a call stand in a text, in whatever form."""
    if isinstance(value, dict):
        return all(key in written and _holds(written, inner) for key, inner in value.items())
    if isinstance(value, list):
        return all(_holds(written, inner) for inner in value)
    forms = [str(value), *(json.dumps(value, ensure_ascii=is_ascii).strip('"') for is_ascii in (True, False))]
    return any(form in written for form in forms)


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
    """The objects in JSON; [] for another text."""
    try:
        value = json.loads(text)  # not orjson, which would round long whole numbers
    except (ValueError, RecursionError):
        return []
    objects = value if isinstance(value, list) else [value]
    return objects if all(isinstance(one, dict) for one in objects) else []


def _read_definitions(text: str) -> list[dict[str, Any]]:
    """Definitions as {type, function: {name, ...}}; [] where one of them is written in another way."""
    definitions = []
    for tool in _read_objects(text):
        function = tool.get("function", tool)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return []
        definitions.append(tool if "function" in tool else {"type": "function", "function": tool})
    return definitions


def _read_calls(text: str) -> list[dict[str, Any]]:
    """Calls as {name, arguments}, the arguments as an object; [] where one of them is written in another way."""
    calls = []
    for call in _read_objects(text):
        call = {key: value for key, value in call.items() if value is not None}
        function = call.get("function", call)
        if not isinstance(function, dict) or not call.keys() <= {"id", "type", "index", "function", *function}:
            return []
        function = {key: value for key, value in function.items() if value is not None}
        arguments = [function[key] for key in _ARGUMENTS if key in function]
        if arguments and isinstance(arguments[0], str):
            try:
                arguments[0] = json.loads(arguments[0].strip() or "{}")
            except (ValueError, RecursionError):
                return []
            arguments[0] = {} if arguments[0] is None else arguments[0]
        is_known = isinstance(function.get("name"), str) and function.keys() <= {"name", "id", "type", *_ARGUMENTS}
        if not is_known or len(arguments) > 1 or not isinstance(arguments[0] if arguments else {}, dict):
            return []
        calls.append({"name": function["name"], "arguments": arguments[0] if arguments else {}})
    return calls


_ARGUMENTS = ("arguments", "parameters", "input", "args")
