"""Any number of workers on any engine make the same store, and whatever ends a run, the next one goes on from there."""

import gzip
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import ochat_train.preprocess.job
import ochat_train.preprocess.workers
from ochat_train.conversations.records import read_chunks
from ochat_train.conversations.sources import Source
from ochat_train.preprocess.job import make_job
from ochat_train.preprocess.shard import Shard, Task
from ochat_train.preprocess.shard_files import WorkFolder
from ochat_train.preprocess.workers import make_shards
from ochat_train.recipe import load_recipe
from ochat_train.tokens.store import Split, StoreWriter
from tests.dumps import (
    ROOT,
    chat,
    contents,
    failure,
    ids_in,
    ledger_of,
    make,
    page,
    prose,
    reasons_in,
    source,
    write_lines,
    write_recipe,
)
from tests.waiting import HANG_S, wait_until

CHUNK_BYTES = 8_000


pytestmark = pytest.mark.usefixtures("keep_signal_handlers")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ochat_train.preprocess.job, "CHUNK_BYTES", CHUNK_BYTES)


def varied_records() -> list[dict[str, Any]]:
    """Chats with copies, snapshots and near-duplicates of one another, long ones, refusals and broken ones."""
    records = []
    for number in range(60):
        texts = [prose(10 * number + turn, 30) for turn in range(4)]
        model = "strong" if number % 3 else "weak"
        records.append(chat(f"chat {number}", *texts, model=model))
        if number % 4 == 0:
            records.append(chat(f"copy {number}", *texts, model="weak"))
        if number % 5 == 0:
            records.append(chat(f"snapshot {number}", *texts[:2], model="strong"))
        if number % 6 == 0:
            records.append(chat(f"near {number}", *texts[:3], texts[3] + " Yes.", model=model))
        if number % 7 == 0:
            records.append(chat(f"long {number}", *[prose(5000 + 20 * number + turn, 90) for turn in range(8)]))
        if number % 8 == 0:
            records.append(chat(f"refusal {number}", "Do it.", "I'm just an AI, I cannot.", *texts[2:]))
        if number % 9 == 0:
            records.append({"id": f"broken {number}", "conversations": [number]})
    return records


def write_varied(folder: Path, records: list[dict[str, Any]]) -> Path:
    """The records over files of four forms, and a recipe for them."""
    folder.mkdir()
    parts = [records[start::4] for start in range(4)]
    write_lines(folder / "a.jsonl", *parts[0])
    (folder / "b.json").write_text(json.dumps(parts[1]))
    (folder / "c.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, parts[2])).encode()))
    with zipfile.ZipFile(folder / "d.zip", "w") as archive:
        for number, record in enumerate(parts[3]):
            archive.writestr(f"pages/{number}.json", json.dumps([record]))
        archive.writestr("pages/page.html", page(chat("page", "<p>Hi</p>", "<p>Hello</p>")))
    sources = [
        source("strong", folder, where={"model": "strong"}),
        source("weak", folder, where_not={"model": "strong"}, weight=0.1, condition="GPT3"),
    ]
    return write_recipe(
        folder.parent,
        [{**of_source, "path": str(folder)} for of_source in sources],
        max_tokens=256,
        overlong_context=64,
        eval_fraction=0.2,
        dedupe={"near": 0.8},
    )


@pytest.fixture(scope="module")
def varied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_varied(tmp_path_factory.mktemp("varied") / "in", varied_records())


@pytest.fixture(scope="module")
def alone(varied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store that one process makes, the measure for all others."""
    path = tmp_path_factory.mktemp("alone") / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ochat_train.preprocess.job, "CHUNK_BYTES", CHUNK_BYTES)
        patch.setattr(ochat_train.preprocess.workers, "ProcessPoolExecutor", None)  # it needs no others
        return make(varied, f"data.store={path}", num_workers=1)


# ---- The same store whoever makes it ----


def test_the_measure_has_something_of_everything(alone: Path) -> None:
    """Or the tests below would compare too little."""
    reasons = {reason for reason in reasons_in(alone).values() if reason}
    assert reasons >= {"exact_duplicate", "earlier_snapshot", "near_duplicate", "turn_not_an_object"}
    actions = {action for row in ledger_of(alone) for action in row["actions"]}
    assert actions >= {"overlong_split", "refusal_masked"}
    assert ids_in(alone) and ids_in(alone, "eval")
    assert {row["file"].rpartition("/")[2].partition(".")[0] for row in ledger_of(alone)} >= {"a", "b", "c", "page"}


@pytest.mark.parametrize("num_workers", [2, 3])
def test_any_number_of_processes_makes_the_same_bytes(
    num_workers: int, varied: Path, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of this process, which leaves making and saving to the others: a shard that came through a pipe would stop the
    # run for ever if its worker ended in the middle of it.
    monkeypatch.setattr(ochat_train.preprocess.workers, "make_shard", None)
    monkeypatch.setattr(WorkFolder, "save", None)
    store = make(varied, f"data.store={tmp_path / 'store'}", num_workers=num_workers)
    assert contents(store) == contents(alone)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


@dataclass(frozen=True)
class Written:
    """What a store holds apart from the order and the places: examples by split, and outcomes by id."""

    examples: set[tuple[Any, ...]]
    outcomes: dict[str, tuple[Any, ...]]


def written_in(store: Path) -> Written:
    examples = set()
    for split, rows in datasets.load_from_disk(str(store)).items():
        for row in rows:
            ids, weights = tuple(row["input_ids"]), tuple(row["loss_weights"])
            examples.add((split, row["id"], row["source"], row["condition"], ids, weights))
    rows = ledger_of(store)
    outcomes = {
        row["id"]: (row["source"], row["reason"], row["detail"], tuple(row["actions"]), row["weight_sum"])
        for row in rows
        if row["reason"] not in ("turn_not_an_object",)
    }
    return Written(examples, outcomes)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_order_of_the_input_makes_no_difference(seed: int, alone: Path, tmp_path: Path) -> None:
    records = varied_records()
    np.random.default_rng(seed).shuffle(records)
    store = make(write_varied(tmp_path / "in", records), num_workers=1)
    assert written_in(store) == written_in(alone)
    assert ids_in(store) != ids_in(alone)


@pytest.mark.parametrize("chunk_bytes", [2_000, 8 << 20])
def test_the_size_of_chunks_makes_no_difference_but_to_the_batches_of_files(
    chunk_bytes: int, varied: Path, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ochat_train.preprocess.job, "CHUNK_BYTES", chunk_bytes)
    store = make(varied, f"data.store={tmp_path / 'store'}", num_workers=1)
    mine, theirs = contents(store), contents(alone)
    of_batches = {name for name in theirs if name.endswith((".arrow", ".parquet"))}
    assert len(of_batches) == 3
    assert {name for name in theirs if mine[name] != theirs[name]} <= of_batches | {"manifest.json"}  # their checksums
    assert pq.read_table(store / "ledger.parquet").equals(pq.read_table(alone / "ledger.parquet"))
    for split in ("train", "eval"):
        first, second = (datasets.load_from_disk(str(path))[split].to_list() for path in (store, alone))
        assert first == second


# ---- Ray ----


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    """A Ray cluster of this machine with two workers."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(ROOT))
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


def test_ray_makes_the_same_bytes(varied: Path, alone: Path, tmp_path: Path, ray: None) -> None:
    store = make(varied, f"data.store={tmp_path / 'store'}", executor="ray")
    assert contents(store) == contents(alone)


def test_ray_is_given_the_records_of_urls(tmp_path: Path, ray: None) -> None:
    dump = write_lines(tmp_path / "dump.jsonl", *(chat(str(number), prose(number, 20), "Yes.") for number in range(40)))
    recipe = write_recipe(tmp_path, [source("all", f"file://{dump}")])
    here = contents(make(recipe, f"data.store={tmp_path / 'here'}", num_workers=1))
    assert contents(make(recipe, executor="ray")) == here


def test_mistakes_in_the_input_are_reported_by_ray_as_by_one_process(tmp_path: Path, ray: None) -> None:
    for write in (of_no_source, broken_array):
        recipe = write_recipe(tmp_path, [source("strong", write(tmp_path), where={"model": "strong"})])
        assert failure(recipe, "--engine", "ray") == failure(recipe, "--workers", "1")
        assert not (tmp_path / "store").exists()


def test_ray_that_is_not_installed_is_named(varied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "--engine ray needs the package ray: pip install 'ochat_train[ray]'" in failure(
        "--dry-run", "--engine", "ray", varied
    )


# ---- Mistakes of the input, found by a worker ----


def of_no_source(folder: Path) -> Path:
    """A dump whose last record is of no source that takes only strong ones."""
    records = [chat(str(number), prose(number, 20), "Yes.", model="strong") for number in range(200)]
    return write_lines(folder / "dump.jsonl", *records, chat("last", "Hi", "Hello", model="weak"))


def broken_array(folder: Path) -> Path:
    """A dump whose last record is no JSON, though its brackets are in order."""
    records = [json.dumps(chat(str(number), prose(number, 20), "Yes.", model="strong")) for number in range(200)]
    path = folder / "dump.jsonl"
    path.write_text(f'[{", ".join(records)}, {{"id": tru}}]')
    return path


def ends_early(folder: Path) -> Path:
    """A dump that was cut off in its last record."""
    path = broken_array(folder)
    path.write_text(path.read_text()[:-10])
    return path


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (of_no_source, ["record 'last' matches no source", "model='weak'", "add a source"]),
        (broken_array, ["the record that starts here is not valid JSON", "byte"]),
        (ends_early, ["the file ends inside the array", "byte"]),
    ],
)
def test_a_mistake_in_the_input_stops_all_processes_with_the_message_of_one(
    write: Callable[[Path], Path], words: list[str], tmp_path: Path
) -> None:
    dump = write(tmp_path)
    recipe = write_recipe(tmp_path, [source("strong", dump, where={"model": "strong"})])
    message = failure(recipe, "--workers", "2")
    assert message.startswith(f"error: {dump}, byte ") and not [word for word in words if word not in message]
    assert message == failure(recipe, "--workers", "1")
    assert not (tmp_path / "store").exists()
    wait_until(lambda: not multiprocessing.active_children())


# ---- Memory ----


def test_only_a_few_chunks_are_read_ahead_of_the_workers(varied: Path, tmp_path: Path) -> None:
    settings = make_job(load_recipe(varied)).settings
    dump = write_lines(tmp_path / "dump.jsonl", *(chat(str(number), prose(number, 20), "Yes.") for number in range(60)))
    everything = Source("all", "GPT4", 1.0, {}, {})
    num_read = 0

    def tasks() -> Iterator[tuple[int, Task]]:
        nonlocal num_read
        for number, chunk in enumerate(read_chunks([str(dump)], chunk_bytes=300)):
            num_read += 1
            yield number, Task(chunk, (everything,))

    done: set[int] = set()
    with WorkFolder(tmp_path / "work") as work:
        for number in make_shards(tasks(), settings, work, executor="local", num_workers=2):
            assert num_read - len(done) <= 2 * 2
            done.add(number)
        assert done == set(range(num_read)) and num_read > 20
        ids = [id for number in sorted(done) for id in work.load(number).records["id"].to_pylist()]
    assert ids == [str(number) for number in range(60)]


# ---- Runs that end in the middle ----

# Pauses after the first shards while a file is there, so that whatever happens to it happens in the middle.
SCRIPT = f"""
import os, sys, time
import ochat_train.preprocess.__main__ as command
import ochat_train.preprocess.job as job
from ochat_train.preprocess.shard_files import WorkFolder

def save(self, number, shard, at_once=WorkFolder.save):
    at_once(self, number, shard)
    while number > 3 and os.path.exists("pause"):
        time.sleep(0.02)

WorkFolder.save = save
job.CHUNK_BYTES = {CHUNK_BYTES}
if __name__ == "__main__":
    command.main(sys.argv[1:])
"""


@dataclass(frozen=True)
class Running:
    """A preprocess command in the middle of its work."""

    process: "subprocess.Popen[str]"
    work: Path
    pause: Path

    def done(self) -> dict[str, int]:
        """The time of each shard that is complete."""
        folders = (path for path in (self.work / "shards").iterdir() if path.suffix != ".partial")
        return {path.name: path.stat().st_mtime_ns for path in folders}

    def workers(self) -> list[psutil.Process]:
        """Its worker processes, which are its grandchildren."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if child.ppid() != self.process.pid]

    def end(self) -> tuple[int, str]:
        """The exit status, and what it printed to stderr."""
        _, err = self.process.communicate(timeout=HANG_S)
        return self.process.returncode, err


@contextmanager
def running(recipe: Path) -> Iterator[Running]:
    """The command with two workers, once it has made a few shards; it pauses until its file `pause` is removed."""
    script, pause = recipe.with_name("script.py"), recipe.with_name("pause")
    script.write_text(SCRIPT)
    pause.touch()
    process = subprocess.Popen(
        [sys.executable, script.name, str(recipe), "--workers", "2"],
        cwd=recipe.parent,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell starts what it puts into the background with SIGINT ignored, and pytest may run there.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        shards: list[Path] = []

        def has_begun() -> bool:
            assert process.poll() is None, process.communicate()[1]
            shards[:] = recipe.parent.glob("store.partial-*/shards/??????")
            return len(shards) >= 4

        wait_until(has_begun)
        yield Running(process, shards[0].parents[1], pause)
    finally:
        script.unlink()
        pause.unlink(missing_ok=True)
        left = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        for each in (process, *left):
            each.kill()
        process.wait()


@pytest.fixture
def in_folder(varied: Path, tmp_path: Path) -> Path:
    """The varied recipe in a folder of its own, which then holds its store too."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(varied.read_text().replace(f"{varied.parent}/store", f"{tmp_path}/store"))
    return recipe


def is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def check_the_next_run_goes_on(
    recipe: Path, done: dict[str, int], alone: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That it makes only the shards that are missing, keeps the others, and makes the store of an unbroken run."""
    made: list[str] = []
    times: dict[str, int] = {}
    save, remove = WorkFolder.save, WorkFolder.remove

    def save_and_record(self: WorkFolder, number: int, shard: Shard) -> None:
        made.append(f"{number:06}")
        save(self, number, shard)

    def look_and_remove(self: WorkFolder) -> None:
        times.update({path.name: path.stat().st_mtime_ns for path in (self.path / "shards").iterdir()})
        remove(self)

    monkeypatch.setattr(WorkFolder, "save", save_and_record)
    monkeypatch.setattr(WorkFolder, "remove", look_and_remove)
    capsys.readouterr()
    store = make(recipe, num_workers=1)
    num_shards = len(made) + len(done)
    assert f"{len(done)} of {num_shards} shards were done before" in capsys.readouterr().out
    assert not set(made) & done.keys()
    assert {name: times[name] for name in done} == done
    assert len(times) == num_shards
    assert contents(store) == contents(alone)
    assert {path.name for path in recipe.parent.iterdir()} == {"recipe.yaml", "store"}


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_interrupted_leaves_its_shards_and_the_store_that_was_there(
    how: signal.Signals,
    in_folder: Path,
    alone: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = make(in_folder, "data.max_tokens=128", num_workers=1)
    before = contents(store)
    with running(in_folder) as run:
        workers = run.workers()
        assert len(workers) == 2
        if how == signal.SIGINT:
            os.killpg(run.process.pid, how)  # as Ctrl-C does
        else:
            run.process.send_signal(how)
        status, err = run.end()
        if how == signal.SIGKILL:
            assert status == -signal.SIGKILL
        else:
            assert status == 1
            assert err.splitlines()[-1] == (
                "interrupted; the store was not touched, and the same command goes on from the shards that are done"
            )
            assert "Traceback" not in err
        wait_until(lambda: not any(map(is_alive, workers)))
        done = run.done()
    assert done
    assert contents(store) == before
    check_the_next_run_goes_on(in_folder, done, alone, capsys, monkeypatch)


def test_a_run_that_is_interrupted_at_its_end_has_all_its_shards(
    in_folder: Path, alone: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make(in_folder, "data.max_tokens=128", num_workers=1)
    before = contents(store)
    add = StoreWriter.add

    def stop(self: StoreWriter, split: Split, rows: pa.Table) -> None:
        add(self, split, rows)
        if split == "eval" and rows.num_rows:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "add", stop)
        assert failure(in_folder, "--workers", "1").startswith("interrupted; the store was not touched")
    assert contents(store) == before
    (shards,) = in_folder.parent.glob("store.partial-*/shards")
    done = {path.name: path.stat().st_mtime_ns for path in shards.iterdir()}
    check_the_next_run_goes_on(in_folder, done, alone, capsys, monkeypatch)


def test_a_worker_that_dies_ends_the_run_by_the_name_of_its_file(
    in_folder: Path, varied: Path, alone: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(in_folder) as run:
        workers = run.workers()
        workers[0].kill()
        status, err = run.end()
        assert status == 1
        (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
        assert "a worker process died" in line and f"while working on {varied.parent}/in/" in line
        assert "Traceback" not in err
        wait_until(lambda: not any(map(is_alive, workers)))
        done = run.done()
    assert done and not (in_folder.parent / "store").exists()
    check_the_next_run_goes_on(in_folder, done, alone, capsys, monkeypatch)


def test_a_second_process_for_one_store_is_refused_and_disturbs_nothing(
    in_folder: Path, alone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leftover = in_folder.parent / "store.partial-0123456789ab/lock"
    leftover.parent.mkdir()
    leftover.touch()
    with running(in_folder) as run:
        assert not leftover.exists()
        message = failure(in_folder)
        assert message.startswith(f"error: another process is making this store, in {run.work}; ")
        make(in_folder, "data.max_tokens=128", num_workers=1)  # another recipe: the last one to end stays
        assert run.work.is_dir()
        run.pause.unlink()
        status, err = run.end()
        assert status == 0, err
    assert contents(in_folder.parent / "store") == contents(alone)
    assert {path.name for path in in_folder.parent.iterdir()} == {"recipe.yaml", "store"}
