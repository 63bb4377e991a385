"""ShareGPT files are read whole, exactly and in bounded memory; no bad record passes without its reason."""

import json
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ochat_train.conversations.schema import Message
from ochat_train.conversations.sharegpt import ROLES, Drop, Record, Turns, parse_record, read_records

SHARED_DATA = Path(__file__).resolve().parents[1] / "../shared/data"
MIB = 1 << 20

Write = Callable[[bytes], str]


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Write:
    """A function that writes bytes to a file, always the same one, and returns its path."""
    path = tmp_path_factory.mktemp("dumps") / "dump.json"

    def write_file(data: bytes) -> str:
        path.write_bytes(data)
        return str(path)

    return write_file


def record_of(fields: Any, damage: str | None = None, repairs: tuple[str, ...] = ()) -> Record:
    return Record("dump.json", 0, 10, fields, damage, repairs)


def parse(fields: Any) -> Turns | Drop:
    return parse_record(record_of(fields), default_id="dump.json:0")


def chat(**more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]} | more


# ---- Files ----


@pytest.mark.parametrize(("name", "num_records"), [("identity", 500), ("toolcall", 300)])
@pytest.mark.parametrize("chunk_bytes", [1000, MIB])
def test_real_files_are_read_as_json_reads_them(name: str, num_records: int, chunk_bytes: int) -> None:
    path = SHARED_DATA / f"{name}_sharegpt.json"
    raw = path.read_bytes()
    records = list(read_records(str(path), chunk_bytes=chunk_bytes))
    assert len(records) == num_records
    assert [record.fields for record in records] == json.loads(raw)
    for record in records:
        assert json.loads(raw[record.offset : record.end]) == record.fields
        turns = parse_record(record, default_id="none")
        assert isinstance(turns, Turns)
        assert any(message.role == "assistant" for message in turns.messages)


def test_every_call_of_a_tool_and_every_answer_is_kept_as_context() -> None:
    path = SHARED_DATA / "toolcall_sharegpt.json"
    for record in read_records(str(path)):
        turns = parse_record(record, default_id="none")
        assert isinstance(turns, Turns)
        if not turns.repairs:
            assert [message.text for message in turns.messages] == [
                turn["value"] for turn in record.fields["conversations"]
            ]


def test_array_and_lines_of_the_same_records_give_the_same_records(write: Write) -> None:
    values = [{"id": 1, "f": 0.1, "big": 123456789012345678901234567890, "t": 'é\n"\\'}, {}, {"a": [[], {}]}]
    encoded = [json.dumps(value, ensure_ascii=False).encode() for value in values]
    from_lines = [record.fields for record in read_records(write(b"\n".join(encoded)))]
    from_array = [record.fields for record in read_records(write(b"[" + b",".join(encoded) + b"]"))]
    assert from_array == from_lines
    assert len(from_lines) == 3


def test_offsets_point_at_records_behind_multibyte_and_invalid_bytes(write: Write) -> None:
    first = '{"a": "日本 🙂 '.encode() + b'\xff\xfe"}'
    raw = b"\xef\xbb\xbf \n[" + first + b' ,\r\n\t{"b": 2}\n]\n'
    one, two = read_records(write(raw), chunk_bytes=3)
    assert raw[one.offset : one.end] == first
    assert raw[two.offset : two.end] == b'{"b": 2}'
    raw = b"\xef\xbb\xbf \n  " + first + b' \r\n\n \t\n  {"b": 2}'
    one, two = read_records(write(raw))
    assert raw[one.offset : one.end] == first
    assert raw[two.offset : two.end] == b'{"b": 2}'


@pytest.mark.parametrize("form", ["array", "lines"])
@pytest.mark.parametrize(
    ("inside", "expected"),
    [
        (b"\xff\xfe", "\ufffd\ufffd"),
        (b"\xc3", "\ufffd"),
        (rb"\ud83d", "\ufffd"),
        (rb"\uDE00 x", "\ufffd x"),
        (rb"\ud83d\ud83d\ude00", "\ufffd😀"),
        (rb"\ud83d\u0041", "\ufffdA"),
        (rb"\\ud83d \ud83d", "\\ud83d \ufffd"),
        (b'\\" \xff \\\\', '" \ufffd \\'),
    ],
)
def test_bytes_and_surrogates_that_are_no_text_become_replacement_characters(
    write: Write, form: str, inside: bytes, expected: str
) -> None:
    raw = b'{"id": "' + inside + b'", "x' + inside + b'": [{"deep": "' + inside + b'"}]}'
    record = next(read_records(write(b"[" + raw + b"]" if form == "array" else raw)))
    assert record.fields == {"id": expected, "x" + expected: [{"deep": expected}]}
    assert record.repairs == ("invalid_utf8_replaced",)


def test_whole_surrogate_pairs_and_escaped_backslashes_are_no_repair(write: Write) -> None:
    (record,) = read_records(write(rb'{"a": "\ud83d\ude00 \\ud83d \u00e9"}'))
    assert record.fields == {"a": "😀 \\ud83d é"}
    assert record.repairs == ()


def test_a_bad_line_is_damage_and_the_lines_behind_it_are_read(write: Write) -> None:
    raw = b'{"a": 1}\n{"a": \n\n{"a": NaN}\n{"a": 2} x\n{"a": 3}\n{"a": "cu'
    records = list(read_records(write(raw)))
    assert [record.fields for record in records] == [{"a": 1}, None, None, None, {"a": 3}, None]
    damages = [None, "not_json", "not_json", "not_json", None, "truncated_record"]
    assert [record.damage for record in records] == damages
    places = [raw[record.offset : record.end] for record in records]
    assert places[1] == b'{"a":'
    assert places[5] == b'{"a": "cu'


def test_a_bad_last_line_with_a_line_end_is_not_called_truncated(write: Write) -> None:
    assert [record.damage for record in read_records(write(b'{"a": 1}\n{"a": \n'))] == [None, "not_json"]


def test_deep_nesting_is_bad_syntax(write: Write) -> None:
    deep = b"[" * 100_000 + b"]" * 100_000
    lines = list(read_records(write(b'{"a": 1}\n{"a": ' + deep + b"}\n")))
    assert [record.damage for record in lines] == [None, "not_json"]
    for chunk_bytes in (1000, MIB):
        with pytest.raises(ValueError, match="byte 10: "):
            list(read_records(write(b'[{"a": 1},' + deep + b"]"), chunk_bytes=chunk_bytes))


@pytest.mark.parametrize(
    ("raw", "offset", "found"),
    [
        (b"", 0, "empty"),
        (b" \n ", 3, "empty"),
        (b"\xef\xbb\xbf", 3, "empty"),
        (b" []", 1, "array is empty"),
        (b"[]x", 0, "array is empty"),
        (b"  <html>", 2, "starts with b'<'"),
        (b"\x1f\x8b\x08", 0, "decompress"),
        (b'\xff\xfe[\x00"', 0, "UTF-8"),
        (b'{"a": \n1}\n', 0, "no line"),
        (b'{\n  "a": [\n    "x"\n  ]\n}\n', 0, "no line"),
        (b'{"a', 0, "no line"),
        (b'[{"a": 1}', 9, "ends inside"),
        (b'[{"a": 1},', 10, "ends inside"),
        (b'[{"a": 1}, {"b"', 11, "ends inside"),
        (b"[12", 1, "ends inside"),
        (b"[", 1, "ends inside"),
        (b'[{"a": 1},]', 10, "where a value should start"),
        (b"[,1]", 1, "where a value should start"),
        (b'[{"a": 1} {"b": 2}]', 10, "instead of ','"),
        (b'[{"a": 1}}', 9, "instead of ','"),
        (b'[{"a": 1},\n {"a" 1}, {"a": 2}]', 12, "not valid JSON"),
        (b"[1, tru, 2]", 4, "not valid JSON"),
        (b"[1, NaN]", 4, "not valid JSON"),
        (b'[1, "a\nb"]', 4, "not valid JSON"),
        (b"[1, {]]", 4, "not valid JSON"),
        (b"[1] 2", 4, "follows"),
        (b'[{"a": 1}]\n[{"a": 2}]\n', 11, "follows"),
    ],
)
@pytest.mark.parametrize("chunk_bytes", [1, 7, MIB])
def test_a_file_that_cannot_be_read_names_file_byte_and_remedy(
    write: Write, raw: bytes, offset: int, found: str, chunk_bytes: int
) -> None:
    path = write(raw)
    with pytest.raises(ValueError) as raised:
        list(read_records(path, chunk_bytes=chunk_bytes))
    message = str(raised.value)
    assert message.startswith(f"{path}, byte {offset}: ")
    assert found in message
    assert ";" in message


@pytest.mark.parametrize("chunk_bytes", [1, 5, MIB])
def test_an_array_cut_at_any_byte_never_gives_a_wrong_record(write: Write, chunk_bytes: int) -> None:
    raw = '\ufeff [{"a": [1, {"b": "é\\\\"}], "c\\"": -1.5e3}, 123, true, "x]", [], null]\n'.encode()
    whole = [record.fields for record in read_records(write(raw))]
    assert len(whole) == 6
    closed = raw.rindex(b"]") + 1
    for num_bytes in range(len(raw)):
        got: list[Any] = []
        records = read_records(write(raw[:num_bytes]), chunk_bytes=chunk_bytes)
        if num_bytes >= closed:
            got.extend(record.fields for record in records)
            assert got == whole
        else:
            with pytest.raises(ValueError):
                got.extend(record.fields for record in records)
            assert got == whole[: len(got)]


def test_lines_cut_at_any_byte_never_give_a_wrong_record(write: Write) -> None:
    raw = '{"a": "é"}\n{"b": [1, 2]}\n\n{"c": {}}'.encode()
    whole = [record.fields for record in read_records(write(raw))]
    for num_bytes in range(len(b'{"a": "\xc3\xa9"}'), len(raw) + 1):
        records = list(read_records(write(raw[:num_bytes])))
        good = [record.fields for record in records if record.damage is None]
        assert good == whole[: len(good)]
        assert [record.damage for record in records[len(good) :]] in ([], ["truncated_record"])


# ---- Properties ----

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
numbers = st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | numbers | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=10,
)
json_objects = st.dictionaries(text, json_values, max_size=4)
spaces = st.text(" \t\r\n", max_size=3).map(str.encode)
chunk_sizes = st.integers(1, 40) | st.just(MIB)


@settings(max_examples=150, deadline=None)
@given(st.lists(json_objects, min_size=1, max_size=5), st.data())
def test_any_objects_in_any_layout_read_back_equal_at_exact_offsets(
    write: Write, objects: list[dict[str, Any]], data: st.DataObject
) -> None:
    indent = data.draw(st.none() | st.integers(0, 2))
    ascii_only = data.draw(st.booleans())
    is_array = data.draw(st.booleans())
    raw = data.draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + data.draw(spaces) + (b"[" if is_array else b"")
    places = []
    for index, value in enumerate(objects):
        encoded = json.dumps(value, ensure_ascii=ascii_only, indent=indent if is_array else None).encode()
        raw += data.draw(spaces)
        places.append((len(raw), len(raw) + len(encoded)))
        is_last = index == len(objects) - 1
        raw += encoded + data.draw(spaces) + (b"" if is_last else b"," if is_array else b"\n")
    raw += b"]" + data.draw(spaces) if is_array else b""

    records = list(read_records(write(raw), chunk_bytes=data.draw(chunk_sizes)))
    assert [record.fields for record in records] == objects
    assert [(record.offset, record.end) for record in records] == places
    assert all(record.damage is None and record.repairs == () for record in records)


@settings(max_examples=150, deadline=None)
@given(st.lists(json_objects, min_size=1, max_size=3), st.data())
def test_replacing_bad_bytes_equals_decoding_and_replacing_in_every_string(
    write: Write, objects: list[dict[str, Any]], data: st.DataObject
) -> None:
    bad = data.draw(st.sampled_from([b"\xff", b"\xe6\x97", rb"\ud800", rb"\udfff", rb"\ud83d\ud83d\ude00"]))
    raw = json.dumps([*objects, {"z\ue000": ["\\\ue000"]}], ensure_ascii=data.draw(st.booleans())).encode()
    raw = raw.replace("\ue000".encode(), bad).replace(rb"\ue000", bad)
    naive = json.loads(raw.decode("utf-8", "surrogateescape"), parse_int=lambda number: orjson.loads(number))
    got = [record.fields for record in read_records(write(raw), chunk_bytes=data.draw(chunk_sizes))]
    assert got == replace_surrogates(naive)


def replace_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return "".join("\ufffd" if "\ud800" <= character <= "\udfff" else character for character in value)
    if isinstance(value, list):
        return [replace_surrogates(element) for element in value]
    if isinstance(value, dict):
        return {replace_surrogates(name): replace_surrogates(element) for name, element in value.items()}
    return value


signs = [
    b"[",
    b"]",
    b"{",
    b"}",
    b",",
    b":",
    b'"',
    b"\\",
    b"\n",
    b" ",
    b"1",
    b"-",
    b"e",
    b"true",
    b'"a"',
    b"\xff",
]
signs += [b'{"a":1}', b'"\\ud800"', b'{"items":[{"role":"user","content":"x"}]}', b"\x00", b"\xef\xbb\xbf"]
arbitrary_bytes = st.binary(max_size=40) | st.lists(st.sampled_from(signs), max_size=14).map(b"".join)


@settings(max_examples=400, deadline=None)
@given(arbitrary_bytes, chunk_sizes)
def test_arbitrary_bytes_raise_nothing_but_a_value_error(write: Write, raw: bytes, chunk_bytes: int) -> None:
    try:
        for record in read_records(write(raw), chunk_bytes=chunk_bytes):
            parse_record(record, default_id="none")
            assert raw[record.offset : record.end].strip(b" \t\r\n") == raw[record.offset : record.end]
    except ValueError as error:
        assert "byte" in str(error)


@settings(max_examples=200, deadline=None)
@given(arbitrary_bytes, st.integers(1, 9))
def test_what_is_read_does_not_depend_on_chunk_size(write: Write, tail: bytes, chunk_bytes: int) -> None:
    path = write(b"[" + tail)

    def outcome(chunk_bytes: int) -> list[Any]:
        got: list[Any] = []
        try:
            got.extend(read_records(path, chunk_bytes=chunk_bytes))
        except ValueError as error:
            # a small window may see that a record is broken before it sees that it has no end
            got.append(str(error).split(":")[0])
        return got

    assert outcome(chunk_bytes) == outcome(MIB)


almost_turns = st.fixed_dictionaries(
    {},
    optional={
        "from": st.sampled_from([*ROLES, "narrator", None]) | json_values,
        "role": st.sampled_from([*ROLES, "narrator"]),
        "value": text | json_values,
        "content": text,
        "weight": json_values | st.floats() | st.just(10**400),
    },
)
almost_records = st.fixed_dictionaries(
    {},
    optional={
        "id": json_values,
        "conversations": st.lists(almost_turns | json_values, max_size=4) | json_values,
        "items": st.lists(almost_turns, max_size=4),
        "condition": text | json_values,
        "system": text | json_values,
    },
)


@settings(max_examples=300, deadline=None)
@given(json_values | almost_records)
def test_any_json_value_becomes_turns_with_an_answer_or_a_drop_with_a_reason(fields: Any) -> None:
    parsed = parse(fields)
    if isinstance(parsed, Turns):
        assert parsed.messages[-1].role == "assistant"
        assert all(message.text.strip() for message in parsed.messages)
    else:
        assert parsed.reason.replace("_", "").isalpha()
    assert isinstance(parsed.id, str) and parsed.id


# ---- Size ----


def array_of(num_bytes: int, record: bytes) -> Iterator[bytes]:
    block = b",\n".join([record] * (MIB // len(record) + 1))
    yield b"[" + block
    for _ in range(num_bytes // len(block)):
        yield b",\n" + block
    yield b"]"


def test_an_array_of_200_mb_is_read_in_bounded_memory_and_time(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    turn = {"from": "gpt", "value": 'He said "yes" — né\n' * 60}
    record = json.dumps({"id": "a", "conversations": [turn] * 8}, ensure_ascii=False).encode()
    with open(path, "wb") as file:
        file.writelines(array_of(200_000_000, record))
    size = path.stat().st_size
    try:
        tracemalloc.start()
        start = time.perf_counter()
        end = num_records = 0
        for one in read_records(str(path)):
            end = one.end
            num_records += 1
        duration_s = time.perf_counter() - start
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        path.unlink()
    assert size > 200_000_000
    assert end == size - 1
    assert num_records > 10_000
    assert peak_bytes < 32 * MIB
    assert duration_s < 10


def test_a_record_of_many_chunks_costs_linear_time(write: Write) -> None:
    # 20 MB in chunks of 4 KiB is 5,000 chunks: scanning all of it again for each would take minutes
    turn = {"from": "gpt", "value": "x\\\n" * 50_000}
    for value in ({"conversations": [turn] * 100}, {"value": "y" * 20_000_000}, "z" * 20_000_000):
        path = write(b"[1, " + orjson.dumps(value) + b", 2]")
        start = time.perf_counter()
        fields = [record.fields for record in read_records(path, chunk_bytes=4096)]
        assert time.perf_counter() - start < 5
        assert fields == [1, value, 2]


@pytest.mark.parametrize("broken", [b'{"a": [1}', b'{"a: 1}', b'{"a": 1 "b"', b"[" * 5000, b'{"a": "\n'])
def test_a_broken_record_without_end_is_noticed_in_bounded_memory(tmp_path: Path, broken: bytes) -> None:
    path = tmp_path / "broken.json"
    with open(path, "wb") as file:
        file.write(b'[{"a": 1}, ' + broken)
        file.writelines([b', {"conversations": [{"from": "gpt", "value": "Hello"}]}' * 1000] * 500)
    try:
        tracemalloc.start()
        with pytest.raises(ValueError, match="byte 11: "):
            list(read_records(str(path), chunk_bytes=1 << 16))
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        path.unlink()
    assert peak_bytes < 8 * MIB


# ---- Records ----


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
    assert parse(mixed) == Turns(
        "dump.json:0",
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


def test_every_role_of_the_table_is_matched_without_case() -> None:
    for name, role in ROLES.items():
        turns = [("human", "q"), (name.upper(), "x"), ("gpt", "a")]
        parsed = parse({"conversations": [{"from": who, "value": text} for who, text in turns]})
        assert isinstance(parsed, Turns)
        assert role in [message.role for message in parsed.messages]


def test_the_id_is_the_records_own_text_or_number_or_else_the_default() -> None:
    ids = [parse(chat(id=id)).id for id in ("a", 7, 0, "", None, True, 1.5, [1])]
    assert ids == ["a", "7", "0", *["dump.json:0"] * 5]


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
        ({"items": [{"from": "human", "value": ["x"]}]}, "value_not_text", "a list"),
        ({"items": [{"from": "human"}]}, "value_not_text", "missing"),
        (chat(condition=4), "bad_condition", "a number"),
        (chat(system=["x"]), "bad_system", "a list"),
        (
            {"items": [{"from": "human", "value": "x"}, {"from": "tool", "value": "y"}]},
            "no_answer",
            "user tool",
        ),
    ],
)
def test_a_record_that_cannot_be_used_says_why(fields: Any, reason: str, detail: str) -> None:
    parsed = parse(fields)
    assert isinstance(parsed, Drop)
    assert parsed.reason == reason
    assert detail in parsed.detail


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf"), 10**400, True, False, "1", [1]])
def test_a_weight_is_a_finite_number_of_at_least_0(weight: object) -> None:
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "weight": weight}]
    parsed = parse({"items": turns})
    assert isinstance(parsed, Drop)
    assert parsed.reason == "bad_weight"
    assert "turn 2" in parsed.detail


def test_deeply_nested_values_in_any_place_are_dropped_not_raised() -> None:
    deep = json.loads("[" * 900 + "]" * 900)
    turn = {"from": "human", "value": "x"}
    for fields in (
        deep,
        chat(condition=deep),
        *({"items": [turn | {key: deep}]} for key in ("from", "value", "weight")),
    ):
        assert isinstance(parse(fields), Drop)


@pytest.mark.parametrize("damage", ["not_json", "truncated_record"])
def test_a_damaged_record_is_dropped_for_its_damage(damage: str) -> None:
    parsed = parse_record(record_of(None, damage), default_id="d")
    assert isinstance(parsed, Drop)
    assert (parsed.id, parsed.reason) == ("d", damage)


def test_repairs_of_reading_and_of_cleaning_are_both_named() -> None:
    turns = [("gpt", "Welcome"), ("human", "a"), ("gpt", "b")]
    fields = {"conversations": [{"from": who, "value": text} for who, text in turns]}
    parsed = parse_record(record_of(fields, repairs=("invalid_utf8_replaced",)), default_id="d")
    assert parsed.repairs == ("invalid_utf8_replaced", "leading_answer_removed")
