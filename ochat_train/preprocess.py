"""Dumps to a token store.

    python -m ochat_train.preprocess RECIPE [key=value ...]

One streaming pass: records are read, repaired or dropped by named rules, given to a source, templated and tokenized on
all cores, and written to `data.store`. A store that is already made from the same things is left as it is.
"""

import argparse
import glob
import hashlib
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import orjson
from tqdm import tqdm

import ochat_train
from ochat_train.conversations.ledger import Ledger
from ochat_train.conversations.schema import Conversation
from ochat_train.conversations.sharegpt import Drop, Record, parse_record, read_records
from ochat_train.conversations.sources import Source, assign_source, match_source
from ochat_train.conversations.template import TEMPLATES, ChatTemplate
from ochat_train.recipe import DataSection, Recipe, load_recipe, recipe_arguments, to_json
from ochat_train.tokens.chat_template import chat_template
from ochat_train.tokens.encode import Encoded, Example, encode
from ochat_train.tokens.store import Manifest, Split, StoreWriter, read_manifest
from ochat_train.tokens.tokenizer import ChatTokenizer, load_tokenizer

_BATCH_CONVERSATIONS = 512  # tokenized at once; the next batch is read meanwhile
_UNMATCHED = "(unreadable)"


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the recipe's token store, or say that it is up to date."""
    parser = argparse.ArgumentParser(prog="python -m ochat_train.preprocess", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    recipe_arguments(parser)
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        preprocess(load_recipe(options.recipe, options.overrides))
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the store was not touched")


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def preprocess(recipe: Recipe) -> None:
    """Write the recipe's token store unless it is up to date. Raises ValueError for mistakes of recipe or input."""
    files = find_files(recipe.data)
    template = TEMPLATES[recipe.template]
    tokenizer = load_tokenizer(recipe.tokenizer_name, template)
    chat_template(tokenizer, template.inference_condition)  # a model that could not be exported is refused here
    made_from = describe_origin(recipe, tokenizer, list(files))
    fingerprint = hashlib.sha256(orjson.dumps(made_from, option=orjson.OPT_SORT_KEYS)).hexdigest()
    manifest = read_manifest(recipe.data.store)
    if manifest is not None and manifest.fingerprint == fingerprint:
        print(f"token store {recipe.data.store} is up to date ({fingerprint[:12]}); nothing to preprocess")
        return
    if manifest is not None:
        changed = _what_changed(manifest.made_from, made_from)
        print(f"token store {recipe.data.store} is stale ({changed} changed); making it anew")
    with StoreWriter(recipe.data.store) as writer, Ledger(str(writer.partial / "ledger.jsonl")) as ledger:
        tokenizer.save(writer.partial / "tokenizer")
        started = time.perf_counter()
        _Pass(recipe.data, template, tokenizer, writer, ledger).run(files)
        seconds = time.perf_counter() - started
        ledger.check()
        print(ledger.table())
        splits = writer.split_totals()
        if not splits["train"]["num_examples"]:
            raise ValueError("no conversation is left to train on; the table says why each was dropped")
        ledger.close()
        writer.finish(
            Manifest(
                fingerprint=fingerprint,
                made_from=made_from,
                template=template.name,
                conditions=writer.conditions,
                inference_condition=_inference_condition(template, writer.trained_condition_weights()),
                added_tokens=tokenizer.added,
                splits=splits,
                counts=ledger.to_json(),
            )
        )
    num_tokens = sum(split["num_tokens"] for split in splits.values())
    print(
        f"token store {recipe.data.store}: {splits['train']['num_examples']:,} examples to train on, "
        f"{splits['eval']['num_examples']:,} held out; {num_tokens / seconds:,.0f} tokens/s; {fingerprint[:12]}"
    )


def find_files(data: DataSection) -> dict[str, list[Source]]:
    """Each input file, sorted, with the sources that name it. Raises ValueError for a path that matches no file."""
    files: dict[str, list[Source]] = {}
    spelling: dict[str, str] = {}  # of a file that sources name in several ways, the first
    for position, section in enumerate(data.sources):
        source = Source(section.name, section.condition, section.weight, section.where, section.where_not)
        for path in section.paths:
            found = [path] if Path(path).is_file() else sorted(glob.glob(path, recursive=True))
            if not found:
                raise ValueError(f"data.sources.{position}.path: no file matches {path!r}")
            for file in found:
                sources = files.setdefault(spelling.setdefault(os.path.realpath(file), file), [])
                if source not in sources:
                    sources.append(source)
    return dict(sorted(files.items()))


def describe_origin(recipe: Recipe, tokenizer: ChatTokenizer, files: Sequence[str]) -> dict[str, Any]:
    """Everything that decides a store's content, as JSON; its hash is the store's fingerprint."""
    data = to_json(recipe.data)
    del data["store"]  # where it lies does not change what it holds
    return {
        "tokenizer": tokenizer.digest,
        "template": recipe.template,
        "data": data,
        "code": _code_digest(),
        "inputs": {file: _file_digest(file) for file in files},
    }


def _file_digest(file: str) -> str:
    try:
        with open(file, "rb") as stream:
            return hashlib.file_digest(stream, "blake2b").hexdigest()
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None


def _code_digest() -> str:
    """SHA-256 of the sources that turn dumps into tokens: an edit there makes stores stale."""
    root = Path(__file__).parent
    sources = [root / "preprocess.py", *root.glob("conversations/*.py"), *root.glob("tokens/*.py")]
    digest = hashlib.sha256(ochat_train.__version__.encode())
    for source in sorted(sources):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _what_changed(old: dict[str, Any], new: dict[str, Any]) -> str:
    names = {"data": "the recipe's data section", "inputs": "an input file", "code": "the version of ochat_train"}
    return ", ".join(names.get(part, f"the {part}") for part in new if old.get(part) != new[part])


def _inference_condition(template: ChatTemplate, weights: dict[str, float]) -> str:
    """The template's own inference condition if it was trained, else the trained one of the largest mean weight.

    So the exported model is never asked under a condition that it has not seen.
    """
    if template.inference_condition in weights:
        return template.inference_condition
    return max(weights, key=weights.__getitem__)


@dataclass(frozen=True, slots=True)
class _Kept:
    """A conversation on its way to the store, with what the ledger will want to know."""

    conversation: Conversation
    file: str
    offset: int
    repairs: tuple[str, ...]


class _Pass:
    """The one pass over all files: reading and tokenizing overlap, results are written in the order of the input."""

    def __init__(
        self, data: DataSection, template: ChatTemplate, tokenizer: ChatTokenizer, writer: StoreWriter, ledger: Ledger
    ) -> None:
        self._data, self._template, self._tokenizer = data, template, tokenizer
        self._writer, self._ledger = writer, ledger
        self._num_kept = 0

    def run(self, files: dict[str, list[Source]]) -> None:
        pending: deque[tuple[list[_Kept], Future[list[Encoded]]]] = deque()
        with ThreadPoolExecutor(max_workers=1) as encoder:
            for batch in _batches(self._read(files)):
                conversations = [kept.conversation for kept in batch]
                pending.append((batch, encoder.submit(encode, conversations, self._template, self._tokenizer)))
                if len(pending) > 1:
                    self._write(*pending.popleft())
            while pending:
                self._write(*pending.popleft())

    def _read(self, files: dict[str, list[Source]]) -> Iterator[_Kept]:
        total = sum(Path(file).stat().st_size for file in files)
        with tqdm(total=total, unit="B", unit_scale=True, desc="preprocess", mininterval=1.0) as bar:
            for file, sources in files.items():
                done = 0
                for num_read, record in enumerate(read_records(file), start=1):
                    kept = self._receive(record, sources)
                    if kept is not None:
                        yield kept
                    bar.update(record.end - done)
                    done = record.end
                    if num_read % 256 == 0:
                        bar.set_postfix_str(f"{self._num_kept:,} conversations", refresh=False)
                bar.update(Path(file).stat().st_size - done)

    def _receive(self, record: Record, sources: list[Source]) -> _Kept | None:
        parsed = parse_record(record, default_id=f"{record.file}:{record.offset}")
        source = match_source(record.fields, sources, file=record.file, offset=record.offset, id=parsed.id)
        name = source.name if source is not None else _UNMATCHED
        self._ledger.received(name)
        if isinstance(parsed, Drop):
            self._drop(parsed.id, record.file, record.offset, name, parsed.reason, parsed.detail, parsed.repairs)
            return None
        assert source is not None  # only a record that is no object, which is a Drop, belongs to none
        conversation = assign_source(parsed, source)
        if not any(message.weight for message in conversation.messages):
            detail = "every turn has weight 0"
            self._drop(parsed.id, record.file, record.offset, name, "no_weight", detail, parsed.repairs)
            return None
        return _Kept(conversation, record.file, record.offset, parsed.repairs)

    def _write(self, batch: list[_Kept], encoded: Future[list[Encoded]]) -> None:
        for kept, result in zip(batch, encoded.result(), strict=True):
            conversation = kept.conversation
            example, repairs, detail = self._fit(result, kept.repairs)
            if example is None or not example.loss_weights.any():
                reason, detail = ("too_long", detail) if detail else ("no_weight", "its weights are 0 in float32")
                self._drop(conversation.id, kept.file, kept.offset, conversation.source, reason, detail, kept.repairs)
                continue
            self._num_kept += 1
            split: Split = "eval" if _is_held_out(conversation, self._data.eval_fraction) else "train"
            self._writer.add(split, conversation.id, conversation.source, conversation.condition, example)
            self._ledger.kept(
                id=conversation.id,
                file=kept.file,
                offset=kept.offset,
                source=conversation.source,
                repairs=repairs,
                num_tokens=len(example.input_ids),
                num_supervised_tokens=int(np.count_nonzero(example.loss_weights)),
                weight_sum=example.weight_sum,
            )

    def _fit(self, encoded: Encoded, repairs: tuple[str, ...]) -> tuple[Example | None, tuple[str, ...], str]:
        """The example within data.max_tokens, the repairs with the cut, and why there is none."""
        num_tokens, limit = len(encoded.example.input_ids), self._data.max_tokens
        if num_tokens <= limit:
            return encoded.example, repairs, ""
        detail = f"{num_tokens:,} tokens, above data.max_tokens {limit:,}"
        if self._data.overlong == "drop":
            return None, repairs, detail
        return encoded.cut(limit), (*repairs, "overlong_truncated"), f"{detail}, and no weighted answer ends within it"

    def _drop(
        self, id_: str, file: str, offset: int, source: str, reason: str, detail: str, repairs: tuple[str, ...]
    ) -> None:
        self._ledger.dropped(
            id=id_, file=file, offset=offset, source=source, reason=reason, detail=detail, repairs=repairs
        )


def _batches(items: Iterator[_Kept]) -> Iterator[list[_Kept]]:
    batch: list[_Kept] = []
    for item in items:
        batch.append(item)
        if len(batch) == _BATCH_CONVERSATIONS:
            yield batch
            batch = []
    if batch:
        yield batch


def _is_held_out(conversation: Conversation, fraction: float) -> bool:
    """Whether the conversation's text falls into the held-out share: stable, and the same for equal texts."""
    digest = hashlib.blake2b(digest_size=8)
    for message in conversation.messages:
        digest.update(orjson.dumps([message.role, message.text]))
    return int.from_bytes(digest.digest()) < fraction * 2**64


if __name__ == "__main__":
    main()
