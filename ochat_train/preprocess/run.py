"""One pass over the input: shards, the decisions over all of them, and the store."""

import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ochat_train.conversations.dedupe import find_duplicates
from ochat_train.conversations.described import Template, describe_template
from ochat_train.preprocess.assemble import InputSummary, assemble
from ochat_train.preprocess.job import (
    Job,
    describe_origin,
    digest_of,
    fingerprint_of,
    make_job,
    read_tasks,
    stamps_of,
    without_places,
)
from ochat_train.preprocess.ledger import Ledger
from ochat_train.preprocess.shard import Task
from ochat_train.preprocess.shard_files import WorkFolder, find_leftovers
from ochat_train.preprocess.summary import make_table
from ochat_train.preprocess.workers import Executor, make_shards
from ochat_train.recipe import DataSection, Recipe, moved_places, to_json
from ochat_train.tokens.store import SPLITS, Manifest, StoreWriter, read_manifest
from ochat_train.tokens.store_files import StoreDamaged, check_blocks, check_sizes
from ochat_train.tokens.tokenizer import compare_with_auto

# What a store is made of besides the input: what training compares with the recipe, and what only decides the making.
_IN_TRAINING = ("tokenizer", "template", "data")
_IN_THE_MAKING = ("base_chat_template", "code", "libraries")


def preprocess(
    recipe: Recipe, *, dry_run: bool = False, executor: Executor = "local", num_workers: int | None = None
) -> None:
    """Write the recipe's token store unless it is up to date. Raises ValueError for mistakes of recipe or input."""
    job = make_job(recipe, needs_dumps=dry_run)
    if dry_run:
        with tempfile.TemporaryDirectory() as folder, WorkFolder(Path(folder)) as work:
            num_shards = _make_missing_shards(job, work, executor, num_workers)
            ledger, summary = _decide(job, work, num_shards, None)
        print(make_table(job, ledger, summary) + "\ndry run: nothing was written")
        return
    store = Path(recipe.data.store).resolve()  # a link stays, and what it leads to is replaced
    manifest = _read_whole(store, verify=recipe.data.verify)
    if job.gone:
        print(_use_without_dumps(job, store, manifest))
        return
    if manifest is None:
        _require_writable(store)  # before all files are read for the fingerprint
    made_from = describe_origin(job)
    fingerprint = fingerprint_of(made_from)
    work_name = digest_of(made_from)  # whose shards name the files as they are named now
    is_up_to_date = manifest is not None and manifest.fingerprint == fingerprint
    with suppress(OSError):  # beside a store that is only read
        for leftover in find_leftovers(store):
            if is_up_to_date or not leftover.name.endswith(work_name[:12]):
                shutil.rmtree(leftover)
    if manifest is not None and is_up_to_date:
        for line in moved_places(manifest.places, to_json(recipe)):
            print(f"moved, and the same by what it holds: {line}")
        print(f"token store {store} is up to date ({fingerprint[:12]}); nothing to preprocess")
        return
    if manifest is not None:
        changed = _what_changed(manifest.made_from, made_from, (*_IN_TRAINING, *_IN_THE_MAKING, "inputs"))
        print(f"token store {store} is stale ({changed} changed); making it anew")
        _require_writable(store)
    started = time.perf_counter()
    with WorkFolder.beside(store, work_name) as work:
        num_shards = _make_missing_shards(job, work, executor, num_workers)
        splits = _write_store(job, work, num_shards, store, made_from)
        work.remove()
    num_tokens = sum(split["num_tokens"] for split in splits.values())
    num_train, num_eval = (int(splits[split]["num_examples"]) for split in SPLITS)
    share = f"{100 * num_eval / (num_train + num_eval):.1f} %, data.eval_fraction {job.data.eval_fraction:g}"
    if job.data.eval_sources:
        share += f", data.eval_sources {', '.join(source.name for source in job.data.eval_sources)}"
    print(
        f"token store {store}: {num_train:,} examples to train on, {num_eval:,} held out ({share}); "
        f"{num_tokens / (time.perf_counter() - started):,.0f} tokens/s; {fingerprint[:12]}"
    )


def _use_without_dumps(job: Job, store: Path, manifest: Manifest | None) -> str:
    """That the store is used as it is, since the recipe's dumps are gone, in a line that names what is not as it was.

    Raises ValueError if training would refuse the store, or if the recipe named other dumps when it was made.
    """
    lost = job.gone[0]
    if manifest is None:
        raise ValueError(f"{lost}; and there is no whole token store at {store}")
    if paths := [line for line in moved_places(manifest.places, to_json(job.recipe)) if line.startswith("data.")]:
        raise ValueError(
            f"{lost}; token store {store} was made from another path ({paths[0]}): correct the new one, or go back to "
            "the old one, to train on that store as it is"
        )
    made_from = describe_origin(job)
    if changed := _what_changed(manifest.made_from, made_from, _IN_TRAINING):
        raise ValueError(f"{lost}; token store {store} is stale ({changed} changed), and cannot be made anew")
    changed = _what_changed(manifest.made_from, made_from, _IN_THE_MAKING)
    return (
        f"{'WARNING: ' if changed else ''}{lost}: the dumps are out of reach; token store {store} "
        f"({manifest.fingerprint[:12]}) is complete and is used as it is"
        + (f", though it would be made anew from them, since {changed} changed" if changed else "")
    )


def _read_whole(store: Path, *, verify: bool) -> Manifest | None:
    """The manifest of the store; None when there is none, or its files are damaged, which is reported."""
    try:
        if (manifest := read_manifest(store)) is None:
            return None
        check_sizes(store, manifest.files)
        if verify:
            check_blocks(store, manifest.files)
    except StoreDamaged as damage:
        print(f"WARNING: {damage}")
        return None
    return manifest


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


def _what_changed(old: dict[str, Any], new: dict[str, Any], parts: Iterable[str]) -> str:
    """Which of these parts of what a store is made of differ; a store of an earlier version may lack some."""
    old, new = without_places(old), without_places(new)
    names = {
        "base_chat_template": "the base's chat template",
        "data": "the recipe's data section",
        "inputs": "an input file",
        "code": "the version of ochat_train",
        "libraries": ", ".join(
            f"{name} {before} -> {now}"
            for name, now in new["libraries"].items()
            if (before := old.get("libraries", {}).get(name, "unknown")) != now
        ),
    }
    return ", ".join(names.get(part, f"the {part}") for part in parts if old.get(part) != new[part])


def _make_missing_shards(job: Job, work: WorkFolder, executor: Executor, num_workers: int | None) -> int:
    """Make the shards that are not in the work folder yet; the number of all shards."""
    sizes: list[int] = []  # of the input files on disk, the bytes that were read for each shard
    num_done = 0

    def missing() -> Iterator[tuple[int, Task]]:
        nonlocal num_done
        for sources, files in groupby(job.files, key=job.files.__getitem__):
            num_read = 0
            for task in read_tasks(list(files), sources):
                number = len(sizes)
                sizes.append(task.chunk.bytes_read - num_read)
                num_read = task.chunk.bytes_read
                if work.shard_folder(number).is_dir():
                    num_done += 1
                    bar.update(sizes[number])
                else:
                    yield number, task

    total = sum(max(0, size) for size, _ in job.stamps.values())
    with (
        ThreadPoolExecutor(1) as pool,
        tqdm(total=total, unit="B", unit_scale=True, desc="preprocess", mininterval=1.0) as bar,
    ):
        note = pool.submit(compare_with_auto, job.recipe.tokenizer_name, job.tokenizer)  # 2 s of imports, meanwhile
        for number in make_shards(missing(), job.settings, work, executor=executor, num_workers=num_workers):
            bar.update(sizes[number])
    if text := note.result():
        print(f"tokenizer {job.recipe.tokenizer_name}: {text}")
    if num_done:
        print(f"{num_done:,} of {len(sizes):,} shards were done before")
    return len(sizes)


def _decide(job: Job, work: WorkFolder, num_shards: int, writer: StoreWriter | None) -> tuple[Ledger, InputSummary]:
    """Decide over all shards, and write what stays if there is a writer."""
    data = job.data
    decisions = find_duplicates(
        (work.load_keys(number) for number in range(num_shards)),
        exact=data.dedupe.exact,
        prefix=data.dedupe.prefix,
        near=data.dedupe.near,
        eval_fraction=data.eval_fraction,
        work_dir=work.folder("duplicates"),
    )
    path = str(writer.staging / "ledger.parquet") if writer is not None else None
    with Ledger(path, [source.name for source in data.by_key.values()]) as ledger:
        summary = assemble(work, num_shards, decisions, ledger, writer)
        ledger.unread = summary.unread
    ledger.check(summary.dialects.total())
    try:
        _check_splits(data, summary)
    except ValueError:
        print(make_table(job, ledger, summary))
        raise
    return ledger, summary


def _check_splits(data: DataSection, summary: InputSummary) -> None:
    """Raise ValueError if nothing is trained, or nothing under a condition that an eval source has."""
    trained = {condition for _, condition in summary.conditions["train"]}
    if not trained:
        names = {source.name for source in data.sources}
        is_fraction = any(name in names for name, _ in summary.conditions["eval"])
        why = "all of it is held out by data.eval_fraction" if is_fraction else "see above"
        raise ValueError(f"no conversation is left to train on: {why}")
    for key, source in data.by_key.items():
        found = {condition for name, condition in summary.conditions["eval"] if name == source.name}
        if source in data.eval_sources and (unknown := sorted(found - trained)):
            raise ValueError(
                f"{key}: source {source.name} has conversations under the condition {unknown[0]!r}, under which "
                f"nothing is trained ({', '.join(sorted(map(repr, trained)))}); set {key}.condition to one of these"
            )


def _write_store(
    job: Job, work: WorkFolder, num_shards: int, store: Path, made_from: dict[str, Any]
) -> dict[str, dict[str, float]]:
    """Make the store of the shards; the totals of its splits. Raises ValueError if a file changed meanwhile."""
    names = [source.name for source in job.data.by_key.values()]
    writer = StoreWriter(work.folder("store"), names, job.tokenizer.num_ids)
    job.tokenizer.save(writer.staging / "tokenizer")
    ledger, summary = _decide(job, work, num_shards, writer)
    splits = writer.split_totals()
    ledger.check_examples(splits.values())
    if changed := [file for file, stamp in stamps_of(job.files).items() if stamp != job.stamps[file]]:
        work.remove()  # its shards are of what the file was between
        raise ValueError(f"{changed[0]} was changed while it was read; run again when it is complete")
    manifest = Manifest(
        fingerprint=fingerprint_of(made_from),
        made_from=made_from,
        template=describe_template(job.settings.template),
        conditions=writer.conditions,
        sources=writer.sources,
        inference_condition=_inference_condition(job.settings.template, writer.trained_condition_weights()),
        added_tokens=job.tokenizer.added,
        splits=splits,
        counts=ledger.to_json(),
        overlong=summary.overlong,
    )
    writer.finish(manifest, store)
    print(make_table(job, ledger, summary))
    return splits


def _inference_condition(template: Template, weights: dict[str, float]) -> str:
    """The template's own inference condition if it was trained, else the trained one of the largest mean weight.

    So the exported model is never asked under a condition that it has not seen.
    """
    if template.inference_condition and template.inference_condition in weights:
        return template.inference_condition
    return max(weights, key=weights.__getitem__)
