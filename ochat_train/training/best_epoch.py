"""Which epoch's model is the best on held-out data. Apart from metrics.py, so that reports need not load torch."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class BestEpoch(NamedTuple):
    """An epoch, from 0, the step that ended it, and the held-out loss there."""

    epoch: int
    step: int
    loss: float


def best_epoch(events: Iterable[Mapping[str, Any]]) -> BestEpoch | None:
    """The epoch whose end has the lowest held-out loss, the first of equals; None if there is none with a loss.

    events: lines of metrics.jsonl, of any kind; those that count are evaluations at the end of an epoch.
    """
    ends = [
        BestEpoch(event["epoch"], event["step"], event["loss"])
        for event in events
        if event["event"] == "eval" and event.get("epoch_end") and event["loss"] is not None
    ]
    return min(ends, key=lambda end: end.loss, default=None)
