"""A token store to checkpoints and an exported model.

    deepspeed [launcher options] --module ochat_train.train RECIPE [key=value ...]

Without a launcher it runs as one process. Rerun after an interruption, it continues from the newest checkpoint.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine

from ochat_train.conversations.template import TEMPLATES
from ochat_train.export import export, is_export_of
from ochat_train.model.packed_lm import PackedCausalLM
from ochat_train.model.pretrained import load_config, load_model
from ochat_train.recipe import Recipe, load_recipe, recipe_arguments, to_json
from ochat_train.tokens.batch import PackedBatch, collate
from ochat_train.tokens.order import Indices
from ochat_train.tokens.plan import RunPlan, StepPlan, digest_index
from ochat_train.tokens.plan_ahead import PlanAhead, PlanTable
from ochat_train.tokens.prefetch import Ready, prefetch
from ochat_train.tokens.store import Manifest, TokenStore
from ochat_train.tokens.tokenizer import ChatTokenizer, load_tokenizer
from ochat_train.training.checkpoint import (
    Checkpoint,
    TrainState,
    check_resume,
    find_resume,
    load_checkpoint,
    remove_leftovers,
    save_checkpoint,
)
from ochat_train.training.engine import (
    Refused,
    World,
    deepspeed_config,
    gather_objects,
    join_process_group,
    make_engine,
    make_optimizer,
    read_world,
    sum_and_gather,
    together,
    train_step,
)
from ochat_train.training.evaluate import evaluate
from ochat_train.training.metrics import Metrics, StepReport, describe_run
from ochat_train.training.planning import check_lengths, check_store, make_run_plan
from ochat_train.training.schedule import auto_learning_rate, learning_rate


@dataclass(frozen=True, slots=True)
class Run:
    """All that is known before the model is loaded."""

    recipe: Recipe
    store: TokenStore
    held_out: TokenStore
    tokenizer: ChatTokenizer
    plan: RunPlan
    peak_lr: float
    resumed: Checkpoint | None

    @property
    def dir(self) -> Path:
        """The run's folder."""
        return Path(self.recipe.checkpoint.dir)

    @property
    def start(self) -> TrainState:
        """Where the run begins, or goes on."""
        if self.resumed is not None:
            return self.resumed.state
        return TrainState(0, 0, 0, 0, self.store.fingerprint, to_json(self.recipe), self.plan.order.digest)

    def is_finished(self, state: TrainState) -> bool:
        """Whether nothing is left to train."""
        max_steps = self.recipe.train.max_steps
        is_stopped = max_steps is not None and state.step >= max_steps
        return is_stopped or state.examples_consumed >= self.plan.num_examples


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the recipe."""
    parser = argparse.ArgumentParser(prog="deepspeed --module ochat_train.train", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher's; the environment has it too
    recipe_arguments(parser)
    options = parser.parse_args(arguments)
    world = read_world()
    _use_own_share_of_cores()
    join_process_group(world)
    try:
        run = together(lambda: prepare(load_recipe(options.recipe, options.overrides), world))
        last = train(run, world)
    except Refused as error:  # the same on every rank: one of them tells
        sys.exit(f"error: {error}" if world.is_main else 1)
    # Only here: a rank that fails must die at once, so that the launcher ends the others, and not wait for them.
    dist.destroy_process_group()
    if world.is_main:  # the others need not wait for the export
        export_model(run, last)


def train(run: Run, world: World) -> Path:
    """Train to the end of the run, or to train.max_steps; returns the last checkpoint.

    All ranks call it together, in one process group. Raises Refused when they disagree, or the model cannot be used.
    """
    _check_agreement(run)
    if run.resumed is not None and run.is_finished(run.resumed.state):
        _say(world, f"the run is complete at step {run.resumed.state.step} ({run.resumed.path}); nothing to train")
        return run.resumed.path
    return _train(run, world)


def export_model(run: Run, checkpoint: Path) -> None:
    """Export the checkpoint to checkpoint.dir/model, unless that is what is there."""
    out = run.dir / "model"
    if not is_export_of(out, checkpoint):
        export(checkpoint, out)
        print(f"exported {checkpoint} to {out}", flush=True)


def prepare(recipe: Recipe, world: World) -> Run:
    """Open and check everything that is cheap. Raises ValueError with the remedy."""
    store, held_out = TokenStore(recipe.data.store, "train"), TokenStore(recipe.data.store, "eval")
    tokenizer = load_tokenizer(recipe.tokenizer_name, TEMPLATES[recipe.template])
    check_store(recipe, store.manifest, tokenizer)
    config = load_config(recipe.model.base, recipe.model.config, tokenizer.num_ids).get_text_config()
    run = Run(
        recipe=recipe,
        store=store,
        held_out=held_out,
        tokenizer=tokenizer,
        plan=make_run_plan(recipe, store, config, world.size),
        peak_lr=peak_learning_rate(recipe, config, store.manifest, world.size),
        resumed=find_resume(Path(recipe.checkpoint.dir), recipe.checkpoint.resume),
    )
    check_lengths(held_out, recipe.packing.tokens_per_gpu)
    deepspeed_configuration(recipe)
    if run.resumed is not None:
        check_resume(
            run.resumed,
            recipe=to_json(recipe),
            store_fingerprint=store.fingerprint,
            order=run.plan.order.digest,
            world_size=world.size,
        )
    return run


def peak_learning_rate(recipe: Recipe, config: object, manifest: Manifest, world_size: int) -> float:
    """The recipe's learning rate, or the published rule's for `auto`."""
    if recipe.optim.lr != "auto":
        return recipe.optim.lr
    train = manifest.splits["train"]
    tokens_per_step = recipe.packing.tokens_per_gpu * world_size * recipe.packing.grad_accum
    return auto_learning_rate(config, tokens_per_step * train["num_supervised_tokens"] / train["num_tokens"])


def deepspeed_configuration(recipe: Recipe) -> dict[str, object]:
    """The DeepSpeed configuration that the recipe means."""
    return deepspeed_config(
        stage=recipe.zero.stage,
        offload=recipe.zero.offload,
        dtype=recipe.model.dtype,
        grad_accum=recipe.packing.grad_accum,
        grad_clip=recipe.optim.grad_clip,
        extra=recipe.deepspeed,
    )


def _train(run: Run, world: World) -> Path:
    """The loop; returns the last checkpoint."""
    recipe, store, state, last = run.recipe, run.store, run.start, run.dir
    if world.is_main and (leftovers := remove_leftovers(run.dir)):
        _say(world, f"removed {', '.join(leftovers)}: a save that was cut off")
    ahead = PlanAhead(
        run.plan,
        state.examples_consumed,
        folder=run.dir / "plan" / f"rank-{world.rank - world.local_rank:05d}",  # of a node's first, so the node's own
        is_planner=world.local_rank == 0,
    )
    engine = build_engine(run, world)
    attention = engine.module.attention
    _say(world, f"attention backend {attention.backend} ({attention.reason}); peak learning rate {run.peak_lr:.3g}")
    about = describe_run(recipe, world.size, attention.backend) if world.is_main else {}
    if run.resumed is not None:
        load_checkpoint(engine, run.resumed, world)
        last = run.resumed.path
        _say(world, f"continuing {last} at step {state.step}, {state.examples_consumed:,} examples consumed")
    table = _agree_on_steps(ahead)
    num_steps = min(state.step + table.num_steps, recipe.train.max_steps or sys.maxsize)
    _say(world, describe_plan(table, state.step, num_steps))
    conditions = store.manifest.conditions
    with (
        Metrics(
            recipe,
            run.dir,
            conditions,
            start=state.step,
            num_steps=num_steps,
            total_examples=run.plan.num_examples,
            is_main=world.is_main,
        ) as metrics,
        prefetch(_checked_steps(run, table), lambda step: make_batches(store, step, world)) as steps,
    ):
        if state.step == 0:
            _evaluate(run, engine, world, metrics, state)
        started = time.perf_counter()
        for ready in steps:
            state, report = _one_step(run, engine, world, state, ready, started)
            metrics.step(report)
            is_epoch_end = run.plan.order.seek(state.examples_consumed)[1] == 0
            if is_epoch_end or run.is_finished(state):
                _evaluate(run, engine, world, metrics, state)
            if _is_save_due(run, state, is_epoch_end):
                last = run.dir / f"step-{state.step:08d}"
                checkpoint = Checkpoint(
                    path=last,
                    state=state,
                    world_size=world.size,
                    template=recipe.template,
                    inference_condition=store.manifest.inference_condition,
                    conditions=conditions,
                    run=about,
                )
                save_checkpoint(engine, checkpoint, world, run.tokenizer, keep=recipe.checkpoint.keep)
            if run.is_finished(state):
                break
            started = time.perf_counter()
    return last


def build_engine(run: Run, world: World) -> DeepSpeedEngine:
    """The recipe's model in a DeepSpeed engine, ready to train. Raises Refused when the model cannot be used."""
    recipe, model = run.recipe, together(lambda: build_model(run, world))
    torch.manual_seed(recipe.train.seed + world.rank)  # of dropout, if the model has any
    optimizer = make_optimizer(
        model,
        algorithm=recipe.optim.algorithm,
        lr=run.peak_lr,
        betas=recipe.optim.betas,
        eps=recipe.optim.eps,
        weight_decay=recipe.optim.weight_decay,
    )
    return make_engine(model, optimizer, deepspeed_configuration(recipe))


def build_model(run: Run, world: World) -> PackedCausalLM:
    """The recipe's model on the CPU. Raises ValueError when it cannot be loaded or not be used on packed batches."""
    recipe = run.recipe
    lm = load_model(
        recipe.model.base,
        recipe.model.config,
        dtype=recipe.model.dtype,
        num_ids=run.tokenizer.num_ids,
        added_ids=run.store.manifest.added_tokens.values(),
        seed=recipe.train.seed,
    )
    return PackedCausalLM(
        lm,
        attention=recipe.model.attention,
        device_type=world.device.type,
        checkpointing=recipe.model.checkpointing == "full",
        num_conditions=len(run.store.manifest.conditions),
    )


def describe_plan(table: PlanTable, step: int, num_steps: int) -> str:
    """One line about the steps that are left behind `step`, of which the run ends with step `num_steps`."""
    left = f" left of {step + table.num_steps:,}" if step else ""
    stop = f", stopped by train.max_steps at step {num_steps:,}" if num_steps < step + table.num_steps else ""
    return (
        f"plan: {table.num_steps:,} steps{left}{stop}, {table.num_tokens:,} tokens, weight {table.weight_sum:,.6g}; "
        f"{100 * table.fill:.1f} % of the micro-batches filled, costs of ranks {100 * table.efficiency:.1f} % balanced"
    )


def _checked_steps(run: Run, table: PlanTable) -> Iterator[StepPlan]:
    """The steps that are left, each compared with the table that all ranks agreed on."""
    for number, step in enumerate(run.plan.steps(run.start.examples_consumed)):
        table.check(number, step)
        yield step


def make_batches(store: TokenStore, step: StepPlan, world: World) -> list[PackedBatch]:
    """This rank's micro-batches of a step, in memory from which the accelerator copies by itself."""
    return [make_batch(store, positions).pin(world.device) for positions in step.bins[world.rank :: world.size]]


def make_batch(store: TokenStore, positions: Indices) -> PackedBatch:
    """The packed batch of some of the store's examples."""
    return collate([store[position] for position in positions.tolist()], store.condition_ids[positions])


def _one_step(
    run: Run,
    engine: DeepSpeedEngine,
    world: World,
    state: TrainState,
    ready: Ready[StepPlan, list[PackedBatch]],
    started: float,
) -> tuple[TrainState, StepReport]:
    """Train one step of the plan; returns where the run is then, and what to report."""
    recipe, plan, consumed = run.recipe, ready.item, state.examples_consumed + ready.item.num_examples
    progress = consumed / run.plan.num_examples
    lr = learning_rate(progress, peak=run.peak_lr, warmup=recipe.optim.warmup, min_ratio=recipe.optim.min_lr)
    sums, grad_norm = train_step(engine, ready.made, weight_sum=plan.weight_sum, world_size=world.size, lr=lr)
    sums, waits = sum_and_gather(sums.double(), ready.waited_s, world)
    state = TrainState(
        step=state.step + 1,
        epoch=run.plan.order.seek(consumed - 1)[0],
        examples_consumed=consumed,
        tokens_seen=state.tokens_seen + plan.num_tokens,
        store_fingerprint=state.store_fingerprint,
        recipe=state.recipe,
        order=state.order,
    )
    return state, StepReport(
        step=state.step,
        epoch=state.epoch,
        examples_consumed=consumed,
        progress=progress,
        sums=sums.cpu(),
        lr=lr,
        grad_norm=grad_norm,
        num_tokens=plan.num_tokens,
        fill=plan.num_tokens / run.plan.shape.room,
        num_processes=world.size,
        seconds=time.perf_counter() - started,
        data_wait_s=float(waits.max()),
    )


def _evaluate(run: Run, engine: DeepSpeedEngine, world: World, metrics: Metrics, state: TrainState) -> None:
    if not len(run.held_out):
        return
    sums = evaluate(engine, run.held_out, run.plan.shape, world, lambda step: make_batches(run.held_out, step, world))
    metrics.evaluation(state.step, state.epoch, sums.cpu())


def _is_save_due(run: Run, state: TrainState, is_epoch_end: bool) -> bool:
    policy = run.recipe.checkpoint
    by_step = policy.every_steps is not None and state.step % policy.every_steps == 0
    by_epoch = is_epoch_end and policy.every_epochs is not None and (state.epoch + 1) % policy.every_epochs == 0
    return by_step or by_epoch or run.is_finished(state)


def _check_agreement(run: Run) -> None:
    """Raise Refused unless all ranks have the same plan, store, recipe and checkpoint to continue from."""
    position = None if run.resumed is None else (run.resumed.path.name, run.resumed.state.step)
    held_out = digest_index(run.held_out.lengths, run.held_out.weight_sums)
    view = (run.plan.digest, held_out, run.store.fingerprint, repr(to_json(run.recipe)), position)
    views = set(gather_objects(view))
    if len(views) > 1:
        raise Refused(
            "the processes disagree on the plan, or on the checkpoint to continue from: give every node the same "
            "recipe, store, versions and run folder"
        )


def _agree_on_steps(ahead: PlanAhead) -> PlanTable:
    """The table of all steps that are left. Raises Refused unless it is the same, bit for bit, on all ranks."""
    made = together(ahead.make)
    table = together(lambda: made if made is not None else ahead.read())
    if len(set(gather_objects(table.digest))) > 1:
        raise Refused(
            "the processes planned different steps from the same store: give every node the same version of "
            "ochat_train, and remove the folder plan of checkpoint.dir"
        )
    return table


def _use_own_share_of_cores() -> None:
    """Processes of one machine share its cores, for training on CPU and for an offloaded optimizer."""
    if "OMP_NUM_THREADS" not in os.environ:
        num_local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_local))


def _say(world: World, text: str) -> None:
    if world.is_main:
        print(text, flush=True)


if __name__ == "__main__":
    main()
