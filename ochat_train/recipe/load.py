"""A recipe's YAML file and its overrides -> a Recipe, or a message that names every mistake."""

import argparse
import math
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import yaml
from pydantic import ValidationError

from ochat_train.recipe.mistakes import list_mistakes
from ochat_train.recipe.schema import Recipe, fields, known_keys, required_keys
from ochat_train.recipe.shipped import place_data, shipped_recipes


class _Loader(yaml.SafeLoader):
    """YAML without its traps: a key given twice, 1e-5 read as text, 010 as 8, 1:30 as 90, a date as no text."""


class _Word(str):
    """yes, no, on or off without quotes: true or false to YAML 1.1, text to YAML 1.2, and here what the key takes."""


def _construct_bool(loader: _Loader, node: yaml.ScalarNode) -> bool | _Word:
    value = node.value.lower()
    return value == "true" if value in ("true", "false") else _Word(node.value)


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    keys: list[str] = []
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":  # what it brings may be replaced
            continue
        key, line = loader.construct_object(key_node, deep=True), key_node.start_mark.line + 1
        if not isinstance(key, str):
            raise ValueError(f"line {line}: the key {key!r} is not text; quote it, or correct it")
        if key in keys:
            raise ValueError(f"line {line}: the key {key!r} stands twice; keep one")
        keys.append(key)
    return {str(key): value for key, value in loader.construct_mapping(node, deep=True).items()}


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)
_Loader.add_constructor("tag:yaml.org,2002:bool", _construct_bool)
_NUMBERS = {
    "tag:yaml.org,2002:int": r"[-+]?(0|[1-9][\d_]*)",
    "tag:yaml.org,2002:float": r"[-+]?(\d[\d_]*\.[\d_]*|\.\d[\d_]*|\d+(?=[eE]))([eE][-+]?\d+)?"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (*_NUMBERS, "tag:yaml.org,2002:timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(f"^({_pattern})$"), list("-+.0123456789"))

# What YAML's parser says, and what to do.
_YAML_REMEDIES = {
    r"'\t' that cannot start": "indent with spaces, not with tabs",
    "that cannot start any token": "put the text in quotes",
    "mapping values are not allowed": "put a text that holds a colon in quotes, and a space after each key's colon",
    "but found another document": "a recipe is one document: remove the line ---",
    "could not determine a constructor": "leave the tag out",
    "expected <block end>": "keys of one section are indented alike",
    "found unexpected end of stream": "close the quotes",
    "expected ',' or": "close the brackets before it, or quote the text",
}


def read_yaml(text: str) -> Any:
    """The value of a YAML text. Raises ValueError in one line."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        remedy = next((f"; {remedy}" for words, remedy in _YAML_REMEDIES.items() if words in problem), "")
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None and "\n" in text else ""
        raise ValueError(f"{where}{problem}{remedy}") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in the YAML file `path`, with `key=value` overrides applied.

    Where there is no such file, `path` may be the name of a shipped recipe, such as quickstart.

    `key` is a dotted path (`optim.lr`, `data.sources.0.weight`), `value` is YAML. Raises ValueError with every
    wrong key's path, value, what is allowed and the nearest known key.
    """
    shipped = None if Path(path).is_file() else shipped_recipes().get(str(path))
    try:
        tree = read_yaml(Path(shipped or path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        hint = "" if "/" in str(path) else ", and no shipped one has this name; ochat recipes lists those"
        raise ValueError(f"no recipe at {path}{hint}") from None
    except OSError as error:
        raise ValueError(f"{path} is not a recipe: it cannot be read ({error.strerror}); name a YAML file") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path} is not a recipe: line {line} is not UTF-8; save it as UTF-8 text") from None
    except ValueError as error:
        raise ValueError(f"{path} is not a recipe: {error}") from None
    if not isinstance(tree, dict):
        what = "it is empty" if tree is None else f"it is {'a list' if isinstance(tree, list) else 'one value'}"
        raise ValueError(f"{path} is not a recipe: {what}; its top level must be keys, such as name: and data:")
    if shipped is not None:
        tree = place_data(tree)
    for override in overrides:
        _apply_override(tree, override)
    found: dict[str, str] = {}
    errors: list[Any] = []
    tree = _settle(tree, "", found)
    try:
        # Through JSON, because pydantic's strict mode then takes a list for a tuple and still nothing else.
        recipe = Recipe.model_validate_json(orjson.dumps(tree))
    except ValidationError as error:
        errors = error.errors()
    except TypeError as error:  # a key that is no UTF-8
        raise ValueError(f"{path} is not a recipe: {error}") from None
    if found or errors:
        lines = list_mistakes(errors, list(known_keys()), list(required_keys()), found)
        raise ValueError("\n  ".join([f"{path} has {len(lines)} mistake(s):", *lines]))
    return recipe


def _settle(value: Any, key: str, found: dict[str, str]) -> Any:
    """The value at `key` as JSON can say it, null for what it cannot; `found` gets the reason, by key."""
    if isinstance(value, dict):
        return {name: _settle(inner, f"{key}.{name}" if key else name, found) for name, inner in value.items()}
    if isinstance(value, list):
        return [_settle(inner, f"{key}.{position}", found) for position, inner in enumerate(value)]
    if isinstance(value, _Word):
        kind = dict(fields()).get(re.sub(r"\.\d+(?=\.|$)", ".N", key))
        means = "true" if value.lower() in ("yes", "on") else "false"
        if kind is bool:
            return means == "true"
        if kind is None and re.search(r"(^|\.)(where|where_not|config|deepspeed)\.", key):  # any value may be there
            found[key] = f"{value} without quotes may mean {means} or text; write {means} or '{value}'"
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):  # JSON would turn it into null
        found[key] = f"{value} is not a finite number"
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        found[key] = f"{value} is beyond 64 bits"
    elif isinstance(value, str) and any("\ud800" <= sign <= "\udfff" for sign in value):
        found[key] = f"{value!r} is not UTF-8 text"
    elif not isinstance(value, str | int | float | None):
        found[key] = f"a value of YAML's type {type(value).__name__} means nothing here; write text or a number"
    return None if key in found else value


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    *parents, last = key.split(".")
    if not equals or not all([*parents, last]):
        raise ValueError(f"override {override!r} is not of the form key=value, such as optim.lr=1e-5")
    try:
        value = read_yaml(text)
    except ValueError as error:
        raise ValueError(f"override {override!r}: the value is not YAML: {error}") from None
    here: Any = tree
    for position, part in enumerate(parents):
        here = _child(here, part, parents[:position], override)
    if isinstance(here, list):
        here[_index(here, last, parents, override)] = value
    else:
        here[last] = value


def _child(here: Any, part: str, parents: list[str], override: str) -> Any:
    if isinstance(here, list):
        child = here[_index(here, part, parents, override)]
    else:
        child = here.get(part)
        if child is None:  # a section that the file leaves out, or sets to null
            child = here[part] = {}
    if not isinstance(child, dict | list):
        raise ValueError(f"override {override!r}: {part} is the value {child!r}, it has no keys of its own")
    return child


def _index(items: list[Any], part: str, parents: list[str], override: str) -> int:
    if not part.isdecimal() or int(part) >= len(items):
        allowed = f"must be a number from 0 to {len(items) - 1}" if items else "stands for no item, since it is empty"
        raise ValueError(f"override {override!r}: in the list {'.'.join(parents)} {part!r} {allowed}")
    return int(part)


def recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that every entry point shares: RECIPE [key=value ...]."""
    parser.add_argument("recipe", metavar="RECIPE", help="the recipe's YAML file, or the name of a shipped one")
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", default=[], help="override of any key: optim.lr=1e-5"
    )


def parse_arguments(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, which may stand between overrides. Exits when there is another, or an override written as one."""
    options, unknown = parser.parse_known_intermixed_args(arguments)
    if unknown:
        parser.error(f"{unknown[0]} is no option; a key of the recipe has no dashes, as in optim.lr=1e-5")
    return options


@contextmanager
def piped_output() -> Iterator[None]:
    """End without a traceback when the reader of the output ends first, as in `ochat doctor RECIPE | head`."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes the rest when it exits
        sys.exit(128 + signal.SIGPIPE)
