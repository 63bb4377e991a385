"""Writes the two pages that are generated: keys.md from the recipe's models, commands.md from the parsers.

    python docs/reference.py

tests/test_docs.py fails when a committed page is not what this writes.
"""

import argparse
import importlib
import inspect
import os
import types
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from ochat_train.cli import WORDS
from ochat_train.recipe.schema import Recipe, Section, sections_in

DOCS = Path(__file__).resolve().parent

# Where a key is described further.
MORE = {
    "template": "templates.md",
    "pieces": "templates.md#a-template-in-the-recipe",
    "condition_in": "templates.md#where-the-condition-is",
    "tokenizer": "recipes.md#base-models",
    "deepspeed": "recipes.md#the-deepspeed-section",
    "data.sources": "data.md#sources",
    "data.sources.N.path": "data.md#input",
    "data.sources.N.epochs": "plan.md#mixing-sources",
    "data.sources.N.html": "data.md#html",
    "data.sources.N.encoding": "data.md#encodings",
    "data.sources.N.fields": "data.md#forms",
    "data.sources.N.tree": "data.md#forms",
    "data.sources.N.weight_field": "data.md#weights",
    "data.overlong": "data.md#long-conversations",
    "data.eval_sources": "data.md#eval-sources",
    "model.mlp_tiles": "recipes.md#long-sequences",
    "packing.sequence_parallel": "recipes.md#long-sequences",
    "data.dedupe": "data.md#duplicates",
    "data.filters": "data.md#filters",
    "data.filters.last_answer_only": "data.md#the-last-answer-only",
    "data.reasoning": "data.md#tools-and-reasoning",
    "data.tool_calls": "data.md#tools-and-reasoning",
    "data.media": "data.md#pictures-sound-video",
    "model.base": "recipes.md#base-models",
    "model.attention": "recipes.md#attention-backends",
    "model.checkpointing": "recipes.md#activation-checkpointing",
    "model.kernels": "recipes.md#kernels-and-compiling",
    "model.compile": "recipes.md#kernels-and-compiling",
    "model.router_aux_loss_coef": "recipes.md#mixtures-of-experts",
    "model.lora": "recipes.md#adapters",
    "optim.algorithm": "recipes.md#adam-with-8-bits",
    "optim.lr": "recipes.md#the-learning-rate",
    "train.loss": "recipes.md#the-form-of-the-loss",
    "eval.checks": "evaluation.md#checks-in-training",
    "checkpoint.resume": "runs.md#resuming",
    "log.profile": "runs.md#where-the-time-goes",
}

ABOUT_KEYS = """# Every key

This page is generated from the recipe's models. `N` is a position in a list, from 0; RUN is `checkpoint.dir`. How to
write a recipe, and what the larger keys do, is in [Recipes](recipes.md). `ochat recipe --schema` prints the same as a
JSON schema, for editors.
"""

ABOUT_COMMANDS = """# Every command

This page is generated from the parsers of the commands. `ochat WORD` is `python -m` of the module that each part names,
and takes the same arguments. A RECIPE is a file, or the name of a shipped recipe; key=value after it changes any
[key](keys.md).
"""


# ---- Keys ----


def keys_page() -> str:
    """A table for the keys without a section, and one for each section with all that is below it."""
    parts = [ABOUT_KEYS, "## The run\n", *_table(_fields(Recipe, "", deep=False))]
    for name, field in Recipe.model_fields.items():
        sections = [section for section, _ in sections_in(field.annotation)]
        if sections:
            about = inspect.getdoc(sections[0])
            parts += [f"\n## {name}\n", f"{about}\n", *_table(_fields(sections[0], f"{name}.", deep=True))]
    return "\n".join(parts) + "\n"


def _fields(model: type[BaseModel], prefix: str, *, deep: bool) -> Iterator[tuple[str, FieldInfo]]:
    """Every dotted key below a section with its field, those of its own sections after them if `deep`."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}", field
        for section, is_list in sections_in(field.annotation) if deep else ():
            yield from _fields(section, f"{prefix}{name}.{'N.' if is_list else ''}", deep=True)


def _table(fields: Iterator[tuple[str, FieldInfo]]) -> Iterator[str]:
    yield "| key | type or values | default | meaning |"
    yield "| --- | --- | --- | --- |"
    for key, field in fields:
        sections = [section for section, _ in sections_in(field.annotation)]
        meaning = field.description or inspect.getdoc(sections[0]) or ""
        more = f" [More]({MORE[key]})." if key in MORE else ""
        cells = (_kind(field.annotation, field.metadata), _default(field), meaning.replace("|", r"\|") + more)
        yield f"| `{key}` | {' | '.join(cells)} |"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Section):
        return "all defaults"
    shown = yaml.safe_dump(to_jsonable_python(value), default_flow_style=True, width=10**6)
    return f"`{shown.split(chr(10))[0]}`"  # a scalar is followed by a line of dots


def _kind(annotation: Any, limits: list[Any]) -> str:
    """What a value may be, in words."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _kind(arguments[0], [limit for part in arguments[1:] for limit in getattr(part, "metadata", [])])
    if origin in (typing.Union, types.UnionType):
        kinds = [_kind(part, limits) for part in arguments if part is not type(None)]
        return ", or ".join(kinds) + (", or null" if type(None) in arguments else "")
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is tuple:
        inner = _kind(arguments[0], [])
        return f"list of {inner}s" if arguments[1:] == (...,) else f"list of {len(arguments)} {inner}s"
    if origin is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    name = {str: "text", int: "whole number", float: "number", bool: "true or false"}[annotation]
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    bounds = [
        f"{words[bound]} {_number(getattr(limit, bound))}"
        for limit in limits
        for bound in words
        if hasattr(limit, bound)
    ]
    return ", ".join([name, *bounds]) if annotation in (int, float) else name


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


# ---- Commands ----


class _Found(Exception):
    """Leaves a command at the moment in which it would read its arguments."""


@cache
def parser_of(module: str) -> argparse.ArgumentParser:
    """The parser that the command `python -m ochat_train.MODULE` makes."""
    package = f"ochat_train.{module}"
    if (DOCS.parent / "ochat_train" / module).is_dir():
        package += ".__main__"

    def leave(parser: argparse.ArgumentParser, *_: Any) -> None:
        raise _Found(parser)

    readers = {"parse_known_args": leave, "parse_known_intermixed_args": leave}
    with mock.patch.multiple(argparse.ArgumentParser, **readers):
        try:
            importlib.import_module(package).main([])
        except _Found as found:
            return typing.cast(argparse.ArgumentParser, found.args[0])
    raise AssertionError(f"{package}.main reads no arguments")


def subparsers_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers of a command's own words, by word."""
    actions = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(actions[0].choices) if actions else {}


def commands_page() -> str:
    """A part for each word of ochat, and for each word below it."""
    parts = [ABOUT_COMMANDS]
    for word, (module, meaning, arguments) in WORDS.items():
        parts.append(f"## ochat {word}\n\n`python -m ochat_train.{' '.join([module, *arguments])}`: {meaning}.\n")
        if arguments:
            continue  # a word for a flag of another command
        parser = parser_of(module)
        about, _, usage = (parser.description or "").strip().partition("\n")
        parts.append(_as_markdown(usage) if usage else f"{about}\n")
        parts.append(_arguments(parser))
        for name, inner in subparsers_of(parser).items():
            parts += [f"### ochat {word} {name}\n", _arguments(inner)]
    parser = parser_of("train")
    parts.append(
        "## deepspeed --module ochat_train.train\n\nWhat `ochat train` starts on each GPU, for launchers of your own.\n"
    )
    parts += [_as_markdown((parser.description or "").partition("\n")[2]), _arguments(parser)]
    return "\n".join(part for part in parts if part)


def _as_markdown(text: str) -> str:
    """Paragraphs as they are, those that are indented as code."""
    paragraphs = text.strip("\n").split("\n\n")
    return "\n\n".join(f"```text\n{inspect.cleandoc(one)}\n```" if one[0] == " " else one for one in paragraphs) + "\n"


def _arguments(parser: argparse.ArgumentParser) -> str:
    rows = []
    for action in parser._actions:
        if action.help == argparse.SUPPRESS or "--help" in action.option_strings:
            continue
        if isinstance(action, argparse._SubParsersAction):
            continue  # each has a part of its own
        value = action.metavar or ("" if action.nargs == 0 else (action.dest.upper()))
        if action.choices is not None:
            value = f"{{{','.join(map(str, action.choices))}}}"
        if action.nargs in ("*", "+"):
            value = f"{value} ..."
        name = f"{', '.join(action.option_strings)} {value}".strip()
        meaning = (action.help or "").replace("%(default)s", str(action.default)).replace("|", r"\|")
        rows.append(f"| `{name}` | {meaning} |")
    return "\n".join(["| argument | meaning |", "| --- | --- |", *rows]) + "\n" if rows else ""


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    (DOCS / "keys.md").write_text(keys_page(), encoding="utf-8")
    (DOCS / "commands.md").write_text(commands_page(), encoding="utf-8")
