"""Loss sums of the held-out split, the same for any number of ranks, and the probe of what conditions change."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
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
    because one of their three forms is too long.
    """

    own: ConditionSums
    other: ConditionSums | None
    none: ConditionSums
    num_left_out: int


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

    def loss_sums(self, examples: Examples | None = None, title: str = "evaluate") -> ConditionSums:
        """f64 sums over all examples of the split, or over `examples`, on the CPU of every rank. title: of its bar."""
        examples = self.store if examples is None else examples
        sums = zero_sums(len(self.store.manifest.conditions), self.world.device)
        order = DataOrder(len(examples), seed=None)
        steps = plan_epoch(examples.lengths, examples.weight_sums, self.shape, order, epoch=0)
        self.model.eval()
        with (
            torch.no_grad(),
            tqdm(
                total=len(examples),
                unit=" examples",
                desc=title,
                mininterval=1.0,
                delay=1.0,
                leave=False,
                disable=not self.world.is_main,
            ) as bar,
            prefetch(steps, lambda step: make_batches(examples, step, self.world)) as ready_steps,
        ):
            for ready in ready_steps:
                if is_any(self.is_asked_to_stop(), self.world):
                    raise Interrupted
                for batch in ready.made:
                    self.progress()
                    sums.add(self.model(batch.to(self.world.device)).by_condition)
                bar.update(ready.item.num_examples)
        self.model.train()
        return sum_over_ranks(sums)

    def probe_conditions(self, tokenizer: ChatTokenizer, own_sums: ConditionSums, *, max_tokens: int) -> ConditionProbe:
        """The split under its own, another and no condition.

        own_sums: the result of `loss_sums()`. An example that another condition makes longer than `max_tokens`, or that
        cannot be made under it, is left out everywhere, so that all sums are over the same answers.
        """
        store = self.store
        frames = [frame_of(tokenizer, condition) for condition in store.manifest.conditions]
        none = frame_of(tokenizer, "")
        views = {"none": Reconditioned(store, [(own, none) for own in frames])}
        if len(frames) > 1:
            views["other"] = Reconditioned(store, list(zip(frames, frames[1:] + frames[:1], strict=True)))
        fits = np.logical_and.reduce([view.lengths <= max_tokens for view in views.values()])
        kept, num_left_out = np.flatnonzero(fits), int(np.count_nonzero(~fits))
        return ConditionProbe(
            own=self.loss_sums(Selected(store, kept), "probe, own condition") if num_left_out else own_sums,
            other=self.loss_sums(Selected(views["other"], kept), "probe, another") if "other" in views else None,
            none=self.loss_sums(Selected(views["none"], kept), "probe, none"),
            num_left_out=num_left_out,
        )
