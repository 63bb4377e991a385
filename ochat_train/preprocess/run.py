"""One pass over the input: shards, the decisions over all of them, and the store."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ochat_train.conversations.dedupe import find_duplicates
from ochat_train.conversations.records import read_chunks
from ochat_train.conversations.template import ChatTemplate
from ochat_train.preprocess.assemble import assemble
from ochat_train.preprocess.job import Plan, describe_origin, fingerprint_of, make_plan, reading_of
from ochat_train.preprocess.ledger import Ledger
from ochat_train.preprocess.shard import OVERLONG_COLUMNS, Task
from ochat_train.preprocess.shard_files import WorkFolder, find_leftovers
from ochat_train.preprocess.summary import make_table
from ochat_train.preprocess.workers import Engine, make_shards
from ochat_train.recipe import (
    Recipe,
)
from ochat_train.tokens.store import SPLITS, Manifest, StoreWriter, read_manifest
from ochat_train.tokens.tokenizer import compare_with_auto

CHUNK_BYTES = 4 << 20  # of records that make one shard


def preprocess(
    recipe: Recipe, *, dry_run: bool = False, engine: Engine = "local", num_workers: int | None = None
) -> None:
    """Write the recipe's token store unless it is up to date. Raises ValueError for mistakes of recipe or input."""
    plan = make_plan(recipe)
    if note := compare_with_auto(recipe.tokenizer_name, plan.tokenizer):
        print(f"tokenizer {recipe.tokenizer_name}: {note}")
    store = Path(recipe.data.store).resolve()  # a link stays, and what it leads to is replaced
    if dry_run:
        with tempfile.TemporaryDirectory() as folder, WorkFolder(Path(folder)) as work:
            ledger, _, table = _Run(plan, work, engine, num_workers).decide(None)
        print(table + "\ndry run: nothing was written")
        if not ledger.total().num_kept:
            raise ValueError("no conversation is kept: see above")
        return
    manifest = read_manifest(store)
    if manifest is None:
        _require_writable(store)  # before all files are read for the fingerprint
    stamps = _stamp(plan.files)
    made_from = describe_origin(recipe, plan)
    fingerprint = fingerprint_of(made_from)
    is_up_to_date = manifest is not None and manifest.fingerprint == fingerprint
    with suppress(FileNotFoundError):
        for leftover in find_leftovers(store):
            if is_up_to_date or not leftover.name.endswith(fingerprint[:12]):
                shutil.rmtree(leftover)
    if is_up_to_date:
        print(f"token store {store} is up to date ({fingerprint[:12]}); nothing to preprocess")
        return
    if manifest is not None:
        print(f"token store {store} is stale ({_what_changed(manifest.made_from, made_from)} changed); making it anew")
        _require_writable(store)
    with WorkFolder.beside(store, fingerprint) as work:
        _Run(plan, work, engine, num_workers).write(store, fingerprint, made_from, stamps)
        work.remove()


def _require_writable(store: Path) -> None:
    """Raise ValueError unless a folder can be made beside the store, as its work folder will be."""
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=store.parent, prefix=f"{store.name}.", suffix=".seen"):
            pass
    except OSError as error:
        raise ValueError(
            f"data.store {store}: nothing can be written in {store.parent} ({error.strerror}); name another folder, or "
            "get the right to write there"
        ) from None


def _stamp(files: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Size and time of change of each file."""
    stats = {file: os.stat(file) for file in files}
    return {file: (stat.st_size, stat.st_mtime_ns) for file, stat in stats.items()}


def _what_changed(old: dict[str, Any], new: dict[str, Any]) -> str:
    names = {
        "base_chat_template": "the base's chat template",
        "data": "the recipe's data section",
        "inputs": "an input file",
        "code": "the version of ochat_train",
    }
    return ", ".join(names.get(part, f"the {part}") for part in new if old.get(part) != new[part])


def _inference_condition(template: ChatTemplate, weights: dict[str, float]) -> str:
    """The template's own inference condition if it was trained, else the trained one of the largest mean weight.

    So the exported model is never asked under a condition that it has not seen.
    """
    if template.inference_condition in weights:
        return template.inference_condition
    return max(weights, key=weights.__getitem__)


class _Run:
    """One pass over the input: shards, decisions over all of them, and the store."""

    def __init__(self, plan: Plan, work: WorkFolder, engine: Engine, num_workers: int | None) -> None:
        self._plan, self._work = plan, work
        self._engine, self._num_workers = engine, num_workers
        self._num_shards = 0

    def write(
        self, store: Path, fingerprint: str, made_from: dict[str, Any], stamps: dict[str, tuple[int, int]]
    ) -> None:
        """Make the store. Raises ValueError if a file is no longer the one of `stamps`."""
        started = time.perf_counter()
        writer = StoreWriter(self._work.folder("store"), [source.name for source in self._plan.data.sources])
        self._plan.tokenizer.save(writer.staging / "tokenizer")
        ledger, overlong, table = self.decide(writer)
        splits = writer.split_totals()
        ledger.check_examples(splits.values())
        if not splits["train"]["num_examples"]:
            why = "all of it is held out by data.eval_fraction" if splits["eval"]["num_examples"] else "see above"
            print(table)
            raise ValueError(f"no conversation is left to train on: {why}")
        if changed := [file for file, stamp in _stamp(self._plan.files).items() if stamp != stamps[file]]:
            self._work.remove()  # its shards are of what the file was between
            raise ValueError(f"{changed[0]} was changed while it was read; run again when it is complete")
        manifest = Manifest(
            fingerprint=fingerprint,
            made_from=made_from,
            template=self._plan.template.name,
            conditions=writer.conditions,
            sources=writer.sources,
            inference_condition=_inference_condition(self._plan.template, writer.trained_condition_weights()),
            added_tokens=self._plan.tokenizer.added,
            splits=splits,
            counts=ledger.to_json(),
            overlong=overlong,
        )
        writer.finish(manifest, store)
        seconds = time.perf_counter() - started
        num_tokens = sum(split["num_tokens"] for split in splits.values())
        num_train, num_eval = (int(splits[split]["num_examples"]) for split in SPLITS)
        share = f"{100 * num_eval / (num_train + num_eval):.1f} %, data.eval_fraction {self._plan.data.eval_fraction:g}"
        print(
            f"{table}\ntoken store {store}: {num_train:,} examples to train on, {num_eval:,} held out ({share}); "
            f"{num_tokens / seconds:,.0f} tokens/s; {fingerprint[:12]}"
        )

    def decide(self, writer: StoreWriter | None) -> tuple[Ledger, dict[str, int], str]:
        """Make the shards, decide over them, and put the store together if there is a writer.

        Gives the ledger, the sums of OVERLONG_COLUMNS, and the table for a person.
        """
        self._make_shards()
        data = self._plan.data
        decisions = find_duplicates(
            (self._work.load_keys(number) for number in range(self._num_shards)),
            exact=data.dedupe.exact,
            prefix=data.dedupe.prefix,
            near=data.dedupe.near,
            eval_fraction=data.eval_fraction,
            work_dir=self._work.folder("duplicates"),
        )
        path = str(writer.staging / "ledger.parquet") if writer is not None else None
        with Ledger(path, [source.name for source in data.sources]) as ledger:
            totals = assemble(self._work, self._num_shards, decisions, ledger, writer)
            ledger.unread = totals.unread
        ledger.check(totals.num_records)
        overlong = dict(zip(OVERLONG_COLUMNS, totals.overlong.tolist(), strict=True))
        return ledger, overlong, make_table(totals, ledger, overlong, data, self._plan.left_out)

    def _make_shards(self) -> None:
        total = sum(os.stat(file).st_size for file in self._plan.files)
        with tqdm(total=total, unit="B", unit_scale=True, desc="preprocess", mininterval=1.0) as bar:
            num_done = 0

            def tasks() -> Iterator[tuple[int, Task]]:
                nonlocal num_done
                for number, (task, num_bytes) in enumerate(self._tasks()):
                    sizes[number] = num_bytes
                    self._num_shards = number + 1
                    if self._work.has(number):
                        num_done += 1
                        bar.update(num_bytes)
                    else:
                        yield number, task

            sizes: dict[int, int] = {}
            shards = make_shards(tasks(), self._plan.settings, engine=self._engine, num_workers=self._num_workers)
            for number, _, shard in shards:
                self._work.save(number, shard)
                bar.update(sizes.pop(number))
        if num_done:
            print(f"{num_done:,} of {self._num_shards:,} shards were done before")

    def _tasks(self) -> Iterator[tuple[Task, int]]:
        """Every chunk with its sources, and the bytes on disk that were read for it."""
        for sources, files in groupby(self._plan.files, key=self._plan.files.__getitem__):
            num_read = 0
            for chunk in read_chunks(list(files), chunk_bytes=CHUNK_BYTES, **reading_of(sources)):
                yield Task(chunk, sources), chunk.bytes_read - num_read
                num_read = chunk.bytes_read
