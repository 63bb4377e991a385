"""What preprocessing does to one record, stage by stage: `ochat preprocess --explain ID RECIPE`."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from ochat_train.conversations.containers import escape_name
from ochat_train.conversations.schema import Drop, Message, Record
from ochat_train.conversations.sources import Source
from ochat_train.preprocess.job import Job, describe_origin, fingerprint_of, make_job, read_tasks
from ochat_train.preprocess.ledger import read_rows
from ochat_train.preprocess.shard import Trace, follow, id_of
from ochat_train.recipe import Recipe
from ochat_train.tokens.loss_forms import LOSS_FORMS, spread_over_answers
from ochat_train.tokens.overlong import Fitted
from ochat_train.tokens.store import read_manifest

_MAX_TEXT = 2000  # characters shown of one text
_MAX_DEPTH = 32


def explain_record(recipe: Recipe, id: str) -> None:
    """Print what happens to every record or conversation of this id, stage by stage. Raises ValueError without any."""
    job = make_job(recipe)
    rows = _ledger_rows(job, id)
    if rows is None:
        print("no store is made from this recipe and these files yet, by these names, so they are searched;")
        print("whether it is a duplicate, and of what, is decided only when the store is made\n")
    found = False
    for record, sources in _find_records(job, id, rows):
        traces = follow([record], sources, job.settings)
        wanted = [trace for trace in traces if trace.parsed.id == id] or traces
        found = True
        print("\n".join(_show_record(record)))
        for trace in wanted:
            if len(traces) > 1:
                print(f"== conversation {trace.number} of {len(traces)}: {trace.parsed.id}")
            print("\n".join(_show_stages(trace, sources, job)))
            for row in rows or ():
                if (row["file"], row["offset"], row["conversation"]) != (record.file, record.offset, trace.number):
                    continue
                if row["reason"] is None:
                    print(f"== in the store: {row['num_examples']:,} example(s), {row['num_tokens']:,} tokens")
                else:
                    print(f"== not in the store: {row['reason']}: {row['detail']}")
    if not found:
        if part := re.fullmatch(r"(.*)#\d+", id, re.DOTALL):  # an example's name in the store
            return explain_record(recipe, part[1])
        where = "the store's ledger" if rows is not None else "the input files"
        raise ValueError(f"no record has the id {id!r} in {where}; a record without one has FILE:OFFSET for it")


def _ledger_rows(job: Job, id: str) -> list[dict[str, Any]] | None:
    """The ledger's rows of this id; None if there is no store, or one made from other files or names."""
    store = Path(job.data.store)
    manifest = read_manifest(store)
    made_from = describe_origin(job)
    if manifest is None or manifest.fingerprint != fingerprint_of(made_from):
        return None
    if manifest.made_from["places"]["files"] != made_from["places"]["files"]:  # the ledger's are the old names
        return None
    return read_rows(str(store / "ledger.parquet"), id)


def _find_records(job: Job, id: str, rows: list[dict[str, Any]] | None) -> Iterator[tuple[Record, tuple[Source, ...]]]:
    """The records of this id: of the files that the ledger's rows name, or of all if there is no ledger."""
    wanted = None if rows is None else {(row["file"], row["offset"]) for row in rows}
    for file, sources in job.files.items():
        # A row's file may be a member of an archive, whose name follows the archive's.
        shown = escape_name(file)
        if wanted is not None and not any(name == shown or name.startswith(f"{shown}/") for name, _ in wanted):
            continue
        for task in read_tasks([file], sources):
            for record in task.chunk.records():
                own = id_of(record)
                is_named = own == id or id.startswith(f"{own}/")
                if (record.file, record.offset) in wanted if wanted is not None else is_named:
                    yield record, sources


def _show_record(record: Record) -> Iterator[str]:
    yield f"== {record.file}, offset {record.offset:,}"
    if record.raw is not None:
        yield record.raw
    else:
        yield json.dumps(_shorten(record.fields), indent=2, ensure_ascii=False, default=str)


def _show_stages(trace: Trace, sources: tuple[Source, ...], job: Job) -> Iterator[str]:
    """What each stage made of the record, up to the one that dropped it."""
    parsed, cleaned, filtered = trace.parsed, trace.cleaned, trace.filtered
    used = {name for source in sources for name in (*source.where, *source.where_not)}
    unread = Counter(
        item for item in parsed.unread if not item[0].startswith(("record", "answer")) or item[1] not in used
    )
    for (kind, name), count in sorted(unread.items()):
        yield f"-- not read: {kind} {name!r}{f', {count} times' if count > 1 else ''}"
    if isinstance(parsed, Drop):
        yield f"-- read: dropped, {parsed.reason}: {parsed.detail}"
        return
    yield f"-- read as {parsed.dialect}{_actions(parsed.repairs)}"
    yield from _turns(parsed.system, parsed.messages)
    if isinstance(cleaned, Drop):
        yield f"-- cleaned: dropped, {cleaned.reason}: {cleaned.detail}{_actions(cleaned.repairs)}"
        return
    yield f"-- cleaned{_actions(cleaned.repairs[len(parsed.repairs) :])}"
    if (cleaned.system, cleaned.messages) != (parsed.system, parsed.messages):
        yield from _turns(cleaned.system, cleaned.messages)
    assert trace.source is not None  # only a record that is no object, which is a Drop, belongs to none
    if filtered is None:
        yield f"-- source {trace.source.name}: dropped, {trace.reason}: {trace.detail}"
        return
    held_out = ", held out whole" if trace.source.held_out else ""
    yield f"-- source {trace.source.name}{held_out}, condition {filtered.conversation.condition!r}"
    if filtered.reason is not None:
        yield f"-- filtered: dropped, {filtered.reason}: {filtered.detail}"
        return
    yield f"-- filtered{_actions(filtered.actions)}"
    yield from _turns("", filtered.conversation.messages, with_text=False)
    if trace.encoded is None or trace.fitted is None:
        yield f"   dropped, {trace.reason}: {trace.detail}"
        return
    num_tokens = sum(len(encoded.example.input_ids) for encoded in trace.encoded)
    yield f"-- tokens: {num_tokens:,}, limit {job.settings.max_tokens:,}{_actions(trace.fitted.actions)}"
    if trace.fitted.reason is not None:
        yield f"   dropped, {trace.fitted.reason}: {trace.fitted.detail}"
    else:
        yield from _examples(trace.fitted, job)


def _examples(fitted: Fitted, job: Job) -> Iterator[str]:
    """Each example with a line for each run of tokens of one weight, the tokens as the vocabulary spells them."""
    loss = job.recipe.train.loss
    yield f"   loss {loss}: {LOSS_FORMS[loss]}"
    for number, (example, answer_lengths) in enumerate(zip(fitted.examples, fitted.answer_lengths, strict=True), 1):
        weights, num_supervised = example.loss_weights, int(np.count_nonzero(example.loss_weights))
        if loss == "answer":
            weights = spread_over_answers(weights, [len(weights)], answer_lengths, [len(answer_lengths)])
        yield f"   example {number}: {len(weights):,} tokens, {num_supervised:,} with a loss"
        tokens = job.tokenizer.pretrained.convert_ids_to_tokens(example.input_ids.tolist())
        weighted = zip(weights.tolist(), tokens, strict=True)
        for weight, run in groupby(weighted, key=lambda pair: pair[0]):
            shown = f"{weight:.4f}" if loss == "token" else f"{weight:.3g}"
            yield f"   {shown:>8}  {' '.join(token for _, token in run)}"


def _turns(system: str, messages: tuple[Message, ...], *, with_text: bool = True) -> Iterator[str]:
    if system:
        yield f"   system: {_shorten(system)!r}"
    for number, message in enumerate(messages, start=1):
        weight = "" if message.weight is None else f", weight {message.weight:g}"
        beside = {"reasoning": message.reasoning, "calls": message.calls}
        text = f": {_shorten(message.text)!r}" if with_text else ""
        text += "".join(f", {name} {_shorten(value)!r}" for name, value in beside.items() if value)
        yield f"   {number} {message.role}{weight}{text}"


def _actions(actions: tuple[str, ...]) -> str:
    return f" ({', '.join(actions)})" if actions else ""


def _shorten(value: Any, depth: int = 0) -> Any:
    """The value with long texts in it, and what is nested deeply, cut for a screen."""
    if depth > _MAX_DEPTH:
        return "…"
    if isinstance(value, str) and len(value) > _MAX_TEXT:
        return f"{value[:_MAX_TEXT]}… ({len(value):,} characters)"
    if isinstance(value, dict):
        return {key: _shorten(inner, depth + 1) for key, inner in value.items()}
    return [_shorten(inner, depth + 1) for inner in value] if isinstance(value, list) else value
