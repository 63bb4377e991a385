"""Reasoning, tool calls and definitions of tools become text, in the form of the base's own chat template."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

from ochat_train.conversations.schema import Message, ParsedRecord
from ochat_train.conversations.template import num_common

_SYSTEM, _USER, _ANSWER = "\u2983system\u2984", "\u2983user\u2984", "\u2983answer\u2984"  # in no template
_DATE = "26 Jul 2024"  # for templates that would write today's, so that the same dump gives the same text every day
_ASKED = {"role": "user", "content": _USER}


@dataclass(frozen=True, slots=True)
class Spelling:
    """How reasoning and tools are written, and what of them is trained.

    chat_template: the base's own, in Jinja, or None. special_tokens: the tokenizer's; a form that needs one of them is
    not used, since text is never read as control. reasoning: "drop" or "keep". tool_calls: "context" gives calls no
    loss unless the record gives them a weight, "train" the loss of answers. arguments: which of "tools", "calls" and
    "reasoning" the template that is trained takes as arguments; these stay beside the texts.
    """

    chat_template: str | None = None
    special_tokens: tuple[str, ...] = ()
    reasoning: Literal["drop", "keep"] = "drop"
    tool_calls: Literal["context", "train"] = "context"
    arguments: frozenset[str] = frozenset()


AS_WRITTEN = Spelling()


def spell_out(parsed: ParsedRecord, spelling: Spelling) -> ParsedRecord:
    """The record with reasoning, tool calls and definitions of tools in its texts.

    Definitions follow the system text. If the base's template has no form for them, for a call or for reasoning, they
    are written as the record has them, reasoning between <think> and </think>. A call without a loss becomes a turn of
    its own after its text; as an argument of the template it is a part of its turn, which then has no loss. Added to
    `repairs`: tools_in_system, reasoning_kept, reasoning_dropped, and calls_untrained if calls became context because
    the record gives them no weight.

    Worked example: assistant text "Let me look.", calls [{"name": "f", "arguments": {}}] becomes, with "train" and
    Qwen's template, 'Let me look.\\n<tool_call>\\n{"name": "f", "arguments": {}}\\n</tool_call>'.
    """
    if not parsed.tools and not any(message.calls or message.reasoning for message in parsed.messages):
        return parsed
    repairs = dict.fromkeys(parsed.repairs)
    messages: list[Message] = []
    for message in parsed.messages:
        text, weight, reasoning, calls = message.text, message.weight, message.reasoning, message.calls
        if reasoning:
            repairs["reasoning_kept" if spelling.reasoning == "keep" else "reasoning_dropped"] = None
            reasoning = reasoning if spelling.reasoning == "keep" else ""
        kept_calls = calls if "calls" in spelling.arguments and read_calls(calls) else ""
        if calls and weight is None and spelling.tool_calls == "context":
            repairs["calls_untrained"] = None
            if kept_calls:
                weight = 0.0
            elif text:
                messages.append(Message(message.role, _write_answer(spelling, text, reasoning, "")))
            # Reasoning before an untrained call is untrained too: alone it would teach the model to stop there.
            if not kept_calls:
                text, weight, reasoning = "", 0.0, "" if text else reasoning
        kept_reasoning = reasoning if "reasoning" in spelling.arguments else ""
        written = _write_answer(spelling, text, "" if kept_reasoning else reasoning, "" if kept_calls else calls)
        messages.append(Message(message.role, written, weight, kept_reasoning, kept_calls))
    system = parsed.system
    kept_tools = parsed.tools if "tools" in spelling.arguments and read_definitions(parsed.tools) else ""
    if parsed.tools and not kept_tools:
        repairs["tools_in_system"] = None
        leading = [message.role == "system" and not message.has_weight for message in messages]
        last = (leading.index(False) if False in leading else len(messages)) - 1
        if last < 0:
            system = _write_system(spelling, system, parsed.tools)
        else:  # after the last of the system turns that `repair_turns` will join
            messages[last] = replace(messages[last], text=_write_system(spelling, messages[last].text, parsed.tools))
    return replace(parsed, system=system, messages=tuple(messages), repairs=tuple(repairs), tools=kept_tools)


# ---- Definitions ----


@lru_cache(maxsize=1024)  # many conversations have the same tools
def _write_system(spelling: Spelling, system: str, tools: str) -> str:
    """The system text with the definitions in it."""
    definitions = read_definitions(tools)
    # Names with quotation marks: a system text may mention the weather without defining a tool of that name.
    if definitions and all(json.dumps(definition["function"]["name"]) in system for definition in definitions):
        return system  # which has the definitions already
    messages = [{"role": "system", "content": _SYSTEM}, _ASKED]
    bare, full = _render(spelling, messages), _render(spelling, messages, tools=definitions)
    if definitions and bare and full:
        start = num_common(bare, full)
        num_after = num_common(bare[start:][::-1], full[start:][::-1])
        before, after = full[:start], full[len(full) - num_after :]
        added = full[start : len(full) - num_after].replace(bare[start : len(bare) - num_after] or "\0", "", 1)
        if _USER in after and not _has_control(spelling, added) and added.strip():
            if _SYSTEM in before:
                return system + added if system else added.strip()
            if _SYSTEM in after:
                gap = after[: after.index(_SYSTEM)]
                return added + ("" if gap.strip() else gap) + system if system else added.strip()
    return f"{system}\n\n{tools}" if system else tools


# ---- Answers ----


def _write_answer(spelling: Spelling, text: str, reasoning: str, calls: str) -> str:
    """The text of an answer with its reasoning before it and its calls after it."""
    if not reasoning and not calls:
        return text
    called = read_calls(calls)
    if bool(called) == bool(calls) and (rendered := _render_answer(spelling, text, reasoning, called)):
        return rendered
    if reasoning:
        return f"<think>\n{reasoning}\n</think>\n\n{_write_answer(spelling, text, '', calls)}"
    if text:
        return f"{text}\n{_write_answer(spelling, '', '', calls)}"
    if len(called) > 1 and spelling.chat_template is not None:  # some templates take one call at a time
        try:
            each = [json.dumps(call, ensure_ascii=False, separators=(",", ":")) for call in called]
        except RecursionError:
            return calls
        alone = [_write_answer(spelling, "", "", call) for call in each]
        if alone != each:  # the template has a form for one call
            return "\n".join(alone)
    return calls


def _render_answer(spelling: Spelling, text: str, reasoning: str, called: list[dict[str, Any]]) -> str:
    """The answer in the form of the base's template; empty if it has none, needs control tokens or loses content."""
    prompt, bare = _frame_of_answers(spelling)
    answer: dict[str, Any] = {"role": "assistant", "content": text}
    if called:
        answer["tool_calls"] = [{"type": "function", "function": call} for call in called]
    if reasoning:
        answer["reasoning_content"] = reasoning
    full = _render(spelling, [_ASKED, answer])
    if not (bare and prompt and full and _ANSWER in bare and bare.startswith(prompt) and full.startswith(prompt)):
        return ""
    lead, _, end = bare[len(prompt) :].partition(_ANSWER)
    if not full.endswith(end):
        return ""
    written = full[len(prompt) : len(full) - len(end)]
    if not reasoning:  # a template may begin every answer with empty reasoning
        written = written.removeprefix(lead)
    names = [call["name"] for call in called]
    is_whole = (
        reasoning.strip() in written
        and text.strip() in written
        and all(written.count(name) >= names.count(name) for name in names)
        and all(_holds(written, call["arguments"]) for call in called)
    )
    return written if written.strip() and is_whole and not _has_control(spelling, written) else ""


@lru_cache(maxsize=8)
def _frame_of_answers(spelling: Spelling) -> tuple[str | None, str | None]:
    """The rendered prompt, and the same with a placeholder for the answer."""
    prompt = _render(spelling, [_ASKED], add_generation_prompt=True)
    return prompt, _render(spelling, [_ASKED, {"role": "assistant", "content": _ANSWER}])


def _has_control(spelling: Spelling, text: str) -> bool:
    """Whether the tokenizer would read a part of the text as a special token."""
    return any(token in text for token in spelling.special_tokens if token)


def _holds(written: str, value: Any) -> bool:
    """Whether a text has all names and values in the arguments of a call, in whatever form."""
    if isinstance(value, dict):
        return all(key in written and _holds(written, inner) for key, inner in value.items())
    if isinstance(value, list):
        return all(_holds(written, inner) for inner in value)
    forms = [str(value), *(json.dumps(value, ensure_ascii=is_ascii).strip('"') for is_ascii in (True, False))]
    return any(form in written for form in forms)


def _render(spelling: Spelling, messages: Sequence[dict[str, Any]], **more: Any) -> str | None:
    """The messages in the base's template; None if there is none, or if it refuses them."""
    if spelling.chat_template is None:
        return None
    # Imported here, since it takes a second and few dumps have tools.
    from transformers.utils.chat_template_utils import render_jinja_template

    variables: dict[str, Any] = {"bos_token": "", "eos_token": "", "date_string": _DATE, "tools_in_user_message": False}
    try:
        rendered: Any = render_jinja_template(
            [list(messages)], chat_template=spelling.chat_template, **variables, **more
        )
    except Exception:  # a template may raise anything
        return None
    return str(rendered[0][0])


def _read_objects(text: str) -> list[dict[str, Any]]:
    """The objects in JSON; [] for any other text."""
    try:
        value = json.loads(text)  # not orjson, which would round long whole numbers
    except (ValueError, RecursionError):
        return []
    objects = value if isinstance(value, list) else [value]
    return objects if all(isinstance(one, dict) for one in objects) else []


def read_definitions(text: str) -> list[dict[str, Any]]:
    """Definitions as {type, function: {name, ...}}; [] if one of them is written in another way."""
    definitions = []
    for tool in _read_objects(text):
        function = tool.get("function", tool)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return []
        definitions.append(tool if "function" in tool else {"type": "function", "function": tool})
    return definitions


def read_calls(text: str) -> list[dict[str, Any]]:
    """Calls as {name, arguments}, the arguments as an object; [] if one of them is written in another way."""
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
