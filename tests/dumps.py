"""Small dumps and recipes for tests of preprocessing, and ways to look into the stores that are made of them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from ochat_train.preprocess.__main__ import main
from ochat_train.preprocess.run import preprocess
from ochat_train.recipe import load_recipe
from ochat_train.tokens.store import Manifest, read_manifest

ROOT = Path(__file__).resolve().parents[1]


def chat(id: str, *texts: str, **fields: Any) -> dict[str, Any]:
    """A ShareGPT record in which human and gpt take turns."""
    turns = [{"from": ("human", "gpt")[position % 2], "value": text} for position, text in enumerate(texts)]
    return {"id": id, "conversations": turns, **fields}


_WORDS = (
    "the of and to in is that it was for on are as with his they at be this from have or by one had not but what all "
    "were when we there can an your which their said if do will each about how up out them then she many some so these "
    "would other into has more her two like him see time could no make than first been its who now people my made over "
    "did down only way find use may water long little very after words called just where most know"
)


def prose(seed: int, num_words: int) -> str:
    """English words in an order that no other seed has."""
    return " ".join(np.random.default_rng(seed).choice(_WORDS.split(), num_words).tolist())


def write_lines(path: Path, *records: Any) -> Path:
    """The records as JSON lines."""
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def page(record: dict[str, Any]) -> str:
    """The record as a saved ShareGPT page."""
    data = {"props": {"pageProps": {"id": record["id"], "content": {"items": record["conversations"]}}}}
    script = json.dumps(data).replace("<", "\\u003c")
    return f'<!DOCTYPE html><html><body><script id="__NEXT_DATA__">{script}</script></body></html>'


def source(name: str, path: Path | str, **fields: Any) -> dict[str, Any]:
    """A source of a recipe."""
    return {"name": name, "path": str(path), "condition": "GPT4", **fields}


def write_recipe(folder: Path, sources: Sequence[dict[str, Any]], *, store: str | None = None, **data: Any) -> Path:
    """A recipe in folder/recipe.yaml whose store is folder/store."""
    recipe = {
        "name": "test",
        "data": {"store": store or str(folder / "store"), "sources": list(sources), "max_tokens": 512, **data},
        "template": "openchat_v3.2",
        "tokenizer": str(ROOT / "data/quickstart_tokenizer"),
        "model": {"config": {"model_type": "llama"}},
        "packing": {"tokens_per_gpu": 4096},
        "train": {"epochs": 1},
        "checkpoint": {"dir": str(folder / "run")},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def make(recipe: Path, *overrides: str, **options: Any) -> Path:
    """Preprocess in this process; returns the store's path."""
    loaded = load_recipe(recipe, overrides)
    preprocess(loaded, **options)
    return Path(loaded.data.store)


def failure(*arguments: str | Path) -> str:
    """The message with which the command ends."""
    with pytest.raises(SystemExit) as error:
        main([str(argument) for argument in arguments])
    assert isinstance(error.value.code, str)
    return error.value.code


def ledger_of(store: Path) -> list[dict[str, Any]]:
    """A row for each record."""
    rows: list[dict[str, Any]] = pq.read_table(store / "ledger.parquet").to_pylist()
    return rows


def unread_in(store: Path) -> dict[str, dict[str, dict[str, int]]]:
    """{file: {kind: {name: how often}}} of what was met and not read, of the ledger's metadata."""
    by_file: dict[str, dict[str, dict[str, int]]] = json.loads(
        pq.read_metadata(store / "ledger.parquet").metadata[b"unread"]
    )
    return by_file


def reasons_in(store: Path) -> dict[str, str | None]:
    """Why each record was dropped, None for a kept one, by its id."""
    return {row["id"]: row["reason"] for row in ledger_of(store)}


def manifest_of(store: Path) -> Manifest:
    """The manifest of a store that is there."""
    manifest = read_manifest(store)
    assert manifest is not None
    return manifest


def ids_in(store: Path, split: str = "train") -> list[str]:
    """The ids of a split's examples."""
    opened = datasets.load_from_disk(str(store))
    return list(opened[split]["id"][:]) if split in opened else []


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below the folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
