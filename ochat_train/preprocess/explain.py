"""What preprocessing does to one record, stage by stage: `python -m ochat_train.preprocess --explain ID RECIPE`."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from ochat_train.conversations.containers import escape_name
from ochat_train.conversations.filters import filter_conversations
from ochat_train.conversations.records import Record, read_chunks
from ochat_train.conversations.schema import Conversation, Drop, Message
from ochat_train.conversations.sources import Source, assign_source
from ochat_train.preprocess.job import Plan, describe_origin, fingerprint_of, make_plan, reading_of
from ochat_train.preprocess.ledger import read_entries
from ochat_train.preprocess.shard import clean, find_source, has_weight, parse, without_tail
from ochat_train.recipe import Recipe
from ochat_train.tokens.encode import Example, encode
from ochat_train.tokens.overlong import fit
from ochat_train.tokens.store import read_manifest

_MAX_TEXT = 2000  # characters shown of one text
_MAX_DEPTH = 32


def explain(recipe: Recipe, id: str) -> None:
    """Print what happens to every record of this id. Raises ValueError when there is none."""
    plan = make_plan(recipe)
    entries = _ledger_entries(recipe, plan, id)
    if entries is None:
        print("no store is made from this recipe and these files yet, so the files are searched for the record;")
        print("whether it is a duplicate, and of what, is decided only when the store is made\n")
    found = False
    for record, sources in _find_records(plan, id, entries):
        found = True
        print("\n".join(_explain_record(plan, record, sources)))
        for entry in entries or ():
            if (entry["file"], entry["offset"]) == (record.file, record.offset):
                print("\n".join(_outcome(entry)))
    if not found:
        if part := re.fullmatch(r"(.*)#\d+", id, re.DOTALL):  # an example's name in the store
            return explain(recipe, part[1])
        where = "the store's ledger" if entries is not None else "the input files"
        raise ValueError(f"no record has the id {id!r} in {where}; a record without one has FILE:OFFSET for it")


def _ledger_entries(recipe: Recipe, plan: Plan, id: str) -> list[dict[str, Any]] | None:
    """The ledger's rows of this id; None if there is no store, or one made from something else."""
    store = Path(recipe.data.store)
    manifest = read_manifest(store)
    if manifest is None or manifest.fingerprint != fingerprint_of(describe_origin(recipe, plan)):
        return None
    return read_entries(str(store / "ledger.parquet"), id)


def _find_records(
    plan: Plan, id: str, entries: list[dict[str, Any]] | None
) -> Iterator[tuple[Record, tuple[Source, ...]]]:
    """The records of this id: of the files that the ledger names, or of all if there is none."""
    wanted = None if entries is None else {(entry["file"], entry["offset"]) for entry in entries}
    for file, sources in plan.files.items():
        # A ledger's file may be a member of an archive, whose name stands behind the archive's.
        shown = escape_name(file)
        if wanted is not None and not any(name == shown or name.startswith(f"{shown}/") for name, _ in wanted):
            continue
        for chunk in read_chunks([file], **reading_of(sources)):
            for record in chunk.records():
                if (record.file, record.offset) in wanted if wanted is not None else parse(record, None).id == id:
                    yield record, sources


def _explain_record(plan: Plan, record: Record, sources: tuple[Source, ...]) -> Iterator[str]:
    yield f"== {record.file}, offset {record.offset:,}"
    if record.raw is not None:
        yield record.raw
    else:
        yield json.dumps(_shorten(record.fields), indent=2, ensure_ascii=False, default=str)
    source = find_source(record, sources)
    parsed = parse(record, source)
    used = {name for source in sources for name in (*source.where, *source.where_not)}
    unread = Counter(entry for entry in parsed.unread if entry[0] != "record field" or entry[1] not in used)
    for (kind, name), count in sorted(unread.items()):
        yield f"-- not read: {kind} {name!r}{f', {count} times' if count > 1 else ''}"
    if isinstance(parsed, Drop):
        yield f"-- read: dropped, {parsed.reason}: {parsed.detail}"
        return
    yield f"-- read as {parsed.dialect}{_actions(parsed.repairs)}"
    yield from _turns(parsed.system, parsed.messages)
    assert source is not None  # only a record that is no object, which is a Drop, belongs to none
    cleaned = clean(parsed, source, plan.settings)
    if isinstance(cleaned, Drop):
        yield f"-- cleaned: dropped, {cleaned.reason}: {cleaned.detail}{_actions(cleaned.repairs)}"
        return
    yield f"-- cleaned{_actions(cleaned.repairs[len(parsed.repairs) :])}"
    if (cleaned.system, cleaned.messages) != (parsed.system, parsed.messages):
        yield from _turns(cleaned.system, cleaned.messages)
    try:
        conversation = assign_source(cleaned, source)
    except ValueError as error:  # a weight that is too large
        yield f"-- source {source.name}: dropped, bad_weight: {error}"
        return
    yield f"-- source {source.name}, condition {conversation.condition!r}"
    judgement = filter_conversations([conversation], plan.settings.filters)[0]
    if judgement.reason is not None:
        yield f"-- filtered: dropped, {judgement.reason}: {judgement.detail}"
        return
    yield f"-- filtered{_actions(judgement.actions)}"
    yield from _turns(judgement.conversation.system, judgement.conversation.messages, with_text=False)
    if not has_weight(judgement.conversation):
        yield "   dropped, no_weight: every turn has weight 0"
        return
    yield from _explain_tokens(plan, without_tail(judgement.conversation))


def _explain_tokens(plan: Plan, conversation: Conversation) -> Iterator[str]:
    settings = plan.settings
    encoded = encode([conversation], settings.template, settings.encoder)[0]
    fitted = fit(
        encoded,
        max_tokens=settings.max_tokens,
        overlong=settings.overlong,
        context_tokens=settings.overlong_context,
    )
    yield f"-- tokens: {len(encoded.example.input_ids):,}, limit {settings.max_tokens:,}{_actions(fitted.actions)}"
    if fitted.reason is not None:
        yield f"   dropped, {fitted.reason}: {fitted.detail}"
    for number, example in enumerate(fitted.examples, start=1):
        num_supervised = int(np.count_nonzero(example.loss_weights))
        yield f"   example {number}: {len(example.input_ids):,} tokens, {num_supervised:,} with a loss"
        yield from _weighted_tokens(plan, example)


def _weighted_tokens(plan: Plan, example: Example) -> Iterator[str]:
    """A line for each run of tokens of one weight: the weight, then the tokens as the vocabulary spells them."""
    tokens = plan.tokenizer.pretrained.convert_ids_to_tokens(example.input_ids.tolist())
    weighted = zip(example.loss_weights.tolist(), tokens, strict=True)
    for weight, run in groupby(weighted, key=lambda pair: pair[0]):
        yield f"   {weight:8.4f}  {' '.join(token for _, token in run)}"


def _outcome(entry: dict[str, Any]) -> Iterator[str]:
    if entry["reason"] is None:
        yield f"== in the store: {entry['num_examples']:,} example(s), {entry['num_tokens']:,} tokens"
    else:
        yield f"== not in the store: {entry['reason']}: {entry['detail']}"


def _turns(system: str, messages: tuple[Message, ...], *, with_text: bool = True) -> Iterator[str]:
    if system and with_text:
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
