"""What a recipe may change when its run goes on."""

import re
from contextlib import suppress
from typing import Any

import orjson
from pydantic import ValidationError

from ochat_train.recipe.schema import Recipe, differences, to_json

# Keys that a resumed run may change: they decide neither the weight of an example nor the order of those left, and
# no state of the optimizer depends on them.
FREE_AT_RESUME = (
    "name",
    "data.store",
    "data.verify",
    "model.attention",
    "model.checkpointing",
    "model.mlp_tiles",
    "model.kernels",
    "model.compile",
    "model.router_aux_loss_coef",
    "packing",
    "optim.lr",
    "optim.min_lr",
    "optim.weight_decay",
    "optim.grad_clip",
    "zero",
    "train.epochs",
    "train.max_steps",
    "train.max_skipped",
    "train.early_stop",
    "train.stall_timeout_s",
    "eval",
    "checkpoint",
    "log",
)


# Where a recipe finds what a run reads. What it finds there is compared, not its name.
_PLACE = re.compile(r"tokenizer|model\.base|data\.sources\.\d+\.path(\.\d+)?")


def refused_differences(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A line for each leaf that differs between two recipes as JSON and must not at a resume.

    A key that is newer than the first recipe has its default there, which changes nothing. Places are left out: see
    `moved_places`.
    """
    with suppress(ValidationError):
        was = to_json(Recipe.model_validate_json(orjson.dumps(was)))
    keys = {line: line.partition(":")[0] for line in differences(was, now)}
    return [
        line
        for line, key in keys.items()
        if not _PLACE.fullmatch(key) and not any(f"{key}.".startswith(f"{free}.") for free in FREE_AT_RESUME)
    ]


def moved_places(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A line for each place that differs between two recipes as JSON, `model.base: old -> new`.

    What the first one does not say is not compared. A tokenizer that is the base's moves with it, without a line.
    """
    before, after = _places_of(was), _places_of(now)
    moved = {key: (before[key], place) for key, place in after.items() if before.get(key) and place}
    if not now["tokenizer"] and moved.get("tokenizer") == moved.get("model.base"):
        moved.pop("tokenizer", None)
    return [f"{key}: {old} -> {new}" for key, (old, new) in moved.items() if old != new]


def _places_of(recipe: dict[str, Any]) -> dict[str, str | None]:
    """What a recipe as JSON, or a part of one, says of places."""
    base = recipe.get("model", {}).get("base")
    places = {"model.base": base, "tokenizer": recipe.get("tokenizer") or base}
    for number, source in enumerate(recipe["data"]["sources"]):
        path = source["path"]
        places[f"data.sources.{number}.path"] = path if isinstance(path, str) else ", ".join(path)
    return places
