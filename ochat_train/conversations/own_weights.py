"""The loss weights that a record itself gives: flags on its turns, lists beside them, and a weight of the record."""

import math
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from decimal import Decimal
from typing import Any

from ochat_train.conversations.fields import kind_of, show
from ochat_train.conversations.schema import RecordError

MAX_FLOAT32 = (2 - 2**-23) * 2.0**127  # weights are stored as float32

WEIGHTS = ("weight", "loss_weight", "loss_scale")  # a number of at least 0, or true or false
# True, false, 1 or 0; false means no loss.
FLAGS = ("train", "trainable", "training", "loss", "loss_mask", "output_with_loss")
EXCLUSION = "masked"  # true, false, 1 or 0; true means no loss, false leaves it to the role
PARTS = "train_detail"  # weights of parts of a text, which are refused: a turn has one weight

# Beside the turns: a list with an entry for each turn, or one value for all of them.
_NUMBERS = (*WEIGHTS, "weights", "loss_weights", "turn_weights")
LISTS = frozenset((*_NUMBERS, *FLAGS, "train_mask", "mask", "masks", "loss_masks"))

OF_A_TURN = frozenset((*WEIGHTS, *FLAGS, EXCLUSION, PARTS))


def weight_of_turn(turn: Mapping[str, Any], name: str) -> float | None:
    """The product of all weights and flags of a turn; None if it has none. `name` is the turn's, for errors.

    Raises RecordError (bad_weight) for a value that means a weight but is not a valid one: a text, NaN, Infinity, a
    number below 0 or above float32, a flag that is neither true nor false.
    """
    if turn.keys().isdisjoint(OF_A_TURN):
        return None
    names = [key for key in (*WEIGHTS, *FLAGS, EXCLUSION) if says_weight(key, turn.get(key))]
    weight = product(_read_weight(key, turn[key], f"{key} of {name}") for key in names)
    if turn.get(PARTS):
        raise RecordError(
            "bad_weight", f"{PARTS} of {name} marks parts of its text; give the whole turn a weight, or split the turn"
        )
    return weight


def weights_of_turns(fields: Mapping[str, Any], num_turns: int) -> list[float | None]:
    """The product of all lists of LISTS for each turn, f64[num_turns]; None for a turn that no list gives a weight.

    Raises RecordError (bad_weight) for a list of another length, and as `weight_of_turn` does.
    """
    weights: list[float | None] = [None] * num_turns
    for key in sorted(fields.keys() & LISTS):
        entries = fields[key]
        if not isinstance(entries, list) or not says_weight(key, entries):
            continue
        if len(entries) != num_turns:
            raise RecordError(
                "bad_weight",
                f"{key} has {len(entries):,} entries for {num_turns:,} turns; it must have one for each",
            )
        for position, entry in enumerate(entries):
            own = _read_weight(key, entry, f"entry {position + 1} of {key}")
            weights[position] = product((weights[position], own))
    return weights


def weight_of_record(fields: Mapping[str, Any], weight_field: str | None) -> float:
    """The product of the weight in `weight_field` and the record's own flags, 1.0 without any.

    With `weight_field` None no weight is read. A record without the field has weight 1.0 if the field is "weight", the
    default. If the recipe names the field, its absence is a bad_weight, since a typing error would train everything
    alike. NeMo's `mask: User` is the default and changes nothing; another role's name is a bad_weight.
    """
    weights: list[float | None] = []
    if weight_field is not None and not (weight_field in LISTS and isinstance(fields.get(weight_field), list)):
        value = fields.get(weight_field)
        if weight_field != "weight" and isinstance(value, str):  # of csv
            with suppress(ValueError):
                value = float(value)
        if value is None and weight_field != "weight":
            raise RecordError("bad_weight", f"{weight_field}, the source's weight_field, is missing or null")
        weights.append(_read_weight("weight", value, weight_field))
    for key in sorted(fields.keys() & (LISTS | {EXCLUSION})):
        value = fields[key]
        if key in (weight_field, "weight") or isinstance(value, list):
            continue
        if key == "mask" and isinstance(value, str) and value.strip().lower() in ("assistant", "gpt", "model"):
            raise RecordError("bad_weight", f"mask is {value!r}: it takes the loss from all answers")
        if says_weight(key, value):
            weights.append(_read_weight(key, value, key))
    return math.prod((weight for weight in weights if weight is not None), start=1.0)


def says_weight(key: str, value: object) -> bool:
    """Whether a value under one of the names above means a weight, valid or not.

    Otherwise something else has the same name: a measured loss, the name of a split, nothing.
    """
    if value is None or value == "" or isinstance(value, dict):
        return False
    if isinstance(value, str):
        return key == "weight" or _SWITCH.match(value) is not None
    if key not in ("loss", "train", "training"):
        return True
    if isinstance(value, list):
        return all(says_weight(key, entry) for entry in value if isinstance(entry, int | float))
    is_measured = isinstance(value, int | float) and value not in (0, 1) and 0 <= value <= MAX_FLOAT32
    return not is_measured


# A switch or a number in quotation marks.
_SWITCH = re.compile(r"\s*(?:true|false|yes|no|on|off|[-+\[\d].*)\s*\Z", re.IGNORECASE | re.DOTALL)


def product(weights: Iterable[float | None]) -> float | None:
    """The product of the weights that are not None; None if there is none."""
    known = [weight for weight in weights if weight is not None]
    return math.prod(known) if known else None


def _read_weight(key: str, value: object, name: str) -> float | None:
    """The weight that a value under `key` means; None for null. `name` is the value's, for errors."""
    if value is None:
        return None
    number = float(value) if isinstance(value, Decimal) and not value.is_snan() else value
    shown = show(value) if isinstance(value, str | int | float | Decimal) else kind_of(value)
    if key not in _NUMBERS and (not isinstance(number, int | float) or number not in (0, 1)):
        raise RecordError("bad_weight", f"{name} is {shown}; it must be true or false, without quotation marks")
    if not isinstance(number, int | float) or not 0 <= number <= MAX_FLOAT32:  # not NaN either
        raise RecordError(
            "bad_weight", f"{name} is {shown}; a weight is a number from 0 to {MAX_FLOAT32:.3g}, or true or false"
        )
    if key == EXCLUSION:
        return 0.0 if number else None
    return float(number)
