"""Loss sums of the held-out split, the same for any number of ranks, and the probe of what conditions change."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ochat_train.model.loss import ConditionSums, zero_sums
from ochat_train.tokens.order import DataOrder
from ochat_train.tokens.plan import PlanShape, plan_epoch
from ochat_train.tokens.prefetch import prefetch
from ochat_train.tokens.recondition import Reconditioned, Selected, frame_of
from ochat_train.tokens.store import Examples, TokenStore
from ochat_train.tokens.tokenizer import ChatTokenizer
from ochat_train.training.data import make_batches
from ochat_train.training.engine import World, is_any, sum_over_ranks


@dataclass(frozen=True, slots=True)
class ConditionProbe:
    """The loss sums of the same held-out answers under three conditions.

    own: under their own condition. other: under the next one of the store's list, the first being next to the last;
    None where the store has only one. none: without a condition. num_left_out: examples that are in none of the sums,
    because one of their three forms is too long. leanings: f64[n] of all examples, how much smaller the mean negative
    log-likelihood of an example's answers is under its own condition than under the other (none, where there is no
    other), in nats a token; nan where it was left out.
    """

    own: ConditionSums
    other: ConditionSums | None
    none: ConditionSums
    num_left_out: int
    leanings: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))


class ExampleSums(NamedTuple):
    """The loss sums of n examples, f64[2, 3, n] as the table of ConditionSums, and their condition_ids, i32[n]."""

    table: Tensor
    condition_ids: npt.NDArray[np.int32]

    def at(self, positions: npt.NDArray[np.int64]) -> "ExampleSums":
        """Those of some examples."""
        return ExampleSums(self.table[:, :, torch.tensor(positions)], self.condition_ids[positions])

    def by_condition(self, num_conditions: int) -> ConditionSums:
        """The sums of each condition."""
        sums = torch.zeros(2, 3, num_conditions, dtype=torch.float64)
        return ConditionSums(sums.index_add(2, torch.tensor(self.condition_ids, dtype=torch.int64), self.table))

    @property
    def mean_nll(self) -> npt.NDArray[np.float64]:
        """f64[n]: of the tokens with a loss, each counting 1."""
        nll, num, _ = self.table[1]
        return np.asarray(nll / num)


class Interrupted(Exception):
    """Raised on all ranks when any of them was asked to stop during an evaluation."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A split, and what runs over it. All ranks call the methods together, which raise Interrupted.

    model: takes a PackedBatch and returns LossSums: a PackedCausalLM or the DeepSpeed engine around it. shape: of the
    micro-batches. progress: called for each batch. is_asked_to_stop: called before each step of micro-batches.
    """

    store: TokenStore
    model: nn.Module
    shape: PlanShape
    world: World
    progress: Callable[[], None] = lambda: None
    is_asked_to_stop: Callable[[], bool] = lambda: False

    def loss_sums(self, examples: Examples | None = None) -> ExampleSums:
        """The sums of all examples of the split, or of `examples`, on the CPU of every rank."""
        examples = self.store if examples is None else examples
        sums = zero_sums(len(examples), self.world.device)
        packed: Any = getattr(self.model, "module", self.model)
        loss_head = packed.loss_head
        order = DataOrder(len(examples), seed=None)
        steps = plan_epoch(examples.lengths, examples.weight_sums, self.shape, order, epoch=0)
        self.model.eval()
        with (
            ExitStack() as afterwards,
            torch.no_grad(),
            tqdm(
                total=len(examples),
                unit=" examples",
                desc="evaluate",
                mininterval=1.0,
                delay=1.0,
                leave=False,
                disable=not self.world.is_main,
            ) as bar,
            prefetch(steps, lambda step: make_batches(examples, step, self.world, by_example=True)) as ready_steps,
        ):
            afterwards.callback(setattr, loss_head, "num_conditions", loss_head.num_conditions)
            for ready in ready_steps:
                if is_any(self.is_asked_to_stop(), self.world):
                    raise Interrupted
                mine = ready.item.bins[self.world.rank // self.world.sequence_parallel :: self.world.num_groups]
                for batch, positions in zip(ready.made, mine, strict=True):
                    self.progress()
                    loss_head.num_conditions = max(1, len(positions))
                    found = self.model(batch.to(self.world.device)).by_condition.table[:, :, : len(positions)]
                    places = torch.tensor(positions, device=self.world.device)
                    sums.table.index_add_(2, places, found.double())
                bar.update(ready.item.num_examples)
        self.model.train()
        return ExampleSums(sum_over_ranks(sums).table, examples.condition_ids)

    def probe_conditions(self, tokenizer: ChatTokenizer, own: ExampleSums, *, max_tokens: int) -> ConditionProbe:
        """The split under its own, another and no condition.

        own: the result of `loss_sums()`. An example that another condition makes longer than `max_tokens`, or that
        cannot be made under it, is left out everywhere, so that all sums are over the same answers.
        """
        store = self.store
        frames = [frame_of(tokenizer, condition) for condition in store.manifest.conditions]
        none = frame_of(tokenizer, "")
        views = {"none": Reconditioned(store, [(own, none) for own in frames])}
        if len(frames) > 1:
            views["other"] = Reconditioned(store, list(zip(frames, frames[1:] + frames[:1], strict=True)))
        fits = np.logical_and.reduce([view.lengths <= max_tokens for view in views.values()])
        kept, num_conditions = np.flatnonzero(fits), len(frames)
        own = own.at(kept)
        found = {name: self.loss_sums(Selected(view, kept)) for name, view in views.items()}
        leanings = np.full(len(store), np.nan)
        leanings[kept] = found.get("other", found["none"]).mean_nll - own.mean_nll
        return ConditionProbe(
            own=own.by_condition(num_conditions),
            other=found["other"].by_condition(num_conditions) if "other" in found else None,
            none=found["none"].by_condition(num_conditions),
            num_left_out=len(store) - len(kept),
            leanings=leanings,
        )
