"""A record of any dialect becomes turns as they are written, or says why not."""

import json
from collections import Counter
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ochat_train.conversations.fields import ANSWER_KEYS, USER_KEYS, Reading
from ochat_train.conversations.roles import CALL_ROLES, ROLES
from ochat_train.conversations.schema import Drop, Message, ParsedRecord, Record
from ochat_train.conversations.sharegpt import parse_record
from ochat_train.conversations.unread import hint_fields


def record_of(fields: Any, damage: str | None = None, repairs: tuple[str, ...] = ()) -> Record:
    return Record("dump.json", 0, 10, fields, damage, repairs)


def parse(fields: Any) -> ParsedRecord | Drop:
    return parse_record(record_of(fields), default_id="dump.json:0")


def turns_of(turns: Any, name: str = "conversations") -> ParsedRecord:
    parsed = parse({name: turns})
    assert isinstance(parsed, ParsedRecord), parsed
    return parsed


def chat(**more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]} | more


HI, HELLO = Message("user", "Hi"), Message("assistant", "Hello")


# ---- Dialects ----


@pytest.mark.parametrize("name", ["conversations", "items", "messages", "conversation"])
@pytest.mark.parametrize(
    ("turns", "dialect"),
    [
        ([{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "from/value"),
        ([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}], "role/content"),
        ([{"human": "Hi", "assistant": "Hello"}], "pairs"),
        ([["Hi", "Hello"]], "pairs"),
        ([{"from": "human", "value": "Hi"}, {"role": "assistant", "content": "Hello"}], "from/value + role/content"),
        ([["Hi", None], {"from": "gpt", "value": "Hello"}], "pairs + from/value"),
    ],
)
def test_every_dialect_is_read_under_every_name_of_the_list(name: str, turns: Any, dialect: str) -> None:
    assert turns_of(turns, name) == ParsedRecord("dump.json:0", dialect, False, None, "", (HI, HELLO), ())


def test_the_first_list_with_turns_is_taken() -> None:
    turns = chat()["conversations"]
    for others in ({"conversations": None}, {"conversations": []}, {"conversations": "x"}, {"items": None}):
        parsed = parse(others | {"messages": turns, "conversation": [["other", "other"]]})
        assert isinstance(parsed, ParsedRecord)
        assert parsed.messages == (HI, HELLO)


def test_sharegpt_turns_and_openchat_messages_are_understood_turn_by_turn() -> None:
    mixed = {
        "items": [
            {"role": "user", "content": "Hi", "weight": 0},
            {"from": " GPT ", "value": " Hello\n"},
            {"from": None, "role": "user", "value": None, "content": "More"},
            {"role": "assistant", "content": "No", "weight": 0.5},
        ],
        "condition": "GPT4",
        "system": "Be brief.",
    }
    assert parse(mixed) == ParsedRecord(
        "dump.json:0",
        "role/content + from/value",
        False,
        "GPT4",
        "Be brief.",
        (
            Message("user", "Hi", 0.0),
            Message("assistant", " Hello\n"),
            Message("user", "More"),
            Message("assistant", "No", 0.5),
        ),
        (),
    )


@pytest.mark.parametrize("asked", USER_KEYS)
@pytest.mark.parametrize("answered", ANSWER_KEYS)
def test_a_pair_has_a_key_for_each_side(asked: str, answered: str) -> None:
    assert turns_of([{answered.title(): "Hello", asked.upper(): "Hi", "id": 7}]).messages == (HI, HELLO)


def test_a_pair_may_have_a_system_text_and_a_side_that_is_null() -> None:
    system = Message("system", "Be brief.")
    assert turns_of([{"system": "Be brief.", "input": "Hi", "output": "Hello"}]).messages == (system, HI, HELLO)
    assert turns_of([{"system": "", "input": "Hi", "output": None}]).messages == (HI,)
    assert turns_of([{"system": None, "output": "Hello"}]).messages == (HELLO,)


def test_an_instruction_and_its_input_are_one_text() -> None:
    pair = {"instruction": "Add.", "input": "1 2", "output": "3"}
    assert [message.text for message in turns_of([pair]).messages] == ["Add.\n\n1 2", "3"]
    assert [message.text for message in turns_of([pair | {"input": ""}]).messages] == ["Add.", "3"]


def test_typed_parts_are_joined_as_they_are() -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b\n", "image_url": None}]
    for turn in (
        {"role": "user", "content": parts},
        {"from": "human", "value": parts},
        {"prompt": parts},
        [parts, None],
    ):
        assert turns_of([turn]).messages == (Message("user", "a b\n"),)


def test_parts_with_a_value_are_text_reasoning_and_calls() -> None:
    parts = [{"type": "reasoning", "value": "Hm."}, {"type": "text", "value": "Let me see."}]
    add, see = '{"name": "add", "arguments": {"a": 1}}', {"name": "see", "arguments": {}}
    called = [*parts, {"type": "tool_call", "value": add}]
    expected = Message("assistant", "Let me see.", reasoning="Hm.", calls=add)
    parsed = turns_of([{"role": "assistant", "content": called}])
    assert (parsed.messages, parsed.unread) == ((expected,), ())
    both = '[{"name":"add","arguments":{"a":1}},{"name":"see","arguments":{}}]'
    (message,) = turns_of([{"role": "assistant", "content": [*called, {"type": "tool_call", "value": see}]}]).messages
    assert message == replace(expected, calls=both)
    told = {"role": "tool", "content": [{"type": "text", "value": "2"}]}
    assert turns_of([told]).messages == (Message("tool", "2"),)


@pytest.mark.parametrize(
    ("role", "parts", "reason"),
    [
        ("user", [{"type": "tool_call", "value": "{}"}], "not_text"),
        ("assistant", [{"type": "tool_call", "value": call} for call in ("add(", "[1]")], "value_not_text"),
        ("user", [{"value": "Hi"}], "not_text"),  # it may be anything
        ("user", [{"type": "image_url", "value": "a.jpg"}, {"type": "text", "value": "Who?"}], "not_text"),
    ],
)
def test_other_parts_with_a_value_are_refused(role: str, parts: list[Any], reason: str) -> None:
    drop = parse({"messages": [{"role": role, "content": parts}]})
    assert isinstance(drop, Drop) and drop.reason == reason


def test_every_role_of_the_table_is_matched_without_case() -> None:
    for name, role in ROLES.items():
        assert name == name.lower()
        for key, text in (("from", "value"), ("role", "content")):
            said = Message(role, "", calls=" x ") if name in CALL_ROLES else Message(role, " x ")
            assert turns_of([{key: f" {name.upper().replace('_', '-')}\n", text: " x "}]).messages == (said,)


def test_the_roles_that_dumps_are_known_to_use_are_in_the_table() -> None:
    names = "human user gpt chatgpt bing bard assistant system tool function_call observation"
    assert set(names.split()) <= set(ROLES)
    assert {ROLES[name] for name in ("function", "function_response", "tool")} == {"tool"}
    assert (ROLES["developer"], ROLES["model"]) == ("system", "assistant")


# ---- Tools ----

CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
CALL_TEXT = '[{"id":"c1","type":"function","function":{"name":"add","arguments":"{\\"a\\": 1}"}}]'


def call(text: str, **more: Any) -> Message:
    return Message("assistant", "", calls=text, **more)


def test_calls_of_an_assistant_stand_beside_its_text_and_keep_its_weight() -> None:
    said = {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL], "weight": 0.5}
    assert turns_of([said]).messages == (Message("assistant", "Let me see.", 0.5, calls=CALL_TEXT),)
    for nothing in (None, "", []):
        assert turns_of([said | {"content": nothing}]).messages == (call(CALL_TEXT, weight=0.5),)
    old = {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": "é"}}
    assert turns_of([old]).messages == (call('{"name":"add","arguments":"é"}'),)
    assert turns_of([old | {"function_call": "add(1)"}]).messages == (call("add(1)"),)
    assert turns_of([old | {"function_call": {"a": Decimal("1.5")}}]).messages == (call('{"a":"1.5"}'),)
    sharegpt = [{"from": "function_call", "value": "add(1)", "weight": 1.0}]
    assert turns_of(sharegpt).messages == (call("add(1)", weight=1.0),)


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_stands_beside_the_text(key: str) -> None:
    turn = {"role": "assistant", key: "Hm.", "content": "Hello"}
    assert turns_of([turn]).messages == (Message("assistant", "Hello", reasoning="Hm."),)
    assert turns_of([turn | {"content": None}]).messages == (Message("assistant", "", reasoning="Hm."),)
    parts = [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "Hello"}]
    assert turns_of([{"role": "assistant", "content": parts}]).messages == (
        Message("assistant", "Hello", reasoning="Hm."),
    )
    assert turns_of([turn | {key: None}]).messages == (HELLO,)


@pytest.mark.parametrize("tools", [[{"name": "add"}], '[{"name":"add"}]'])
def test_definitions_of_tools_are_kept_as_they_are_written(tools: Any) -> None:
    parsed = parse(chat(tools=tools))
    assert isinstance(parsed, ParsedRecord)
    assert (parsed.tools, parsed.unread) == ('[{"name":"add"}]', ())
    for nothing in (None, "", [], {}, "[]", " {} ", "null", float("nan")):
        without = parse(chat(tools=nothing))
        assert isinstance(without, ParsedRecord) and without.tools == ""


def test_calls_that_are_null_or_of_another_role_are_no_calls() -> None:
    for nothing in (None, [], {}, "", {"name": None, "arguments": None}):
        turn = {"role": "assistant", "content": "Hello", "tool_calls": nothing, "function_call": nothing}
        assert turns_of([turn]).messages == (HELLO,)
    assert turns_of([{"role": "user", "content": "Hi", "tool_calls": [CALL]}]).messages == (HI,)


def test_what_tools_are_asked_and_answer_keeps_its_text() -> None:
    turns = [{"from": name, "value": f" <{name}>\n"} for name in ("function_call", "observation", "function")]
    turns.append({"role": "tool", "content": ' {"a": 1} ', "tool_call_id": "c1", "name": "add"})
    called, *messages = turns_of(turns).messages
    assert called == call(" <function_call>\n")
    assert {message.role for message in messages} == {"tool"}
    assert [m.text for m in messages] == [" <observation>\n", " <function>\n", ' {"a": 1} ']
    for value, text in (
        ({"a": 1}, '{"a":1}'),
        ([{"a": 1}], '[{"a":1}]'),
        (7, "7"),
        ([{"type": "text", "text": "x"}], "x"),
    ):
        assert turns_of([{"role": "tool", "content": value}]).messages == (Message("tool", text),)


# ---- Tables ----


def test_a_row_of_a_table_with_every_column_is_read_as_the_record_it_was() -> None:
    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    written: list[dict[str, Any]] = [
        {"id": "a", "conversations": [{"from": "human", "value": "Hi", "role": None, "content": None, "weight": None}]},
        {"messages": [{"role": "user", "content": "Hi", "tool_calls": None}, called]},
        {"conversation": [{"human": "Hi", "assistant": "Hello", "system": None}], "system": "S", "condition": "C"},
    ]
    names = ("id", "conversations", "messages", "conversation", "system", "condition")
    rows = pa.Table.from_pylist([dict.fromkeys(names) | row for row in written]).to_pylist()
    assert set(rows[0]) == set(names)
    parsed = [parse(row) for row in rows]
    assert [turns.dialect for turns in parsed if isinstance(turns, ParsedRecord)] == [
        "from/value",
        "role/content",
        "pairs",
    ]
    assert [turns.messages for turns in parsed if isinstance(turns, ParsedRecord)] == [
        (HI,),
        (HI, call(CALL_TEXT)),
        (HI, HELLO),
    ]
    assert [turns.id for turns in parsed] == ["a", "dump.json:0", "dump.json:0"]


# ---- Records ----


def test_a_page_is_marked_and_repairs_of_reading_are_kept() -> None:
    record = Record("a.html", 0, 99, chat(title="t", views=3), None, ("surrogate_replaced",), is_page=True)
    expected = ParsedRecord("d", "from/value", True, None, "", (HI, HELLO), ("surrogate_replaced",))
    assert parse_record(record, default_id="d") == expected
    dropped = parse_record(record_of([], repairs=("surrogate_replaced",)), default_id="d")
    assert dropped.repairs == ("surrogate_replaced",)


def test_turns_are_left_as_they_are_written() -> None:
    turns = [("gpt", ""), ("human", " a"), ("human", "b\n"), ("gpt", "c"), ("system", " "), ("human", "d")]
    messages = turns_of([{"from": name, "value": text} for name, text in turns]).messages
    assert [(message.role, message.text) for message in messages] == [(ROLES[name], text) for name, text in turns]


def test_nulls_that_a_table_writes_into_objects_are_nothing() -> None:
    call = {"id": None, "function": {"name": "add", "arguments": {"a": 1, "b": None}}}
    fields = {
        "messages": [{"role": "assistant", "content": None, "tool_calls": [call]}],
        "tools": [{"name": "add", "x": None}],
    }
    for is_row, called, tools in (
        (True, '[{"function":{"name":"add","arguments":{"a":1}}}]', '[{"name":"add"}]'),
        (False, json.dumps([call]).replace(" ", ""), '[{"name":"add","x":null}]'),
    ):
        parsed = parse_record(Record("t.parquet", 0, 1, fields, is_row=is_row), default_id="d")
        assert isinstance(parsed, ParsedRecord)
        assert (parsed.messages[0].calls, parsed.tools) == (called, tools)


def test_the_id_is_the_records_own_text_or_number_or_else_the_default() -> None:
    ids = [parse(chat(id=id)).id for id in ("a", 7, 0, 1.5, "", None, True, float("nan"), [1])]
    assert ids == ["a", "7", "0", "1.5", *["dump.json:0"] * 5]


@pytest.mark.parametrize(
    ("fields", "reason", "detail"),
    [
        ([1], "not_an_object", "a list"),
        (None, "not_an_object", "null"),
        ({}, "no_turns", ""),
        ({"conversations": []}, "no_turns", ""),
        ({"conversations": {"from": "human"}}, "no_turns", ""),
        ({"items": "x"}, "no_turns", ""),
        ({"items": ["x"]}, "turn_not_an_object", "turn 1 is text"),
        ({"items": [{"from": "narrator", "value": "x"}]}, "unknown_role", "'narrator'"),
        ({"items": [{"from": "user2", "value": "x"}]}, "unknown_role", "'user2'"),
        ({"items": [{"value": "x"}]}, "unknown_role", "missing"),
        ({"items": [{"from": 7, "value": "x"}]}, "unknown_role", "a number"),
        ({"items": [{"from": "human", "value": None}]}, "value_not_text", "turn 1"),
        ({"items": [{"from": "human", "value": ["x", 7]}]}, "value_not_text", "a list"),
        ({"items": [{"from": "human"}]}, "value_not_text", "missing"),
        (chat(condition=4), "bad_condition", "a number"),
        (chat(system=["x"]), "bad_system", "a list"),
        ({"items": [{"role": "user", "content": [{"type": "image_url"}]}]}, "not_text", "'image_url'"),
        ({"items": [{"role": "user", "content": [{"type": 7}]}]}, "not_text", "it is 7"),
        ({"items": [{"role": "user", "content": [{"type": "text", "text": None}]}]}, "not_text", "turn 1"),
        ({"items": [{"role": "assistant", "content": None}]}, "value_not_text", "missing"),
        ({"items": [["x"]]}, "bad_pair", "turn 1 is a list of 1"),
        ({"items": [["x", "y", "z"]]}, "bad_pair", "turn 1 is a list of 3"),
        ({"items": [[None, None]]}, "bad_pair", "it holds nothing"),
        ({"items": [["x", 7]]}, "value_not_text", "a number"),
        ({"items": [{"human": "x", "user": "y", "gpt": "z"}]}, "bad_pair", "it holds human, user, gpt"),
        ({"items": [{"human": "x", "gpt": "y", "bot": "z"}]}, "bad_pair", "it holds human, gpt, bot"),
        ({"items": [{"input": None, "output": None}]}, "unknown_role", "missing"),
        ({"items": [{"input": "x", "output": "y", "system": 7}]}, "value_not_text", "a number"),
    ],
)
def test_a_record_that_cannot_be_used_says_why(fields: Any, reason: str, detail: str) -> None:
    parsed = parse(fields)
    assert isinstance(parsed, Drop)
    assert parsed.reason == reason
    assert detail in parsed.detail


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf"), 3.41e38, 10**39, 10**400, "1", [1]])
def test_a_weight_is_a_finite_float32_of_at_least_0(weight: object) -> None:
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "weight": weight}]
    parsed = parse({"items": turns})
    assert isinstance(parsed, Drop)
    assert parsed.reason == "bad_weight"
    assert "turn 2" in parsed.detail


@pytest.mark.parametrize(
    ("flags", "weight"),
    [
        ({}, None),
        ({"weight": True}, 1.0),
        ({"weight": False}, 0.0),
        ({"weight": None, "train": None}, None),
        *[({flag: False}, 0.0) for flag in ("train", "trainable", "training", "loss", "loss_mask")],
        *[({flag: 0}, 0.0) for flag in ("train", "loss", "loss_mask")],
        *[({flag: True}, 1.0) for flag in ("train", "trainable", "loss")],
        ({"masked": True}, 0.0),
        ({"masked": False}, None),
        ({"weight": 0.5, "train": True}, 0.5),
        ({"weight": 0.5, "train": False}, 0.0),
        ({"weight": 0.5, "loss_weight": 0.5}, 0.25),
    ],
)
def test_flags_of_a_turn_are_its_weight(flags: dict[str, Any], weight: float | None) -> None:
    for turn in ({"from": "gpt", "value": "Hello"}, {"role": "assistant", "content": "Hello"}):
        assert turns_of([turn | flags]).messages == (Message("assistant", "Hello", weight),)
    pair = turns_of([{"human": "Hi", "gpt": "Hello"} | flags])
    assert pair.messages == (HI, Message("assistant", "Hello", weight))
    assert pair.unread == ()


@pytest.mark.parametrize(
    "flags",
    [{"train": "false"}, {"loss": float("inf")}, {"trainable": float("nan")}, {"masked": 2}, {"train_detail": [{}]}],
)
def test_a_flag_that_is_neither_true_nor_false_is_a_bad_weight(flags: dict[str, Any]) -> None:
    parsed = parse({"items": [{"role": "assistant", "content": "y"} | flags]})
    assert isinstance(parsed, Drop)
    assert (parsed.reason, next(iter(flags)) in parsed.detail) == ("bad_weight", True)


@pytest.mark.parametrize(
    ("name", "entries", "weights"),
    [
        ("weights", [0, 0.5], [0.0, 0.5]),
        ("loss_mask", [False, True], [0.0, 1.0]),
        ("mask", [0, 1], [0.0, 1.0]),
        ("train", [None, False], [None, 0.0]),
        ("weight", [None, 0.25], [None, 0.25]),
        ("mask", "User", [None, None]),
    ],
)
def test_a_list_beside_the_turns_has_an_entry_for_each(name: str, entries: Any, weights: list[float | None]) -> None:
    parsed = parse(chat(**{name: entries}))
    assert isinstance(parsed, ParsedRecord)
    assert [message.weight for message in parsed.messages] == weights
    assert parsed.weight == 1.0


@pytest.mark.parametrize(
    ("more", "weight"),
    [
        *[({flag: False}, 0.0) for flag in ("loss", "train", "trainable", "training", "loss_mask")],
        *[({flag: 0}, 0.0) for flag in ("train", "loss_mask", "loss_weight", "loss_weights")],
        ({"masked": True}, 0.0),
        ({"loss": 0.37}, 1.0),
        ({"mask": "User"}, 1.0),
        ({"loss_weight": Decimal("0.5")}, 0.5),
        *[({flag: "false"}, None) for flag in ("train", "loss_mask", "weights")],
        ({"mask": "Assistant"}, None),
        ({"loss_mask": "[0, 0]"}, None),
        ({"train": "yes"}, None),
        ({"masked": "no"}, None),
    ],
)
def test_what_is_no_list_says_it_of_the_whole_record(more: dict[str, Any], weight: float | None) -> None:
    parsed = parse(chat(**more))
    if weight is None:
        assert isinstance(parsed, Drop)
        assert (parsed.reason, next(iter(more)) in parsed.detail) == ("bad_weight", True)
    else:
        assert isinstance(parsed, ParsedRecord)
        assert parsed.weight == weight
        assert parsed.unread == ((("record field", "loss"),) if more == {"loss": 0.37} else ())


@pytest.mark.parametrize(
    "more",
    [
        *[{"train": value} for value in ("train", "", {"a": 1})],
        *[{"training": value} for value in ("corpus A", 3)],
        *[{"loss": value} for value in ("sft", {"train": 0.3}, [0.5, 0.7], 0.53)],
        *[{"loss_scale": "default"}, {"mask": "None"}, {"masks": {}}, {"weights": {"0": 0}}],
    ],
)
def test_what_only_has_the_name_of_a_weight_is_named_and_not_read(more: dict[str, Any]) -> None:
    parsed = parse(chat(**more))
    assert isinstance(parsed, ParsedRecord)
    assert (parsed.weight, [message.weight for message in parsed.messages]) == (1.0, [None, None])
    (name, value), *_ = more.items()
    assert parsed.unread == ((("record field", name),) if value != "" else ())
    if not isinstance(value, list):
        (message,) = turns_of([{"role": "assistant", "content": "Hello"} | more]).messages
        assert message.weight is None


@pytest.mark.parametrize("more", [{"mask": [1]}, {"weights": [1, 1, 1]}, {"weights": [1, -1]}, {"mask": [1, 0.5]}])
def test_a_list_that_does_not_fit_the_turns_is_a_bad_weight(more: dict[str, Any]) -> None:
    parsed = parse(chat(**more))
    assert isinstance(parsed, Drop)
    assert (parsed.reason, next(iter(more)) in parsed.detail) == ("bad_weight", True)


@pytest.mark.parametrize(
    ("more", "weight"),
    [({}, 1.0), ({"weight": 0}, 0.0), ({"weight": 0.25}, 0.25), ({"train": False}, 0.0), ({"weight": None}, 1.0)],
)
def test_a_record_may_have_a_weight(more: dict[str, Any], weight: float) -> None:
    parsed = parse(chat(**more))
    assert isinstance(parsed, ParsedRecord) and parsed.weight == weight


@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf"), "1.0", {"a": 1}])
def test_a_records_weight_is_as_bad_as_a_turns(weight: Any) -> None:
    parsed = parse(chat(weight=weight))
    assert isinstance(parsed, Drop) and parsed.reason == "bad_weight"


def test_a_recipe_names_the_field_of_a_records_weight() -> None:
    def weigh(field: str | None, **more: Any) -> ParsedRecord | Drop:
        return parse_record(record_of(chat(**more)), default_id="d", reading=Reading(weight_field=field))

    for parsed, weight in ((weigh("reward", reward=0.5, weight=7), 0.5), (weigh(None, weight=7), 1.0)):
        assert isinstance(parsed, ParsedRecord)
        assert (parsed.weight, parsed.unread) == (weight, (("record field", "weight"),))
    lost = weigh("reward")
    assert isinstance(lost, Drop) and (lost.reason, "reward" in lost.detail) == ("bad_weight", True)


# ---- Pictures, sound, video ----


@pytest.mark.parametrize(
    "fields",
    [
        chat(image="000.jpg"),
        chat(images=["a.png"]),
        chat(audios=[{"path": "a"}]),
        {"conversations": [{"from": "human", "value": "Hi", "video": "v.mp4"}, {"from": "gpt", "value": "Hello"}]},
        {"pic": "0.jpg", "items": [{"from": "human", "value": "<image>\nHi"}, {"from": "gpt", "value": "Hello"}]},
        {"items": [{"role": "user", "content": [{"type": "image"}, "Hi"]}, {"role": "assistant", "content": "Hello"}]},
    ],
)
def test_a_record_with_media_is_dropped_unless_its_text_is_asked_for(fields: dict[str, Any]) -> None:
    parsed = parse(fields)
    assert isinstance(parsed, Drop)
    assert (parsed.reason, parsed.hint) == ("not_text", "data.media: text")
    text = parse_record(record_of(fields), default_id="d", reading=Reading(media="text"))
    assert isinstance(text, ParsedRecord)
    assert (text.messages, text.repairs) == ((HI, HELLO), ("media_left_out",))


def test_a_placeholder_that_no_field_explains_is_text() -> None:
    for fields in (chat(image=None, images=[]), chat(cover="0.jpg")):
        assert isinstance(parse(fields), ParsedRecord)
    talk = [{"from": "human", "value": "What does <image> do in HTML?"}]
    assert turns_of(talk).messages == (Message("user", "What does <image> do in HTML?"),)


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([{"type": "text", "text": "a", "train": False}, {"type": "text", "text": "b"}], "bad_weight"),
        ([{"type": "text", "text": "a", "weight": 0}], "bad_weight"),
        ([{"type": "text", "text": "a", "image": "x.png"}], "not_text"),
        ([{"inlineData": {"data": "x"}}], "not_text"),
        ([{"image": "a.png"}, {"text": "q"}], "not_text"),
        ([{"functionCall": {"name": "f"}}], "not_text"),
        ([{"type": "tool_use", "name": "f"}], "not_text"),
    ],
)
def test_a_part_that_is_no_plain_text_drops_its_record(parts: list[dict[str, Any]], reason: str) -> None:
    parsed = parse({"items": [{"role": "assistant", "content": parts}]})
    assert isinstance(parsed, Drop)
    assert parsed.reason == reason
    has_media = any("image" in str(part) or "inlineData" in part for part in parts)
    assert parsed.hint == ("data.media: text" if has_media else "")


def test_a_thought_among_parts_is_reasoning_and_other_fields_of_parts_are_named() -> None:
    parts = [{"text": "Hm.", "thought": True}, {"text": "Hello", "citation": 1}]
    parsed = parse({"contents": [{"role": "model", "parts": parts}]})
    assert isinstance(parsed, ParsedRecord)
    assert parsed.messages == (Message("assistant", "Hello", reasoning="Hm."),)
    assert parsed.unread == (("part field", "citation"),)


@pytest.mark.parametrize(
    "value",
    [
        {"text": "sunny", "temp": 21},
        [{"text": "row1", "id": 1}, {"text": "row2", "id": 2}],
        ["red", "green"],
        {"type": "FeatureCollection", "features": []},
        {"type": "text", "value": 3},
        {"name": "P", "image": "http://x/y.png", "price": 3},
        [{"title": "P", "image_url": "u"}, 5],
        {"type": "videoResult", "id": 3},
        {"n": 12345678901234567890123},
        [],
    ],
)
def test_what_a_tool_says_is_json_unless_it_is_plain_text(value: Any) -> None:
    (message,) = turns_of([{"role": "tool", "content": value}]).messages
    assert (message.role, json.loads(message.text)) == ("tool", value)


@pytest.mark.parametrize("nothing", [[None], {"bytes": None, "path": None}, "", {}])
def test_empty_media_are_nothing(nothing: Any) -> None:
    assert isinstance(parse(chat(images=nothing)), ParsedRecord)


@pytest.mark.parametrize(
    "more",
    [
        *[{"image": value} for value in (False, 0, "None", "null", "n/a")],
        *[{"images": 0}, {"image_id": -1}, {"images": "[]"}, {"video": "no"}, {"video_id": "dQw4w9WgXcQ"}],
        *[{"media": "twitter"}, {"video_url": "https://youtu.be/x"}, {"picture": "n/a"}],
    ],
)
def test_a_note_about_media_is_no_picture(more: dict[str, Any]) -> None:
    assert isinstance(parse(chat(**more)), ParsedRecord)
    turns = [{"from": "human", "value": "Hi"} | more, {"from": "gpt", "value": "Hello"}]
    assert turns_of(turns).messages == (HI, HELLO)


def test_a_tools_parts_with_a_picture_are_no_text() -> None:
    fields = {"messages": [{"role": "tool", "content": [{"type": "image", "url": "x"}, {"type": "text", "text": "r"}]}]}
    parsed = parse(fields)
    assert isinstance(parsed, Drop) and parsed.reason == "not_text"
    text = parse_record(record_of(fields), default_id="d", reading=Reading(media="text"))
    assert isinstance(text, ParsedRecord) and text.messages == (Message("tool", "r"),)


@pytest.mark.parametrize(("value", "text"), [(True, ""), ({"budget": 1}, ""), ([{"type": "text", "text": "x"}], "x")])
def test_reasoning_that_is_no_text_is_named(value: Any, text: str) -> None:
    parsed = turns_of([{"role": "assistant", "content": "Hello", "thinking": value}])
    assert parsed.messages == (Message("assistant", "Hello", reasoning=text),)
    assert parsed.unread == (() if text else (("turn field", "thinking"),))


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"picture": "https://x/y.png?s=1"}, "picture"),
        ({"image_base64": "x"}, "image_base64"),
        ({"Images": ["x"]}, "Images"),
        ({"scan": "x.tiff", "conversations": [["<image>\nHi", "Hello"], {"from": "gpt", "value": "<image>"}]}, "scan"),
        ({"conversations": [{"from": "human", "value": "<img>assets/demo.jpeg</img> What?"}]}, "<img>assets/demo.jpeg"),
    ],
)
def test_pictures_are_known_by_other_names_too(more: dict[str, Any], named: str) -> None:
    parsed = parse(chat(**more) if "conversations" not in more else more)
    assert isinstance(parsed, Drop)
    assert (parsed.reason, parsed.detail.startswith(named)) == ("not_text", True)


@pytest.mark.parametrize(
    ("turn", "unread"),
    [
        (
            {"human": "Hi", "assistant": "Hello", "reasoning_content": "t", "tool_calls": [1]},
            {"reasoning_content", "tool_calls"},
        ),
        ({"from": "function_call", "value": "f", "reasoning_content": "t"}, {"reasoning_content"}),
        ({"role": "user", "content": "Hi", "thinking": "t", "tool_calls": [1]}, {"thinking", "tool_calls"}),
        ({"role": "assistant", "content": "x", "tool_calls": [1], "function_call": "f"}, {"function_call"}),
        ({"role": "assistant", "content": "x", "reasoning": "t", "reasoning_content": "u"}, {"reasoning"}),
        ({"role": "assistant", "content": "x", "parts": ["y"]}, {"parts"}),
    ],
)
def test_what_stands_where_it_is_not_read_is_named(turn: dict[str, Any], unread: set[str]) -> None:
    assert {name for kind, name in turns_of([turn]).unread if kind == "turn field"} == unread


# ---- Other names ----


def test_a_source_may_name_the_parts_of_its_records() -> None:
    reading = Reading(fields={"turns": "chat", "role": "who", "text": "said"}, roles={"Agent": "assistant"})
    chatty = {"chat": [{"who": "user", "said": "Hi", "at": 1}, {"who": "agent", "said": "Hello", "train": False}]}
    parsed = parse_record(record_of(chatty), default_id="d", reading=reading)
    assert isinstance(parsed, ParsedRecord)
    assert parsed.messages == (HI, Message("assistant", "Hello", 0.0))
    assert parsed.unread == (("turn field", "at"),)

    flat = {"instruction": "Add.", "input": "1 2", "output": "3", "sys": "S", "weight": 0.5, "source": "x"}
    reading = Reading(fields={"question": ("instruction", "input"), "answer": "output", "system": "sys"})
    for record, asked in ((flat, "Add.\n\n1 2"), (flat | {"input": ""}, "Add."), (flat | {"input": None}, "Add.")):
        parsed = parse_record(record_of(record), default_id="d", reading=reading)
        assert isinstance(parsed, ParsedRecord)
        assert parsed.messages == (Message("user", asked), Message("assistant", "3"))
        assert (parsed.system, parsed.weight, parsed.unread) == ("S", 0.5, (("record field", "source"),))


@pytest.mark.parametrize(
    ("fields", "hint"),
    [
        (
            {"chat": [{"speaker": "user", "text": "Hi"}, {"speaker": "bot", "text": "Hello"}]},
            "fields: {turns: chat, role: speaker, text: text}",
        ),
        (
            {"my turns": [{"from": "human", "text": "Hi"}, {"from": "gpt", "text": "Hello"}]},
            'fields: {turns: "my turns", role: from, text: text}',
        ),
        (
            {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Hello"}]},
            "",
        ),
        ({"text": "Once"}, ""),
        ({"conversations": [{"from": "human", "value": "Hi"}]}, ""),
    ],
)
def test_a_line_of_a_recipe_is_guessed_that_reads_other_names(fields: dict[str, Any], hint: str) -> None:
    assert hint_fields(fields) == hint
    if hint:
        parsed = parse(fields)
        assert isinstance(parsed, Drop) and parsed.hint == hint
        section = yaml.safe_load(hint)["fields"]
        assert isinstance(
            parse_record(record_of(fields), default_id="d", reading=Reading(fields=section)), ParsedRecord
        )


def test_what_is_met_and_not_read_is_named() -> None:
    turns = [{"from": "human", "value": "Hi", "tag": 1}, {"from": "gpt", "value": "Hello", "tag": 2, "role": "x"}]
    parsed = parse({"conversations": turns, "messages": turns, "id": "a", "title": "T", "lang": None})
    assert isinstance(parsed, ParsedRecord)
    assert Counter(parsed.unread) == {
        ("record field", "messages"): 1,
        ("record field", "title"): 1,
        ("turn field", "tag"): 2,
        ("turn field", "role"): 1,
    }
    unknown = parse({"items": [{"from": "alice", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]})
    assert isinstance(unknown, Drop)
    assert (unknown.reason, unknown.unread) == ("unknown_role", (("role", "alice"),))
    assert yaml.safe_load(unknown.hint) == {"roles": {"alice": "user"}}
    strange = parse({"items": [{"from": "用户", "value": "Hi"}, {"from": "my bot: 1", "value": "Hello"}]})
    assert isinstance(strange, Drop)
    reading = Reading(roles=yaml.safe_load(strange.hint)["roles"])
    read = parse_record(record_of({"items": [{"from": "用户", "value": "Hi"}]}), default_id="d", reading=reading)
    assert isinstance(read, ParsedRecord) and read.messages == (HI,)


@pytest.mark.parametrize("missing", ["system", "condition", "tools"])
def test_nan_is_as_good_as_nothing_but_for_a_weight(missing: str) -> None:
    parsed = parse(chat(**{missing: float("nan")}))
    assert isinstance(parsed, ParsedRecord) and parsed.messages == (HI, HELLO)


def test_the_largest_float32_is_a_weight() -> None:
    parsed = parse({"items": [{"role": "assistant", "content": "y", "weight": 3.4028234663852886e38}]})
    assert isinstance(parsed, ParsedRecord)
    assert parsed.messages[0].weight == 3.4028234663852886e38


def test_deeply_nested_values_in_any_place_are_dropped_not_raised() -> None:
    deep = json.loads("[" * 900 + "]" * 900)
    turn = {"from": "human", "value": "x"}
    for fields in (
        deep,
        chat(condition=deep),
        *({"items": [turn | {key: deep}]} for key in ("from", "value", "weight")),
    ):
        assert isinstance(parse(fields), Drop)


def test_calls_nested_more_deeply_than_json_is_written_are_dropped() -> None:
    turn = {"role": "assistant", "tool_calls": json.loads("[" * 900 + "]" * 900)}
    parsed = parse({"messages": [turn]})
    assert isinstance(parsed, Drop)
    assert parsed.reason == "value_not_text"


@pytest.mark.parametrize(
    "damage", ["not_json", "not_utf8", "truncated_record", "record_too_large", "no_next_data", "no_page_content"]
)
def test_a_damaged_record_is_dropped_for_its_damage(damage: str) -> None:
    parsed = parse_record(record_of(None, damage), default_id="d")
    assert isinstance(parsed, Drop)
    assert (parsed.id, parsed.reason) == ("d", damage)


# ---- Properties ----

text = st.text(max_size=12)
numbers = st.integers() | st.floats()
json_values = st.recursive(
    st.none() | st.booleans() | numbers | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=10,
)
table_values = json_values | st.binary(max_size=3) | st.decimals() | st.datetimes() | st.tuples(text, json_values)
parts = st.lists(
    st.fixed_dictionaries({"type": st.just("text") | table_values, "text": text | table_values}), max_size=3
)
texts = text | parts | table_values
almost_turns = st.fixed_dictionaries(
    {},
    optional={
        "from": st.sampled_from([*ROLES, "narrator", None]) | table_values,
        "role": st.sampled_from([*ROLES, "narrator"]),
        "value": texts,
        "content": texts,
        "weight": table_values | st.just(10**400),
        "tool_calls": table_values,
        "function_call": table_values,
    },
)
pairs = st.dictionaries(st.sampled_from([*USER_KEYS, *ANSWER_KEYS, "system"]), texts, max_size=3)
almost_records = st.fixed_dictionaries(
    {},
    optional={
        "id": table_values,
        "conversations": st.lists(almost_turns | pairs | table_values, max_size=4) | table_values,
        "messages": st.lists(almost_turns, max_size=4),
        "conversation": st.lists(pairs | st.lists(texts, min_size=2, max_size=2), max_size=4),
        "condition": text | table_values,
        "system": text | table_values,
    },
)


@settings(max_examples=400, deadline=None)
@given(table_values | almost_records)
def test_any_value_becomes_turns_or_a_drop_with_a_reason(fields: Any) -> None:
    parsed = parse(fields)
    if isinstance(parsed, ParsedRecord):
        assert all(isinstance(message.text, str) for message in parsed.messages)
        assert parsed.dialect
    else:
        assert parsed.reason.replace("_", "").isalpha()
        assert parsed.detail
    assert isinstance(parsed.id, str) and parsed.id
