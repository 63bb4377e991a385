"""Calls of tools in an answer become the API's calls, and all else stays text."""

from typing import Any

import pytest

from ochat_train.conversations.spell_out import Spelling
from ochat_train.serve.tool_calls import CallForm, CallReader, find_form
from tests.calling_model import TAGS

TAGGED, BARE = CallForm("<tool_call>", "</tool_call>"), CallForm("", "")
CALL = '{"name": "look", "arguments": {"at": "</tool_call> \\u0040 \\""}}'
SAID = {"name": "look", "arguments": {"at": '</tool_call> @ "'}}
# Llama 3's form has other names and no marks.
BY_PARAMETERS = (
    "{%- for message in messages %}{{- '<start_of_turn>' + message.role + '\n' }}{%- if message.tool_calls %}"
    "{%- set call = message.tool_calls[0].function %}"
    """{{- '{"name": "' + call.name + '", "parameters": ' + (call.arguments | tojson) + '}' }}"""
    "{%- else %}{{- message.content }}{%- endif %}{{- '</s>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<start_of_turn>assistant\n' }}{%- endif %}"
)
IN_PYTHON = BY_PARAMETERS.replace(
    """'{"name": "' + call.name + '", "parameters": ' + (call.arguments | tojson) + '}'""",
    """'[' + call.name + '(at="' + call.arguments.at + '")]'""",
)


def read(form: CallForm | None, text: str, size: int) -> tuple[str, list[dict[str, Any]]]:
    """The text and the calls of an answer that comes in pieces of some characters."""
    reader, parts = CallReader(form, ["look"]), []
    for start in range(0, len(text), size):
        parts += reader.read(text[start : start + size])
    parts += reader.read("", is_last=True)
    return "".join(p for p in parts if isinstance(p, str)), [p for p in parts if isinstance(p, dict)]


@pytest.mark.parametrize(
    ("spelling", "form"),
    [
        (Spelling(TAGS), TAGGED),
        (Spelling(TAGS, special_tokens=("<tool_call>",)), BARE),  # text is no control: the record's own form
        (Spelling(TAGS, special_tokens=("<tool_call>",), arguments=frozenset({"calls"})), TAGGED),
        (Spelling(BY_PARAMETERS), BARE),
        (Spelling(IN_PYTHON), None),
        (Spelling(), BARE),
    ],
)
def test_the_form_is_that_of_training(spelling: Spelling, form: CallForm | None) -> None:
    assert find_form(spelling) == form


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("form", "answer", "text", "num_calls"),
    [
        (TAGGED, f"<tool_call>\n{CALL}\n</tool_call>", "", 1),
        (TAGGED, f" I look. \n<tool_call>{CALL}</tool_call>\n<tool_call>\n{CALL}\n</tool_call>\n", " I look.", 2),
        (TAGGED, f"<tool_call>{CALL}", "", 1),  # as where the closing tag is a stop text
        (TAGGED, f"<tool_call>{CALL}</tool_call> Done. ", " Done.", 1),
        (TAGGED, f"<tool_call>{CALL[:-1]}", ..., 0),  # cut
        (TAGGED, "<tool_call>none</tool_call> <tool", ..., 0),
        (TAGGED, f"<tool_call>{CALL.replace('look', 'erase')}</tool_call>", ..., 0),  # no tool of the request
        (TAGGED, f"a < b <tool \n\n{CALL}\n ", ..., 0),
        (BARE, f"\n {CALL}\n", "", 1),
        (BARE, f"I look.\n[{CALL}, {CALL}]", "I look.", 2),
        (BARE, f"{CALL}\n{CALL}", "", 2),
        (BARE, f"I look. {CALL}", ..., 0),
        (BARE, f"{CALL} And so on.", ..., 0),
        (BARE, '{"name": "Ada", "age": 36}', ..., 0),
        (BARE, "[1, 2]\n{not JSON", ..., 0),
        (None, f"<tool_call>{CALL}</tool_call>", ..., 0),
    ],
)
def test_calls_are_found_in_whatever_pieces_they_come(
    form: CallForm | None, answer: str, text: Any, num_calls: int, size: int
) -> None:
    assert read(form, answer, size) == (answer if text is ... else text, [SAID] * num_calls)


def test_text_is_not_held_back_for_longer_than_it_may_be_a_call() -> None:
    reader = CallReader(TAGGED, ["look"])
    assert [reader.read(piece) for piece in ("a", " <", "tool", "s>")] == [["a"], [], [], [" <tools>"]]
    assert CallReader(TAGGED, []).read(" <tool_call>") == [" <tool_call>"]  # a request without tools
