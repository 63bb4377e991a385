"""Steps without an update, because their gradient was not finite: when they are too many, and what was in them."""

from pathlib import Path
from typing import Any

import orjson
from torch import Tensor

from ochat_train.tokens.plan import StepPlan
from ochat_train.tokens.store import TokenStore
from ochat_train.training.engine import Failed, World, gather_objects

FILE = "skipped-steps.json"


class SkippedSteps:
    """The last steps in a row that were skipped, as this rank saw them."""

    def __init__(self, limit: int, run_dir: Path, store: TokenStore, world: World) -> None:
        self._limit, self._run_dir, self._store, self._world = limit, run_dir, store, world
        self._steps: list[dict[str, Any]] = []

    def note(self, number: int, plan: StepPlan, nll: Tensor, *, is_skipped: bool) -> None:
        """Note a step, by all ranks together; nll f32[M] is the loss sum of each of this rank's micro-batches.

        Raises Failed when it is the last of as many in a row as are allowed, with the ids of their examples in a file.
        """
        if not is_skipped:
            self._steps.clear()
            return
        micro_batches = [
            {
                "rank": self._world.rank,
                "number": position,
                "is_loss_finite": bool(total.isfinite()),
                "examples": [self._store.name(example) for example in examples.tolist()],
            }
            for position, (examples, total) in enumerate(
                zip(plan.bins[self._world.rank :: self._world.size], nll, strict=True), start=1
            )
        ]
        self._steps.append({"step": number, "micro_batches": micro_batches})
        if len(self._steps) < self._limit:
            return
        parts = gather_objects(self._steps)
        if self._world.is_main:
            steps = [
                # The likeliest causes first.
                {
                    "step": same[0]["step"],
                    "micro_batches": sorted(
                        (batch for part in same for batch in part["micro_batches"]), key=lambda b: b["is_loss_finite"]
                    ),
                }
                for same in zip(*parts, strict=True)
            ]
            (self._run_dir / FILE).write_bytes(orjson.dumps(steps, option=orjson.OPT_INDENT_2))
        raise Failed(
            f"the gradients of {self._limit} steps in a row, train.max_skipped, up to step {number} were not finite, "
            f"and nothing was learned from them. Their examples are named in {self._run_dir / FILE}, those first whose "
            "own loss was not finite: look at them; if all are like that, lower optim.lr or look at the model. Started "
            "again, training goes on from the newest checkpoint."
        )
