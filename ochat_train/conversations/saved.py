"""Folders that `datasets.save_to_disk` wrote: which of their files are a data set, and which split is meant."""

import json
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

# What `datasets` writes beside its data: next to Arrow and parquet files these are no data.
DESCRIPTIONS = frozenset(("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json"))


def leave_out(files: Iterable[str], known: list[str], read: Callable[[str], bytes]) -> list[str]:
    """Of the files of a folder, the `known` ones without what is no data; `read` gives the bytes of a file.

    Raises ValueError for a saved data set of several splits, for one whose files are missing, and for one whose rows
    are chosen by an index of their own, which old versions wrote.
    """
    there = set(files)
    if any(file.lower().endswith((".arrow", ".parquet")) for file in known):
        known = [file for file in known if os.path.basename(file) not in DESCRIPTIONS]
    for file in sorted(there):
        folder, name = os.path.split(file)
        if name == "dataset_dict.json" and len(splits := _read(file, read).get("splits") or []) > 1:
            remedy = f"name one, as in {folder}{'/' if '://' in folder else ':'}{splits[0]}"
            raise ValueError(f"{folder}: several splits and none named; it has {', '.join(splits)}: {remedy}")
        if name == "state.json" and f"{folder}/dataset_info.json" in there:
            state = _read(file, read)
            if state.get("_indices_data_files"):
                remedy = "load it with datasets and save it again"
                raise ValueError(f"{folder}: an index chooses the rows of this data set, which is not read; {remedy}")
            if not (entries := state.get("_data_files")):
                continue
            named = {f"{folder}/{entry['filename']}" for entry in entries}
            if absent := sorted(named - there):
                raise ValueError(f"{folder}: {absent[0]} of the data set is not there; save it again")
            tables = [file for file in known if os.path.dirname(file) == folder and file.endswith(".arrow")]
            known = [file for file in known if file in named or file not in tables]
    return known


def named_split(path: str) -> list[str]:
    """The folder of the split that a path FOLDER:SPLIT names, or nothing where it names none."""
    folder, _, split = path.rpartition(":")
    if not os.path.isfile(f"{folder}/dataset_dict.json"):
        return []
    splits = _read(f"{folder}/dataset_dict.json", read_file).get("splits") or []
    if split not in splits:
        raise ValueError(f"{path}: no split {split}; it has {', '.join(splits)}")
    return [f"{folder}/{split}"]


def read_file(path: str) -> bytes:
    """The bytes of a file on disk."""
    with open(path, "rb") as file:
        return file.read()


def _read(file: str, read: Callable[[str], bytes]) -> dict[str, Any]:
    """A description; empty where it is none of `datasets`' own."""
    with suppress(ValueError):
        if isinstance(value := json.loads(read(file)), dict):
            return value
    return {}
