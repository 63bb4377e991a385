"""The report of a store counts right, says the same on the page and in the terminal, and shows text as text."""

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, field
from html.parser import HTMLParser
from itertools import accumulate, groupby
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tokenizers import Tokenizer

import ochat_train.report.__main__ as report
import ochat_train.report.page as page_module
import ochat_train.report.store as report_store
from ochat_train.conversations.schema import Conversation, Message
from ochat_train.conversations.template import TEMPLATES
from ochat_train.preprocess.ledger import Ledger, LedgerRow, ledger_table
from ochat_train.preprocess.run import preprocess
from ochat_train.preprocess.shard import OVERLONG_COLUMNS
from ochat_train.recipe import load_recipe
from ochat_train.report.page import Token, align, visible
from ochat_train.report.store import PackingTrial, Sample, StoreReport, quantile, read_store
from ochat_train.report.store_sections import store_document
from ochat_train.tokens.encode import encode
from ochat_train.tokens.store import Manifest, Split, StoreWriter, TokenStore
from ochat_train.tokens.tokenizer import ChatTokenizer
from tests.conftest import ROOT
from tests.waiting import HANG_S

BAR = re.compile(" *[█▐▕▏▎▍▌▋▊▉]+ *")
SCRIPT = '<script>alert("x")</script><img src=http://evil.example/x.png onerror=alert(1)>'


@dataclass(frozen=True, slots=True)
class Row:
    id: str
    source: str
    condition: str
    input_ids: Sequence[int]
    loss_weights: Sequence[float]


def chat(
    tokenizer: ChatTokenizer,
    turns: Sequence[str] = ("Hi", "Hello!"),
    *,
    id: str = "a",
    source: str = "good",
    condition: str = "GPT4",
    weight: float = 1.0,
) -> Row:
    """A conversation whose turns are the user's and the assistant's by turns, encoded as training does."""
    messages = [Message("assistant", text, weight) if n % 2 else Message("user", text) for n, text in enumerate(turns)]
    conversation = Conversation(id, source, condition, "", tuple(messages))
    example = encode([conversation], TEMPLATES["openchat_v3.2"], tokenizer)[0].example
    return Row(id, source, condition, example.input_ids.tolist(), example.loss_weights.tolist())


def plain(length: int, **names: str) -> Row:
    """An example of this length whose last token has a weight."""
    return Row(names.get("id", "a"), names.get("source", "good"), "GPT4", [5] * length, [0.0] * (length - 1) + [1.0])


def entry_of(row: Row, *, num_examples: int = 1) -> LedgerRow:
    return LedgerRow(
        row.id.rpartition("#")[0] if num_examples > 1 else row.id, "f", 0, row.source, (), None, None, num_examples
    )


def answer_lengths(row: Row) -> list[int]:
    """The lengths of the runs of tokens with a weight, each of which is an answer here."""
    return [len(list(run)) for is_trained, run in groupby(row.loss_weights, key=bool) if is_trained]


def write(
    path: Path,
    tokenizer: ChatTokenizer,
    train: Sequence[Row],
    eval_: Sequence[Row] = (),
    entries: Sequence[LedgerRow] | None = None,
    *,
    sources: Sequence[str] = ("good",),
    max_tokens: int = 64,
    overlong: Sequence[int] = (0,) * len(OVERLONG_COLUMNS),
    batch: int = 7,
) -> Path:
    staging = path.with_name(f"{path.name}.staging")
    writer = StoreWriter(staging, list(dict.fromkeys([*sources, *(row.source for row in (*train, *eval_))])), 2**31)
    splits: dict[Split, Sequence[Row]] = {"train": train, "eval": eval_}
    for split, rows in splits.items():
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            columns = {name: [getattr(row, name) for row in part] for name in Row.__slots__}
            columns["input_ids"] = pa.array(columns["input_ids"], pa.list_(pa.int32()))
            columns["loss_weights"] = pa.array(columns["loss_weights"], pa.list_(pa.float32()))
            columns["answer_lengths"] = pa.array([answer_lengths(row) for row in part], pa.list_(pa.int32()))
            writer.add(split, pa.table(columns))
    with Ledger(str(staging / "ledger.parquet")) as ledger:
        ledger.add(ledger_table(entries if entries is not None else [entry_of(row) for row in (*train, *eval_)]))
    tokenizer.save(staging / "tokenizer")
    manifest = Manifest(
        fingerprint="0123456789abcdef",
        made_from={
            "tokenizer": "fedcba9876543210",
            "data": {
                "max_tokens": max_tokens,
                "overlong": "split",
                "sources": [{"name": name} for name in sources],
            },
        },
        template="openchat_v3.2",
        conditions=writer.conditions,
        sources=writer.sources,
        inference_condition="GPT4",
        added_tokens={"<|end_of_turn|>": 1024},
        splits=writer.split_totals(),
        counts=ledger.to_json(),
        overlong=dict(zip(OVERLONG_COLUMNS, overlong, strict=True)),
    )
    writer.finish(manifest, path)
    return path


@dataclass
class Page(HTMLParser):
    """The tags of a page, its text, and its tables as rows of cells without those that hold a bar."""

    page: str
    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    text: str = ""
    tables: list[list[list[str]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._cell: list[str] | None = None
        self.feed(self.page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th") and "bar" not in (attributes.get("class") or "") and "aria-hidden" not in attributes:
            self._cell = []

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th") and self._cell is not None:
            self.tables[-1][-1].append("".join(self._cell))
            self._cell = None

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._cell is not None:
            self._cell.append(data)


def text_tables(text: str) -> list[list[list[str]]]:
    """The tables of the terminal's report as rows of cells, empty cells and bars left out."""
    tables: list[list[list[str]]] = [[]]
    for line in text[: text.index("\nSAMPLES")].splitlines():
        if line.startswith("  "):
            tables[-1].append(re.split(r" {2,}", re.sub(BAR, "  ", line).strip()))
        elif tables[-1]:
            tables.append([])
    return [table for table in tables if table]


def row_of(tables: Iterable[list[list[str]]], *first: str) -> list[str]:
    """The row below the header `first[0]` that begins with `first[1]`."""
    (table,) = (table for table in tables if table[0][: len(first) - 1] == list(first[:-1]))
    (row,) = (row for row in table if row[0] == first[-1])
    return row


def as_text(report: StoreReport) -> str:
    return page_module.as_text(store_document(report))


def as_html(report: StoreReport) -> str:
    return page_module.as_html(store_document(report))


def show(path: Path) -> tuple[StoreReport, list[list[list[str]]]]:
    facts = read_store(path)
    return facts, text_tables(as_text(facts))


# ---- The numbers ----


def random_rows(num_conversations: int, seed: int, prefix: str) -> tuple[list[Row], list[LedgerRow]]:
    """Conversations of one to three examples; some that are whole have ids which look like those of parts."""
    random = np.random.default_rng(seed)
    rows, entries = [], []
    for number in range(num_conversations):
        source, condition = f"s{random.integers(3)}", ("", "GPT4", "größer")[random.integers(3)]
        id, parts = f"{prefix}{number}" + f"#{number % 5}" * (number % 2), int(random.integers(1, 4))
        for part in range(1, parts + 1):
            length = int(random.integers(1, 61))
            weights = random.choice(np.array([0, 0, 0.1, 1, 2.5], dtype=np.float32), length)
            suffix = f"#{part}" if parts > 1 else ""
            rows.append(Row(id + suffix, source, condition, random.integers(3, 900, length).tolist(), weights.tolist()))
        entries.append(LedgerRow(id, "f", number, source, (), None, None, parts))
    return rows, entries


def recount(rows: Sequence[Row], entries: Sequence[LedgerRow]) -> dict[tuple[str, str], tuple[Any, ...]]:
    """Conversations, examples, tokens, supervised tokens and both weight sums by source and condition."""
    starts = set(accumulate((entry.num_examples for entry in entries), initial=0))
    found: dict[tuple[str, str], list[Any]] = {}
    for position, row in enumerate(rows):
        numbers = found.setdefault((row.source, row.condition), [0, 0, 0, 0, 0.0, 0.0])
        numbers[0] += position in starts
        numbers[1] += 1
        for weight in row.loss_weights:
            numbers[2] += 1
            numbers[3] += weight > 0
            numbers[4] += weight
        numbers[5] += sum(np.mean(list(run)) for _, run in groupby(row.loss_weights, key=bool))
    return {
        # Each weight of the form answer is rounded once to f32.
        group: (*counts, pytest.approx(weights, rel=1e-9), pytest.approx(by_answer, rel=2**-23))
        for group, (*counts, weights, by_answer) in found.items()
    }


def test_the_totals_are_those_of_a_naive_recount(quickstart: ChatTokenizer, tmp_path: Path) -> None:
    train, train_entries = random_rows(150, 1, "a")
    eval_, eval_entries = random_rows(20, 2, "b")
    entries = [*train_entries, *eval_entries]
    path = write(tmp_path / "store", quickstart, train, eval_, entries, sources=["s2", "s0", "s1"])
    facts, tables = show(path)
    assert len({row.source for row in train}) == 3
    assert {group: astuple(totals) for group, totals in facts.train.items()} == recount(train, train_entries)
    assert {group: astuple(totals) for group, totals in facts.held_out.items()} == recount(eval_, eval_entries)
    assert list(facts.by_source) == ["s2", "s0", "s1"]
    for source in facts.by_source:
        of_source = [row for row in train if row.source == source]
        tokens = sum(len(row.input_ids) for row in of_source)
        assert facts.by_source[source].tokens == tokens
        assert row_of(tables, "source", "condition", source)[-2] == f"{tokens:,}"
        loss = sum(sum(row.loss_weights) for row in of_source) / sum(sum(row.loss_weights) for row in train)
        assert row_of(tables, "source", "of conversations", source)[-2] == f"{100 * loss:.1f} %"
    for condition, totals in facts.by_condition.items():
        of_condition = [row for row in train if row.condition == condition]
        assert totals.examples == len(of_condition)
        share = len(np.concatenate([row.input_ids for row in of_condition])) / sum(len(row.input_ids) for row in train)
        assert (
            row_of(tables, "condition", "of conversations", condition or "(no condition)")[2] == f"{100 * share:.1f} %"
        )


def test_a_store_made_by_preprocess_agrees_with_its_own_table(tmp_path: Path) -> None:
    overrides = [f"data.store={tmp_path / 'store'}", "data.max_tokens=64", "data.overlong_context=8"]
    preprocess(load_recipe(ROOT / "recipes/quickstart.yaml", overrides), num_workers=1)
    facts = read_store(tmp_path / "store")
    counts = facts.manifest.counts
    assert sum(source["examples"] for source in counts.values()) > sum(source["kept"] for source in counts.values())
    for source, expected in counts.items():
        both = [
            totals for groups in (facts.train, facts.held_out) for group, totals in groups.items() if group[0] == source
        ]
        assert {
            "kept": sum(totals.conversations for totals in both),
            "examples": sum(totals.examples for totals in both),
            "tokens": sum(totals.tokens for totals in both),
            "supervised_tokens": sum(totals.supervised_tokens for totals in both),
            "weight_sum": pytest.approx(sum(totals.weight_sum for totals in both)),
        } == {name: expected[name] for name in ("kept", "examples", "tokens", "supervised_tokens", "weight_sum")}
        assert (facts.records[source].num_in, facts.records[source].num_kept) == (expected["in"], expected["kept"])
    train = TokenStore(tmp_path / "store")
    assert facts.all_lengths.tolist() == np.bincount(train.lengths, minlength=65).tolist()
    assert sum(totals.weight_sum for totals in facts.train.values()) == pytest.approx(train.weight_sums.sum())


def test_a_share_of_the_loss_is_a_share_of_the_weights(quickstart: ChatTokenizer, tmp_path: Path) -> None:
    rows = [
        Row("a", "good", "GPT4", [5] * 10, [0.0] * 5 + [1.0] * 5),
        Row("b", "bad", "GPT3", [5] * 30, [0.0] * 5 + [0.2] * 25),
    ]
    _, tables = show(write(tmp_path / "store", quickstart, rows, sources=["good", "bad"]))
    assert row_of(tables, "source", "of conversations", "good")[1:] == [
        "50.0 %",
        "25.0 %",
        "16.7 %",
        "50.0 %",
        "83.3 %",
    ]
    assert row_of(tables, "condition", "of conversations", "GPT3")[1:] == [
        "50.0 %",
        "75.0 %",
        "83.3 %",
        "50.0 %",
        "16.7 %",
    ]
    assert row_of(tables, "source", "condition", "bad")[:3] == ["bad", "GPT3", "0.2"]


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9, 1.0])
def test_a_quantile_is_an_element_of_the_sorted_lengths(share: float) -> None:
    random = np.random.default_rng(3)
    for num in (1, 2, 10, 11, 99):
        lengths = random.integers(1, 40, num)
        assert quantile(np.bincount(lengths), share) == sorted(lengths)[ceil(round(share * num, 9)) - 1]


def test_each_length_is_in_the_bin_that_names_it(quickstart: ChatTokenizer, tmp_path: Path) -> None:
    lengths = [2, 3, 10, 11, 16, 17, 17, 64, 63, 45, 46]
    path = write(tmp_path / "store", quickstart, [plain(length) for length in lengths])
    (table,) = (table for table in show(path)[1] if table[0][0] == "tokens")
    binned = Counter()
    for name, good, total in table[1:]:
        first, _, last = name.partition(" to ")
        inside = [length for length in lengths if int(first) <= length <= int(last or first)]
        assert (good, total) == (str(len(inside)), str(len(inside)))
        binned.update(inside)
    assert binned == Counter(lengths)
    assert table[-1][0] == "55 to 64"
    assert "median 17, 90 % 63, longest 64, data.max_tokens 64." in as_text(read_store(path))


# Two of 33 tokens never fit into 64, so each of the 8 micro-batches of 64 holds one, those of 128 hold three.
def test_the_fill_is_what_the_plan_reaches_without_the_last_step(quickstart: ChatTokenizer, tmp_path: Path) -> None:
    facts, tables = show(write(tmp_path / "store", quickstart, [plain(33)] * 50))
    assert facts.packing == (
        PackingTrial(64, 33 / 64, 7, 50),
        PackingTrial(128, 3 * 33 / 128, 3, 50),
        PackingTrial(256, None, 1, 50),
        PackingTrial(512, None, 1, 50),
    )
    assert row_of(tables, "packing.tokens_per_gpu", "128")[1:] == ["77.3 %", "3", "17"]
    assert row_of(tables, "packing.tokens_per_gpu", "512")[1:] == ["-", "1", "50"]


def test_packing_of_many_examples_is_tried_on_a_sample_and_says_so(
    quickstart: ChatTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "store", quickstart, [plain(33)] * 500, batch=100)
    assert "drawn at random" not in as_text(read_store(path))
    monkeypatch.setattr(report_store, "_PACKING_EXAMPLES", 100)
    facts = read_store(path)
    assert facts.packing[0] == PackingTrial(64, 33 / 64, 63, 100)  # 500 / 8 steps
    assert "Tried on 100 examples drawn at random." in " ".join(as_text(facts).split())


def test_the_funnel_and_the_changes_say_what_the_ledger_says(quickstart: ChatTokenizer, tmp_path: Path) -> None:
    rows = [chat(quickstart, id=f"k{number}") for number in range(6)]
    kept = [LedgerRow(row.id, "f", 0, "good", ("refusal_masked",) * (row.id < "k2"), None, None, 1) for row in rows]
    dropped = [LedgerRow(f"d{number}", "f", 0, "good", (), "no_answer", "") for number in range(4)]
    dropped += [LedgerRow("e", "f", 0, "bad", ("html_converted",), "language", "fr")]
    facts, tables = show(write(tmp_path / "store", quickstart, rows, (), [*kept, *dropped], sources=["good", "bad"]))
    funnel = next(table for table in tables if table[1][0] == "records in")
    assert funnel == [
        ["(all)", "good", "bad", "some ids"],
        ["records in", "11", "10", "1"],
        ["no_answer", "4 (36.4 %)", "4 (40.0 %)", "0", "d0, d1, d2"],
        ["language", "1 (9.1 %)", "0", "1 (100.0 %)", "e"],
        ["kept", "6 (54.5 %)", "6 (60.0 %)", "0"],
    ]
    assert ["refusal_masked", "2", "2", "0", "k0, k1"] in next(
        table for table in tables if table[1][0] == "refusal_masked"
    )
    assert row_of(tables, "source", "condition", "bad")[:6] == ["bad", "-", "-", "1", "0", "1"]
    margins = re.findall(r'<div style="margin: 0 ([\d.]+)% 0 ([\d.]+)%">', as_html(facts))
    places = [(float(left), 100 - float(right)) for right, left in margins]
    assert places == [pytest.approx(place) for place in ((0, 100), (63.636, 100), (54.545, 63.636), (0, 54.545))]


def test_the_choices_for_long_conversations_stand_beside_each_other(quickstart: ChatTokenizer, tmp_path: Path) -> None:
    counts = (3, 1000, 400, 900, 400, 500, 100, 0, 0)
    path = write(tmp_path / "store", quickstart, [chat(quickstart)], overlong=counts)
    _, tables = show(path)
    assert row_of(tables, "data.overlong", "split (this store)")[1:] == ["900", "90.0 %", "400", "100.0 %"]
    assert row_of(tables, "data.overlong", "truncate")[1:] == ["500", "50.0 %", "100", "25.0 %"]
    assert row_of(tables, "data.overlong", "drop")[1:] == ["0", "0.0 %", "0", "0.0 %"]
    without = write(tmp_path / "without", quickstart, [chat(quickstart)])
    assert not [table for table in show(without)[1] if table[0][0] == "data.overlong"]


def test_the_held_out_share_is_of_a_sources_conversations(quickstart: ChatTokenizer, tmp_path: Path) -> None:
    train = [chat(quickstart, id=f"t{number}") for number in range(3)]
    eval_ = [Row(f"e#{part}", "good", "GPT4", [5] * 8, [0.0] + [1.0] * 7) for part in (1, 2)]
    entries = [*map(entry_of, train), entry_of(eval_[0], num_examples=2)]
    _, tables = show(write(tmp_path / "store", quickstart, train, eval_, entries))
    assert row_of(tables, "source", "conversations", "good") == ["good", "1", "2", "16", "14", "25.0 %"]


# ---- The page and the text ----


@pytest.fixture
def mixed(quickstart: ChatTokenizer, tmp_path: Path) -> Path:
    """A store of three sources, two conditions, every kind of table, and hostile text wherever a dump can put it."""
    train = [
        chat(quickstart, [SCRIPT, f"{SCRIPT}\n\n\tYes.", "Why?", "So."], id=f"{SCRIPT}{number}", condition=SCRIPT)
        for number in range(9)
    ]
    train += [chat(quickstart, ["Hi", "Yo"], id=f"b{n}", source="<b>bad", condition="", weight=0.3) for n in range(5)]
    eval_ = [chat(quickstart, id="e")]
    entries = [*map(entry_of, (*train, *eval_))]
    entries += [LedgerRow(f"\x1b[31m{SCRIPT}", "f", 0, "good", ("question_cut",), "no_answer", SCRIPT)]
    counts = (3, 1000, 400, 900, 400, 500, 100, 0, 0)
    sources = ["good", "<b>bad", "none"]
    return write(
        tmp_path / SCRIPT[:8], quickstart, train, eval_, entries, sources=sources, max_tokens=512, overlong=counts
    )


def test_the_page_and_the_terminal_show_the_same_tables(mixed: Path) -> None:
    facts = read_store(mixed)
    text = as_text(facts)
    page = Page(as_html(facts))
    origin, *tables = page.tables
    assert [[[cell for cell in row if cell] for row in table] for table in tables] == text_tables(text)
    assert len(tables) == 10
    assert all(re.search(rf"^{re.escape(name)} +{re.escape(value)}$", text, re.MULTILINE) for name, value in origin)
    for line in text[: text.index("\nSOURCES")].splitlines():
        for cell in re.split(r" {2,}", line):
            assert cell in page.text


def test_text_of_the_dump_stays_text(mixed: Path) -> None:
    page = Page(as_html(read_store(mixed)))
    assert not {tag for tag, _ in page.tags} & {"script", "img", "b>bad"}
    assert sum(tag == "html" for tag, _ in page.tags) == 1
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.text.count('<script>alert("x")</script>') >= 6  # in three samples, twice each
    assert "↵" in page.text and "⇥" in page.text


def test_a_token_is_escaped_and_what_one_cannot_see_in_it_is_marked() -> None:
    """A token may be a whole tag in another vocabulary than the test's."""
    shown = {
        '</b>&"': "&lt;/b&gt;&amp;&#34;",
        "a b\n": "a b<i>↵</i>\n",
        "\t\u202e": "<i>⇥</i>\t<i>\\u202e</i>",
        " ": " ",
        "  ": "<i>·</i><i>·</i>",
    }
    assert {text: str(visible(text)) for text in shown} == shown


def test_the_page_shows_tokens_that_way(mixed: Path) -> None:
    page = as_html(read_store(mixed))
    assert ">&lt;</span>" in page and "><i>↵</i>\n" in page
    assert "<</span>" not in page and "&lt;i&gt;↵" not in page


def test_the_page_loads_nothing(mixed: Path) -> None:
    page = as_html(read_store(mixed))
    parsed = Page(page)
    assert not {tag for tag, _ in parsed.tags} & {"script", "link", "img", "iframe", "object", "base", "use", "image"}
    assert not [a for _, attributes in parsed.tags for a in attributes if a in ("src", "href", "xlink:href", "srcset")]
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style and "@import" not in style
    assert not re.search(r"https?://", page.replace("http://evil.example", ""))


def test_a_terminal_is_not_obeyed(mixed: Path) -> None:
    text = as_text(read_store(mixed))
    assert "\x1b" not in text
    assert r"\x1b[31m" in text


def test_an_unnamed_condition_and_a_source_without_records_have_rows(mixed: Path) -> None:
    _, tables = show(mixed)
    assert row_of(tables, "source", "condition", "<b>bad")[:3] == ["<b>bad", "(no condition)", "0.3"]
    assert row_of(tables, "condition", "weight", "(no condition)")[2] == "5"
    assert row_of(tables, "source", "condition", "none") == ["none", "-", "-", *"0000000"]


def test_a_store_of_one_source_and_one_example_and_nothing_held_out(quickstart: ChatTokenizer, tmp_path: Path) -> None:
    facts, tables = show(write(tmp_path / "store", quickstart, [chat(quickstart)]))
    assert facts.held_out == {}
    assert [sample.id for sample in facts.samples] == ["a"]
    assert row_of(tables, "source", "conversations", "good") == ["good", "0", "0", "0", "0", "0.0 %"]
    assert row_of(tables, "source", "of conversations", "good")[1:] == ["100.0 %"] * 5
    assert "Nothing is held out." in Page(as_html(facts)).text


def test_the_page_says_what_the_store_is(mixed: Path, quickstart: ChatTokenizer) -> None:
    text = Page(as_html(read_store(mixed))).text
    facts = (
        "0123456789ab",
        "fedcba987654",
        "openchat_v3.2; inference under GPT4",
        "<|end_of_turn|> = 1024",
        str(mixed),
    )
    for fact in (*facts, f"{len(quickstart.pretrained):,} tokens"):
        assert fact in text


# ---- Samples ----


def joined(sample: Sample) -> list[list[str]]:
    return [[piece.text for piece in turn] for turn in (*sample.head, *sample.tail)]


def test_a_sample_shows_every_token_in_its_turn_with_its_weight(quickstart: ChatTokenizer, tmp_path: Path) -> None:
    row = chat(quickstart, ["Who?\n\n  Me", "I am <s> 你好 👨‍👩‍👧 ça.", "Ok", "Bye"], weight=0.5)
    (sample,) = read_store(write(tmp_path / "store", quickstart, [row], max_tokens=256)).samples
    pieces: list[Token] = [piece for turn in sample.head for piece in turn]
    assert [id for piece in pieces for id in piece.ids] == row.input_ids
    assert [piece.weight for piece in pieces for _ in piece.ids] == row.loss_weights
    assert ["".join(turn) for turn in joined(sample)] == [
        "<s>GPT4 User:Who?\n\n  Me<|end_of_turn|>",
        "GPT4 Assistant:I am <s> 你好 👨‍👩‍👧 ça.<|end_of_turn|>",
        "GPT4 User:Ok<|end_of_turn|>",
        "GPT4 Assistant:Bye<|end_of_turn|>",
    ]
    special = [piece.text for piece in pieces if piece.is_special]
    assert special == ["<s>", *["<|end_of_turn|>"] * 4]  # not the <s> that is text
    assert (sample.num_tokens, sample.num_hidden) == (len(row.input_ids), 0)


def test_the_line_break_after_an_end_token_belongs_to_the_turn(quickstart_chatml: ChatTokenizer) -> None:
    messages = (Message("user", "Hi"), Message("assistant", "\nYo", 1.0))
    conversation = Conversation("a", "good", "GPT4", "", messages)
    example = encode([conversation], TEMPLATES["chatml"], quickstart_chatml)[0].example
    tokenizer = Tokenizer.from_str(quickstart_chatml.pretrained.backend_tokenizer.to_str())
    pieces = report_store._split_tokens(example.input_ids.tolist(), example.loss_weights.tolist(), tokenizer)
    turns = ["".join(piece.text for piece in turn) for turn in report_store._turns(pieces, "<|im_end|>")]
    assert turns == ["<|im_start|>GPT4 user\nHi<|im_end|>\n", "<|im_start|>GPT4 assistant\n\nYo<|im_end|>\n"]


def test_a_sentencepiece_tokenizer_shows_the_spaces_that_the_model_sees(llama2: ChatTokenizer, tmp_path: Path) -> None:
    row = chat(llama2, ["Give 7 😀", "\nHere  it is"])
    (sample,) = read_store(write(tmp_path / "store", llama2, [row])).samples
    assert ["".join(turn) for turn in joined(sample)] == [
        "<s>GPT4 User: Give 7 😀<|end_of_turn|>",
        "GPT4 Assistant: \nHere  it is<|end_of_turn|>",
    ]


def test_ids_that_spell_no_text_are_shown_nevertheless(quickstart: ChatTokenizer, tmp_path: Path) -> None:
    half = quickstart.encode_texts(["😀"])[0].tolist()[:-1]
    row = Row("a", "good", "GPT4", [*half, 5000, *half], [0.0] + [1.0] * (2 * len(half)))
    (sample,) = read_store(write(tmp_path / "store", quickstart, [row])).samples
    assert [id for turn in sample.head for piece in turn for id in piece.ids] == row.input_ids
    assert all(text for turn in joined(sample) for text in turn)


def test_samples_are_short_median_and_long_and_always_the_same(quickstart: ChatTokenizer, tmp_path: Path) -> None:
    lengths = [*range(60, 20, -1), *range(21, 61)]
    rows = [plain(length, id=f"{position}") for position, length in enumerate(lengths)]
    rows += [plain(30, id=f"other {number}", source="other") for number in range(2)]
    path = write(tmp_path / "store", quickstart, rows, sources=["good", "other"])
    chosen = [(sample.source, sample.id, sample.num_tokens) for sample in read_store(path).samples]
    good = [("good", str(60 - length), length) for length in (22, 40, 58)]
    assert chosen == [*good, ("other", "other 0", 30), ("other", "other 1", 30)]
    assert read_store(path).samples == read_store(path).samples


def test_a_long_sample_is_shown_without_its_middle(quickstart: ChatTokenizer, tmp_path: Path) -> None:
    ids = [3 + number % 900 for number in range(1000)]
    row = Row("a", "good", "GPT4", ids, [0.0] * 999 + [1.0])
    facts = read_store(write(tmp_path / "store", quickstart, [row], max_tokens=1000))
    (sample,) = facts.samples
    shown = [[id for turn in part for piece in turn for id in piece.ids] for part in (sample.head, sample.tail)]
    assert shown == [ids[:400], ids[-200:]]
    assert (sample.num_tokens, sample.num_hidden) == (1000, 400)
    assert "… 400 tokens left out" in as_text(facts)
    assert "400 tokens left out" in Page(as_html(facts)).text


def test_supervised_tokens_are_marked_on_the_page_by_more_than_a_colour(mixed: Path) -> None:
    page = as_html(read_store(mixed))
    marked = [a for tag, a in Page(page).tags if tag == "span" and "title" in a]
    assert {(a["class"] or "").strip(): (a["title"] or "").split(", ")[1] == "weight 0" for a in marked} == {
        "": True,
        "s": True,
        "w": False,
        "s w": False,
    }
    assert re.search(r"\.turn \.w[^}]*border-bottom: 2px solid", page)
    assert {a["style"] for a in marked if "style" in a} == {"--w:1", "--w:0.3"}


# ---- The command ----


def test_the_command_writes_a_page_into_the_store_and_prints_its_path(
    mixed: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    report.main(["store", str(mixed)])
    assert capsys.readouterr().out == f"{mixed / 'report.html'}\n"
    assert (mixed / "report.html").read_text(encoding="utf-8") == as_html(read_store(mixed))
    report.main(["store", str(mixed), "--out", str(tmp_path / "page.html")])
    assert capsys.readouterr().out == f"{tmp_path / 'page.html'}\n"
    assert (tmp_path / "page.html").read_bytes() == (mixed / "report.html").read_bytes()


def test_the_command_prints_text_and_writes_nothing(mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report.main(["store", str(mixed), "--text"])
    assert capsys.readouterr().out == as_text(read_store(mixed)) + "\n"
    assert not (mixed / "report.html").exists()


def test_mistakes_are_said_in_a_line(mixed: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=f"^error: no complete token store at {tmp_path / 'none'}; make it with"):
        report.main(["store", str(tmp_path / "none")])
    with pytest.raises(
        SystemExit, match=r"^error: .*none/page.html cannot be written: No such file or directory; name"
    ):
        report.main(["store", str(mixed), "--out", str(tmp_path / "none" / "page.html")])


def test_the_report_of_a_store_does_without_torch() -> None:
    code = (
        "import sys, ochat_train.report.__main__\n"
        "assert not {'torch', 'transformers', 'datasets', 'matplotlib', 'jinja2'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=HANG_S)
    assert (result.returncode, result.stderr) == (0, "")


def test_columns_without_names_are_aligned_to_the_right() -> None:
    assert align([("a", "bb"), ("ccc", "d")], left=()) == ["  a  bb", "ccc   d"]
