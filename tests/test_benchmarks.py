"""The benchmark of preprocessing measures what it says, on a dump so small that it takes seconds."""

import json
import os
import pickle
import sys
from collections import Counter
from pathlib import Path

import pytest
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import dumps
import preprocess as benchmark

ROOT = Path(__file__).resolve().parents[1]
NUM_CONVERSATIONS = 60


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> benchmark.Dump:
    folder = tmp_path_factory.mktemp("benchmark")
    return benchmark.make_dump(folder, NUM_CONVERSATIONS, str(ROOT / "data/quickstart_tokenizer"))


def test_a_seed_gives_the_same_dump_and_another_seed_another(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a", "b", "c")]
    for file, seed in zip(files, (1, 1, 2), strict=True):
        dumps.write_dump(file, 30, seed=seed)
    first, again, other = (file.read_bytes() for file in files)
    assert first == again
    assert first != other


def test_a_dump_holds_what_it_says_and_repeats_only_what_is_meant_to_repeat(dump: benchmark.Dump) -> None:
    records = json.loads((dump.folder / "dump.json").read_text())
    assert len(records) == NUM_CONVERSATIONS == sum(dump.kinds.values())
    assert len({record["id"] for record in records}) == NUM_CONVERSATIONS
    assert dump.kinds["plain"] > 0.6 * NUM_CONVERSATIONS
    copies = dump.kinds["exact duplicate"] + dump.kinds["earlier snapshot"] + dump.kinds["broken"]
    first_turns = Counter(json.dumps(record["conversations"][:1]) for record in records)
    assert 0 < NUM_CONVERSATIONS - len(first_turns) <= copies


def test_pages_hold_what_chatgpt_writes_around_code() -> None:
    pages = "".join(dumps.html_answers(40))
    assert all(
        tag in pages for tag in ("Copy code</button>", "<table>", "<ul><li>", "<ol><li>", "<h2>", "hljs-keyword")
    )


def test_the_ceiling_is_of_the_texts_that_preprocessing_tokenizes(dump: benchmark.Dump) -> None:
    records = json.loads((dump.folder / "dump.json").read_text())
    turns = [turn["value"] for record in records for turn in record["conversations"]]
    heard = [text for file in dump.batches for text in pickle.loads(file.read_bytes())]
    assert len(heard) > 0.8 * len(set(turns))
    others = set(heard) - set(turns)  # headers, and questions in a row that were joined
    assert {"GPT4 User:", "GPT3 Assistant:"} <= others
    assert len(others) <= 4 + dump.kinds["broken"]


def test_both_ways_to_the_ceiling_make_the_same_tokens(dump: benchmark.Dump) -> None:
    tokenizer = Tokenizer.from_file(str(ROOT / "data/quickstart_tokenizer/tokenizer.json"))
    heard = [text for file in dump.batches for text in pickle.loads(file.read_bytes())]
    naive = sum(len(tokenizer.encode(text, add_special_tokens=False)) for text in heard)
    assert benchmark.ceiling_by_threads(dump).num_tokens == benchmark.ceiling_by_processes(dump).num_tokens == naive


def test_every_stage_is_measured(dump: benchmark.Dump) -> None:
    stages = {stage.name: stage for stage in benchmark.measure_stages(dump, 1)}
    assert all(min(stage.seconds) > 0 and len(stage.seconds) == 1 for stage in stages.values())
    assert {"whole shard", "encode", "parse"} <= stages.keys()
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"


def test_a_run_counts_every_record_and_sees_the_memory_of_its_processes(dump: benchmark.Dump) -> None:
    run = benchmark.run_preprocess(dump, watch_memory=True)
    assert sum(counts["in"] for counts in run.counts.values()) == NUM_CONVERSATIONS
    assert 0 < run.num_supervised_tokens < run.num_tokens
    assert run.peak_pss is not None
    assert 50e6 < run.peak_pss < 5e9
    assert 0 < run.cpu_seconds < run.seconds * os.cpu_count()
    assert not (dump.folder / "store").exists()
