"""What a recipe may change when its run goes on."""

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
    "train.stall_timeout_s",
    "eval",
    "checkpoint",
    "log",
)


def refused_differences(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A line for each leaf that differs between two recipes as JSON and must not at a resume.

    A key that is newer than the first recipe has its default there, which changes nothing.
    """
    with suppress(ValidationError):
        was = to_json(Recipe.model_validate_json(orjson.dumps(was)))
    return [
        line
        for line in differences(was, now)
        if not any(f"{line.partition(':')[0]}.".startswith(f"{free}.") for free in FREE_AT_RESUME)
    ]
