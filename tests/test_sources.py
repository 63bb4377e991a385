"""Every record belongs to exactly one source, and gets its condition and weights from there."""

import json
from typing import Any

import pytest

from ochat_train.conversations.schema import Conversation, Message, ParsedRecord
from ochat_train.conversations.sources import Source, assign_source, match_source

GPT4 = Source("gpt4", "GPT4", 1.0, {"model": "Model: GPT-4"}, {})
GPT3 = Source("gpt3", "GPT3", 0.1, {}, {"model": "Model: GPT-4"})


def match(fields: object, *candidates: Source) -> Source | None:
    return match_source(fields, candidates, file="dumps/a.json", offset=1234, id="rec7")


def test_a_record_matches_by_its_fields() -> None:
    assert match({"model": "Model: GPT-4"}, GPT4, GPT3) is GPT4
    assert match({"model": "Model: GPT-3.5"}, GPT4, GPT3) is GPT3


def test_a_missing_field_never_equals() -> None:
    assert match({}, GPT4, GPT3) is GPT3
    null = Source("null", None, 1.0, {"model": None}, {})
    assert match({"model": None}, null, GPT4) is null
    with pytest.raises(ValueError, match="matches no source"):
        match({}, null)


def test_all_fields_of_where_must_equal_and_none_of_where_not() -> None:
    source = Source("s", None, 1.0, {"a": 1, "b": "x"}, {"c": 1, "d": 1})
    assert match({"a": 1, "b": "x"}, source) is source
    assert match({"a": 1.0, "b": "x", "c": 2}, source) is source
    for fields in ({"a": 1}, {"a": 1, "b": "y"}, {"a": 1, "b": "x", "c": 1}, {"a": 1, "b": "x", "d": 1}):
        with pytest.raises(ValueError):
            match(fields, source)


def test_a_list_means_any_of() -> None:
    new = Source("new", None, 1.0, {"model": ["gpt-4", "gpt-5"]}, {})
    old = Source("old", None, 1.0, {}, {"model": ("gpt-4", "gpt-5")})
    assert match({"model": "gpt-5"}, new, old) is new
    assert match({"model": "gpt-2"}, new, old) is old
    assert match({"model": ["gpt-4", "gpt-5"]}, new, old) is old


def test_true_is_not_1() -> None:
    flag = Source("flag", None, 1.0, {"good": True}, {})
    number = Source("number", None, 1.0, {"good": 1}, {})
    assert match({"good": True}, flag, number) is flag
    assert match({"good": 1}, flag, number) is number


def test_no_source_or_two_are_refused_with_all_that_is_needed_to_mend_it() -> None:
    every = Source("every", None, 1.0, {}, {"lang": "de"})
    with pytest.raises(ValueError) as raised:
        match({"model": "Model: GPT-4", "unrelated": 5}, GPT4, GPT3, every)
    message = str(raised.value)
    for part in ("dumps/a.json", "1234", "rec7", "matches 2 sources (gpt4, every)", "narrow"):
        assert part in message
    assert "model='Model: GPT-4', lang=(missing)" in message
    assert "unrelated" not in message
    assert "gpt3 (where_not model='Model: GPT-4')" in message

    with pytest.raises(ValueError) as raised:
        match({"model": "Model: X" * 1000}, GPT4)
    message = str(raised.value)
    assert "matches no source" in message and "add a source" in message
    assert len(message) < 600


def test_a_deeply_nested_field_is_shown_in_short() -> None:
    deep = json.loads("[" * 900 + "]" * 900)
    with pytest.raises(ValueError, match="matches no source"):
        match({"model": deep}, GPT4)


@pytest.mark.parametrize("fields", [None, 7, "x", [{"model": "Model: GPT-4"}]])
def test_a_record_that_is_no_object_belongs_to_the_only_candidate_or_to_none(fields: Any) -> None:
    assert match(fields, GPT4) is GPT4
    assert match(fields, GPT4, GPT3) is None
    assert match(fields) is None


def turns_of(*messages: Message, condition: str | None = None) -> ParsedRecord:
    return ParsedRecord("rec7", "role/content", False, condition, "Be brief.", messages, ())


def test_weights_multiply_and_become_numbers() -> None:
    messages = (
        Message("user", "a"),
        Message("assistant", "b"),
        Message("user", "c", 2.0),
        Message("tool", "d"),
        Message("assistant", "e", 0.5),
        Message("system", "f", 0.0),
        Message("assistant", "g", 0.0),
    )
    conversation = assign_source(turns_of(*messages), GPT3)
    assert conversation.messages == (
        Message("user", "a", 0.0),
        Message("assistant", "b", 0.1),
        Message("user", "c", 0.2),
        Message("tool", "d", 0.0),
        Message("assistant", "e", 0.05),
        Message("system", "f", 0.0),
        Message("assistant", "g", 0.0),
    )
    assert all(isinstance(message.weight, float) for message in conversation.messages)


def test_whole_numbers_as_weights_become_floats() -> None:
    source = Source("s", None, 1, {}, {})
    conversation = assign_source(turns_of(Message("user", "a"), Message("assistant", "b", 2)), source)
    assert [repr(message.weight) for message in conversation.messages] == ["0.0", "2.0"]


def test_a_source_of_weight_0_is_allowed() -> None:
    source = Source("context only", "GPT3", 0.0, {}, {})
    assert assign_source(turns_of(Message("assistant", "b")), source).messages[0].weight == 0.0


@pytest.mark.parametrize(
    ("of_source", "own", "expected"),
    [("GPT4", "GPT3", "GPT4"), ("", "GPT3", ""), (None, "GPT3", "GPT3"), (None, "", ""), (None, None, "")],
)
def test_the_sources_condition_comes_before_the_records_own(
    of_source: str | None, own: str | None, expected: str
) -> None:
    conversation = assign_source(turns_of(condition=own), Source("s", of_source, 1.0, {}, {}))
    assert conversation == Conversation("rec7", "s", expected, "Be brief.", ())


def test_a_weight_beyond_all_numbers_is_refused() -> None:
    source = Source("s", None, 1e308, {}, {})
    with pytest.raises(ValueError, match=r"rec7.*not finite.*lower"):
        assign_source(turns_of(Message("assistant", "b", 1e308)), source)
