"""A token store to checkpoints and an exported model.

    deepspeed [launcher options] --module ochat_train.train RECIPE [key=value ...]

Without a launcher it runs as one process. Run again after an interruption, it continues from the newest checkpoint. On
SIGTERM, SIGUSR1 or Ctrl-C it finishes the step, or leaves the evaluation, saves and exits with code 75.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ochat_train.export import Configs, export, is_export_of, metadata_of, write_model
from ochat_train.files import read_json_lines, step_name
from ochat_train.gpus import check_gpus, use_expandable_segments
from ochat_train.model.lora import merge_adapters
from ochat_train.model.loss import LossSums, zero_sums
from ochat_train.model.pretrained import DTYPES, max_positions_of
from ochat_train.model.router import add_router_sums
from ochat_train.model.text_part import untrained_of
from ochat_train.recipe import (
    CheckpointSection,
    ModelsSection,
    load_recipe,
    moved_places,
    parse_arguments,
    recipe_arguments,
    to_json,
)
from ochat_train.tokens.batch import PackedBatch
from ochat_train.tokens.loss_forms import LOSS_FORMS
from ochat_train.tokens.plan import PlanTable, StepPlan, start_table
from ochat_train.tokens.prefetch import Ready, prefetch
from ochat_train.tokens.store import StoreChanged
from ochat_train.training.best_epoch import num_without_gain
from ochat_train.training.checkpoint import Checkpoint, set_aside_newer
from ochat_train.training.checks import Checker, name_leaks
from ochat_train.training.data import make_batches, source_weights, verify_store
from ochat_train.training.engine import (
    Failed,
    OutOfMemory,
    RankReport,
    Refused,
    World,
    gather_objects,
    join_process_group,
    read_world,
    reduce_over_ranks,
    say,
    together,
    train_step,
)
from ochat_train.training.generate import GreedyDecoder
from ochat_train.training.held_out import HeldOut, Interrupted
from ochat_train.training.kept_models import copy_best
from ochat_train.training.leanings import write_leanings
from ochat_train.training.metrics import Metrics, Reason, RunOutline, SkippedSteps, StepReport, peak_memory_bytes
from ochat_train.training.profiling import profile_steps
from ochat_train.training.run_folder import RunFolder, describe_run, device_name, open_run_folder
from ochat_train.training.saving import Kind, Saver, SaveResult, prune_best, remove_leftovers
from ochat_train.training.schedule import learning_rate
from ochat_train.training.setup import (
    Run,
    agree,
    agree_on_resume,
    agree_on_steps,
    prepare,
    ready_engine,
)
from ochat_train.training.speed import find_utilisation
from ochat_train.training.stopping import STOPPED, StopRequest, Watchdog


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the recipe."""
    parser = argparse.ArgumentParser(prog="deepspeed --module ochat_train.train", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher's; the environment has it too
    recipe_arguments(parser)
    options = parse_arguments(parser, arguments)
    try:
        check_gpus()
    except ValueError as error:  # the same on every rank of a node
        sys.exit(f"error: {error}" if os.environ.get("LOCAL_RANK", "0") == "0" else 1)
    use_expandable_segments()  # before anything is allocated
    world = read_world()
    _use_own_share_of_cores(world)
    join_process_group(world)
    try:
        with Watchdog(world) as watchdog:
            recipe = together(lambda: load_recipe(options.recipe, options.overrides))
            verify_store(recipe, world, watchdog.progress)
            run = together(partial(prepare, recipe, world))
            together(partial(check_dumps, run, world))
            end = train(run, world, watchdog)
    except (Refused, Failed) as error:  # the same on every rank: one of them prints it
        sys.exit(f"error: {error}" if world.is_main else 1)
    except (OutOfMemory, StoreChanged) as error:  # on each rank that has met it
        sys.exit(f"error: {error}")
    # Only here: a rank that fails must exit at once, so that the launcher ends the others, and not wait for them.
    dist.destroy_process_group()
    if not end.is_finished:
        sys.exit(STOPPED)
    if world.is_main:  # the others need not wait for the export
        try:
            export_model(run, end.checkpoint)
        except (ValueError, OSError) as error:
            sys.exit(f"error: training has ended, but {run.dir / 'model'} was not written: {error}")


def check_dumps(run: Run, world: World) -> None:
    """Raise ValueError on the main rank when dumps at new paths of the recipe are not those of its store."""
    if world.is_main:
        from ochat_train.preprocess.job import check_moved  # slow to import

        check_moved(run.recipe, run.store.manifest)


@dataclass(frozen=True, slots=True)
class RunEnd:
    """The newest checkpoint, and whether the run is finished or a signal stopped it before."""

    checkpoint: Path
    is_finished: bool


def train(run: Run, world: World, watchdog: Watchdog) -> RunEnd:
    """Train to the end of the run, to train.max_steps, or until a signal asks to stop.

    All ranks call it together, in one process group, with the watchdog entered. Raises Refused when they disagree, the
    folder is another run's, or the model cannot be used; Failed when the run cannot continue, or its end cannot be
    saved; OutOfMemory, StoreChanged.
    """
    run = agree(run)
    world = replace(world, sequence_parallel=run.recipe.packing.sequence_parallel)
    if world.is_main:
        name_leaks(run.asked, run.store, run.tokenizer)
    with open_run_folder(run.dir, world) as folder:
        run = agree_on_resume(run, folder, world)
        was = run.store.manifest.places if run.resumed is None else run.resumed.state.recipe
        for line in moved_places(was, to_json(run.recipe)):
            say(world, f"moved, and compared by what it holds: {line}")
        if run.resumed is not None and (run.is_finished(run.resumed.state) or has_stopped_early(run, world)):
            say(world, f"the run is complete at step {run.resumed.state.step} ({run.resumed.path}); nothing to train")
            return RunEnd(run.resumed.path, is_finished=True)
        trainer = Trainer(run, folder, world, watchdog)
        trainer.train()
        return RunEnd(trainer.newest, is_finished=trainer.is_early or run.is_finished(trainer.state))


def has_stopped_early(run: Run, world: World) -> bool:
    """Whether train.early_stop has ended the run at its checkpoint."""
    assert run.resumed is not None
    early, step = run.recipe.train.early_stop, run.resumed.state.step
    if early is None or not run.is_epoch_end(run.resumed.state):
        return False
    lines = read_json_lines(run.dir / "metrics.jsonl") if world.is_main else []
    evaluated = [line for line in lines if line.get("event") == "eval" and line["step"] <= step]
    return gather_objects(num_without_gain(evaluated, run.criterion) >= early.epochs)[0]


def export_model(run: Run, checkpoint: Path) -> None:
    """Export the checkpoint, or with checkpoint.export the best model, to checkpoint.dir/model, unless it is there."""
    out = run.dir / "model"
    if run.recipe.checkpoint.export == "best":
        print(f"exported {copy_best(run.dir, out)} to {out}", flush=True)
    elif not is_export_of(out, checkpoint):
        export(checkpoint, out, base=run.recipe.model.base if run.recipe.model.lora else None)
        print(f"exported {checkpoint} to {out}", flush=True)


class Trainer:
    """A run in training, on every rank: its engine and position, and what reports, saves and evaluates them.

    state: the position after the last step. newest: the newest checkpoint; the run's folder before there is one.
    is_stopping, is_writing: whether any rank was asked to stop, or was still writing a save, at the last step.
    is_early: whether train.early_stop ends the run. saved: the step after which the newest save of each kind was begun.
    """

    def __init__(self, run: Run, folder: RunFolder, world: World, watchdog: Watchdog) -> None:
        recipe, state = run.recipe, run.start
        self.run, self.folder, self.world, self.watchdog, self.state = run, folder, world, watchdog, state
        self.newest = run.dir if run.resumed is None else run.resumed.path
        self.is_stopping = self.is_writing = self.is_early = False
        if folder.is_writer and (leftovers := remove_leftovers(run.dir)):
            say(world, f"removed {', '.join(leftovers)}: a save that was cut off")
        table = start_table(run.plan, state.examples_consumed)
        say(world, run.resolved.describe())
        say(world, f"loss {recipe.train.loss}: {LOSS_FORMS[recipe.train.loss]}")
        self.engine = ready_engine(run, folder, world)
        if run.resumed is not None:
            consumed = f"{state.examples_consumed:,} examples consumed"
            say(world, f"continuing {run.resumed.path} at step {state.step}, {consumed}")
        self.table = agree_on_steps(table)
        self.num_steps = min(state.step + self.table.num_steps, recipe.train.max_steps or sys.maxsize)
        say(world, describe_plan(self.table, state.step, self.num_steps))
        self.about = describe_run(
            recipe,
            world.size,
            attention=run.resolved.attention.backend,
            checkpointing=run.resolved.checkpointing.policy,
        ) | {"began_from": run.began_from, "base_digest": self.engine.module.base_digest}
        self.metrics = Metrics(self.outline(), is_main=world.is_main)
        self.skipped = SkippedSteps(recipe.train.max_skipped, run.dir, run.store, world)
        self.saver = Saver(self.engine, folder, world, watchdog.progress)
        self.saved: dict[Kind, int] = {"checkpoint": state.step, "model": state.step}
        self.stop = stop = StopRequest()
        self.held_out = HeldOut(
            run.held_out, self.engine, run.plan.shape, world, watchdog.progress, lambda: stop.is_made
        )
        decoder = GreedyDecoder(
            self.engine,
            run.tokenizer,
            # A cache has keys and values of all layers, of which training with checkpointing keeps only inputs.
            max(4096, run.plan.shape.capacity // 4),
            world,
            watchdog.progress,
            lambda: stop.is_made,
        )
        self.checker = Checker(run.asked, decoder, run.dir / "checks")
        watchdog.limit_stalls(recipe.train.stall_timeout_s)

    def train(self) -> None:
        """The loop."""
        run, world = self.run, self.world
        if self.folder.is_writer and (undone := set_aside_newer(run.dir, self.state.step)):
            say(world, f"newer than step {self.state.step}, set aside and no longer counted: {', '.join(undone)}")
        with (
            self.stop,
            self.metrics,
            prefetch(self.planned_steps(), self.make_batches) as steps,
            profile_steps(
                run.dir / "profile", world, step=self.state.step, is_on=run.recipe.log.profile
            ) as end_profiled,
        ):
            resumed = None if run.resumed is None else run.resumed.path.name
            self.metrics.start(self.state.step, self.state.epoch, resumed=resumed, about=self.about)
            self.checker.try_out()
            if (self.state.step == 0 or self.is_evaluation_due()) and not self.is_evaluated():
                self.evaluate()
            self.keep_best()
            started = self.begin_step()
            for ready in () if self.is_stopping or self.is_early else steps:
                report, parts = self.train_one_step(ready, started)
                self.metrics.step(report)
                self.check_skipped(report, ready.item, parts)
                self.save()
                if self.is_evaluation_due():
                    self.evaluate()
                    self.keep_best()
                end_profiled()
                if self.is_last_step():
                    break
                started = self.begin_step()
            self.save()  # of a step that was to be the last one only when a stop came during its evaluation
            self.metrics.end(self.state.step, self.state.epoch, self.end_reason())
        if self.state.step > run.start.step and self.newest.name != step_name(self.state.step):
            raise Failed(
                f"step {self.state.step} is done, but could not be saved (see above). Make room in {run.dir}, or "
                "repair it, and run the same command again: it continues from "
                f"{self.newest.name if self.newest != run.dir else 'the start'}."
            )
        if self.is_early:
            say(world, f"stopped early: {self.without_gain()} epochs without a better {run.criterion.name}")
        elif not run.is_finished(self.state):
            saved = f"saved as {self.newest}" if self.newest != run.dir else "with nothing to save"
            say(world, f"stopped on request at step {self.state.step}, {saved}; run the same command again to continue")

    # ------------------------------------------------------------------------------------------------------ a step

    def planned_steps(self) -> Iterator[StepPlan]:
        """The steps that are left, each compared with the table that all ranks agreed on."""
        for number, step in enumerate(self.run.plan.steps(self.run.start.examples_consumed)):
            self.table.check(number, step)
            yield step

    def make_batches(self, step: StepPlan) -> list[PackedBatch]:
        """This rank's micro-batches of a step."""
        return make_batches(self.run.store, step, self.world)

    def begin_step(self) -> float:
        """The time at which the next step begins, by waiting for its batches."""
        self.watchdog.mark(self.state.step + 1, "waiting for its batches")
        return time.perf_counter()

    def train_one_step(
        self, ready: Ready[StepPlan, list[PackedBatch]], started: float
    ) -> tuple[StepReport, list[LossSums]]:
        """Train one step of the plan; returns its report, and the loss sums of each of this rank's micro-batches."""
        run, plan, world = self.run, ready.item, self.world
        run.store.check_unchanged()
        consumed = self.state.examples_consumed + plan.num_examples
        progress = consumed / run.plan.num_examples
        optim = run.recipe.optim
        lr = learning_rate(progress, peak=run.resolved.peak_lr.value, warmup=optim.warmup, min_ratio=optim.min_lr)
        mark = partial(self.watchdog.mark, self.state.step + 1)
        parts, grad_norm = train_step(
            self.engine,
            ready.made,
            weight_sum=plan.weight_sum,
            num_tokens=plan.num_tokens,
            world_size=world.size,
            lr=lr,
            mark=mark,
        )
        mine = zero_sums(len(run.store.manifest.conditions), world.device)
        for part in parts:
            mine.add(part.by_condition)
        router = add_router_sums([part.router for part in parts if part.router is not None])
        memory = peak_memory_bytes(world.device)
        of_rank = RankReport(grad_norm, ready.waited_s, memory, self.stop.is_made, self.saver.is_writing)
        sums, router, of_ranks = reduce_over_ranks(mine, router, of_rank, world)
        self.is_stopping, self.is_writing = of_ranks.is_asked_to_stop, of_ranks.is_writing
        self.state = replace(
            self.state,
            step=self.state.step + 1,
            epoch=run.plan.order.seek(consumed - 1)[0],
            examples_consumed=consumed,
            tokens_seen=self.state.tokens_seen + plan.num_tokens,
        )
        report = StepReport(
            step=self.state.step,
            epoch=self.state.epoch,
            examples_consumed=consumed,
            progress=progress,
            sums=sums,
            source_weights=source_weights(run.store, plan),
            lr=lr,
            grad_norm=float(of_ranks.grad_norm),
            num_tokens=plan.num_tokens,
            cost=int(plan.costs.sum()),
            fill=plan.num_tokens / run.plan.shape.room,
            num_processes=world.size,
            seconds=time.perf_counter() - started,
            data_wait_s=of_ranks.data_wait_s,
            peak_memory_bytes=int(of_ranks.peak_memory_bytes),
            router=router,
        )
        return report, parts

    def check_skipped(self, report: StepReport, plan: StepPlan, parts: Sequence[LossSums]) -> None:
        """End the run when too many steps in a row were skipped, or all that it has."""
        try:
            self.skipped.add(report.step, plan, parts, is_skipped=report.is_skipped)
            is_last = report.is_skipped and self.run.is_finished(self.state)
            if is_last and gather_objects(self.metrics.num_skipped)[0] == report.step:
                self.skipped.fail(f"all {report.step} steps of the run")
        except Failed:
            self.metrics.end(report.step, report.epoch, "skipped")
            raise

    def is_last_step(self) -> bool:
        """Whether the loop ends here: the run is finished, stops early, or some rank was asked to stop."""
        return self.run.is_finished(self.state) or self.is_early or self.is_stopping

    def end_reason(self) -> Reason:
        """Why the loop ends, for the metrics."""
        if self.state.examples_consumed >= self.run.plan.num_examples:
            return "finished"
        if self.is_early:
            return "early_stop"
        return "max_steps" if self.run.is_finished(self.state) else "stopped"

    # ------------------------------------------------------------------------------------------------------- saving

    def save(self) -> None:
        """Begin the saves that are due, and report those that have ended; after the last step wait for all of them."""
        policy, checkpoint, results = self.run.recipe.checkpoint, self.checkpoint(), []
        if self.begins("checkpoint", is_due=self.is_save_due(policy) or self.is_last_step()):
            self.watchdog.mark(self.state.step, "saving")
            results += self.saver.finish("best")  # a run that goes on from this checkpoint must find it
            results += self.saver.save_checkpoint(checkpoint, self.run.tokenizer, keep=policy.keep)
        elif not self.is_writing:
            results += self.saver.finish()
        if self.begins("model", is_due=self.is_save_due(policy.models)):
            folder = self.run.dir / "models" / checkpoint.path.name
            write = partial(self.write_model, checkpoint, torch.bfloat16)
            results += self.saver.save_model(folder, write, keep=policy.models.keep)
        if self.is_last_step():
            results += self.saver.finish()
        self.report_saves(results)

    def report_saves(self, results: Sequence[SaveResult]) -> None:
        """Report saves that have ended, and remove what they replace."""
        for result in results:
            if result.error is not None:
                say(
                    self.world,
                    f"WARNING: {result.path.name} was not saved: {result.error}. Training continues, older checkpoints "
                    "stay; the next save is tried when it is due.",
                )
                continue
            self.metrics.saved(result)
            if result.kind == "checkpoint":
                self.newest = result.path
        if results and self.newest != self.run.dir and self.folder.is_writer:
            prune_best(self.run.dir, self.newest.name)

    def keep_best(self) -> None:
        """Begin to save the model in `best` if its epoch is the best so far, and decide whether the run stops early."""
        run, step = self.run, self.state.step
        early, best = run.recipe.train.early_stop, gather_objects(self.metrics.best(run.criterion))[0]
        if early is not None and run.is_epoch_end(self.state):
            self.is_early = self.without_gain() >= early.epochs
        if run.recipe.checkpoint.best is None or best is None:
            return
        folder = run.dir / "best" / step_name(best.step)
        if gather_objects(folder.is_dir())[0]:
            return
        if best.step < step:
            if step == run.start.step:
                say(
                    self.world,
                    f"WARNING: the best model is that of step {best.step}, and {folder} is not there any more",
                )
            return
        self.watchdog.mark(step, "saving")
        write = partial(self.write_model, self.checkpoint(), DTYPES[run.recipe.model.dtype])
        self.report_saves(self.saver.save_model(folder, write, keep=None, kind="best"))

    def without_gain(self) -> int:
        """How many epochs have ended since the best one."""
        return gather_objects(self.metrics.num_without_gain(self.run.criterion))[0]

    def begins(self, kind: Kind, *, is_due: bool) -> bool:
        """Whether a save that is due begins now: after a step once."""
        begins = is_due and self.saved[kind] < self.state.step
        if begins:
            self.saved[kind] = self.state.step
        return begins

    def is_save_due(self, policy: CheckpointSection | ModelsSection) -> bool:
        """Whether a kind of save is due after this step."""
        state, every_steps, every_epochs = self.state, policy.every_steps, policy.every_epochs
        by_step = every_steps is not None and state.step % every_steps == 0
        by_epoch = every_epochs is not None and (state.epoch + 1) % every_epochs == 0
        return by_step or (by_epoch and self.run.is_epoch_end(state))

    def checkpoint(self) -> Checkpoint:
        """The checkpoint of the present position, not yet saved."""
        manifest = self.run.store.manifest
        return Checkpoint(
            path=self.run.dir / step_name(self.state.step),
            state=self.state,
            world_size=self.world.size,
            template=manifest.template,
            inference_condition=manifest.inference_condition,
            conditions=manifest.conditions,
            run=self.about,
            files={},
        )

    def write_model(self, checkpoint: Checkpoint, dtype: torch.dtype, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write the weights of the checkpoint's step as a model, adapters merged."""
        lm, lora = self.engine.module.lm, self.run.recipe.model.lora
        write_model(
            folder,
            merge_adapters(weights, scaling=1 if lora is None else lora.scaling),
            untrained=untrained_of(lm),
            configs=Configs(lm.config, lm.generation_config),
            tokenizer=self.run.tokenizer,
            dtype=dtype,
            metadata=metadata_of(checkpoint),
        )

    # --------------------------------------------------------------------------------------------------- evaluating

    def is_evaluation_due(self) -> bool:
        """Whether the held-out split is evaluated after this step."""
        every_steps = self.run.recipe.eval.every_steps
        by_step = every_steps is not None and self.state.step % every_steps == 0
        return by_step or self.run.is_epoch_end(self.state) or self.run.is_finished(self.state)

    def is_evaluated(self) -> bool:
        """Whether the present position was evaluated before a resume; not if a stop came first."""
        return gather_objects(self.metrics.has_evaluation(self.state.step))[0]

    def evaluate(self) -> None:
        """Evaluate the held-out split, and at the end of an epoch or the run what conditions change, and the checks."""
        run, state = self.run, self.state
        is_epoch_end, is_finished = run.is_epoch_end(state), run.is_finished(state)
        is_end = is_epoch_end or is_finished
        if not len(run.held_out) and not (is_end and run.asked):
            return
        self.watchdog.mark(state.step, "evaluating")
        try:
            sums, probe = self.held_out.loss_sums(), None
            if is_end and len(run.held_out):
                most = min(run.plan.shape.capacity, max_positions_of(self.engine.module.lm.config))
                probe = self.held_out.probe_conditions(run.tokenizer, sums, max_tokens=most)
                if self.world.is_main:
                    write_leanings(run.dir / "leanings.json", state.step, run.held_out, probe.leanings, run.tokenizer)
            checks = self.checker.run(state.step) if is_end else None
            by_condition = sums.by_condition(len(run.store.manifest.conditions))
            self.metrics.evaluation(state.step, state.epoch, by_condition, probe, checks, is_epoch_end=is_epoch_end)
        except Interrupted:
            self.is_stopping = True
            later = f"ochat evaluate held-out {run.dir / 'model'} {run.recipe.data.store} does it"
            later += ", without the checks" if run.asked else ""
            later = later if is_finished else "the same command begins with it"
            say(self.world, f"step {state.step}: the evaluation was left on request; {later}")
        except Exception as error:
            if not is_finished:  # other ranks may wait for this one
                raise
            print(f"WARNING: the model could not be evaluated after the last step: {error!r}", flush=True)

    def outline(self) -> RunOutline:
        """What the reports refer to."""
        run, start = self.run, self.state.step
        return RunOutline(
            recipe=run.recipe,
            dir=run.dir,
            conditions=run.store.manifest.conditions,
            sources=run.store.manifest.trained_sources,
            start=start,
            num_steps=self.num_steps,
            num_tokens=int(self.table.rows["num_tokens"][: self.num_steps - start].sum()),
            utilisation=find_utilisation(
                self.engine.module.lm.config,
                quadratic_length=run.plan.shape.quadratic_length,
                is_frozen=run.recipe.model.lora is not None,
                dtype=run.recipe.model.dtype,
                device_name=device_name(),
            ),
            is_branch=run.resumed is not None and run.resumed.state != run.start,
        )


def describe_plan(table: PlanTable, step: int, num_steps: int) -> str:
    """One line about the steps that are left after `step`; the run ends with step `num_steps`."""
    left = f" left of {step + table.num_steps:,}" if step else ""
    stop = f", stopped by train.max_steps at step {num_steps:,}" if num_steps < step + table.num_steps else ""
    return (
        f"plan: {table.num_steps:,} steps{left}{stop}, {table.num_tokens:,} tokens, weight {table.weight_sum:,.6g}; "
        f"{100 * table.fill:.1f} % of the micro-batches filled, costs of ranks {100 * table.efficiency:.1f} % balanced"
    )


def _use_own_share_of_cores(world: World) -> None:
    """Share the cores of a machine among its processes, for training on CPU and for an offloaded optimizer."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world.local_size))


if __name__ == "__main__":
    main()
