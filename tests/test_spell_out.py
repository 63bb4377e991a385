"""Reasoning, calls and tools become the text that the base's own chat template makes of them."""

import json
from dataclasses import replace

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from ochat_train.conversations.schema import Message, ParsedRecord
from ochat_train.conversations.spell_out import Spelling, spell_out

TOOLS = '[{"name": "area", "parameters": {"a": null, "b": "number"}}]'  # a null that somebody wrote
CALL = '[{"id": "c1", "function": {"name": "area", "arguments": "{\\"a\\": 5}"}}]'

# In the manner of templates that people use; each has a `{% ... %}` of its own for system text, tools and calls.
AFTER_THE_SYSTEM_TEXT = """\
{%- if tools %}
    {{- '<|start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- 'Tools:' }}{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}{{- '<|end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|start|>system\\n' + messages[0].content + '<|end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{{- '<|start|>user\\n' + message.content + '<|end|>\\n' }}{%- endif %}
    {%- if message.role == 'assistant' %}
        {{- '<|start|>assistant\\n' }}
        {%- if message.reasoning_content %}
            {{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- message.content }}
        {%- for call in message.tool_calls %}
            {{- '\\n' if message.content or not loop.first }}
            {{- '<call>' + (call.function | tojson) + '</call>' }}
        {%- endfor %}
        {{- '<|end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant\\n' }}{%- endif %}"""
BEFORE_THE_SYSTEM_TEXT = """\
{{- '<|start|>system\\n' }}
{%- if tools %}{{- 'Environment: tools\\n' }}{%- endif %}
{{- 'Date: ' + date_string + '\\n\\n' }}
{%- if tools %}{%- for tool in tools %}{{- (tool | tojson) + '\\n\\n' }}{%- endfor %}{%- endif %}
{%- if messages[0].role == 'system' %}{{- messages[0].content }}{%- endif %}{{- '<|end|>' }}
{%- for message in messages if message.role != 'system' %}
    {{- '<|start|>' + message.role + '\\n' }}
    {%- if message.tool_calls %}
        {{- message.tool_calls[0].function | tojson }}
    {%- else %}{{- message.content }}{%- endif %}
    {{- '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant\\n' }}{%- endif %}"""
WITH_CONTROL = AFTER_THE_SYSTEM_TEXT.replace("'Tools:'", "'<|tools|>'").replace("<call>", "<|call|>")
WITHOUT_ARGUMENTS = AFTER_THE_SYSTEM_TEXT.replace("(call.function | tojson)", "call.function.name")
CONTROL = ("<|start|>", "<|end|>", "<|tools|>", "<|call|>")


def turns(*messages: Message, system: str = "", tools: str = "") -> ParsedRecord:
    return ParsedRecord("id", "role/content", False, None, system, messages, ("nan_read",), tools=tools)


ASKED = Message("user", "How large?")


def spelled(spelling: Spelling, *messages: Message, system: str = "", tools: str = "") -> ParsedRecord:
    return spell_out(turns(*messages, system=system, tools=tools), spelling)


@pytest.mark.parametrize("tool_calls", ["context", "train"])
@pytest.mark.parametrize("chat_template", [None, AFTER_THE_SYSTEM_TEXT])
def test_turns_without_tools_and_reasoning_are_left_as_they_are(chat_template: str | None, tool_calls: str) -> None:
    plain = turns(Message("system", " s"), ASKED, Message("assistant", " 25 ", 0.5), system="x")
    assert spell_out(plain, Spelling(chat_template, tool_calls=tool_calls)) is plain  # type: ignore[arg-type]


# ---- Definitions ----


@pytest.mark.parametrize("system", ["", "Be brief.", " Two\n\nlines "])
@pytest.mark.parametrize("template", [AFTER_THE_SYSTEM_TEXT, BEFORE_THE_SYSTEM_TEXT])
def test_definitions_are_where_the_base_has_them(template: str, system: str) -> None:
    written = spelled(Spelling(template, CONTROL), ASKED, system=system, tools=TOOLS)
    assert (written.repairs, written.tools) == (("nan_read", "tools_in_system"), "")
    definition = {"type": "function", "function": {"name": "area", "parameters": {"a": None, "b": "number"}}}
    whole, _ = render_jinja_template(
        [[*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": "How large?"}]],
        tools=[definition],
        chat_template=template,
        date_string="DATE",
    )
    (own,) = whole
    expected = own.partition("<|start|>system\n")[2].partition("<|end|>")[0].replace("Date: DATE\n\n", "")
    assert written.system.split() == expected.split()
    assert system in written.system and json.dumps(definition) in written.system


@pytest.mark.parametrize(
    ("chat_template", "control"), [(None, ()), (WITH_CONTROL, CONTROL), ("{{ nothing.here }}", ())]
)
def test_definitions_that_have_no_form_are_json_after_the_system_text(
    chat_template: str | None, control: tuple[str, ...]
) -> None:
    spelling = Spelling(chat_template, control)
    assert spelled(spelling, ASKED, tools=TOOLS).system == TOOLS
    assert spelled(spelling, ASKED, tools=TOOLS, system="Be brief.").system == f"Be brief.\n\n{TOOLS}"
    first, second = Message("system", "One."), Message("system", "Two.")
    several = spelled(spelling, first, second, ASKED, tools=TOOLS, system="Zero.")
    assert (several.system, several.messages[:2]) == ("Zero.", (first, replace(second, text=f"Two.\n\n{TOOLS}")))
    trained = Message("system", "Learn me.", 1.0)
    assert spelled(spelling, trained, ASKED, tools=TOOLS).messages[0] == trained


# ---- Calls and reasoning ----

CALLED = Message("assistant", "Let me see.", reasoning="Hm.", calls=CALL)


@pytest.mark.parametrize(
    ("template", "control", "text"),
    [
        (
            AFTER_THE_SYSTEM_TEXT,
            CONTROL,
            '<think>\nHm.\n</think>\n\nLet me see.\n<call>{"name": "area", "arguments": {"a": 5}}</call>',
        ),
        (
            BEFORE_THE_SYSTEM_TEXT,
            CONTROL,
            '<think>\nHm.\n</think>\n\nLet me see.\n{"name": "area", "arguments": {"a": 5}}',
        ),
        (WITHOUT_ARGUMENTS, CONTROL, f"<think>\nHm.\n</think>\n\nLet me see.\n{CALL}"),
        (WITH_CONTROL, CONTROL, f"<think>\nHm.\n</think>\n\nLet me see.\n{CALL}"),
        (None, (), f"<think>\nHm.\n</think>\n\nLet me see.\n{CALL}"),
    ],
)
def test_reasoning_and_calls_are_in_the_form_of_the_base_and_lose_no_text(
    template: str | None, control: tuple[str, ...], text: str
) -> None:
    kept = Spelling(template, control, "keep", "train")
    assert spelled(kept, ASKED, CALLED).messages == (ASKED, Message("assistant", text))
    dropped = spelled(replace(kept, reasoning="drop"), ASKED, CALLED)
    assert dropped.messages[1].text == text.removeprefix("<think>\nHm.\n</think>\n\n")
    assert dropped.repairs == ("nan_read", "reasoning_dropped")
    context = spelled(replace(kept, tool_calls="context"), ASKED, CALLED)
    thought, call = text.rsplit("\n", 1)
    assert context.messages == (ASKED, Message("assistant", thought), Message("assistant", call, 0.0))
    assert context.repairs == ("nan_read", "reasoning_kept", "calls_untrained")


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_a_call_with_a_weight_of_its_own_keeps_it_whatever_the_recipe_says(weight: float) -> None:
    for tool_calls in ("context", "train"):
        written = spelled(Spelling(tool_calls=tool_calls), ASKED, replace(CALLED, weight=weight))  # type: ignore[arg-type]
        assert written.messages[1] == Message("assistant", f"Let me see.\n{CALL}", weight)
        assert "calls_untrained" not in written.repairs


def test_several_calls_are_written_one_by_one_where_the_base_takes_one() -> None:
    one_at_a_time = BEFORE_THE_SYSTEM_TEXT.replace(
        "{%- if message.tool_calls %}",
        "{%- if message.tool_calls %}"
        "{%- if message.tool_calls | length > 1 %}{{- raise_exception('one') }}{%- endif %}",
    )
    called = Message("assistant", "", calls='[{"name": "area", "arguments": {}}, {"name": "side", "arguments": {}}]')
    written = spelled(Spelling(one_at_a_time, CONTROL, tool_calls="train"), ASKED, called)
    assert written.messages[1].text == '{"name": "area", "arguments": {}}\n{"name": "side", "arguments": {}}'


def test_nulls_beside_a_calls_name_and_blank_arguments_are_nothing() -> None:
    calls = [
        '[{"id": "c", "custom": null, "function": {"name": "f", "arguments": "{}", "parsed_arguments": null}}]',
        '{"name": "f", "arguments": null}',
        '{"name": "f", "arguments": " "}',
        '{"name": "f", "arguments": "null"}',
    ]
    for call in calls:
        called = Message("assistant", "", calls=call)
        written = spelled(Spelling(AFTER_THE_SYSTEM_TEXT, CONTROL, tool_calls="train"), ASKED, called)
        assert written.messages[1].text == '<call>{"name": "f", "arguments": {}}</call>'
    null = Message("assistant", "", calls='{"name": "f", "arguments": {"x": null}}')
    written = spelled(Spelling(AFTER_THE_SYSTEM_TEXT, CONTROL, tool_calls="train"), ASKED, null)
    assert written.messages[1].text == '<call>{"name": "f", "arguments": {"x": null}}</call>'


def test_definitions_that_stand_in_the_system_text_are_not_written_twice() -> None:
    system = f"You may call <tools>{TOOLS}</tools>"
    for template in (None, AFTER_THE_SYSTEM_TEXT):
        assert spelled(Spelling(template, CONTROL), ASKED, system=system, tools=TOOLS).system == system
        other = "You measure the area of rooms."  # the tool's name, and no definition
        assert '"name"' in spelled(Spelling(template, CONTROL), ASKED, system=other, tools=TOOLS).system


def test_long_whole_numbers_keep_their_digits() -> None:
    one = '{"name": "f", "arguments": {"n": 12345678901234567890123}}'
    for calls in (one, f"[{one}, {one}]"):
        for template in (None, AFTER_THE_SYSTEM_TEXT, BEFORE_THE_SYSTEM_TEXT, WITH_CONTROL):
            called = Message("assistant", "", calls=calls)
            written = spelled(Spelling(template, CONTROL, tool_calls="train"), ASKED, called).messages[1].text
            assert written.count("12345678901234567890123") == calls.count("12345678901234567890123")


def test_reasoning_that_ends_in_a_call_is_context_with_it() -> None:
    called = Message("assistant", "", reasoning="Hm.", calls=CALL)
    for template in (None, AFTER_THE_SYSTEM_TEXT):
        kept = Spelling(template, CONTROL, "keep", "context")
        (_, said) = spelled(kept, ASKED, called).messages
        assert said.weight == 0.0 and said.text.startswith("<think>\nHm.\n</think>\n\n") and "area" in said.text


def test_a_call_that_is_written_in_another_way_stays_as_it_is() -> None:
    others = [
        '[{"type": "custom", "custom": {"name": "code", "input": "print(1)"}}]',
        '{"tool": "f", "tool_input": {"x": 1}}',
        '{"name": "f", "arguments": {}, "thought": "because"}',
        '{"name": "f", "arguments": {}, "input": {}}',
        '{"name": "f", "arguments": "x = 1"}',
        '{"name": "f", "arguments": "[]"}',
    ]
    for template in (None, AFTER_THE_SYSTEM_TEXT):
        for call in ("area(5)", "{", "[1]", "{}", *others):
            written = spelled(Spelling(template, tool_calls="train"), ASKED, Message("assistant", "", calls=call))
            assert written.messages[1].text == call
