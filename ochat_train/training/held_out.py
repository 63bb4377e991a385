"""Held-out sums per condition, the same for any number of ranks, and the probe of what conditions change."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from ochat_train.tokens.batch import PackedBatch
from ochat_train.tokens.order import DataOrder
from ochat_train.tokens.plan import PlanShape, StepPlan, plan_epoch
from ochat_train.tokens.prefetch import prefetch
from ochat_train.tokens.recondition import Reconditioned, Selected, make_frame
from ochat_train.tokens.store import Examples, TokenStore
from ochat_train.tokens.tokenizer import ChatTokenizer
from ochat_train.training.engine import sum_over_ranks

# This rank's micro-batches of a step of the examples' plan.
MakeBatches = Callable[[Examples, StepPlan], list[PackedBatch]]


@dataclass(frozen=True, slots=True)
class Probe:
    """The same held-out answers under three conditions, as sums f64[2, 3, K] by their own condition.

    own: under it. other: under the next one of the store's list, the first being next to the last; None where the store
    has one condition alone. none: under no condition. num_left_out: examples that are in none of the sums, because one
    of the three is too long.
    """

    own: Tensor
    other: Tensor | None
    none: Tensor
    num_left_out: int


def evaluate(
    engine: DeepSpeedEngine, examples: Examples, shape: PlanShape, make_batches: MakeBatches, num_conditions: int
) -> Tensor:
    """Sums f64[2, 3, K] over all examples and ranks, on the CPU of every rank; see LossSums.by_condition."""
    totals = torch.zeros(2, 3, num_conditions, dtype=torch.float64, device=engine.device)
    steps = plan_epoch(examples.lengths, examples.weight_sums, shape, DataOrder(len(examples), seed=None), epoch=0)
    engine.eval()
    with torch.no_grad(), prefetch(steps, lambda step: make_batches(examples, step)) as ready_steps:
        for ready in ready_steps:
            for batch in ready.made:
                totals += engine(batch.to(engine.device)).by_condition
    engine.train()
    return sum_over_ranks(totals).cpu()


def probe_conditions(
    engine: DeepSpeedEngine,
    store: TokenStore,
    tokenizer: ChatTokenizer,
    shape: PlanShape,
    make_batches: MakeBatches,
    own_sums: Tensor,
    *,
    max_tokens: int,
) -> Probe:
    """The held-out split `store` under its own, another and no condition.

    own_sums: what `evaluate` gives for it, f64[2, 3, K]. An example that another condition makes longer than
    `max_tokens` is left out everywhere, so that the sums are over the same answers.
    """
    conditions = store.manifest.conditions
    frames = [make_frame(tokenizer, condition) for condition in conditions]
    none = make_frame(tokenizer, "")
    views = {"none": Reconditioned(store, [(own, none) for own in frames])}
    if len(frames) > 1:
        views["other"] = Reconditioned(store, list(zip(frames, frames[1:] + frames[:1], strict=True)))
    fits = np.logical_and.reduce([view.lengths <= max_tokens for view in views.values()])
    kept, num_left_out = np.flatnonzero(fits), int(np.count_nonzero(~fits))

    def sums(examples: Examples) -> Tensor:
        return evaluate(engine, Selected(examples, kept), shape, make_batches, len(conditions))

    return Probe(
        own=sums(store) if num_left_out else own_sums,
        other=sums(views["other"]) if "other" in views else None,
        none=sums(views["none"]),
        num_left_out=num_left_out,
    )
