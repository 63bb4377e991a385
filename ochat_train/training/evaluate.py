"""Held-out loss per condition, the same for any number of ranks."""

from collections.abc import Callable

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from ochat_train.tokens.batch import PackedBatch
from ochat_train.tokens.plan import PlanShape, plan_epoch
from ochat_train.tokens.store import TokenStore
from ochat_train.training.engine import World, sum_over_ranks


def evaluate(
    engine: DeepSpeedEngine,
    store: TokenStore,
    shape: PlanShape,
    world: World,
    make_batch: Callable[[list[int]], PackedBatch],
) -> Tensor:
    """Sums f64[3, K] over the whole held-out split, on every rank: nll, weight, tokens of each condition."""
    totals = torch.zeros(3, len(store.manifest.conditions), dtype=torch.float64, device=world.device)
    engine.eval()
    with torch.no_grad():
        for step in plan_epoch(store.lengths, store.weight_sums, shape, seed=None, epoch=0):
            for positions in step.bins[world.rank :: world.size]:
                sums = engine(make_batch(positions.tolist()).to(engine.device))
                totals += torch.stack([sums.nll_by_condition, sums.weight_by_condition, sums.tokens_by_condition])
    engine.train()
    return sum_over_ranks(totals)
