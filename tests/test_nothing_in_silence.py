"""What users bring is honoured or named: weights, tools, media, encodings, fields, files of which nothing is kept."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ochat_train.conversations.template import TEMPLATES
from ochat_train.preprocess.__main__ import main
from ochat_train.tokens.store import TokenStore
from ochat_train.tokens.tokenizer import ChatTokenizer, load_tokenizer
from tests.dumps import chat, failure, ids_in, ledger_of, make, source, unread_in, write_lines, write_recipe

KEEP_COPIES = {"exact": False, "prefix": False}


pytestmark = pytest.mark.usefixtures("keep_signal_handlers")


def test_the_cases_that_were_misread_are_read_or_named(tmp_path: Path, shared: Path) -> None:
    cases = shared / "cases"
    names = (
        "flag_loss_false flag_train_false record_weight explicit_weights call_with_weight reasoning_content huge_int"
    )
    files = [cases / f"{name}.jsonl" for name in names.split()] + [cases / "tools.json", cases / "images.json"]
    files += [cases / "roles.json", cases / "conversation_typo.json"]
    sources = [source("s", "") | {"path": [str(file) for file in files]}]
    store = TokenStore(make(write_recipe(tmp_path, sources, dedupe=KEEP_COPIES)))
    rows = {row["id"]: row for row in ledger_of(tmp_path / "store")}
    ids = ids_in(tmp_path / "store")
    tokens = {id: store[position] for position, id in enumerate(ids)}
    tokenizer = load_tokenizer(str(tmp_path / "store/tokenizer"), TEMPLATES["openchat_v3.2"])

    def trained(id: str) -> str:
        example = tokens[id]
        return str(tokenizer.pretrained.decode(example.input_ids[example.loss_weights > 0]))

    end = "<|end_of_turn|>"
    for id in ("loss", "train"):
        assert trained(id) == f"A good answer{end}"
        assert "A bad draft answer" in tokenizer.pretrained.decode(tokens[id].input_ids)
    assert (rows["rw0"]["reason"], trained("rw1")) == ("no_weight", f"Gold{end}")
    assert trained("x_leading_answer") == f"Chapter one.{end}Chapter two.{end}"
    assert trained("x_only_answer") == f"Chapter one.{end}"
    assert trained("x_user_weighted_last") == f"Yo{end}Bye now{end}"
    assert set(tokens["x_user_weighted_last"].loss_weights.tolist()) == {0.0, 0.5, 1.0}
    assert trained("x_empty_user") == f"Yo{end}"
    assert trained("x_leading_space") == f"    return x{end}"
    for id, last in (
        ("call-last", '{"name": "area", "arguments": {"a": 2, "b": 3}}'),
        ("call-last-2", '{"name": "area"}'),
    ):
        assert trained(id).endswith(f"{last}{end}")
    assert trained("call-mid") == f'{{"name": "area"}}{end}27.{end}'
    assert trained("openai-call-weight").startswith('[{"function":{"name":"weather"')
    assert trained("think") == f"4{end}" and rows["think"]["actions"] == ["reasoning_dropped"]
    assert '[{"name": "area"}]' in tokenizer.pretrained.decode(tokens["lf-tools"].input_ids)
    assert rows["lf-tools"]["actions"] == ["calls_untrained", "tools_in_system"]
    assert rows["only-call"]["reason"] == "no_weight"
    assert rows["only-call"]["detail"] == "every turn has weight 0; a call has none without data.tool_calls: train"
    assert rows["llava"]["reason"] == rows["parts"]["reason"] == "not_text"
    for id in (
        "openai-call",
        "dash",
        "tool-result",
        "args-object",
        "parts-arrow",
        "parts-strings",
        "gemini",
        "text-obj",
    ):
        assert rows[id]["outcome"] == "kept", id
    assert rows["123456789012345678901234567890123"]["outcome"] == rows["x"]["outcome"] == "kept"
    assert rows["role-0"]["outcome"] == rows["role-1"]["outcome"] == "kept"
    unread = unread_in(tmp_path / "store")
    assert unread[str(cases / "roles.json")]["role"]["alice"] == 1
    assert unread[str(cases / "conversation_typo.json")] == {
        "hint": {
            "fields: {turns: chat, role: role, text: content}": 1,
            "fields: {turns: conversation, role: speaker, text: text}": 1,
            "fields: {turns: conversations, role: from, text: text}": 1,
        },
        "record field": {"chat": 1},
        "turn field": {"speaker": 2, "text": 4},
    }
    assert unread[str(cases / "record_weight.jsonl")] == {"record field": {"reward": 1}}


def test_a_file_in_another_encoding_stops_the_run_or_is_read_by_its_name(tmp_path: Path, shared: Path) -> None:
    recipe = write_recipe(tmp_path, [source("s", shared / "cases/gbk.json")])
    message = failure(recipe)
    assert "gbk.json, byte 48: this is not UTF-8; it is likely gb18030" in message
    assert "as in encoding: gb18030" in message
    path = make(write_recipe(tmp_path, [source("s", shared / "cases/gbk.json", encoding="gb18030")]))
    tokenizer = load_tokenizer(str(path / "tokenizer"), TEMPLATES["openchat_v3.2"])
    assert "你好吗" in tokenizer.pretrained.decode(TokenStore(path)[0].input_ids)


def test_two_sources_of_one_file_have_one_encoding(tmp_path: Path) -> None:
    dump = write_lines(tmp_path / "a.jsonl", chat("a", "Hi", "Hello", good=True))
    sources = [
        source("one", dump, where={"good": True}),
        source("two", dump, where_not={"good": True}, encoding="cp1252"),
    ]
    assert "give both the same encoding" in failure(write_recipe(tmp_path, sources))


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_a_run_that_keeps_nothing_ends_with_the_lines_that_would_read_it(tmp_path: Path, options: list[str]) -> None:
    record = {"id": "a", "chat": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    dump = write_lines(tmp_path / "a.jsonl", record)
    run = subprocess.run(
        [sys.executable, "-m", "ochat_train.preprocess", *options, str(write_recipe(tmp_path, [source("s", dump)]))],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    said = run.stdout + run.stderr
    assert f"WARNING: nothing is kept of {dump} (JSON lines, not read):\n  no_turns 1, such as: none of conv" in said
    assert "fields of its records that are not read: chat" in said
    hint = "fields: {turns: chat, role: role, text: content}"
    assert f"to read it, write into its source: {hint}" in said
    again = source("s", dump, **yaml.safe_load(hint))
    assert ids_in(make(write_recipe(tmp_path, [again]))) == ["a"]


def test_a_source_without_a_record_and_a_file_without_a_kept_one_are_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = write_lines(tmp_path / "a.jsonl", chat("a", "Hi", "Hello", model="strong", lang="en"))
    bad = write_lines(tmp_path / "b.jsonl", chat("b", "Hi", model="strong", topic="x"))
    sources = [
        source("strong", "", where={"model": "strong"}) | {"path": [str(good), str(bad)]},
        source("weak", "", where={"model": "weak"}, condition="GPT3") | {"path": [str(good), str(bad)]},
    ]
    make(write_recipe(tmp_path, sources))
    said = capsys.readouterr().out
    assert "WARNING: source weak has no record" in said
    assert f"WARNING: nothing is kept of {bad} (JSON lines, from/value):\n  no_answer 1, such as: turns: user" in said
    assert f"  {good}: record fields lang 1\n" in said and f"  {bad}: record fields topic 1\n" in said
    assert said.count("WARNING") == 2


def test_fields_tells_what_dumps_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(tmp_path / "a.jsonl", *[chat(str(n), "Hi", "Hello", model=f"m{n % 2}", n=n) for n in range(40)])
    write_lines(
        tmp_path / "b.jsonl",
        {"thread": [{"who": "op", "said": "Hi"}]},
        {"id": "c", "messages": [{"role": "alice", "content": "x"}]},
    )
    main(["--fields", str(tmp_path), str(tmp_path / "a.jsonl")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path}: 2 files"
    assert "  JSON lines, from/value: 40 records" in lines
    assert "  not read, because of: no_turns 1, unknown_role 1" in lines
    assert any(line.split() == ["model", "40", '"m0"', "20,", '"m1"', "20"] for line in lines)
    assert any("many different ones, such as 0, 1, 2" in line for line in lines)
    assert "  roles: human 40 (user), gpt 40 (assistant), alice 1 (not known)" in lines
    assert "  turns a conversation: 1 to 2, median 2" in lines
    assert "  characters a text: 2 to 5, median 2" in lines


def test_leading_answers_are_as_the_recipe_says(tmp_path: Path, quickstart: ChatTokenizer) -> None:
    turns = [("gpt", "Part one."), ("human", "continue"), ("gpt", "Part two.")]
    piece = {"id": "a", "conversations": [{"from": name, "value": text} for name, text in turns]}
    dump = write_lines(tmp_path / "a.jsonl", piece)
    for choice, whole, trained in (
        ("context", "Part one.", "Part two.<|end_of_turn|>"),
        ("train", "Part one.", "Part one.<|end_of_turn|>Part two.<|end_of_turn|>"),
        ("drop", "continue", "Part two.<|end_of_turn|>"),
    ):
        path = make(write_recipe(tmp_path, [source("s", dump)], leading_answers=choice))
        example = TokenStore(path)[0]
        text = quickstart.pretrained.decode(example.input_ids)
        assert whole in text and ("Part one." in text) == (choice != "drop")
        assert quickstart.pretrained.decode(example.input_ids[example.loss_weights > 0]) == trained
