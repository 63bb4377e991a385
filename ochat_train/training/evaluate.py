"""Held-out loss per condition, the same for any number of ranks."""

from collections.abc import Callable

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from ochat_train.tokens.batch import PackedBatch
from ochat_train.tokens.order import DataOrder
from ochat_train.tokens.plan import PlanShape, StepPlan, plan_epoch
from ochat_train.tokens.prefetch import prefetch
from ochat_train.tokens.store import TokenStore
from ochat_train.training.engine import World, sum_over_ranks


def evaluate(
    engine: DeepSpeedEngine,
    store: TokenStore,
    shape: PlanShape,
    world: World,
    make_batches: Callable[[StepPlan], list[PackedBatch]],
) -> Tensor:
    """Sums f64[3, K] over the whole held-out split, on every rank: nll, weight, tokens of each condition.

    make_batches: this rank's micro-batches of a step.
    """
    totals = torch.zeros(3, len(store.manifest.conditions), dtype=torch.float64, device=world.device)
    engine.eval()
    steps = plan_epoch(store.lengths, store.weight_sums, shape, DataOrder(len(store), seed=None), epoch=0)
    with torch.no_grad(), prefetch(steps, make_batches) as ready_steps:
        for ready in ready_steps:
            for batch in ready.made:
                sums = engine(batch.to(engine.device))
                totals += torch.stack([sums.nll_by_condition, sums.weight_by_condition, sums.tokens_by_condition])
    engine.train()
    return sum_over_ranks(totals)
