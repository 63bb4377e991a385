"""A chunk becomes a shard that accounts for each of its records, and shards wait on disk for those that are missing."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ochat_train.files
import ochat_train.preprocess.shard
from ochat_train.conversations.filters import FilterRules
from ochat_train.conversations.records import read_chunks
from ochat_train.conversations.sources import Source
from ochat_train.preprocess.ledger import LEDGER_SCHEMA
from ochat_train.preprocess.shard import (
    OVERLONG_COLUMNS,
    ROW_SCHEMA,
    UNREADABLE,
    Shard,
    ShardSettings,
    Task,
    make_shard,
)
from ochat_train.preprocess.shard_files import WorkFolder, find_leftovers
from ochat_train.tokens.tokenizer import ChatTokenizer
from tests.dumps import ROOT, chat, contents, prose, write_lines

ALL = Source("all", "GPT4", 1.0, {}, {})


@pytest.fixture(scope="module")
def settings(quickstart: ChatTokenizer) -> ShardSettings:
    return ShardSettings(
        template=quickstart.template,
        encoder=quickstart.text,
        filters=FilterRules(None, 0.7, "mask", "mask", 1, last_answer_only=False),
        max_tokens=128,
        overlong="split",
        overlong_context=32,
        minhash=True,
    )


def tasks_of(path: Path, sources: Sequence[Source] = (ALL,), *, chunk_bytes: int = 8 << 20) -> list[Task]:
    return [Task(chunk, tuple(sources)) for chunk in read_chunks([str(path)], chunk_bytes=chunk_bytes)]


def shard_of(settings: ShardSettings, path: Path, *sources: Source) -> Shard:
    (task,) = tasks_of(path, sources or (ALL,))
    return make_shard(settings, task)


def assert_equal(first: Shard, second: Shard) -> None:
    """Equal in every row, key and count; how the rows are cut into batches does not matter."""
    assert first.rows.combine_chunks().equals(second.rows.combine_chunks())
    assert first.records.equals(second.records)
    for name in ("own", "num_prefixes", "prefixes", "priority", "condition", "signatures"):
        assert np.array_equal(getattr(first.keys, name), getattr(second.keys, name))
    assert np.array_equal(first.kept, second.kept)
    assert np.array_equal(first.overlong, second.overlong)
    assert first.dialects == second.dialects


def mixed_dump(folder: Path) -> Path:
    """Two chats that are kept, one of them in parts, between two that are dropped."""
    return write_lines(
        folder / "dump.jsonl",
        chat("unanswered", "Hi"),
        chat("short", "Hi", "Hello"),
        chat("long", *[prose(number, 20) for number in range(12)]),
        {"id": "empty", "conversations": []},
    )


# ---- One chunk ----


def test_each_record_has_its_entry_and_each_kept_one_its_keys_and_examples(
    tmp_path: Path, settings: ShardSettings
) -> None:
    shard = shard_of(settings, mixed_dump(tmp_path))
    assert shard.rows.schema.equals(ROW_SCHEMA) and shard.records.schema.equals(LEDGER_SCHEMA)
    assert shard.records["id"].to_pylist() == ["unanswered", "short", "long", "empty"]
    assert shard.records["reason"].to_pylist() == ["no_answer", None, None, "no_turns"]
    assert shard.kept.tolist() == [1, 2]
    assert len(shard.keys.own) == 2 and shard.keys.num_prefixes.tolist() == [0, 5]

    num_parts = shard.rows.num_rows - 1
    assert num_parts > 2
    assert shard.rows["id"].to_pylist() == ["short", *[f"long#{number + 1}" for number in range(num_parts)]]
    assert shard.rows["conversation"].to_pylist() == [0, *[1] * num_parts]
    assert shard.records["num_examples"].to_pylist() == [0, 1, num_parts, 0]
    lengths = [len(ids) for ids in shard.rows["input_ids"].to_pylist()]
    assert shard.records["num_tokens"].to_pylist() == [0, lengths[0], sum(lengths[1:]), 0]
    weights = [np.array(row, np.float32) for row in shard.rows["loss_weights"].to_pylist()]
    assert shard.records["weight_sum"].to_pylist()[1] == weights[0].sum(dtype=np.float64)
    supervised = [int((row > 0).sum()) for row in weights]
    assert shard.records["num_supervised_tokens"].to_pylist() == [0, supervised[0], sum(supervised[1:]), 0]


def test_what_each_choice_would_keep_of_a_long_conversation_stands_at_its_record(
    tmp_path: Path, settings: ShardSettings
) -> None:
    dump = mixed_dump(tmp_path)
    shard = shard_of(settings, dump)
    assert shard.overlong.shape == (4, len(OVERLONG_COLUMNS))
    assert shard.overlong[[0, 1, 3]].tolist() == [[0] * len(OVERLONG_COLUMNS)] * 3
    of_long = dict(zip(OVERLONG_COLUMNS, shard.overlong[2].tolist(), strict=True))
    whole = shard_of(replace(settings, max_tokens=4096), dump)
    assert whole.overlong.sum() == 0
    num_supervised = whole.records["num_supervised_tokens"].to_pylist()[2]
    cut = shard_of(replace(settings, overlong="truncate"), dump).records.to_pylist()[2]
    assert of_long == {
        "conversations": 1,
        "tokens": whole.records["num_tokens"].to_pylist()[2],
        "supervised_tokens": num_supervised,
        "split_tokens": of_long["split_tokens"],  # each token once, though parts repeat some
        "split_supervised_tokens": num_supervised,
        "truncate_tokens": cut["num_tokens"],
        "truncate_supervised_tokens": cut["num_supervised_tokens"],
        "drop_tokens": 0,
        "drop_supervised_tokens": 0,
    }
    assert num_supervised < of_long["split_tokens"] <= of_long["tokens"]


def test_actions_of_all_stages_stand_in_their_order(tmp_path: Path, settings: ShardSettings) -> None:
    refusal = "As an AI language model, I cannot."
    texts = [text for number in range(5) for text in (prose(number, 20), prose(100 + number, 20))]
    (tmp_path / "dump.jsonl").write_bytes(
        b'{"id": "a", "messages": [{"role": "assistant", "content": "\\ud800"}, '
        + b", ".join(
            b'{"role": "%b", "content": "%b"}' % ((b"user", b"assistant")[position % 2], text.encode())
            for position, text in enumerate(["Do it.", refusal, *texts])
        )
        + b"]}\n"
    )
    (actions,) = shard_of(settings, tmp_path / "dump.jsonl").records["actions"].to_pylist()
    assert actions == ["surrogate_replaced", "leading_answer_untrained", "refusal_masked", "overlong_split"]


@pytest.mark.parametrize("overlong", ["split", "drop"])
def test_how_many_conversations_are_encoded_at_once_makes_no_difference(
    overlong: Any, tmp_path: Path, settings: ShardSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [chat(str(number), *[prose(7 * number + turn, number % 40) for turn in range(4)]) for number in range(30)]
    records[7] = {"id": "bad"}
    dump = write_lines(tmp_path / "dump.jsonl", *records)
    settings = replace(settings, overlong=overlong)
    whole = shard_of(settings, dump)
    assert {None, "no_turns", "no_answer"} <= set(whole.records["reason"].to_pylist())
    for size in (1, 7):
        monkeypatch.setattr(ochat_train.preprocess.shard, "_BATCH_CONVERSATIONS", size)
        assert_equal(shard_of(settings, dump), whole)


def test_the_shards_of_small_chunks_are_the_shard_of_the_whole(tmp_path: Path, settings: ShardSettings) -> None:
    dump = write_lines(tmp_path / "dump.jsonl", *(chat(str(number), prose(number, 30), "Yes.") for number in range(50)))
    whole = shard_of(settings, dump)
    shards = [make_shard(settings, task) for task in tasks_of(dump, chunk_bytes=1000)]
    assert len(shards) > 5
    assert [row for shard in shards for row in shard.records.to_pylist()] == whole.records.to_pylist()
    columns = ["id", "source", "condition", "input_ids", "loss_weights"]
    rows = [row for shard in shards for row in shard.rows.select(columns).to_pylist()]
    assert rows == whole.rows.select(columns).to_pylist()
    assert np.concatenate([shard.keys.own for shard in shards]).tolist() == whole.keys.own.tolist()
    assert sum((shard.dialects for shard in shards), Counter()) == whole.dialects


def test_a_chunk_of_which_nothing_is_kept_makes_a_shard_too(tmp_path: Path, settings: ShardSettings) -> None:
    shard = shard_of(settings, write_lines(tmp_path / "dump.jsonl", chat("a", "Hi"), {"id": "b"}))
    assert (shard.rows.num_rows, shard.records.num_rows, len(shard.keys.own)) == (0, 2, 0)
    assert shard.keys.signatures.shape == (0, 128)
    assert shard.dialects == {
        (str(tmp_path / "dump.jsonl"), "JSON lines", name): 1 for name in ("from/value", "not read")
    }


def test_a_record_that_no_source_can_claim_by_its_fields_is_nobodys_only_if_there_are_several(
    tmp_path: Path, settings: ShardSettings
) -> None:
    dump = write_lines(tmp_path / "dump.jsonl", chat("a", "Hi", "Hello"), 7)
    rest = Source("rest", "GPT4", 1.0, {}, {"good": True})
    good = Source("good", "GPT4", 1.0, {"good": True}, {})
    assert shard_of(settings, dump).records["source"].to_pylist() == ["all", "all"]
    assert shard_of(settings, dump, good, rest).records["source"].to_pylist() == ["rest", UNREADABLE]


def test_a_record_of_no_source_is_an_error_even_if_it_would_be_dropped(tmp_path: Path, settings: ShardSettings) -> None:
    dump = write_lines(tmp_path / "dump.jsonl", chat("a", "Hi", "Hello", lang="en"), chat("b", lang="de"))
    with pytest.raises(ValueError, match=r"record 'b' matches no source.*lang='de'"):
        shard_of(settings, dump, Source("en", None, 1.0, {"lang": "en"}, {}))


def test_a_weight_beyond_all_numbers_drops_its_record_alone(tmp_path: Path, settings: ShardSettings) -> None:
    heavy = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 1e30}]
    dump = write_lines(tmp_path / "dump.jsonl", {"id": "heavy", "messages": heavy}, chat("light", "Hi", "Hello"))
    records = shard_of(settings, dump, Source("all", None, 1e30, {}, {})).records.to_pylist()
    assert [(row["id"], row["reason"]) for row in records] == [("heavy", "bad_weight"), ("light", None)]
    assert "is not finite in float32" in records[0]["detail"]


def test_without_near_duplicates_no_signatures_are_made(tmp_path: Path, settings: ShardSettings) -> None:
    shard = shard_of(replace(settings, minhash=False), mixed_dump(tmp_path))
    assert shard.keys.signatures.shape == (2, 0)


# ---- Shards on disk ----


def test_a_shard_comes_back_as_it_was_and_equal_ones_are_equal_files(tmp_path: Path, settings: ShardSettings) -> None:
    shard = shard_of(settings, mixed_dump(tmp_path))
    empty = shard_of(settings, write_lines(tmp_path / "empty.jsonl", {"id": "b"}))
    for name in ("a", "b"):
        with WorkFolder(tmp_path / name) as work:
            work.save(3, shard)
            work.save(4, empty)
            assert_equal(work.load(3), shard)
            assert_equal(work.load(4), empty)
            assert np.array_equal(work.load_keys(3).priority, shard.keys.priority)
            assert [work.shard_folder(number).is_dir() for number in range(5)] == [False, False, False, True, True]
    assert len(contents(tmp_path / "a")) > 6
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_shard_counts_only_once_all_of_it_is_on_the_disk(
    tmp_path: Path, settings: ShardSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = shard_of(settings, mixed_dump(tmp_path))

    def fail(folder: Path) -> None:
        assert not work.shard_folder(0).exists()
        raise KeyboardInterrupt

    with WorkFolder(tmp_path / "work") as work:
        monkeypatch.setattr(ochat_train.files, "flush_tree", fail)
        with pytest.raises(KeyboardInterrupt):
            work.save(0, shard)
        assert not work.shard_folder(0).exists()
        monkeypatch.undo()
        work.save(0, shard)
        assert_equal(work.load(0), shard)
        assert os.listdir(tmp_path / "work/shards") == ["000000"]


def test_one_process_at_a_time_works_in_a_folder(tmp_path: Path) -> None:
    hold = "import sys, ochat_train.preprocess.shard_files as w, pathlib\n"
    hold += "with w.WorkFolder.beside(pathlib.Path(sys.argv[1]), 'a' * 64): print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold, str(tmp_path / "store")]
    path = tmp_path / f"store.partial-{'a' * 12}"
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdin is not None
        holder.stdout.readline()
        with pytest.raises(ValueError, match=f"another process is making this store, in {path}"):
            WorkFolder.beside(tmp_path / "store", "a" * 64).__enter__()
        with WorkFolder.beside(tmp_path / "store", "b" * 64):
            assert find_leftovers(tmp_path / "store") == []
        assert find_leftovers(tmp_path / "store") == [tmp_path / f"store.partial-{'b' * 12}"]
        holder.stdin.close()
        holder.wait()
    assert path in find_leftovers(tmp_path / "store")
    with WorkFolder.beside(tmp_path / "store", "a" * 64) as work:
        assert work.path == path


def test_only_what_a_run_for_this_store_left_is_a_leftover(tmp_path: Path) -> None:
    number = "0123456789ab"
    for name in (f"store.partial-{number}", f"store2.partial-{number}", "store.partial-notes", "stor*"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").touch()
    (tmp_path / "store.partial-abcdefabcdef").mkdir()  # without a lock it is somebody's
    (tmp_path / "store.partial-000000000000").write_text("dear")
    assert find_leftovers(tmp_path / "store") == [tmp_path / f"store.partial-{number}"]
    assert find_leftovers(tmp_path / "stor*") == []  # the name is no pattern
    assert find_leftovers(tmp_path / "none/store") == []


def test_a_folder_that_is_asked_for_is_empty_each_time(tmp_path: Path) -> None:
    with WorkFolder(tmp_path / "work") as work:
        (work.folder("store") / "half").write_text("x")
        assert list(work.folder("store").iterdir()) == []
