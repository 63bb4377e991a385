"""The loss weights that a record itself gives: flags on its turns, lists beside them, and a weight of the whole."""

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

MAX_FLOAT32 = (2 - 2**-23) * 2.0**127  # weights are stored as float32

WEIGHTS = ("weight", "loss_weight", "loss_scale")  # a number of at least 0, or true or false
# True, false, 1 or 0; what is false has no loss.
FLAGS = ("train", "trainable", "training", "loss", "loss_mask", "output_with_loss")
EXCLUSIONS = ("masked",)  # true, false, 1 or 0; what is true has no loss, and what is false is as its role says
PARTS = ("train_detail",)  # marks parts of a text, and here a whole turn has one weight

# Beside the turns: a list with an entry for each turn, or one value for all of them.
_NUMBERS = (*WEIGHTS, "weights", "loss_weights", "turn_weights")
LISTS = frozenset((*_NUMBERS, *FLAGS, "train_mask", "mask", "masks", "loss_masks"))

OF_A_TURN = frozenset((*WEIGHTS, *FLAGS, *EXCLUSIONS, *PARTS))


class BadWeight(ValueError):
    """A weight that is none; the message says which and why."""


def says_weight(key: str, value: object) -> bool:
    """Whether a value under one of the names above speaks of a weight, if only of one that is none.

    Else it is something of the same name: a measured loss, the name of a split, nothing.
    """
    if value is None or value == "" or isinstance(value, dict):
        return False
    if isinstance(value, str):
        return key == "weight" or _SWITCH.match(value) is not None
    is_measured = isinstance(value, int | float) and value not in (0, 1) and 0 <= value <= MAX_FLOAT32
    if key in ("loss", "train", "training") and isinstance(value, list):
        return not any(isinstance(entry, int | float) and says_weight(key, entry) is False for entry in value)
    return not (key in ("loss", "train", "training") and is_measured)


# A switch or a number that stands in quotation marks.
_SWITCH = re.compile(r"\s*(?:true|false|yes|no|on|off|[-+\[\d].*)\s*\Z", re.IGNORECASE | re.DOTALL)


def weight_of_turn(turn: Mapping[str, Any], name: str) -> float | None:
    """The product of all weights and flags of a turn; None if it has none. `name` says which turn, for errors.

    Raises BadWeight for what speaks of a weight and is none: a text, NaN, Infinity, a number below 0 or above float32,
    a flag that is neither true nor false.
    """
    if turn.keys().isdisjoint(OF_A_TURN):
        return None
    weight = None
    for key in (*WEIGHTS, *FLAGS, *EXCLUSIONS):
        if not says_weight(key, turn.get(key)):
            continue
        if key in EXCLUSIONS:
            weight = 0.0 if _times(None, turn[key], f"{key} of {name}", is_flag=True) else weight
        else:
            weight = _times(weight, turn[key], f"{key} of {name}", is_flag=key in FLAGS)
    for key in PARTS:
        if turn.get(key):
            raise BadWeight(f"{key} of {name} marks parts of its text; give the whole turn a weight, or split the turn")
    return weight


def weights_of_turns(fields: Mapping[str, Any], num_turns: int) -> list[float | None]:
    """The product of all lists of LISTS for each turn, f64[num_turns]; None for a turn to which none says anything.

    Raises BadWeight for a list of another length, and as `weight_of_turn` does.
    """
    weights: list[float | None] = [None] * num_turns
    for key in sorted(fields.keys() & LISTS):
        entries = fields[key]
        if not isinstance(entries, list) or not says_weight(key, entries):
            continue
        if len(entries) != num_turns:
            raise BadWeight(f"{key} has {len(entries):,} entries beside {num_turns:,} turns; it must have one for each")
        for position, entry in enumerate(entries):
            name = f"entry {position + 1} of {key}"
            weights[position] = _times(weights[position], entry, name, is_flag=key not in _NUMBERS)
    return weights


def weight_of_record(fields: Mapping[str, Any], field: str | None) -> float:
    """The product of the weight in `field` and the record's own flags, 1.0 without any.

    `field` None reads no weight. A record without the field has weight 1.0 if the field is "weight", the default, and
    is a BadWeight if somebody named the field, since a typing error would train everything alike. NeMo's `mask: User`
    says what is so anyway, and another role's name is a BadWeight.
    """
    weight = None
    if field is not None and not (field in LISTS and isinstance(fields.get(field), list)):
        value = fields.get(field)
        if value is None and field != "weight":
            raise BadWeight(f"{field}, which the source names as weight_field, is missing or null")
        weight = _times(weight, value, field)
    for key in sorted(fields.keys() & (LISTS | {*EXCLUSIONS})):
        value = fields[key]
        if key in (field, "weight") or isinstance(value, list):
            continue
        if key == "mask" and isinstance(value, str) and value.strip().lower() in ("assistant", "gpt", "model"):
            raise BadWeight(f"mask is {value!r}: it takes the loss from all answers")
        if not says_weight(key, value):
            continue
        if key in EXCLUSIONS:
            weight = 0.0 if _times(None, value, key, is_flag=True) else weight
        else:
            weight = _times(weight, value, key, is_flag=key not in _NUMBERS)
    return 1.0 if weight is None else weight


def _times(weight: float | None, value: object, name: str, *, is_flag: bool = False) -> float | None:
    """`weight` times the value, where None stands for nothing said."""
    if value is None:
        return weight
    number = float(value) if isinstance(value, Decimal) and not value.is_snan() else value
    shown = f"{value!r:.80}" if isinstance(value, str | int | float | Decimal) else "a list or an object"
    if is_flag and (not isinstance(number, int | float) or number not in (0, 1)):
        raise BadWeight(f"{name} is {shown}; it must be true or false, without quotation marks")
    if not isinstance(number, int | float) or not 0 <= number <= MAX_FLOAT32:  # NaN is not between them either
        raise BadWeight(f"{name} is {shown}; a weight is a number from 0 to {MAX_FLOAT32:.3g}, or true or false")
    return (1.0 if weight is None else weight) * float(number)
