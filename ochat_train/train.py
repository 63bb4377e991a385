"""A token store to checkpoints and an exported model.

    deepspeed [launcher options] --module ochat_train.train RECIPE [key=value ...]

Without a launcher it runs as one process. Rerun after an interruption, it continues from the newest checkpoint. On
SIGTERM, SIGUSR1 or Ctrl-C it finishes the step, saves and exits with code 75.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from torch import Tensor

from ochat_train.export import export, is_export_of, metadata_of, write_model
from ochat_train.model.lora import merge_adapters
from ochat_train.model.pretrained import max_positions_of
from ochat_train.recipe import CheckpointSection, ModelsSection, load_recipe, parse_arguments, recipe_arguments
from ochat_train.tokens.batch import PackedBatch
from ochat_train.tokens.plan import PlanTable, StepPlan, start_table
from ochat_train.tokens.prefetch import Ready, prefetch
from ochat_train.tokens.store import Examples, StoreChanged
from ochat_train.training.batches import make_batches
from ochat_train.training.checkpoint import Checkpoint, TrainState
from ochat_train.training.engine import (
    Failed,
    OutOfMemory,
    Refused,
    World,
    gather_objects,
    join_process_group,
    read_world,
    say,
    sum_and_gather,
    together,
    train_step,
)
from ochat_train.training.flops import find_utilisation
from ochat_train.training.held_out import evaluate, probe_conditions
from ochat_train.training.metrics import Metrics, StepReport, describe_run, device_name, peak_memory_bytes
from ochat_train.training.planning import source_weights
from ochat_train.training.profiling import profile_steps
from ochat_train.training.run_folder import RunFolder, open_run_folder
from ochat_train.training.saving import Saved, Saver, remove_leftovers
from ochat_train.training.schedule import learning_rate
from ochat_train.training.setup import Run, agree_on_steps, check_agreement, prepare, ready_engine, settle_resume
from ochat_train.training.signals import STOPPED, StopRequest
from ochat_train.training.skipped import SkippedSteps
from ochat_train.training.watchdog import Watchdog


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the recipe."""
    parser = argparse.ArgumentParser(prog="deepspeed --module ochat_train.train", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher's; the environment has it too
    recipe_arguments(parser)
    options = parse_arguments(parser, arguments)
    world = read_world()
    _use_own_share_of_cores(world)
    join_process_group(world)
    try:
        with Watchdog(world) as watchdog:
            run = together(lambda: prepare(load_recipe(options.recipe, options.overrides), world))
            last = train(run, world, watchdog)
    except (Refused, Failed) as error:  # the same on every rank: one of them tells
        sys.exit(f"error: {error}" if world.is_main else 1)
    except (OutOfMemory, StoreChanged) as error:  # each rank that has met it
        sys.exit(f"error: {error}")
    # Only here: a rank that fails must die at once, so that the launcher ends the others, and not wait for them.
    dist.destroy_process_group()
    if not last.is_end:
        sys.exit(STOPPED)
    if world.is_main:  # the others need not wait for the export
        try:
            export_model(run, last.checkpoint)
        except (ValueError, OSError) as error:
            sys.exit(f"error: training has ended, but {run.dir / 'model'} was not written: {error}")


@dataclass(frozen=True, slots=True)
class Last:
    """How training ended: the newest checkpoint, and whether it is the run's end or a signal stopped it before."""

    checkpoint: Path
    is_end: bool


def train(run: Run, world: World, watchdog: Watchdog) -> Last:
    """Train to the end of the run, to train.max_steps, or until a signal asks to stop.

    All ranks call it together, in one process group, with the watchdog entered. Raises Refused when they disagree, the
    folder is another run's, or the model cannot be used; Failed when the run cannot go on, or its end cannot be saved;
    OutOfMemory, StoreChanged.
    """
    check_agreement(run)
    with open_run_folder(run.dir, world) as folder:
        run = settle_resume(run, folder, world)
        if run.resumed is not None and run.is_finished(run.resumed.state):
            say(world, f"the run is complete at step {run.resumed.state.step} ({run.resumed.path}); nothing to train")
            return Last(run.resumed.path, is_end=True)
        return _train(run, folder, world, watchdog)


def export_model(run: Run, checkpoint: Path) -> None:
    """Export the checkpoint to checkpoint.dir/model, unless that is what is there."""
    out = run.dir / "model"
    if not is_export_of(out, checkpoint):
        export(checkpoint, out)
        print(f"exported {checkpoint} to {out}", flush=True)


def _train(run: Run, folder: RunFolder, world: World, watchdog: Watchdog) -> Last:
    """The loop."""
    recipe, store, state = run.recipe, run.store, run.start
    if folder.is_writer and (leftovers := remove_leftovers(run.dir)):
        say(world, f"removed {', '.join(leftovers)}: a save that was cut off")
    ahead = start_table(run.plan, state.examples_consumed)
    engine = ready_engine(run, folder, world)
    attention = engine.module.attention
    say(world, f"attention backend {attention.backend} ({attention.reason}); peak learning rate {run.peak_lr:.3g}")
    about = describe_run(recipe, world.size, attention.backend, engine.module.checkpointing)
    if run.resumed is not None:
        say(world, f"continuing {run.resumed.path} at step {state.step}, {state.examples_consumed:,} examples consumed")
    table = agree_on_steps(ahead)
    num_steps = min(state.step + table.num_steps, recipe.train.max_steps or sys.maxsize)
    say(world, describe_plan(table, state.step, num_steps))
    watchdog.limit_stalls(recipe.train.stall_timeout_s)
    saver = Saver(engine, folder, world, watchdog.move)
    skipped = SkippedSteps(recipe.train.max_skipped, run.dir, store, world)
    last = run.dir if run.resumed is None else run.resumed.path
    is_stopping = False
    with (
        StopRequest() as stop,
        Metrics(
            recipe,
            run.dir,
            store.manifest.conditions,
            store.manifest.sources,
            start=state.step,
            num_steps=num_steps,
            num_tokens=int(table.rows["num_tokens"][: num_steps - state.step].sum()),
            total_examples=run.plan.num_examples,
            utilisation=find_utilisation(
                engine.module.lm.config,
                quadratic_length=run.plan.shape.quadratic_length,
                is_frozen=recipe.model.lora is not None,
                dtype=recipe.model.dtype,
                device_name=device_name(),
            ),
            is_main=world.is_main,
        ) as metrics,
        prefetch(_checked_steps(run, table), lambda step: make_batches(store, step, world)) as steps,
        profile_steps(run.dir / "profile", world, step=state.step, is_on=recipe.log.profile) as end_profiled_step,
    ):
        resumed = None if run.resumed is None else run.resumed.path.name
        metrics.start(state.step, state.epoch, resumed=resumed, about=about)
        is_epoch_end = state.step > 0 and _is_epoch_end(run, state)
        is_evaluated = gather_objects(metrics.has_evaluation(state.step))[0]
        if (state.step == 0 or is_epoch_end) and not is_evaluated:  # else a stop came before it
            _evaluate(run, engine, world, metrics, state, is_epoch_end, watchdog.move)
        watchdog.mark(state.step + 1, "waiting for its batches")
        started = time.perf_counter()
        for ready in steps:
            store.check_unchanged()
            mark = partial(watchdog.mark, state.step + 1)
            done = _one_step(run, engine, world, state, ready, started, mark, (stop.is_made, saver.is_writing))
            state, is_stopping = done.state, done.is_stopping
            metrics.step(done.report)
            try:
                skipped.note(state.step, ready.item, done.nll, is_skipped=done.report.is_skipped)
            except Failed:
                metrics.end(state.step, state.epoch, "skipped")
                raise
            is_epoch_end, is_end = _is_epoch_end(run, state), run.is_finished(state)
            results = []
            if _is_due(recipe.checkpoint, state, is_epoch_end) or is_end or is_stopping:
                mark("saving")
                results += saver.save_checkpoint(
                    _checkpoint(run, state, world, about), run.tokenizer, keep=recipe.checkpoint.keep
                )
            elif not done.is_writing:
                results += saver.finish()
            if _is_due(recipe.checkpoint.models, state, is_epoch_end):
                results += saver.save_model(
                    run.dir / "models" / _name(state),
                    partial(_write_model, run, engine.module.lm, state, about, world),
                    keep=recipe.checkpoint.models.keep,
                )
            if is_end or is_stopping:
                results += saver.finish()
            last = _tell_saves(results, last, world, metrics)
            if _is_evaluation_due(run, state, is_epoch_end):
                mark("evaluating")
                _evaluate(run, engine, world, metrics, state, is_epoch_end, watchdog.move)
            end_profiled_step()
            if is_end or is_stopping:
                is_complete = state.examples_consumed >= run.plan.num_examples
                metrics.end(
                    state.step, state.epoch, "finished" if is_complete else "max_steps" if is_end else "stopped"
                )
                break
            watchdog.mark(state.step + 1, "waiting for its batches")
            started = time.perf_counter()
    if last.name != _name(state):
        raise Failed(
            f"step {state.step} is done, but could not be saved (see above). Make room in {run.dir}, or repair it, and "
            f"run the same command again: it goes on from {last.name if last != run.dir else 'the start'}."
        )
    if not run.is_finished(state):
        say(world, f"stopped on request at step {state.step}, saved as {last}; run the same command again to go on")
    return Last(last, is_end=run.is_finished(state))


@dataclass(frozen=True, slots=True)
class _Step:
    """What came of a step: where the run is, what to report, this rank's loss sums f32[M], what any rank said."""

    state: TrainState
    report: StepReport
    nll: Tensor
    is_stopping: bool
    is_writing: bool


def _name(state: TrainState) -> str:
    """Of its checkpoint."""
    return f"step-{state.step:08d}"


def _checkpoint(run: Run, state: TrainState, world: World, about: dict[str, Any]) -> Checkpoint:
    manifest = run.store.manifest
    return Checkpoint(
        path=run.dir / _name(state),
        state=state,
        world_size=world.size,
        template=run.recipe.template,
        inference_condition=manifest.inference_condition,
        conditions=manifest.conditions,
        run=about,
        files={},
    )


def _write_model(
    run: Run,
    lm: Any,
    state: TrainState,
    about: dict[str, Any],
    world: World,
    folder: Path,
    weights: dict[str, Tensor],
) -> None:
    """Write a light checkpoint, in bfloat16. lm: for its configurations."""
    lora = run.recipe.model.lora
    write_model(
        folder,
        weights if lora is None else merge_adapters(weights, scaling=lora.alpha / lora.rank),
        config=lm.config,
        generation_config=lm.generation_config,
        tokenizer=run.tokenizer,
        dtype=torch.bfloat16,
        metadata=metadata_of(_checkpoint(run, state, world, about)),
    )


def _tell_saves(results: list[Saved], last: Path, world: World, metrics: Metrics) -> Path:
    """Report saves that ended; returns the newest checkpoint that is there, `last` until then."""
    for saved in results:
        if saved.error is not None:
            say(
                world,
                f"WARNING: {saved.path.name} was not saved: {saved.error}. Training goes on, older checkpoints stay; "
                "the next save is tried when it is due.",
            )
            continue
        metrics.saved(
            int(saved.path.name[5:]), saved.kind, saved.path, seconds=saved.seconds, num_bytes=saved.num_bytes
        )
        if saved.kind == "checkpoint":
            last = saved.path
    return last


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


def _one_step(
    run: Run,
    engine: DeepSpeedEngine,
    world: World,
    state: TrainState,
    ready: Ready[StepPlan, list[PackedBatch]],
    started: float,
    mark: Callable[[str], None],
    says: tuple[bool, bool],
) -> _Step:
    """Train one step of the plan. says: whether this rank was asked to stop, and whether it still writes a save."""
    recipe, plan, consumed = run.recipe, ready.item, state.examples_consumed + ready.item.num_examples
    progress = consumed / run.plan.num_examples
    lr = learning_rate(progress, peak=run.peak_lr, warmup=recipe.optim.warmup, min_ratio=recipe.optim.min_lr)
    parts, norm = train_step(engine, ready.made, weight_sum=plan.weight_sum, world_size=world.size, lr=lr, mark=mark)
    sums, told = sum_and_gather(
        parts.sum(dim=0).double(), (ready.waited_s, peak_memory_bytes(world.device), norm, *says), world
    )
    wait, memory, grad_norm, is_stopping, is_writing = told.amax(dim=0).tolist()
    state = replace(
        state,
        step=state.step + 1,
        epoch=run.plan.order.seek(consumed - 1)[0],
        examples_consumed=consumed,
        tokens_seen=state.tokens_seen + plan.num_tokens,
    )
    report = StepReport(
        step=state.step,
        epoch=state.epoch,
        examples_consumed=consumed,
        progress=progress,
        sums=sums,
        source_weights=source_weights(run.store, plan),
        lr=lr,
        grad_norm=grad_norm if math.isfinite(grad_norm) else math.inf,
        num_tokens=plan.num_tokens,
        cost=int(plan.costs.sum()),
        fill=plan.num_tokens / run.plan.shape.room,
        num_processes=world.size,
        seconds=time.perf_counter() - started,
        data_wait_s=wait,
        peak_memory_bytes=int(memory),
    )
    return _Step(state, report, parts[:, 0, 0].sum(dim=1), bool(is_stopping), bool(is_writing))


def _evaluate(
    run: Run,
    engine: DeepSpeedEngine,
    world: World,
    metrics: Metrics,
    state: TrainState,
    is_epoch_end: bool,
    move: Callable[[], None],
) -> None:
    """Evaluate the held-out split, and at the end of an epoch or the run what conditions change. move: it goes on."""
    if not len(run.held_out):
        return
    shape, conditions = run.plan.shape, run.held_out.manifest.conditions

    def batches(examples: Examples, step: StepPlan) -> list[PackedBatch]:
        move()
        return make_batches(examples, step, world)

    try:
        sums, probe = evaluate(engine, run.held_out, shape, batches, len(conditions)), None
        if is_epoch_end or run.is_finished(state):
            most = min(shape.capacity, max_positions_of(engine.module.lm.config))
            probe = probe_conditions(engine, run.held_out, run.tokenizer, shape, batches, sums, max_tokens=most)
        metrics.evaluation(state.step, state.epoch, sums, probe, is_epoch_end=is_epoch_end)
    except Exception as error:
        if not run.is_finished(state):  # other ranks may wait for this one
            raise
        print(f"WARNING: the held-out split could not be evaluated after the last step: {error!r}", flush=True)


def _is_evaluation_due(run: Run, state: TrainState, is_epoch_end: bool) -> bool:
    every_steps = run.recipe.eval.every_steps
    by_step = every_steps is not None and state.step % every_steps == 0
    return by_step or is_epoch_end or run.is_finished(state)


def _is_epoch_end(run: Run, state: TrainState) -> bool:
    return run.plan.order.seek(state.examples_consumed)[1] == 0


def _is_due(policy: CheckpointSection | ModelsSection, state: TrainState, is_epoch_end: bool) -> bool:
    """Whether its kind of save is."""
    by_step = policy.every_steps is not None and state.step % policy.every_steps == 0
    by_epoch = is_epoch_end and policy.every_epochs is not None and (state.epoch + 1) % policy.every_epochs == 0
    return by_step or by_epoch


def _use_own_share_of_cores(world: World) -> None:
    """Processes of one machine share its cores, for training on CPU and for an offloaded optimizer."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world.local_size))


if __name__ == "__main__":
    main()
