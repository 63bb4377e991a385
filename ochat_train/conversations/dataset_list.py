"""LLaMA-Factory's dataset_info.json: a list of data sets, each with its place, form and names of fields."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from ochat_train.conversations.containers import has_known_suffix
from ochat_train.conversations.fields import TOOL_KEYS, Reading
from ochat_train.conversations.forms import FORMS
from ochat_train.conversations.roles import find_role
from ochat_train.conversations.schema import Role

LIST = "dataset_info.json"
_PLACES = ("hf_hub_url", "script_url", "cloud_file_name", "file_name", "ms_hub_url", "om_hub_url")  # the first counts
_READ = frozenset((*_PLACES, "formatting", "ranking", "subset", "split", "columns", "tags"))
_ROLE_TAGS: Mapping[str, Role] = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "system_tag": "system",
}


class _NotRead(Exception):
    """Why a data set of the list is not read."""


def expand(path: str, reading: Reading) -> Iterator[tuple[str, Reading]]:
    """The path itself; of a folder with such a list the path of each data set, and how its records are written.

    FOLDER:NAME is one of them. Without a name those are read whose file lies in the folder. Prints which are read and
    which are not. What `reading` says of fields counts before the list. Raises ValueError for a name that is not in the
    list, for a set that cannot be read, and for two sets of one file.
    """
    folder, name = (path, "") if os.path.exists(path) else path.rpartition(":")[::2]
    if os.path.basename(folder) == LIST:
        folder = os.path.dirname(folder) or "."
    listed = _read_list(f"{folder}/{LIST}") if folder else None
    if listed is None:
        yield path, reading
        return
    if name and name not in listed:
        raise ValueError(f"{path}: no data set {name}; {folder}/{LIST} has {', '.join(listed)}")
    read, others = {}, []
    for one, entry in listed.items():
        try:
            if name in ("", one):
                read[one] = _translate(folder, entry, reading, is_named=bool(name))
        except _NotRead as reason:
            if name:
                raise ValueError(f"{path}: data set {name} of {folder}/{LIST} is not read: {reason}") from None
            others.append(f"{one} ({reason})")
    places = [place for place, _, _ in read.values()]
    if twice := [one for one, (place, _, _) in read.items() if places.count(place) > 1]:
        raise ValueError(
            f"{path}: the data sets {', '.join(twice)} are of one file, in several forms; name those that you want, as "
            f"in {folder}:{twice[0]}"
        )
    if not read:
        raise ValueError(f"{path}: no data set of {folder}/{LIST} is read: {', '.join(others)}")
    named = {os.path.basename(place) for place in places} | {LIST}
    files = sorted(file for file in os.listdir(folder) if has_known_suffix(file) and file not in named)
    of_none = f"; files of no data set that is read: {', '.join(files)}" if files and not name else ""
    not_read = f"; not read: {', '.join(others)}" if others else ""
    print(f"{folder}/{LIST}: data sets {', '.join(read)}{not_read}{of_none}")
    for one, (place, of_set, notes) in read.items():
        if notes:
            print(f"WARNING: {folder}/{LIST}: of data set {one} is not read: {', '.join(notes)}")
        yield place, of_set


def _read_list(file: str) -> dict[str, Any] | None:
    """The list in a file, or None where it is none: `datasets` has files of this name, too."""
    try:
        with open(file, "rb") as stream:
            listed = json.load(stream)
    except (OSError, ValueError):
        return None
    is_list = isinstance(listed, dict) and listed and all(isinstance(entry, dict) for entry in listed.values())
    return listed if is_list and any(set(_PLACES) & entry.keys() for entry in listed.values()) else None


def _translate(
    folder: str, entry: dict[str, Any], reading: Reading, *, is_named: bool
) -> tuple[str, Reading, list[str]]:
    """(path, how its records are written, what of the entry is not read)."""
    place = _find_place(folder, entry, is_named=is_named)
    form = entry.get("formatting", "alpaca")
    columns, tags = dict(entry.get("columns") or {}), dict(entry.get("tags") or {})
    notes = [name for name in entry if name not in _READ]
    fields: dict[str, Any] = {}
    roles: dict[str, Role] = {}
    if form == "alpaca":
        if columns:
            question = tuple(columns.pop(part) for part in ("prompt", "query") if part in columns)
            fields["question"] = question[0] if len(question) == 1 else question
            answer = columns.pop("response", None)
            if not entry.get("ranking"):
                fields["answer"] = answer
            if not question or not (answer or entry.get("ranking")):
                raise _NotRead("its columns name no prompt or no response: text without answers")
            fields["history"] = columns.pop("history", None)
    elif form in ("sharegpt", "openai"):
        fields = {
            "turns": columns.pop("messages", None),
            "role": tags.pop("role_tag", None),
            "text": tags.pop("content_tag", None),
        }
        for tag, role in _ROLE_TAGS.items():
            if (word := tags.pop(tag, None)) is not None and find_role(word) != role:
                roles[word] = role
        if find_role(str(tags.get("function_tag"))) == "assistant":  # a call, by its usual names
            del tags["function_tag"]
    else:
        raise _NotRead(f"formatting {form} is not known")
    chosen, rejected = columns.pop("chosen", None), columns.pop("rejected", None)
    if entry.get("ranking") and chosen and rejected:
        fields |= {"chosen": chosen, "rejected": rejected}
    fields["system"] = columns.pop("system", None)
    usual = {"tools": TOOL_KEYS, "kto_tag": [name for (name,) in FORMS["label"]], "images": ("images", "image")}
    notes += [f"{part}: {name}" for part, name in (columns | tags).items() if name not in usual.get(part, ())]
    fields = {part: name for part, name in fields.items() if name is not None}
    return place, replace(reading, fields=reading.fields or fields, roles=roles | dict(reading.roles)), notes


def _find_place(folder: str, entry: dict[str, Any], *, is_named: bool) -> str:
    place = next((name for name in _PLACES if entry.get(name)), None)
    if place == "file_name":
        path = os.path.join(folder, entry["file_name"])
        if not os.path.exists(path):
            raise _NotRead(f"{entry['file_name']} is not there")
        return path
    if place in ("hf_hub_url", "cloud_file_name"):
        if not is_named:
            raise _NotRead("it lies elsewhere: name it to read it")
        if entry.get("folder"):
            raise _NotRead(f"folder {entry['folder']}: name its files in the recipe, as hf://datasets/...")
        subset = f"/{entry['subset']}" if entry.get("subset") else ""
        remote = f"hf://{entry['hf_hub_url']}{subset}:{entry.get('split') or 'train'}"
        return remote if place == "hf_hub_url" else str(entry[place])
    raise _NotRead(f"{place}: {'a script is not run' if place == 'script_url' else 'it is not fetched from there'}")
