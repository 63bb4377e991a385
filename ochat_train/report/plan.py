"""What a run would do: read_plans(requests) -> PlanReport of each, the numbers and a few steps to look at."""

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from ochat_train.conversations.described import read_template
from ochat_train.gpus import usable_gpus
from ochat_train.model.pretrained import load_config
from ochat_train.preprocess.job import check_moved
from ochat_train.recipe import Recipe, load_recipe
from ochat_train.tokens.packing import cost_of
from ochat_train.tokens.plan import PlanTable, RunPlan, StepPlan, make_table
from ochat_train.tokens.store import Manifest, TokenStore
from ochat_train.tokens.tokenizer import load_tokenizer
from ochat_train.training.data import check_store, make_run_plan, trained_rows
from ochat_train.training.resources import AvailableMemory, find_memory, plan_memory, size_of
from ochat_train.training.speed import (
    MACHINES,
    Machine,
    Prediction,
    Rate,
    measured_rate,
    predict,
    speed_sections,
    work_of,
)

_MOST_GPUS = 65_536
_CPU_PROCESSES = 2  # that launch.sh starts on a machine without GPUs
_WINDOW = 65_536  # examples counted at once
_MOST_RANKS = 32  # of a picture; of more ranks it shows a selection
_SELECTED_RANKS = 16
_GPU_BYTES = 85 * 10**9  # that torch finds in an A100 or H100 of 80 GB
THIS_MACHINE = "this machine"  # how the name of a prediction's machine begins


# ----------------------------------------------------------------------------------------------- what is asked


@dataclass(frozen=True, slots=True)
class Request:
    """Which plan is asked for: a recipe's file with overrides, on `num_gpus`, each doing `tokens_per_s` if not None."""

    recipe: str
    overrides: tuple[str, ...]
    num_gpus: int
    tokens_per_s: float | None


def read_requests(recipe: str, words: Sequence[str], versus: Sequence[str] | None) -> list[Request]:
    """The plan, or the two plans, that a command line asks for.

    words: gpus=N, tokens_per_s=X, and overrides of the recipe; the default of N is the number of processes that
    launch.sh would start here. versus: the second plan's. A first word without "=" is another recipe; else it is the
    first recipe with the first's overrides and these on top. Raises ValueError for what cannot be.
    """
    num_gpus = usable_gpus() or _CPU_PROCESSES
    first = _add_words(Request(recipe, (), num_gpus, None), words)
    if versus is None:
        return [first]
    if not versus:
        raise ValueError("--vs has no words after it; name another recipe, or what differs, such as gpus=64")
    if "=" in versus[0]:
        return [first, _add_words(replace(first, tokens_per_s=None), versus)]
    return [first, _add_words(Request(versus[0], (), first.num_gpus, None), versus[1:])]


def _add_words(request: Request, words: Sequence[str]) -> Request:
    for word in words:
        key, _, value = word.partition("=")
        if key == "gpus":
            request = replace(request, num_gpus=_read_gpus(value))
        elif key == "tokens_per_s":
            request = replace(request, tokens_per_s=_read_rate(value))
        else:
            others = [other for other in request.overrides if other.partition("=")[0] != key]
            request = replace(request, overrides=(*others, word))
    return request


def _read_gpus(text: str) -> int:
    if text.isdecimal() and 1 <= int(text) <= _MOST_GPUS:
        return int(text)
    raise ValueError(f"gpus {text!r} is not a whole number from 1 to {_MOST_GPUS:,}; give one, such as gpus=8")


def _read_rate(text: str) -> float:
    with suppress(ValueError):
        if 0 < (rate := float(text)) < math.inf:
            return rate
    raise ValueError(
        f"tokens_per_s {text!r} is not a number above 0; give the tokens a second of one GPU, such as tokens_per_s=3000"
    )


# ------------------------------------------------------------------------------------------------------- facts


class SourceTotals(NamedTuple):
    """What the run draws of one source. epochs: passes over it in an epoch of the run."""

    epochs: float
    num_examples: int
    num_tokens: int
    weight_sum: float


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The sequences of a micro-batch: source_ids i32[n]; costs i64[n], times the shape's quadratic length."""

    source_ids: npt.NDArray[np.int32]
    costs: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StepPicture:
    """A step to look at, and why: `names`, such as first, worst.

    number: from 1. rows: of each rank shown, or the first of those that share them, its micro-batches. ends:
    i64[grad_accum], when the last rank has finished each micro-batch and all begin the next, in the unit of costs.
    """

    names: tuple[str, ...]
    number: int
    num_examples: int
    num_tokens: int
    balance: float
    rows: dict[int, tuple[MicroBatch, ...]]
    ends: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PlanReport:
    """The facts about a plan.

    table: the steps that are trained, all those of `whole` unless train.max_steps stops the run. balances: f64[steps],
    the share of a step's modelled time in which ranks do not wait. is_epoch_end: bool[steps], those that are as small
    as they come. sources: in the store's order. scaled: of the sources whose weight is another than the store's, the
    store's and theirs. predictions: how long the run takes on this machine, if it has GPUs, and on others; none of a
    model that is not trained in bfloat16. rate: None if unknown.
    """

    request: Request
    recipe: Recipe
    fingerprint: str
    table: PlanTable
    whole: PlanTable
    balances: npt.NDArray[np.float64]
    is_epoch_end: npt.NDArray[np.bool_]
    sources: dict[str, SourceTotals]
    scaled: dict[str, tuple[float, float]]
    pictures: tuple[StepPicture, ...]
    predictions: tuple[Prediction, ...]
    rate: Rate | None

    @property
    def num_examples(self) -> int:
        """Examples of all steps."""
        return int(self.table.rows["num_examples"].sum())

    @property
    def cost(self) -> float:
        """The modelled time of all steps: what ranks wait for, in the cost of a token without its attention."""
        return self.table.waits / self.table.shape.quadratic_length

    @property
    def seconds(self) -> float | None:
        """Wall time of all steps; None if the rate is not known."""
        return None if self.rate is None else self.table.num_tokens / (self.rate.tokens_per_s * self.request.num_gpus)

    @property
    def metrics(self) -> Path:
        """Where a run of this recipe writes what it measures."""
        return Path(self.recipe.checkpoint.dir) / "metrics.jsonl"

    @property
    def worst_step(self) -> int:
        """The worst balanced step, from 0, among those that are full, if any is."""
        return int(_by_balance(self.balances, self.is_epoch_end)[0])


def read_plans(requests: Sequence[Request]) -> tuple[PlanReport, ...]:
    """The facts about each plan; the wall time of a second one may be modelled on the first's.

    Raises ValueError with the remedy for a recipe, a store or a shape with which no plan can be made.
    """
    reports: list[PlanReport] = []
    for request in requests:
        report = _read_plan(request)
        reports.append(replace(report, rate=_find_rate(report, reports[0] if reports else None)))
    return tuple(reports)


def _read_plan(request: Request) -> PlanReport:
    """All but the rate."""
    recipe = load_recipe(request.recipe, request.overrides)
    store = TokenStore(recipe.data.store, loss=recipe.train.loss)
    tokenizer = load_tokenizer(recipe.tokenizer_name, read_template(recipe.template_json))
    check_store(_with_weights_of(recipe, store.manifest), store.manifest, tokenizer)
    check_moved(recipe, store.manifest)
    scaled = _changed_weights(recipe, store.manifest)
    config = load_config(recipe.model.base, recipe.model.config, tokenizer.num_ids)
    plan = _scale(make_run_plan(recipe, store, config, request.num_gpus), store, scaled)
    whole = make_table(plan)
    table = PlanTable(whole.rows[: recipe.train.max_steps], whole.shape)
    ends = np.cumsum(table.rows["num_examples"])
    is_epoch_end = np.isin(ends, [plan.order.total(epoch + 1) for epoch in range(plan.num_epochs)])
    balances = table.rows["cost"] / (table.shape.world_size * table.rows["waits"])
    return PlanReport(
        request=request,
        recipe=recipe,
        fingerprint=store.fingerprint,
        table=table,
        whole=whole,
        balances=balances,
        is_epoch_end=is_epoch_end,
        sources=_count_sources(recipe, store, plan, int(ends[-1])),
        scaled=scaled,
        pictures=tuple(
            _take_picture(store, plan, table, recipe.packing.sequence_parallel, number, names)
            for number, names in _choose_steps(balances, is_epoch_end).items()
        ),
        predictions=_predict(recipe, config, table, len(trained_rows(recipe, tokenizer))),
        rate=None,
    )


# ---- Other weights than the store's ----


def _with_weights_of(recipe: Recipe, manifest: Manifest) -> Recipe:
    """The recipe with the weights that the store was made with, if its sources are the store's."""
    made = manifest.made_from["data"]["sources"]
    if len(made) != len(recipe.data.sources):
        return recipe
    sources = tuple(
        source.model_copy(update={"weight": old["weight"]})
        for source, old in zip(recipe.data.sources, made, strict=True)
    )
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"sources": sources})})


def _changed_weights(recipe: Recipe, manifest: Manifest) -> dict[str, tuple[float, float]]:
    """Of each source whose weight is not the one that its examples were made with: that one, and the recipe's."""
    made = manifest.made_from["data"]["sources"]
    changed = {}
    for number, (source, old) in enumerate(zip(recipe.data.sources, made, strict=True)):
        if source.weight == old["weight"]:
            continue
        if not source.weight or not old["weight"]:  # preprocess leaves out what has no weight
            raise ValueError(
                f"data.sources.{number}.weight: {old['weight']:g} -> {source.weight:g}, which cannot be tried on the "
                "store: the examples of a source of weight 0 are not in it. Run ochat preprocess with "
                "this recipe first."
            )
        changed[source.name] = old["weight"], source.weight
    return changed


def _scale(plan: RunPlan, store: TokenStore, scaled: dict[str, tuple[float, float]]) -> RunPlan:
    """The plan with the weights of some sources scaled from the first number to the second."""
    if not scaled:
        return plan
    factors = [new / old for old, new in (scaled.get(name, (1.0, 1.0)) for name in store.manifest.sources)]
    return replace(plan, weight_sums=plan.weight_sums * np.array(factors)[store.source_ids])


# ---- Sources ----


def _count_sources(recipe: Recipe, store: TokenStore, plan: RunPlan, num_examples: int) -> dict[str, SourceTotals]:
    """What the first `num_examples` of the run are, a window at a time."""
    epochs = {source.name: source.epochs for source in recipe.data.sources}
    names = list(epochs)
    examples, tokens, weights = (np.zeros(len(names)) for _ in range(3))  # whole numbers are exact up to 2^53
    with tqdm(total=num_examples, unit=" examples", desc="sources", delay=5) as bar:
        for epoch in range(plan.num_epochs):
            order = plan.order.examples(epoch)
            num_here = min(plan.order.num_examples(epoch), num_examples - plan.order.total(epoch))
            for start in range(0, num_here, _WINDOW):
                positions = order[start : min(start + _WINDOW, num_here)]
                source_ids = store.source_ids[positions]
                examples += np.bincount(source_ids, minlength=len(names))
                tokens += np.bincount(source_ids, store.lengths[positions], len(names))
                weights += np.bincount(source_ids, plan.weight_sums[positions], len(names))
                bar.update(len(positions))
    columns = (examples.astype(int).tolist(), tokens.astype(int).tolist(), weights.tolist())
    return {name: SourceTotals(epochs[name], *row) for name, row in zip(names, zip(*columns, strict=True), strict=True)}


# ---- Pictures ----


def _by_balance(balances: npt.NDArray[np.float64], is_epoch_end: npt.NDArray[np.bool_]) -> npt.NDArray[np.intp]:
    """The full steps, the worst balanced first; all steps where none is full."""
    steps = np.flatnonzero(is_epoch_end == is_epoch_end.all())
    return steps[np.argsort(balances[steps], kind="stable")]


def _choose_steps(balances: npt.NDArray[np.float64], is_epoch_end: npt.NDArray[np.bool_]) -> dict[int, tuple[str, ...]]:
    """The steps, from 0, that are worth a look, and why."""
    by_balance = _by_balance(balances, is_epoch_end)
    found = {
        "first": 0,
        "of median balance": int(by_balance[len(by_balance) // 2]),
        "worst balanced": int(by_balance[0]),
        "last": len(balances) - 1,
    }
    return {number: tuple(name for name in found if found[name] == number) for number in found.values()}


def _take_picture(
    store: TokenStore, plan: RunPlan, table: PlanTable, shared: int, number: int, names: tuple[str, ...]
) -> StepPicture:
    step = next(plan.steps(int(table.rows["num_examples"][:number].sum())))
    table.check(number, step)
    shape = plan.shape
    costs = step.costs.reshape(shape.grad_accum, shape.world_size)
    ranks = np.arange(shape.world_size)
    if shape.world_size > _MOST_RANKS:  # the lightest, some between, the heaviest
        places = np.linspace(0, shape.world_size - 1, _SELECTED_RANKS).round().astype(int)
        ranks = np.argsort(costs.sum(axis=0), kind="stable")[places]
    return StepPicture(
        names=names,
        number=number + 1,
        num_examples=step.num_examples,
        num_tokens=step.num_tokens,
        balance=shape.efficiency(int(costs.sum()), shape.waits(step.costs)),
        rows={rank * shared: _micro_batches(store, plan, step, rank) for rank in ranks.tolist()},
        ends=np.cumsum(costs.max(axis=1)),
    )


def _micro_batches(store: TokenStore, plan: RunPlan, step: StepPlan, rank: int) -> tuple[MicroBatch, ...]:
    found = []
    for positions in step.bins[rank :: plan.shape.world_size]:
        costs = [cost_of(length, plan.shape.quadratic_length) for length in store.lengths[positions].tolist()]
        found.append(MicroBatch(store.source_ids[positions], np.array(costs, np.int64)))
    return tuple(found)


# ---- Wall time ----


def _predict(recipe: Recipe, config: Any, table: PlanTable, num_rows: int) -> tuple[Prediction, ...]:
    """How long the steps take on this machine's GPUs, if it has any, and on other machines."""
    work = work_of(recipe, config, table, "full")  # each machine's own checkpointing below
    if work is None:
        return ()
    shared = recipe.packing.sequence_parallel
    machines = [machine for machine in MACHINES if machine.num_devices % shared == 0]
    if torch.cuda.is_available():
        num_gpus = table.shape.world_size * shared
        device = torch.cuda.get_device_name()
        machines.insert(0, Machine(f"{THIS_MACHINE}: {num_gpus:,} x {device}", device, num_gpus))
    policies: dict[tuple[bool, int], str] = {}  # counting activations of a large model takes seconds
    found: list[Prediction] = []
    for machine in machines:
        key = machine in MACHINES, machine.num_devices
        if key not in policies:
            policies[key] = _policy_on(machine, recipe, config, num_rows)
        found += predict(replace(work, checkpointing=policies[key]), machine)
    return tuple(found)


def _policy_on(machine: Machine, recipe: Recipe, config: Any, num_rows: int) -> str:
    """The recipe's checkpointing; for auto what it chooses on such a machine: those of MACHINES have GPUs of 80 GB."""
    if recipe.model.checkpointing != "auto":
        return recipe.model.checkpointing
    memory = find_memory()
    if machine in MACHINES:
        memory = AvailableMemory(_GPU_BYTES, memory.host_bytes, is_here=False)
    with suppress(ValueError):  # of a model whose activations cannot be counted; training takes full then
        return plan_memory(recipe, memory, config, size_of(recipe, config, num_rows), machine.num_devices).policy
    return "full"


def _find_rate(report: PlanReport, first: PlanReport | None) -> Rate | None:
    """The rate that is given, or was measured in the recipe's run folder, or follows from the first plan's.

    Without any of these it is what is predicted for this machine's GPUs.

    The time of a plan is that of its heaviest micro-batches, in which all ranks wait, so seconds grow with `cost`.
    """
    if report.request.tokens_per_s is not None:
        return Rate(report.request.tokens_per_s, "given")
    # What was measured in the first's folder is the first's.
    is_own = first is None or first.metrics != report.metrics
    if is_own and (rate := measured_rate(report.request.recipe, report.recipe)) is not None:
        return rate
    if first is None or first.seconds is None or speed_sections(first.recipe) != speed_sections(report.recipe):
        here = (prediction for prediction in report.predictions if prediction.machine.name.startswith(THIS_MACHINE))
        return next((Rate(found.tokens_per_s, "modelled", basis=found.basis) for found in here), None)
    seconds = first.seconds * report.cost / first.cost
    return Rate(report.table.num_tokens / (seconds * report.request.num_gpus), "modelled")
