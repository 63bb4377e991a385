"""Whatever the bytes of a file or the signs of a text: a result that accounts for every record, or a ValueError."""

import gzip
import io
import json
import os
import random
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from ochat_train.conversations.clean import clean_turns
from ochat_train.conversations.filters import FilterRules
from ochat_train.conversations.html import convert_text
from ochat_train.conversations.records import read_chunks
from ochat_train.conversations.schema import Drop, Message, ParsedRecord, RecordError, Role
from ochat_train.conversations.sources import Source
from ochat_train.preprocess.shard import Shard, ShardSettings, Task, make_shard
from ochat_train.tokens.tokenizer import ChatTokenizer
from tests.dumps import ROOT, chat, ledger_of, make, page, prose, source, write_lines, write_recipe


def fuzz(max_examples: int) -> hypothesis_settings:
    """The same examples at every run."""
    no_fixture_check = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return hypothesis_settings(
        max_examples=max_examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=no_fixture_check,
    )


# ---- The bytes of a file, through all stages of a shard ----


@pytest.fixture(scope="module")
def shard_settings(quickstart: ChatTokenizer) -> ShardSettings:
    return ShardSettings(
        template=quickstart.template,
        encoder=quickstart.text,
        filters=FilterRules(("en",), 0.7, "mask", "mask", 1, last_answer_only=False),
        max_tokens=64,
        overlong="split",
        overlong_context=16,
        minhash=True,
    )


SHOWN = '<div class="markdown prose"><p>a &lt; b</p><pre><code>x</code></pre></div>'
TEXTS = ["Hi", "", " ", "\0", "\U0001f600", SHOWN, "1 / 2\n\nyes", "As an AI language model, I cannot.", prose(0, 80)]
TEXTS += ["```\npythonCopy code\nx\n```", "<|end_of_turn|>", "Ein deutscher Satz, der wirklich lang genug ist."]

texts = st.one_of(st.sampled_from(TEXTS), st.text("ab <>&;/`\n\r*_-#1.|\\\"'\u00a0\ufdd0é中", max_size=20))
junk: st.SearchStrategy[Any] = st.sampled_from(
    [None, True, 0, -1, 1e300, 10**30, "", [], {}, "x", [[]], {"a": None}, [None]]
)
weights = st.sampled_from([None, 0, 0.5, 1e-46, 3e38, -1, True, "1", 10**400])
values = st.one_of(texts, texts, st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": texts}), max_size=2))
names = st.sampled_from(["human", "gpt", "gpt", "user", "assistant", " System", "tool", "nobody"])
calls: st.SearchStrategy[Any] = st.sampled_from(
    [None, "f()", {"a": None}, [{"id": "1", "function": {"name": "f"}}], [[[]]], 1.5]
)
turns = st.one_of(
    st.fixed_dictionaries({"from": names, "value": values}, optional={"weight": weights}),
    st.fixed_dictionaries({"role": names, "content": values}, optional={"tool_calls": calls}),
    st.fixed_dictionaries({"human": texts, "assistant": texts}),
    st.tuples(texts, texts),
    junk,
)
lists = st.sampled_from(["conversations", "items", "messages", "conversation"])
pairs = st.tuples(texts, texts).map(lambda pair: chat("pair", *pair))
odd = st.builds(
    lambda fields, name, turns: {**fields, name: turns},
    st.dictionaries(st.sampled_from(["id", "condition", "system", "lang"]), st.one_of(texts, junk)),
    lists,
    st.lists(turns, max_size=5),
)
records = st.one_of(pairs, odd, odd, junk)

TABLE = pa.Table.from_pylist([chat("a", "Hi", "Hello"), chat("b", "Hi"), {"id": None, "conversations": None}])


def packed(form: str, records: Sequence[Any]) -> bytes:
    """The bytes of a file that holds these records; a table holds its own."""
    lines = "\n".join(json.dumps(record) for record in records).encode()
    sink = io.BytesIO()
    if form == "array":
        return json.dumps(records).encode()
    if form == "page":
        return page({"id": "page", "conversations": records}).encode()
    if form == "gzip":
        return gzip.compress(lines, mtime=0)
    if form == "zstd":
        return bytes(pa.compress(lines, codec="zstd", asbytes=True))
    if form == "zip":
        with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.jsonl", lines)
            archive.writestr("../\n.html", page({"id": "page", "conversations": records}))
        return sink.getvalue()
    if form == "parquet":
        pq.write_table(TABLE, sink)
        return sink.getvalue()
    if form == "arrow":
        with pa.ipc.new_stream(sink, TABLE.schema) as writer:
            writer.write_table(TABLE)
        return sink.getvalue()
    return lines


SPLICES = (b"\xff", b"\\ud800", b'"', b"\\", b"[", b"}", b"\n", b"\0", b"\xef\xbb\xbf", b"</script>", b"1e999", b",")


def damaged(data: bytes, seed: int, times: int) -> bytes:
    """The bytes with `times` of them changed, cut out, doubled or spliced."""
    rng, changed = random.Random(seed), bytearray(data)
    for _ in range(times):
        start = rng.randrange(len(changed) + 1)
        end = start + rng.randrange(20)
        changed[start:end] = rng.choice([b"", bytes(changed[start:end]) * 2, rng.choice(SPLICES), rng.randbytes(1)])
    return bytes(changed)


forms = st.sampled_from(["array", "array", "lines", "lines", "page", "gzip", "zstd", "zip", "parquet", "arrow"])
files = st.builds(
    damaged,
    st.builds(packed, forms, st.lists(records, min_size=1, max_size=4)),
    st.integers(0, 2**32),
    st.sampled_from([0, 0, 1, 2, 8]),
)


def shards_of(settings: ShardSettings, path: Path, sources: Sequence[Source], chunk_bytes: int) -> list[Shard] | str:
    """The shards of a file, or what the ValueError says."""
    try:
        chunks = list(read_chunks([str(path)], chunk_bytes=chunk_bytes))
        shards = [make_shard(settings, Task(chunk, tuple(sources))) for chunk in chunks]
    except ValueError as error:
        assert not isinstance(error, UnicodeError)  # one of ours says what to do
        return str(error)
    assert [shard.records.num_rows for shard in shards] == [sum(1 for _ in chunk.records()) for chunk in chunks]
    return shards


@fuzz(120)
@given(
    data=files,
    page_like=st.sampled_from(["auto", "always", "never"]),
    treatment=st.sampled_from(["mask", "drop", "keep"]),
    overlong=st.sampled_from(["split", "truncate", "drop"]),
    max_tokens=st.sampled_from([16, 64, 256]),
)
def test_any_bytes_become_shards_that_account_for_every_record_or_a_named_error(
    data: bytes,
    page_like: Any,
    treatment: Any,
    overlong: Any,
    max_tokens: int,
    tmp_path: Path,
    shard_settings: ShardSettings,
) -> None:
    filters = replace(shard_settings.filters, refusals=treatment, repeated_answers=treatment)
    settings = replace(shard_settings, filters=filters, overlong=overlong, max_tokens=max_tokens)
    sources = [Source("all", None, 1.0, {}, {}, page_like)]
    path = tmp_path / "dump"
    path.write_bytes(data)
    shards = shards_of(settings, path, sources, 8 << 20)
    again = shards_of(settings, path, sources, 64)
    if isinstance(shards, str) or isinstance(again, str):
        assert isinstance(shards, str) and isinstance(
            again, str
        )  # where chunks are cut does not decide what is an error
        assert shards.startswith((str(path), "record "))
        return
    entries = [row for shard in shards for row in shard.records.to_pylist()]
    assert entries == [row for shard in again for row in shard.records.to_pylist()]
    columns = ["id", "input_ids", "loss_weights"]
    examples = [row for shard in shards for row in shard.rows.select(columns).to_pylist()]
    assert examples == [row for shard in again for row in shard.rows.select(columns).to_pylist()]
    assert entries
    for entry in entries:
        assert (entry["reason"] is None) == (entry["num_examples"] > 0) == (entry["num_supervised_tokens"] > 0)
    assert sum(entry["num_examples"] for entry in entries) == len(examples)
    assert sum(entry["num_tokens"] for entry in entries) == sum(len(row["input_ids"]) for row in examples)
    for row in examples:
        example_weights = np.array(row["loss_weights"])
        assert len(example_weights) == len(row["input_ids"]) <= max_tokens
        assert example_weights.any() and np.isfinite(example_weights).all() and (example_weights >= 0).all()


def test_tiny_files_of_every_form_make_a_store_whose_ledger_adds_up(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    said = [chat("a", "Hi", "Hello"), chat("a", "Hi", "Hello"), 7, {}, chat("b", "Hi"), chat("c", SHOWN, SHOWN)]
    suffixes = {"array": "json", "lines": "jsonl", "page": "html", "gzip": "json.gz", "zstd": "json.zst"}
    suffixes |= {"zip": "zip", "parquet": "parquet", "arrow": "arrow"}
    for form, suffix in suffixes.items():
        (folder / f"{form}\n.{suffix}").write_bytes(packed(form, said))
    (folder / "cut.jsonl").write_bytes(packed("lines", said)[:-9])
    store = make(write_recipe(tmp_path, [source("s", folder)], eval_fraction=0.3), num_workers=1)
    rows = ledger_of(store)
    assert len(rows) == 5 * len(said) + 1 + (len(said) + 1) + 2 * 3
    kept = [row for row in rows if row["reason"] is None]
    assert {row["id"] for row in kept} == {"a", "c"} and len(kept) == 2
    assert {row["outcome"] for row in rows if row["reason"]} == {"dropped"}


# ---- Names of files ----

OWN = json.dumps(chat("own", "Hi", "Hello"))
NAMELESS = json.dumps({"conversations": chat("", "Who?", "Me.")["conversations"]})


def test_a_file_name_that_is_not_utf8_is_read_and_shown_with_escapes(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    with open(os.fsencode(folder) + b"/\xff\n.jsonl", "wb") as file:
        file.write(f"{OWN}\n{NAMELESS}\n7\n".encode())
    recipe = write_recipe(tmp_path, [source("s", folder)])
    command = [sys.executable, "-m", "ochat_train.preprocess", str(recipe), "--workers=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    rows = ledger_of(tmp_path / "store")
    assert [row["file"] for row in rows] == [f"{folder}/\\xff\n.jsonl"] * 3
    assert [row["reason"] for row in rows] == [None, None, "not_an_object"]


# ---- Records beyond all measure ----


def turns_of(role: str, number: int, **fields: Any) -> list[dict[str, Any]]:
    return [{"from": role, "value": f"so {position}", **fields} for position in range(number)]


ASKED, ANSWERED = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}
MANY = 2_000
HUGE = {
    "turns": (turns_of("human", 1) + turns_of("gpt", MANY), None),
    "weighted tool turns": ([ASKED, *turns_of("tool", MANY, weight=1), ANSWERED], None),
    "system turns": ([ASKED, *turns_of("system", MANY), ANSWERED], None),
    "calls": ([ASKED, {**ANSWERED, "tool_calls": [{"id": "1"}] * MANY}, *turns_of("tool", 1), ANSWERED], None),
    "role": ([{"from": "r" * 1_000_000, "value": "Hi"}, ANSWERED], "unknown_role"),
    "weight too small": ([ASKED, {**ANSWERED, "weight": 1e-46}], "no_weight"),
}


@pytest.mark.parametrize("what", HUGE)
def test_a_huge_record_has_its_outcome_and_a_short_detail(
    what: str, tmp_path: Path, shard_settings: ShardSettings
) -> None:
    conversation, reason = HUGE[what]
    dump = write_lines(tmp_path / "dump.jsonl", {"id": "i" * 100_000, "conversations": conversation})
    (entry,) = entries_of(dump, shard_settings)
    assert (entry["id"], entry["reason"]) == ("i" * 100_000, reason)
    assert len(entry["detail"] or "") < 200
    assert entry["num_examples"] > 0 or reason


@pytest.mark.parametrize("name", ["condition", "system"])
def test_a_huge_condition_or_system_text_makes_a_conversation_too_long(
    name: str, tmp_path: Path, shard_settings: ShardSettings
) -> None:
    dump = write_lines(tmp_path / "dump.jsonl", chat("a", "Hi", "Hello", **{name: "c " * 100_000}))
    (entry,) = entries_of(dump, shard_settings)
    assert entry["reason"] == "too_long"


@pytest.mark.parametrize(
    ("weight", "reason"),
    [("1e999", "bad_weight"), ("NaN", "bad_weight"), ("-Infinity", "bad_weight"), ("1" + "0" * 5000, "not_json")],
)
def test_a_weight_that_is_no_finite_number_costs_its_record_alone(
    weight: str, reason: str, tmp_path: Path, shard_settings: ShardSettings
) -> None:
    dump = tmp_path / "dump.jsonl"
    dump.write_text(f'{{"id": "a", "conversations": [{{"from": "gpt", "value": "x", "weight": {weight}}}]}}\n{OWN}\n')
    assert [entry["reason"] for entry in entries_of(dump, shard_settings)] == [reason, None]


@pytest.fixture
def python_limit() -> Iterator[None]:
    """Python's own limit of recursion, which torch's compiler raises in the process of other tests."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)
    yield
    sys.setrecursionlimit(before)


@pytest.mark.parametrize("depth", [1_000, 1_025, 1_000_000])
@pytest.mark.parametrize("signs", [("[", "]"), ('{"a":', "}")])
def test_deep_nesting_costs_its_record_alone(
    depth: int,
    signs: tuple[str, str],
    tmp_path: Path,
    shard_settings: ShardSettings,
    python_limit: None,
) -> None:
    deep = signs[0] * depth + "1" + signs[1] * depth
    dump = tmp_path / "dump.jsonl"
    asked, answered = json.dumps(ASKED), json.dumps(ANSWERED)
    calling = f'{{"from": "gpt", "value": "x", "tool_calls": {deep}}}'
    dump.write_text(
        f'{{"x": {deep}, "conversations": [{asked}, {answered}]}}\n{{"conversations": [{asked}, {calling}]}}\n{OWN}\n'
    )
    first, second, third = (entry["reason"] for entry in entries_of(dump, shard_settings))
    assert (first, second, third) == (
        (None, "value_not_text", None) if depth == 1_000 else ("not_json", "not_json", None)
    )


def entries_of(dump: Path, settings: ShardSettings) -> list[dict[str, Any]]:
    shards = shards_of(settings, dump, [Source("all", None, 1.0, {}, {})], 8 << 20)
    assert not isinstance(shards, str), shards
    return [row for shard in shards for row in shard.records.to_pylist()]


# ---- HTML ----

# A word in one of these must come out. Not among them, since a browser shows nothing of them either: comments, what is
# `hidden`, and a "<" before a letter, which begins a tag. `{}` stands for a word.
PIECES = [
    "{}",
    " {} ",
    "{} {}",
    "\n{}\n",
    "{}&nbsp;{}",
    "&lt;{}&gt;",
    "*{}*",
    "_{}_",
    "# {}",
    "1. {}",
    "{}\\",
    "&amp;{}",
]
PIECES += [
    "{} < {}",
    "{}\r\n{}",
    "{}\u00a0",
    "{}|{}",
    "`{}`",
    "- {}",
    "{}&#39;{}",
    "\t{}",
    "{}\n\n{}",
    "&#0;{}",
    "[{}]({})",
]
PIECES += ["&#xD800;{}", "&bogus;{}", "\0{}", "\ufdd0{}", "{}$", "$${}$$", "{}\u2028{}", "{}>", "&#x1F600;{}"]
MARKS = [
    "<br>",
    "<!-- c -->",
    "<!doctype html>",
    "<hr>",
    "<wbr>",
    "<img src=x>",
    "</p>",
    "</div>",
    "</>",
    "< b>",
    "<input>",
]
BAR = '<div class="bg-black"><span>python</span><button>Copy code</button></div>'
CODE = f'<pre>{BAR}<code class="language-python">{{}}</code></pre>'
TEX = '<annotation encoding="application/x-tex">{}</annotation>'
KATEX = f'<span class="katex"><span><math><mi>x</mi>{TEX}</math></span><span aria-hidden="true"><i>x</i></span></span>'
CELLS = "<table><tr><th>{}</th><th colspan=2>{}</th></tr><tr><td>{}</td></tr></table>"
CELLS_OPEN = "<table><tr><td>{}<td rowspan=2>{}<tr><td>{}</table>"
FRAMES = [
    CODE,
    KATEX,
    CELLS,
    CELLS_OPEN,
    "<pre>{}</pre>",
    "<ul><li>{}</li><li>{}</ul>",
    "<ol start=-1><li>{}\n<li>{}</ol>",
]
FRAMES += [
    "<dl><dt>{}</dt><dd>{}</dd></dl>",
    "<details><summary>{}</summary>{}</details>",
    "<p>{}",
    "<blockquote>{}</blockquote>",
]
ELEMENTS = [
    "b",
    "i",
    "em",
    "code",
    "span",
    "a",
    "sub",
    "sup",
    "del",
    "kbd",
    "mark",
    "q",
    "p",
    "div",
    "h1",
    "h6",
    "section",
]
ATTRIBUTES = ["", " class='x'", ' href="http://a.b/c_d"', f' data-x="{"y" * 3000}"', " x", " ="]

leaves = st.one_of(st.sampled_from(PIECES), st.sampled_from(PIECES), st.sampled_from(MARKS), st.sampled_from(FRAMES))
elements = st.builds(
    lambda name, attribute, inside, end: f"<{name}{attribute}>{''.join(inside)}{end and f'</{name}>'}",
    st.sampled_from(ELEMENTS),
    st.sampled_from(ATTRIBUTES),
    st.lists(leaves, max_size=3),
    st.sampled_from([True, True, True, ""]),
)
quoted = st.builds(
    lambda name, inside: f"<{name}>{''.join(inside)}</{name}>",
    st.sampled_from(["blockquote", "ul", "div", "figure"]),
    st.lists(st.one_of(leaves, elements), max_size=4),
)
documents = st.lists(st.one_of(elements, quoted, leaves), min_size=1, max_size=5).map("".join)


def with_words(pattern: str) -> str:
    parts = pattern.split("{}")
    return parts[0] + "".join(f"w{number}x{part}" for number, part in enumerate(parts[1:]))


@fuzz(200)
@given(documents.map(with_words), st.booleans(), st.booleans(), st.booleans())
def test_every_word_that_html_shows_is_in_its_markdown(document: str, is_page: bool, typed: bool, sure: bool) -> None:
    if is_page:
        document = f'<div class="markdown prose w-full">{document}</div>'
    words = set(re.findall(r"w\d+x", document))
    try:
        markdown = convert_text(document, typed=typed, sure=sure)
    except RecordError:  # a doctype and nothing else
        assert not words
        return
    assert convert_text(document, typed=typed, sure=sure) == markdown
    assert words == set(re.findall(r"w\d+x", markdown))


@fuzz(200)
@given(
    st.lists(
        st.one_of(
            st.sampled_from(
                ["<!--", "-->", "<![CDATA[", "]]>", "<?", "<script>", "</script>", "<style>", "<svg", "<pre"]
            ),
            st.sampled_from(
                ["<pre><code>", "</pre>", "</code></pre>", '<span class="katex">', "<td", "<a", '<b "', "<"]
            ),
            st.sampled_from(
                ["\ud800", "\0", "\r\n", "&#x110000;", "<li>", "</table>", "<div hidden>", "<select>", TEX]
            ),
            elements,
            quoted,
        ),
        max_size=8,
    ).map("".join),
    st.sampled_from(["auto", "always", "never"]),
)
def test_broken_html_becomes_text_or_a_drop_and_the_same_every_time(document: str, page_like: Any) -> None:
    shown = f'<div class="markdown">{document}'
    said = (
        Message("user", document),
        Message("assistant", shown),
        Message("tool", document),
        Message("assistant", "x"),
    )
    turns = ParsedRecord("a", "from/value", False, None, document, said, ())
    cleaned = clean_turns(turns, html=page_like)
    assert cleaned == clean_turns(turns, html=page_like)
    if isinstance(cleaned, Drop):
        assert cleaned.reason in ("html_not_converted", "html_too_deep", "no_answer")
    elif page_like == "never":
        assert cleaned.messages[-1].text == "x"


@pytest.mark.parametrize(
    "document", ['<b title="a>b"></b>', '<blockquote><b title="a>b"><blockquote>x</blockquote></b></blockquote>']
)
def test_a_greater_than_in_an_attribute_is_no_text(document: str) -> None:
    assert convert_text(document, typed=False, sure=True).strip("> *\n") in ("", "x")


@pytest.mark.parametrize(
    "open_tag", ["<div>", "<b>", "<blockquote>", "<ul><li>", "<table><tr><td>", "<dl><dd>", "<pre>", "<svg>"]
)
@pytest.mark.parametrize("number", [101, 20_000])
def test_elements_deep_in_one_another_are_refused_or_converted_without_a_crash(open_tag: str, number: int) -> None:
    try:
        markdown = convert_text(open_tag * number + "x", typed=False, sure=True)
    except RecordError as error:
        assert error.reason == "html_too_deep"
    else:
        assert len(markdown) < 10_000_000


WIDE = {
    "one wide row": "<table><tr>" + "<td>" * 1000 + "<tr><td>x" * 3_000 + "</table>",
    "a signed span": "<table>" + "<tr><td colspan=+1000>x" * 3_000 + "</table>",
    "a span in entities": "<table>" + "<tr><td colspan='&#57;99'>x" * 3_000 + "</table>",
    "a span after a greater-than": "<table>" + "<tr><td title='>' colspan=999>x" * 3_000 + "</table>",
}


@pytest.mark.parametrize("what", WIDE)
def test_a_small_table_does_not_become_huge_markdown(what: str) -> None:
    """Markdown writes out every cell that a row lacks."""
    with pytest.raises(RecordError, match="html_not_converted"):
        convert_text(WIDE[what], typed=False, sure=True)


# ---- Markdown ----

NOISE = [
    "```",
    "````",
    "~~~",
    "```python",
    "```js Copy code",
    "Copy code",
    "pythonCopy code",
    "Copy codes",
    "1 / 2",
    "3 / 4",
]
NOISE += [
    "Copy 12 chars / 3 words",
    "Copy12 chars / 3 words",
    "Share Prompt",
    "Save & SubmitCancel",
    "\n",
    "\n\n",
    "\r\n",
    " ",
]
NOISE += [
    "word",
    "a_b",
    "*x*",
    "> ",
    "- ",
    "1. ",
    "<b>",
    "&lt;",
    "    ",
    "\t",
    "\u2028",
    "\x0b",
    "\0",
    "é",
    "| a |",
    "\r",
]
noisy = st.lists(st.sampled_from(NOISE), max_size=14).map("".join)
roles: st.SearchStrategy[Role] = st.sampled_from(["user", "assistant", "system", "tool"])


@fuzz(250)
@given(noisy, st.lists(st.builds(Message, roles, noisy), max_size=6), st.sampled_from(["auto", "never"]))
def test_cleaning_plain_text_twice_is_cleaning_it_once(system: str, messages: list[Message], page_like: Any) -> None:
    cleaned = clean_turns(ParsedRecord("a", "from/value", False, None, system, tuple(messages), ()), html=page_like)
    if isinstance(cleaned, Drop):
        assert cleaned.reason == "no_answer"
        return
    if "user_turns_joined" in cleaned.repairs:  # what was the end of a turn may then stand in the middle of one
        return
    assert clean_turns(replace(cleaned, repairs=()), html=page_like) == replace(cleaned, repairs=())


# ---- Long texts ----

SIGNS = [
    "a",
    " ",
    "\n",
    "`",
    "~",
    "<",
    "&",
    "\\",
    "*",
    "é",
    "\0",
    "<p>",
    "&lt;",
    "> ",
    "```\n",
    "1 / 1\n",
    "Copy code",
    "\ufdd0",
]
SIGNS += [
    "as an AI ",
    "<!--",
    "<pre><code>",
    "<button>",
    '<span class="katex">',
    "<svg",
    "&#",
    "Copy 1 chars / 1 words\n",
]


@pytest.mark.parametrize("sign", SIGNS)
def test_a_long_text_of_one_sign_takes_linear_time(sign: str, tmp_path: Path, shard_settings: ShardSettings) -> None:
    """All stages together: each needs 1 s for a megabyte at most, a quadratic one would need minutes."""
    text = "x" + sign * (100_000 // len(sign)) + "y"
    dump = write_lines(
        tmp_path / "dump.jsonl", chat("a", text, text), chat("b", "Hi", f'<div class="markdown">{text}</div>')
    )
    start = time.process_time()
    entries = entries_of(dump, shard_settings)
    assert [entry["reason"] for entry in entries[:1]] in ([None], ["other_language"]) and len(entries) == 2
    assert time.process_time() - start < 5
