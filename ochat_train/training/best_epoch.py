"""Which epoch's model is the best, by held-out loss or by a check. Apart, so that reports need not load torch."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple


class Criterion(NamedTuple):
    """What makes a model better: a lower held-out loss, or a higher score of the check `name` under a condition."""

    name: str = "loss"
    condition: str = ""

    @property
    def is_loss(self) -> bool:
        """Whether it is the held-out loss."""
        return self.name == "loss"

    def of(self, event: Mapping[str, Any]) -> float | None:
        """The value of an evaluation, None if it has none."""
        if self.is_loss:
            return event["loss"]  # type: ignore[no-any-return]
        found = ((event.get("checks") or {}).get(self.name) or {}).get(self.condition) or {}
        return found.get("score")


LOSS = Criterion()


class BestEpoch(NamedTuple):
    """An epoch, from 0, the step that ended it, and the value of the criterion there, by default the held-out loss."""

    epoch: int
    step: int
    value: float


def best_epoch(events: Iterable[Mapping[str, Any]], criterion: Criterion = LOSS) -> BestEpoch | None:
    """The epoch whose end has the best value, the first of equals; None if there is none with a value.

    events: lines of metrics.jsonl, of any kind; those that count are evaluations at the end of an epoch.
    """
    sign = 1 if criterion.is_loss else -1
    return min(_epoch_ends(events, criterion), key=lambda end: sign * end.value, default=None)


def num_without_gain(events: Sequence[Mapping[str, Any]], criterion: Criterion) -> int:
    """How many epochs have ended since the best one; 0 before any has a value."""
    best = best_epoch(events, criterion)
    ends = [event for event in events if event["event"] == "eval" and event.get("epoch_end")]
    return 0 if best is None else sum(event["step"] > best.step for event in ends)


def _epoch_ends(events: Iterable[Mapping[str, Any]], criterion: Criterion) -> Iterator[BestEpoch]:
    for event in events:
        if event["event"] == "eval" and event.get("epoch_end") and (value := criterion.of(event)) is not None:
            yield BestEpoch(event["epoch"], event["step"], value)
