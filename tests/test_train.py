"""Whole runs in one process: checkpoints, export, evaluation, and what is refused before anything starts."""

import gzip
import hashlib
import math
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import numpy as np
import numpy.typing as npt
import orjson
import pytest
import torch
import torch.nn.functional as F
import wandb
import yaml
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import ochat_train.tokens.order
import ochat_train.train
import ochat_train.training.metrics
import ochat_train.training.resources
import ochat_train.training.saving
import ochat_train.training.setup
import ochat_train.training.sinks
from ochat_train.export import export
from ochat_train.files import free_port
from ochat_train.recipe import OptimSection, Recipe, load_recipe
from ochat_train.tokens.recondition import Frame, make_frame, recondition
from ochat_train.tokens.store import TokenStore
from ochat_train.train import Trainer, export_model
from ochat_train.train import train as train_run
from ochat_train.training.checkpoint import (
    Checkpoint,
    FileMark,
    check_resume,
    find_checkpoints,
    load_checkpoint,
    manifest_of,
    mark_file,
    read_checkpoint,
)
from ochat_train.training.data import check_lengths, make_batch
from ochat_train.training.engine import Failed, World, deepspeed_config, join_process_group, make_engine, make_optimizer
from ochat_train.training.held_out import HeldOut
from ochat_train.training.resources import AvailableMemory
from ochat_train.training.run_folder import describe_run
from ochat_train.training.schedule import learning_rate
from ochat_train.training.setup import CheckpointingChoice, agree, build_engine, prepare
from ochat_train.training.stopping import Watchdog
from tests.e2e.harness import ROOT, events, preprocess, tiny_recipe, weights, write_dump
from tests.host_waits import host_waits
from tests.waiting import HANG_S, ends

ALONE = World(0, 1, 0, torch.device("cpu"))


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    write_dump(folder, 60)
    path = tiny_recipe(folder)
    preprocess(path, "data.eval_fraction=0.2")
    return path


@pytest.fixture(scope="module", autouse=True)
def process_group() -> None:
    """A group of one, for the whole module: DeepSpeed cannot join a second one in a process."""
    join_process_group(ALONE)


def train(recipe: Recipe, world: World) -> None:
    """What the command does."""
    run = prepare(recipe, world)
    with Watchdog(world) as watchdog:
        last = train_run(run, world, watchdog)
    export_model(run, last.checkpoint)


def recipe_for(recipe_path: Path, run: Path, *overrides: str) -> Recipe:
    return load_recipe(recipe_path, ["data.eval_fraction=0.2", f"checkpoint.dir={run}", *overrides])


@pytest.fixture(scope="module")
def finished(recipe_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs that saved every second step and kept the last three."""
    run = tmp_path_factory.mktemp("finished")
    options = ("zero.stage=1", "checkpoint.every_steps=2", "checkpoint.keep=3")
    train(recipe_for(recipe_path, run, *options), ALONE)
    return run


def test_every_example_of_every_epoch_is_trained_and_the_schedule_ends_at_its_end(
    recipe_path: Path, finished: Path
) -> None:
    recipe = recipe_for(recipe_path, finished)
    store = TokenStore(recipe.data.store)
    steps = events(finished, "step")
    assert steps[-1]["examples_consumed"] == 2 * len(store)
    assert sum(step["tokens"] for step in steps) == 2 * int(store.lengths.sum())
    assert steps[-1]["progress"] == 1.0
    assert steps[-1]["lr"] == pytest.approx(0.01 * 0.1)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Fills up with the positions of the examples that a run trains, in the order of its steps."""
    positions: list[int] = []
    original = Trainer.train_one_step

    def train_one_step(trainer: Trainer, ready: Any, *others: Any, **options: Any) -> Any:
        for examples, batch in zip(ready.item.bins, ready.made, strict=True):
            ids = [trainer.run.store[position].input_ids for position in examples.tolist()]
            assert np.array_equal(np.concatenate(ids) if ids else [0], batch.input_ids)
            positions.extend(examples.tolist())
        return original(trainer, ready, *others, **options)

    monkeypatch.setattr(Trainer, "train_one_step", train_one_step)
    return positions


def test_a_resume_with_other_micro_batches_trains_every_remaining_example_once(
    recipe_path: Path, tmp_path: Path, trained: list[int]
) -> None:
    for options in (["train.max_steps=2"], ["packing.tokens_per_gpu=700", "train.max_steps=3"], []):
        train(recipe_for(recipe_path, tmp_path, *options), ALONE)
    store, steps = TokenStore(load_recipe(recipe_path).data.store), events(tmp_path, "step")
    assert steps[1]["tokens"] <= 2 * 256 < steps[2]["tokens"]
    for epoch in (trained[: len(store)], trained[len(store) :]):
        assert sorted(epoch) == list(range(len(store)))
    assert steps[-1]["progress"] == 1.0
    assert steps[-1]["lr"] == pytest.approx(0.01 * 0.1)


def test_sources_are_passed_over_as_often_as_the_recipe_says(
    recipe_path: Path, tmp_path: Path, trained: list[int]
) -> None:
    shares = ["data.sources.0.epochs=0.5", "data.sources.1.epochs=2"]
    train(recipe_for(recipe_path, tmp_path, *shares, "train.max_steps=3"), ALONE)
    train(recipe_for(recipe_path, tmp_path, *shares), ALONE)  # goes on in the middle of an epoch
    store, steps = TokenStore(load_recipe(recipe_path).data.store), events(tmp_path, "step")
    counts = np.bincount(trained, minlength=len(store))
    assert set(counts[store.members(0)].tolist()) == {1}  # half of it in each of two epochs
    assert set(counts[store.members(1)].tolist()) == {4}
    assert steps[-1]["examples_consumed"] == counts.sum()
    assert sum(step["tokens"] for step in steps) == int(store.lengths @ counts)
    assert steps[-1]["progress"] == 1.0


def test_a_run_says_how_long_it_waited_for_its_batches(
    recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_asked_for = threading.Event()
    begin_step, make_batches = Trainer.begin_step, Trainer.make_batches
    begun: list[float] = []

    def note_and_begin(trainer: Trainer) -> float:
        begun.append(begin_step(trainer))
        return begun[-1]

    def perf_counter() -> float:
        now = time.perf_counter()
        if begun:  # it is the loop that asks, not an evaluation before it
            is_asked_for.set()
        return now

    def slow(*arguments: Any) -> Any:
        is_asked_for.wait(HANG_S)
        time.sleep(0.2)
        return make_batches(*arguments)

    monkeypatch.setattr(ochat_train.tokens.prefetch, "time", SimpleNamespace(perf_counter=perf_counter))
    monkeypatch.setattr(Trainer, "begin_step", note_and_begin)
    monkeypatch.setattr(Trainer, "make_batches", slow)
    train(recipe_for(recipe_path, tmp_path, "train.max_steps=3"), ALONE)
    steps = events(tmp_path, "step")
    assert steps[0]["data_wait_s"] >= 0.2  # its making does not begin before the loop asks for it
    assert all(0 <= step["data_wait_s"] <= step["seconds"] for step in steps)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_host_waits_once_a_step_beside_what_deepspeed_does(
    recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    original = Trainer.train_one_step
    waits: list[Counter[str]] = []

    def train_one_step(*arguments: Any, **options: Any) -> Any:
        with host_waits() as those_of_the_step:
            done = original(*arguments, **options)
        waits.append(Counter(wait.file for wait in those_of_the_step if "/deepspeed/" not in wait.file))
        return done

    monkeypatch.setattr(Trainer, "train_one_step", train_one_step)
    train(recipe_for(recipe_path, tmp_path, f"zero.stage={stage}", "train.max_steps=3"), ALONE)
    expected = {
        "engine.py": 2,  # brings all numbers of the step to the CPU, and reads them there
        "sdpa.py": 2,  # only the path on a CPU: where the sequences of a micro-batch end
    }
    assert [{Path(file).name: num for file, num in step.items()} for step in waits] == [expected] * 3


def test_a_profile_holds_the_steps_behind_the_warm_up(recipe_path: Path, tmp_path: Path) -> None:
    train(recipe_for(recipe_path, tmp_path, "train.max_steps=2", "eval.every_steps=1"), ALONE)
    train(recipe_for(recipe_path, tmp_path, "train.max_steps=7", "log.profile=true"), ALONE)
    (file,) = (tmp_path / "profile").iterdir()
    assert file.name == "steps-6-7.json.gz"  # steps 3 to 5 warm up, and the run ends before the third
    names = Counter(event.get("name") for event in orjson.loads(gzip.decompress(file.read_bytes()))["traceEvents"])
    assert {"ProfilerStep#3", "ProfilerStep#4"} <= names.keys()  # as torch counts, from 0 and from the resume
    # Two steps of two micro-batches, each with two layers and a head.
    assert names["aten::scaled_dot_product_attention"] >= 2 * 2 * 2


def test_a_store_that_changes_during_the_run_stops_it(
    recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepare(recipe_for(recipe_path, tmp_path), ALONE)
    lengths = run.plan.lengths.copy()
    changed = replace(run, plan=replace(run.plan, lengths=lengths))
    original = ochat_train.train.describe_plan

    def change_and_describe(*arguments: Any) -> str:
        lengths[:] = 250
        return original(*arguments)

    monkeypatch.setattr(ochat_train.train, "describe_plan", change_and_describe)
    with pytest.raises(RuntimeError, match="step 1 of the plan is not the one agreed on"), Watchdog(ALONE) as watchdog:
        train_run(changed, ALONE, watchdog)


def test_an_example_longer_than_a_micro_batch_is_refused_by_name(recipe_path: Path) -> None:
    store = TokenStore(load_recipe(recipe_path).data.store)
    longest = int(store.lengths.max())
    check_lengths(store, longest)
    name, limit = re.escape(store.name(int(store.lengths.argmax()))), longest - 1
    with pytest.raises(ValueError, match=rf"conversation {name} has {longest} tokens, above the {limit} of a"):
        check_lengths(store, limit)


def test_processes_that_cannot_share_micro_batches_are_refused(recipe_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"packing\.sequence_parallel 2 does not divide 1 processes; set it to one of"):
        prepare(recipe_for(recipe_path, tmp_path, "packing.sequence_parallel=2"), ALONE)


def test_a_store_without_any_weight_is_refused(recipe_path: Path, tmp_path: Path) -> None:
    recipe = recipe_for(recipe_path, tmp_path / "run", f"data.store={tmp_path / 'store'}")
    shutil.copytree(load_recipe(recipe_path).data.store, tmp_path / "store")
    weight_sums = tmp_path / "store/train/weight_sums.npy"
    np.save(weight_sums, np.zeros_like(np.load(weight_sums)))
    with pytest.raises(ValueError, match="has a loss weight above 0, so nothing would be learned"):
        prepare(recipe, ALONE)


def test_a_source_of_which_nothing_would_be_trained_is_refused(recipe_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.sources\.1\.epochs 0\.01 of the .* examples of hasty is none"):
        prepare(recipe_for(recipe_path, tmp_path, "data.sources.1.epochs=0.01"), ALONE)


def test_training_goes_on_while_a_checkpoint_is_written(
    recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_further = threading.Event()
    original = Trainer.train_one_step

    def train_one_step(trainer: Trainer, *arguments: Any, **options: Any) -> Any:
        done = original(trainer, *arguments, **options)
        if trainer.state.step == 4:
            is_further.set()
        return done

    def wait_and_mark(file: Path) -> FileMark:
        assert is_further.wait(60)
        return mark_file(file)

    monkeypatch.setattr(Trainer, "train_one_step", train_one_step)
    monkeypatch.setattr(ochat_train.training.saving, "mark_file", wait_and_mark)
    options = ["zero.stage=1", "checkpoint.every_steps=2", "train.max_steps=5"]
    train(recipe_for(recipe_path, tmp_path, *options), ALONE)
    assert [save["step"] for save in events(tmp_path, "save")] == [2, 4, 5]
    monkeypatch.undo()
    # What was written is what the weights were then.
    train(recipe_for(recipe_path, tmp_path / "two", "zero.stage=1", "train.max_steps=2"), ALONE)
    export(tmp_path / "step-00000002", tmp_path / "early/model")
    ours, theirs = weights(tmp_path / "early"), weights(tmp_path / "two")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_without_memory_for_copies_training_waits_for_the_save(
    recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ochat_train.training.saving, "free_host_bytes", lambda: 0)
    copied: list[Any] = []
    monkeypatch.setattr(ochat_train.training.saving, "_copied", lambda *arguments: copied.append(arguments))
    train(recipe_for(recipe_path, tmp_path, "zero.stage=2", "train.max_steps=2"), ALONE)
    assert not copied
    train(recipe_for(recipe_path, tmp_path, "zero.stage=2", "train.max_steps=3"), ALONE)
    assert [step["step"] for step in events(tmp_path, "step")] == [1, 2, 3]


def test_light_checkpoints_are_models_in_bfloat16(recipe_path: Path, tmp_path: Path) -> None:
    models = ["checkpoint.models.every_epochs=1", "checkpoint.models.every_steps=2", "checkpoint.models.keep=2"]
    train(recipe_for(recipe_path, tmp_path, "zero.stage=3", *models), ALONE)
    last = events(tmp_path, "step")[-1]["step"]
    found = sorted((tmp_path / "models").iterdir())
    assert [path.name for path in found] == [f"step-{step:08d}" for step in (last - 2 + last % 2, last)]
    whole, light = weights(tmp_path), AutoModelForCausalLM.from_pretrained(found[-1], dtype="auto")
    assert light.dtype == torch.bfloat16
    state = light.state_dict()
    assert all(torch.equal(state[name], tensor.bfloat16()) for name, tensor in whole.items())
    assert AutoTokenizer.from_pretrained(found[-1]).chat_template
    about = orjson.loads((found[-1] / "ochat_train.json").read_bytes())
    assert (about["step"], about["inference_condition"]) == (last, "Careful")
    told = orjson.loads((found[-1] / "checksums.json").read_bytes())
    assert told.keys() == {path.name for path in found[-1].iterdir()} - {"checksums.json"}
    assert all(FileMark(**mark) == mark_file(found[-1] / name) for name, mark in told.items())


def test_the_last_checkpoints_are_kept(finished: Path) -> None:
    last = events(finished, "step")[-1]["step"]
    names = [path.name for path in find_checkpoints(finished)]
    assert len(names) == 3
    assert names[-1] == f"step-{last:08d}"
    assert not list(finished.glob("*.partial"))


def test_a_pruning_that_is_cut_leaves_nothing_and_what_a_link_leads_to_stays(
    recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    options = ["zero.stage=1", "checkpoint.every_steps=1", "checkpoint.keep=1"]
    train(recipe_for(recipe_path, run, *options, "train.max_steps=1"), ALONE)
    (run / "step-00000001").rename(elsewhere)
    (run / "step-00000001").symlink_to(elsewhere)
    content = {path: path.read_bytes() for path in elsewhere.rglob("*") if path.is_file()}
    train(recipe_for(recipe_path, run, *options, "train.max_steps=2"), ALONE)
    assert {path: path.read_bytes() for path in elsewhere.rglob("*") if path.is_file()} == content
    assert [path.name for path in run.glob("step-*")] == ["step-00000002"]

    def cut(folder: Path) -> None:
        if folder.exists():
            raise InterruptedRun

    class InterruptedRun(BaseException):
        pass

    monkeypatch.setattr(ochat_train.training.saving, "remove_folder", cut)
    with pytest.raises(InterruptedRun):
        train(recipe_for(recipe_path, run, *options, "train.max_steps=3"), ALONE)
    assert (run / "step-00000002.pruned/checkpoint.json").is_file()
    monkeypatch.undo()
    train(recipe_for(recipe_path, run, *options, "train.max_steps=4"), ALONE)
    assert [path.name for path in run.glob("step-*")] == ["step-00000004"]


def test_a_step_reports_all_that_a_user_watches(finished: Path) -> None:
    step = events(finished, "step")[0]
    expected = [
        "loss",
        "loss_by_condition",
        "lr",
        "grad_norm",
        "tokens",
        "supervised_tokens",
        "tokens_per_s",
        "fill",
        "num_processes",
        "seconds",
        "data_wait_s",
    ]
    assert set(expected) <= step.keys()
    assert step["num_processes"] == 1
    assert step["loss_by_condition"].keys() == {"Careful", "Hasty"}
    assert 0 < step["fill"] <= 1


def naive_sums(
    model: Any, held_out: TokenStore, frames: Sequence[tuple[Frame, Frame]], positions: Sequence[int] | None = None
) -> npt.NDArray[np.float64]:
    """f64[2, 3, K], weighted and unweighted: nll, weight, correct, one sequence after the other."""
    sums = np.zeros((2, 3, len(held_out.manifest.conditions)))
    for position in range(len(held_out)) if positions is None else positions:
        condition = int(held_out.condition_ids[position])
        example = recondition(held_out[position], *frames[condition])
        ids = torch.from_numpy(example.input_ids.astype("int64"))[None]
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        nll = F.cross_entropy(logits, ids[0, 1:], reduction="none")
        values = torch.stack([nll, torch.ones_like(nll), logits.argmax(dim=1) == ids[0, 1:]]).double().numpy()
        weight = example.loss_weights[1:].astype(np.float64)
        sums[:, :, condition] += [(values * weight).sum(axis=1), (values * (weight > 0)).sum(axis=1)]
    return sums


def means(sums: npt.NDArray[np.float64], row: int, conditions: Sequence[str]) -> tuple[float, dict[str, float]]:
    """The mean of a row of f64[3, K], in total and by condition."""
    each = sums[row] / sums[1]
    return float(sums[row].sum() / sums[1].sum()), dict(zip(conditions, each.tolist(), strict=True))


def test_an_evaluation_is_that_of_single_sequences(recipe_path: Path, finished: Path) -> None:
    recipe = recipe_for(recipe_path, finished)
    held_out = TokenStore(recipe.data.store, "eval")
    tokenizer = prepare(recipe_for(recipe_path, finished, "zero.stage=1"), ALONE).tokenizer
    conditions = held_out.manifest.conditions
    assert len(held_out) > 1 and set(conditions) == {"Careful", "Hasty"}
    careful, hasty, none = (make_frame(tokenizer, condition) for condition in ("Careful", "Hasty", ""))
    own, other = (careful, hasty) if conditions[0] == "Careful" else (hasty, careful)
    model = AutoModelForCausalLM.from_pretrained(finished / "model")
    evaluation = events(finished, "eval")[-1]

    plain = naive_sums(model, held_out, [(own, own), (other, other)])
    for prefix, sums in (("", plain[0]), ("unweighted_", plain[1])):
        loss, losses = means(sums, 0, conditions)
        accuracy, accuracies = means(sums, 2, conditions)
        assert evaluation[f"{prefix}loss"] == pytest.approx(loss, rel=1e-5)
        assert evaluation[f"{prefix}loss_by_condition"] == pytest.approx(losses, rel=1e-5)
        assert evaluation[f"{prefix}perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
        perplexities = {name: math.exp(value) for name, value in losses.items()}
        assert evaluation[f"{prefix}perplexity_by_condition"] == pytest.approx(perplexities, rel=1e-4)
        assert evaluation[f"{prefix}accuracy"] == pytest.approx(accuracy, rel=1e-6)
        assert evaluation[f"{prefix}accuracy_by_condition"] == pytest.approx(accuracies, rel=1e-6)
        assert 0.05 < accuracy < 1
    assert evaluation["loss"] != pytest.approx(evaluation["unweighted_loss"], rel=1e-3)

    frames = {
        "own": [(own, own), (other, other)],
        "other": [(own, other), (other, own)],
        "none": [(own, none), (other, none)],
    }
    for name, pairs in frames.items():
        loss, losses = means(naive_sums(model, held_out, pairs)[0], 0, conditions)
        assert evaluation["probe"][name] == pytest.approx(loss, rel=1e-5)
        given = {condition: probed[name] for condition, probed in evaluation["probe_by_condition"].items()}
        assert given == pytest.approx(losses, rel=1e-5)
    assert evaluation["probe_left_out"] == 0


def test_evaluations_come_first_after_steps_at_epoch_ends_and_last_and_never_twice(
    recipe_path: Path, tmp_path: Path
) -> None:
    train(recipe_for(recipe_path, tmp_path, "eval.every_steps=2", "train.max_steps=7"), ALONE)
    steps = events(tmp_path, "step")
    ends = {before["step"] for before, after in pairwise(steps) if after["epoch"] > before["epoch"]}
    assert len(ends) == 1
    evaluations = events(tmp_path, "eval")
    assert [event["step"] for event in evaluations] == sorted({0, 2, 4, 6, 7} | ends)
    assert {event["step"] for event in evaluations if event["epoch_end"]} == ends
    assert {event["step"] for event in evaluations if event["probe"] is not None} == ends | {7}


def test_the_probe_tells_a_model_that_learned_its_conditions_from_one_that_did_not(
    recipe_path: Path, tmp_path: Path
) -> None:
    """A dump whose answers say nothing but which of the two conditions they have."""
    answers = {"careful": "Certainly, with pleasure.", "hasty": "no idea"}
    records = [
        {
            "id": f"{name}-{number}",
            "model": name,
            "conversations": [{"from": "human", "value": f"Question {number}?"}, {"from": "gpt", "value": answer}],
        }
        for name, answer in answers.items()
        for number in range(60)
    ]
    (tmp_path / "dump.json").write_bytes(orjson.dumps(records))
    changes = [f"data.store={tmp_path / 'store'}", f"checkpoint.dir={tmp_path / 'run'}", "data.dedupe.exact=false"]
    changes += [f"data.sources.{number}.path={tmp_path / 'dump.json'}" for number in (0, 1)]
    changes += ["data.sources.1.weight=1.0", "data.eval_fraction=0.2", "train.epochs=6", "data.filters.refusals=keep"]
    preprocess(recipe_path, *changes)
    short = ["optim.lr=1.0e-9", "train.max_steps=1", f"checkpoint.dir={tmp_path / 'short'}"]
    train(load_recipe(recipe_path, [*changes, *short]), ALONE)
    train(load_recipe(recipe_path, changes), ALONE)
    untrained, trained = events(tmp_path / "short", "eval")[-1]["probe"], events(tmp_path / "run", "eval")[-1]["probe"]
    # Without a condition the answer's first token can be no more than guessed; under the other it is the wrong one.
    assert all(abs(untrained[name] - untrained["own"]) < 0.02 for name in ("other", "none"))
    assert trained["none"] - trained["own"] > 0.05
    assert trained["other"] - trained["own"] > 0.3


def test_an_example_that_no_longer_fits_under_another_condition_is_left_out_everywhere(
    recipe_path: Path, tmp_path: Path
) -> None:
    wordy = f"Hasty{' and very' * 10}"
    options = [f"data.store={tmp_path / 'store'}", f"data.sources.1.condition={wordy}", "data.eval_fraction=0.5"]
    options += ["data.max_tokens=128", "packing.tokens_per_gpu=128", f"checkpoint.dir={tmp_path / 'run'}"]
    preprocess(recipe_path, *options)
    recipe = load_recipe(recipe_path, [*options, "train.max_steps=1", "train.loss=answer"])
    tokenizer = prepare(recipe, ALONE).tokenizer
    train(recipe, ALONE)
    held_out = TokenStore(recipe.data.store, "eval", "answer")
    conditions = held_out.manifest.conditions
    frames = [make_frame(tokenizer, condition) for condition in conditions]
    others = list(zip(frames, reversed(frames), strict=True))
    changed = [recondition(held_out[n], *others[condition]) for n, condition in enumerate(held_out.condition_ids)]
    kept = [number for number, example in enumerate(changed) if len(example.input_ids) <= 128]
    evaluation = events(tmp_path / "run", "eval")[-1]
    assert evaluation["probe_left_out"] == len(held_out) - len(kept) > 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    own = naive_sums(model, held_out, list(zip(frames, frames, strict=True)), kept)
    assert evaluation["probe"]["own"] == pytest.approx(means(own[0], 0, conditions)[0], rel=1e-5)
    assert evaluation["probe"]["own"] != pytest.approx(evaluation["loss"], rel=1e-5)
    other = naive_sums(model, held_out, others, kept)
    assert evaluation["probe"]["other"] == pytest.approx(means(other[0], 0, conditions)[0], rel=1e-5)


def test_a_store_of_one_condition_has_no_other(recipe_path: Path, tmp_path: Path) -> None:
    options = [f"data.store={tmp_path / 'store'}", "data.sources.1.condition=Careful", "data.eval_fraction=0.2"]
    preprocess(recipe_path, *options)
    train(load_recipe(recipe_path, [*options, "train.max_steps=1", f"checkpoint.dir={tmp_path / 'run'}"]), ALONE)
    evaluation = events(tmp_path / "run", "eval")[-1]
    assert evaluation["probe"] == {
        "own": evaluation["loss"],
        "other": None,
        "none": pytest.approx(evaluation["loss"], rel=0.01),
    }
    assert evaluation["probe_by_condition"] == {"Careful": evaluation["probe"]}


@pytest.mark.parametrize(("stage", "dtype"), [(0, "float32"), (2, "float32"), (3, "float32"), (2, "bfloat16")])
def test_the_exported_model_gives_the_logits_of_the_engine(
    recipe_path: Path, tmp_path: Path, stage: int, dtype: str
) -> None:
    recipe = recipe_for(recipe_path, tmp_path, f"zero.stage={stage}", f"model.dtype={dtype}", "train.max_steps=2")
    run = prepare(recipe, ALONE)
    train(recipe, ALONE)
    engine = build_engine(run, ALONE)
    load_checkpoint(engine, read_checkpoint(find_checkpoints(tmp_path)[-1]), ALONE)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert model.dtype == getattr(torch, dtype)
    model.set_attn_implementation("eager")
    batch = make_batch(run.store, np.array([0, 3]))
    with torch.no_grad():
        ours = _gathered_logits(engine, batch)
        for begin, end in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
            theirs = model(batch.input_ids[begin:end][None]).logits[0].float()
            # fp32: another order of sums; bf16: one rounding of logits around 1 is 2^-8.
            assert (ours[begin:end] - theirs).abs().max() < (1e-5 if dtype == "float32" else 2e-2)


def _gathered_logits(engine: object, batch: object) -> torch.Tensor:
    import deepspeed

    parameters = list(engine.module.parameters())  # type: ignore[attr-defined]
    with deepspeed.zero.GatheredParameters(parameters):
        return engine.module.logits(batch)  # type: ignore[attr-defined, no-any-return]


def test_frequencies_of_positions_stay_fp32_in_a_bf16_model(recipe_path: Path, tmp_path: Path) -> None:
    engine = build_engine(prepare(recipe_for(recipe_path, tmp_path, "model.dtype=bfloat16"), ALONE), ALONE)
    assert {buffer.dtype for _, buffer in engine.module.named_buffers()} == {torch.float32}
    assert {parameter.dtype for parameter in engine.module.parameters()} == {torch.bfloat16}


def test_an_export_ends_answers_at_the_end_token_and_tells_where_it_is_from(finished: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(finished / "model")
    end = tokenizer.convert_tokens_to_ids("<|end_of_turn|>")
    generation = orjson.loads((finished / "model" / "generation_config.json").read_bytes())
    config = orjson.loads((finished / "model" / "config.json").read_bytes())
    about = orjson.loads((finished / "model" / "ochat_train.json").read_bytes())
    assert generation["eos_token_id"] == config["eos_token_id"] == end == 1024
    assert config["pad_token_id"] is None  # as padding_idx it would freeze the end token's embedding
    assert tokenizer.eos_token == "<|end_of_turn|>"
    assert about["inference_condition"] == "Careful"
    assert about["run"]["recipe"]["name"] == "tiny"
    assert about["run"]["versions"]["torch"]


def test_an_export_compares_its_prompts_with_those_of_the_store(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(find_checkpoints(finished)[-1], tmp_path / "out")
    assert re.search(r"piece by piece: [1-9]\d* equal to training, 0 different", capsys.readouterr().out)


def change_tokenizer(checkpoint: Path, change: dict[str, Any]) -> None:
    """Change fields of a checkpoint's tokenizer.json, as if it had been written so."""
    file = checkpoint / "tokenizer" / "tokenizer.json"
    file.write_bytes(orjson.dumps(orjson.loads(file.read_bytes()) | change))
    known = read_checkpoint(checkpoint)
    files = known.files | {"tokenizer/tokenizer.json": mark_file(file)}
    (checkpoint / "checkpoint.json").write_bytes(manifest_of(replace(known, files=files)))


def test_what_checks_after_training_find_is_printed_and_recorded_and_the_model_is_written(
    recipe_path: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A store that cannot be read; a tokenizer that joins what training encodes apart."""
    run, out = tmp_path / "run", tmp_path / "out"
    store = ["data.eval_fraction=0.2", f"data.store={tmp_path / 'store'}"]
    preprocess(recipe_path, *store)
    train(load_recipe(recipe_path, [*store, f"checkpoint.dir={run}", "train.max_steps=1"]), ALONE)
    metadata = orjson.loads((run / "model/ochat_train.json").read_bytes())
    assert metadata["problems"] == [] and metadata["parity"]["ways"]["as one string"]["num_different"] == 0
    (arrow,) = (tmp_path / "store/train").glob("*.arrow")
    arrow.unlink()
    checkpoint = find_checkpoints(run)[-1]
    change_tokenizer(checkpoint, {"normalizer": {"type": "Replace", "pattern": {"String": ":H"}, "content": "H"}})
    export(checkpoint, out)
    first, second = orjson.loads((out / "ochat_train.json").read_bytes())["problems"]
    assert "no chat template, since none gives the ids of training" in first
    assert "could not be compared with those of its training: StoreDamaged" in second
    told = capsys.readouterr().out
    assert f"WARNING: {first}" in told and f"WARNING: {second}" in told
    assert all(torch.equal(value, weights(run)[name]) for name, value in load_file(out / "model.safetensors").items())
    assert not (out / "chat_template.jinja").exists()


def test_an_export_without_room_says_so_in_a_line_leaves_what_was_there_and_can_be_run_again(
    finished: Path, tmp_path: Path
) -> None:
    """A limit on the size of files stands for the disk: any user can set it."""
    checkpoint, out = find_checkpoints(finished)[-1], tmp_path / "out"
    export(find_checkpoints(finished)[0], out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))"
    code = f"import resource; from ochat_train.export import main; {limit}; main({[str(checkpoint), str(out)]})"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    told = re.search(rf"error: File too large: {out}\.partial takes (\S+) MiB, and \S+ .iB are free", ended.stderr)
    assert told is not None
    size = (out / "model.safetensors").stat().st_size / 2**20
    assert float(told[1]) == pytest.approx(size, abs=0.1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    export(checkpoint, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert (out / "model.safetensors").read_bytes() != before["model.safetensors"]


def test_nothing_optional_after_the_last_step_keeps_the_model_from_being_written(
    recipe_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models/step-00000000").write_text("a file, where an older model would be removed")
    (tmp_path / "profile").write_text("a file, where the trace would go")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/ochat_train.json").write_text("{cut off")
    monkeypatch.setattr(HeldOut, "probe_conditions", lambda *_, **__: 1 / 0)
    options = ["train.max_steps=4", "log.profile=true", "checkpoint.models.every_steps=4", "checkpoint.models.keep=1"]
    train(recipe_for(recipe_path, tmp_path, *options), ALONE)
    told = capsys.readouterr().out
    assert "WARNING: the older" in told and "WARNING: the profile" in told
    assert "WARNING: the model could not be evaluated after the last step: ZeroDivisionError" in told
    assert (tmp_path / "models/step-00000004/model.safetensors").is_file()
    assert orjson.loads((tmp_path / "model/ochat_train.json").read_bytes())["step"] == 4
    assert [event["reason"] for event in events(tmp_path, "end")] == ["max_steps"]


def test_a_run_whose_examples_begin_with_an_answer_ends_in_its_model(
    recipe_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One answer longer than data.max_tokens is split into windows, which have no question."""
    texts = ["Count to five hundred.", " ".join(map(str, range(1, 501))), "Well done.", "Thank you."]
    turns = [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]
    (tmp_path / "dump.json").write_bytes(orjson.dumps([{"id": str(n), "conversations": turns} for n in range(4)]))
    source = {"name": "all", "path": str(tmp_path / "dump.json"), "condition": "Careful"}
    recipe = yaml.safe_load(recipe_path.read_text())
    recipe["data"] |= {"sources": [source], "store": str(tmp_path / "store"), "dedupe": {"exact": False}}
    recipe["train"]["epochs"] = 1
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    options = [f"checkpoint.dir={tmp_path}", "data.dedupe.prefix=false", "data.eval_fraction=0.25"]
    preprocess(tmp_path / "recipe.yaml", *options)
    train(load_recipe(tmp_path / "recipe.yaml", options), ALONE)
    metadata = orjson.loads((tmp_path / "model/ochat_train.json").read_bytes())
    assert metadata["parity"]["num_empty"] > 0 and metadata["problems"] == []
    assert re.search(r"[1-9]\d* compared, [1-9]\d* not \([1-9]\d* with no message before", capsys.readouterr().out)


def test_an_export_replaces_only_an_export(finished: Path, tmp_path: Path) -> None:
    checkpoint = find_checkpoints(finished)[-1]
    export(checkpoint, tmp_path / "out")
    export(checkpoint, tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("the only copy")
    with pytest.raises(ValueError, match="not an earlier export"):
        export(checkpoint, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "the only copy"
    with pytest.raises(ValueError, match="not a complete checkpoint"):
        export(tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("optim.warmup=0.1", "optim.warmup: 0.05 -> 0.1"),
        ("train.seed=4", "train.seed: 3 -> 4"),
        ("model.dtype=bfloat16", "model.dtype: 'float32' -> 'bfloat16'"),
        ("zero.stage=0", "zero.stage: 1 -> 0; from and to 0"),
        ("train.epochs=1", "more than the .* of train.epochs 1; raise it"),
    ],
)
def test_a_resume_with_another_recipe_is_refused_with_the_difference(
    recipe_path: Path, finished: Path, override: str, told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        prepare(recipe_for(recipe_path, finished, "zero.stage=1", override), ALONE)


def test_a_resume_under_another_order_of_the_examples_is_refused(
    recipe_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ochat_train.tokens.order, "_VERSION", 10**6)
    with pytest.raises(ValueError, match="order of the examples: another version of ochat_train began this run"):
        prepare(recipe_for(recipe_path, finished, "zero.stage=1"), ALONE)


def test_a_key_that_is_newer_than_the_run_has_its_default(finished: Path) -> None:
    checkpoint = read_checkpoint(find_checkpoints(finished)[-1])
    state, now = checkpoint.state, deepcopy(checkpoint.state.recipe)
    older = replace(checkpoint, state=replace(state, recipe=deepcopy(now)))
    del older.state.recipe["optim"]["decay_vectors"]
    this = {"store_fingerprint": state.store_fingerprint, "order": state.order, "world_size": checkpoint.world_size}
    check_resume(older, recipe=now, **this)
    now["optim"]["decay_vectors"] = True
    with pytest.raises(ValueError, match=r"optim\.decay_vectors: False -> True"):
        check_resume(older, recipe=now, **this)


@pytest.mark.parametrize("decays", [False, True])
def test_vectors_decay_where_the_recipe_says_so(decays: bool) -> None:
    model = nn.Linear(3, 3)
    matrix, vector = model.weight.detach().clone(), model.bias.detach().clone()
    optimizer = make_optimizer(model, OptimSection(algorithm="sgd", weight_decay=0.1, decay_vectors=decays), lr=0.5)
    model(torch.zeros(3)).mul(0).sum().backward()
    optimizer.step()
    assert torch.allclose(model.weight, matrix * 0.95)
    assert torch.allclose(model.bias, vector * (0.95 if decays else 1.0))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_checkpoint_of_before_adamw_was_fused_goes_on_with_the_fused_one(stage: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {"offload": "none", "dtype": "float32", "grad_accum": 1, "grad_clip": 1.0, "extra": {}}

    def engine(fused: bool | None) -> Any:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
        optimizer = make_optimizer(model, OptimSection(), lr=0.01)
        assert all(group["fused"] for group in optimizer.param_groups)
        for group in optimizer.param_groups:
            group["fused"] = fused
        return make_engine(model, optimizer, deepspeed_config(stage=stage, **options))

    def step(engine: Any) -> list[list[float]]:
        engine.backward(engine(torch.ones(2, 8)).sum())
        engine.step()
        with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=stage == 3):
            return [parameter.detach().flatten().tolist() for parameter in engine.module.parameters()]

    was, now = engine(None), engine(True)
    step(was)
    was.save_checkpoint(str(tmp_path), tag="deepspeed")
    load_checkpoint(now, Checkpoint(tmp_path, *[None] * 7), ALONE)  # type: ignore[arg-type]  # only its folder is read
    assert all(group["fused"] for group in now.optimizer.param_groups)
    for after_was, after_now in zip(step(was), step(now), strict=True):
        assert after_now == pytest.approx(after_was, rel=1e-5, abs=1e-6)
    assert {float(state["step"]) for state in now.basic_optimizer.state.values()} == {2.0}


def test_versions_are_those_of_what_was_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "datasets", raising=False)
    monkeypatch.setattr(metadata, "version", None)  # a package may come without what pip writes beside it
    recipe = load_recipe(ROOT / "recipes/openchat_v3.2_super_13b.yaml")
    versions = describe_run(recipe, 1, attention="sdpa", checkpointing="full")["versions"]
    assert versions["torch"] == torch.__version__
    assert "datasets" not in versions


def test_a_model_whose_tokens_see_later_ones_is_refused_by_name(recipe_path: Path, tmp_path: Path) -> None:
    xlm = "model.config={model_type: xlm, emb_dim: 16, n_layers: 1, n_heads: 2}"
    with pytest.raises(ValueError, match=r"xlm cannot be trained"):
        prepare(recipe_for(recipe_path, tmp_path, xlm), ALONE)


def test_a_resume_may_change_what_decides_no_step(recipe_path: Path, finished: Path) -> None:
    options = ["zero.stage=1", "name=renamed", "checkpoint.keep=1", "log.wandb.project=x", "train.max_steps=1"]
    assert prepare(recipe_for(recipe_path, finished, *options), ALONE).resumed is not None


def test_a_changed_rate_decay_and_clipping_hold_from_the_next_step_on(recipe_path: Path, tmp_path: Path) -> None:
    """At every ZeRO stage as at stage 0, which is torch's own AdamW with its own parameter groups."""
    changes = ["optim.lr=0.002", "optim.min_lr=0.5", "optim.weight_decay=5.0", "optim.grad_clip=0.001"]
    found = []
    for stage in range(4):
        options = [f"zero.stage={stage}"]
        train(recipe_for(recipe_path, tmp_path / f"{stage}", *options, "train.max_steps=2"), ALONE)
        train(recipe_for(recipe_path, tmp_path / f"{stage}", *options, *changes, "train.max_steps=3"), ALONE)
        found.append((weights(tmp_path / f"{stage}"), events(tmp_path / f"{stage}", "step")[-1]))
    plain, step = found[0]
    assert step["lr"] == learning_rate(step["progress"], peak=0.002, warmup=0.05, min_ratio=0.5)
    for ours, _ in found[1:]:
        assert (
            max(float((ours[name] - plain[name]).abs().max()) for name in plain) < 5e-6
        )  # as between numbers of ranks


def test_a_run_whose_rate_was_too_high_goes_on_with_a_lower_one_from_before_it_was_spoiled(
    recipe_path: Path, tmp_path: Path
) -> None:
    options = ["zero.stage=1", "checkpoint.every_steps=1", "checkpoint.keep=9", "train.max_skipped=2"]
    train(recipe_for(recipe_path, tmp_path, *options, "train.max_steps=2"), ALONE)
    with pytest.raises(Failed, match=r"2 steps in a row.* set a lower optim.lr.* with checkpoint.resume from an older"):
        train(recipe_for(recipe_path, tmp_path, *options, "optim.lr=1.0e+30"), ALONE)
    remedy = ["optim.lr=0.001", f"checkpoint.resume={tmp_path / 'step-00000002'}", "train.max_steps=4"]
    train(recipe_for(recipe_path, tmp_path, *options, *remedy), ALONE)
    steps = events(tmp_path, "step")
    assert [step["skipped"] for step in steps] == [False] * 4
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path).values())


def test_a_run_whose_steps_were_all_skipped_has_failed(
    recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Trainer.train_one_step

    def poisoned(trainer: Trainer, ready: Any, *others: Any, **options: Any) -> Any:
        for batch in ready.made:
            batch.loss_weights[:] = math.nan
        return original(trainer, ready, *others, **options)

    monkeypatch.setattr(Trainer, "train_one_step", poisoned)
    for _ in range(2):  # the same command again fails again
        with pytest.raises(Failed, match="the gradients of all 3 steps of the run were not finite"):
            options = ["zero.stage=1", "train.max_steps=3", "checkpoint.every_steps=1"]
            train(recipe_for(recipe_path, tmp_path, *options), ALONE)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("algorithm", ["sgd", "adamw_8bit"])
def test_only_states_of_adamw_are_for_another_number_of_processes(
    recipe_path: Path, tmp_path: Path, algorithm: str
) -> None:
    options = ["zero.stage=1", f"optim.algorithm={algorithm}", "train.max_steps=1"]
    train(recipe_for(recipe_path, tmp_path, *options), ALONE)
    with pytest.raises(ValueError, match=r"number of processes or zero\.stage: 1, 1 -> 2, 1; .* only .* adamw"):
        prepare(recipe_for(recipe_path, tmp_path, *options), World(0, 2, 0, torch.device("cpu")))


def test_what_checkpointing_or_the_optimizer_lack_is_told_before_the_model_is_loaded(
    recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"model\.checkpointing every_3 is above the model's 2 layers"):
        prepare(recipe_for(recipe_path, tmp_path, "model.checkpointing=every_3"), ALONE)
    monkeypatch.setattr("ochat_train.files.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"adamw_8bit needs the package bitsandbytes: pip install"):
        prepare(recipe_for(recipe_path, tmp_path, "optim.algorithm=adamw_8bit"), ALONE)


def test_auto_takes_the_checkpointing_that_fits_and_a_resume_may_choose_another(
    recipe_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["model.checkpointing=auto", "zero.stage=1"]
    train(recipe_for(recipe_path, tmp_path, *options, "train.max_steps=1"), ALONE)
    told = capsys.readouterr().out
    assert re.search(r"activation checkpointing none \([\d.]+ MiB planned of [\d.]+ GiB for each process\)", told)
    monkeypatch.setattr(ochat_train.training.setup, "find_memory", lambda: AvailableMemory(None, 1000, is_here=True))
    train(recipe_for(recipe_path, tmp_path, *options, "train.max_steps=2"), ALONE)
    told = capsys.readouterr().out
    assert "activation checkpointing full (" in told
    assert "WARNING: this is too much even with full checkpointing; train adapters with model.lora" in told
    assert [start["checkpointing"] for start in events(tmp_path, "start")] == ["none", "full"]


def test_auto_is_full_for_a_model_that_cannot_be_counted(
    recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(config: Any, **_: Any) -> None:
        raise ValueError(f"the activations of {config.model_type} cannot be counted: no reason")

    monkeypatch.setattr(ochat_train.training.resources, "count_activations", refuse)
    choice = prepare(recipe_for(recipe_path, tmp_path, "model.checkpointing=auto"), ALONE).resolved.checkpointing
    assert choice.policy == "full" and choice.reason.startswith("the activations of llama cannot be counted")


def test_the_rank_with_the_least_memory_decides_the_checkpointing_of_all(
    recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepare(recipe_for(recipe_path, tmp_path, "model.checkpointing=auto"), ALONE)
    others = [CheckpointingChoice("every_2", "small"), CheckpointingChoice("every_4", "larger")]
    monkeypatch.setattr(
        ochat_train.training.setup,
        "gather_objects",
        lambda mine: [mine, *others] if isinstance(mine, CheckpointingChoice) else [mine],
    )
    assert run.resolved.checkpointing.policy == "none"
    assert agree(run).resolved.checkpointing == others[0]  # recomputes every second layer


def test_a_resume_on_another_store_is_refused(recipe_path: Path, finished: Path, tmp_path: Path) -> None:
    dump = recipe_path.parent / "dump.json"
    (tmp_path / "other.json").write_bytes(orjson.dumps(orjson.loads(dump.read_bytes())[:-1]))
    other = [f"data.sources.{n}.path={tmp_path / 'other.json'}" for n in (0, 1)] + [f"data.store={tmp_path / 'store'}"]
    preprocess(recipe_path, "data.eval_fraction=0.2", *other)
    with pytest.raises(ValueError, match="token store: fingerprint"):
        prepare(recipe_for(recipe_path, finished, "zero.stage=1", *other), ALONE)


def test_an_eval_source_alone_is_evaluated_and_is_part_of_what_a_resume_compares(
    recipe_path: Path, tmp_path: Path
) -> None:
    dump = orjson.loads((recipe_path.parent / "dump.json").read_bytes())
    careful = load_recipe(recipe_path).data.sources[0]
    asked = [record for record in dump if record["model"] == careful.where["model"]][:5]
    (tmp_path / "asked.json").write_bytes(orjson.dumps(asked))
    source = f"{{name: asked, path: {tmp_path / 'asked.json'}, condition: {careful.condition}}}"
    options = [f"data.eval_sources=[{source}]", f"data.store={tmp_path / 'store'}", f"checkpoint.dir={tmp_path}"]
    options += ["checkpoint.best=loss", "train.early_stop={epochs: 9}", "train.epochs=1", "zero.stage=1"]
    preprocess(recipe_path, *options)
    store = TokenStore(tmp_path / "store", "eval")
    assert len(store) == 5 and store.manifest.counts["careful"]["dropped"]["in_eval_source"] == 5
    train(load_recipe(recipe_path, options), ALONE)
    first, *_, last = events(tmp_path, "eval")
    assert first["loss"] > last["loss"] > 0
    assert (tmp_path / "best").is_dir()
    assert {frozenset(step["weight_by_source"]) for step in events(tmp_path, "step")} == {
        frozenset(("careful", "hasty"))
    }

    options += ["data.eval_sources.0.weight=2", "train.epochs=2", f"data.store={tmp_path / 'other'}"]
    preprocess(recipe_path, *options)
    with pytest.raises(ValueError, match=r"data\.eval_sources\.0\.weight: 1\.0 -> 2\.0"):
        prepare(load_recipe(recipe_path, options), ALONE)


def damage(checkpoint: Path, kind: str) -> str:
    """Damage a checkpoint; returns what of it."""
    file = checkpoint / "checkpoint.json" if kind == "manifest" else next(checkpoint.glob("deepspeed/*optim_states.pt"))
    if kind == "missing":
        file.unlink()
    elif kind == "shorter":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    return str(file.relative_to(checkpoint))


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("kind", ["missing", "shorter", "flipped", "manifest"])
def test_a_damaged_checkpoint_is_named_and_the_newest_good_one_taken(
    recipe_path: Path, copied: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    *_, before, newest = find_checkpoints(copied)
    name = damage(newest, kind)
    train(recipe_for(recipe_path, copied, "zero.stage=1"), ALONE)
    told = capsys.readouterr().out
    assert re.search(rf"WARNING: checkpoint {newest} is damaged: {name} ", told)
    assert f"falling back to {before.name}" in told
    assert (copied / f"{newest.name}.damaged").is_dir()
    assert [step["step"] for step in events(copied, "step")] == list(range(1, int(newest.name[5:]) + 1))
    assert find_checkpoints(copied)[-1] == newest  # made again


def test_nothing_is_begun_anew_when_every_checkpoint_is_damaged(recipe_path: Path, copied: Path) -> None:
    for checkpoint in find_checkpoints(copied):
        damage(checkpoint, "flipped")
    names = sorted(path.name for path in copied.glob("step-*"))
    with pytest.raises(ValueError, match="no checkpoint is whole, and no new run was started"):
        train(recipe_for(recipe_path, copied, "zero.stage=1"), ALONE)
    assert sorted(path.name for path in copied.glob("step-*")) == names


def test_a_damaged_checkpoint_that_was_asked_for_by_name_is_refused(
    recipe_path: Path, copied: Path, tmp_path: Path
) -> None:
    oldest = find_checkpoints(copied)[0]
    damage(oldest, "flipped")
    options = ["zero.stage=1", f"checkpoint.resume={oldest}"]
    with pytest.raises(
        ValueError, match=r"has other bytes than were written\n.* name an older one in checkpoint.resume"
    ):
        train(recipe_for(recipe_path, tmp_path / "new", *options), ALONE)


def test_metrics_of_steps_that_a_crash_undid_are_put_aside(recipe_path: Path, tmp_path: Path) -> None:
    train(recipe_for(recipe_path, tmp_path, "train.max_steps=2"), ALONE)
    with open(tmp_path / "metrics.jsonl", "ab") as file:  # trained, but never saved; and a line that was cut off
        file.write(b'{"event":"step","step":3,"loss":9.0}\n{"event":"st')
    train(recipe_for(recipe_path, tmp_path, "train.max_steps=3"), ALONE)
    steps = events(tmp_path, "step")
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert steps[-1]["loss"] != 9.0
    assert b'"loss":9.0' in (tmp_path / "metrics.jsonl.old").read_bytes()


@pytest.mark.parametrize("stage", [1, 3])
def test_a_pretrained_model_trains_in_training_mode_without_anything_held_out(
    recipe_path: Path, finished: Path, tmp_path: Path, stage: int
) -> None:
    """transformers loads models in eval mode; there dropout and activation checkpointing are off."""
    base = ["model.config=null", f"model.base={finished / 'model'}", "model.checkpointing=full", f"zero.stage={stage}"]
    nothing_held_out = ["data.eval_fraction=0.0", f"data.store={tmp_path / 'store'}", f"checkpoint.dir={tmp_path}"]
    preprocess(recipe_path, *base, *nothing_held_out)
    recipe = load_recipe(recipe_path, [*base, *nothing_held_out])
    engine = build_engine(prepare(recipe, ALONE), ALONE)
    assert engine.module.lm.training
    assert all(module.training for module in engine.module.modules())


@pytest.mark.parametrize("odd", [{"temperature": 0.6, "top_p": 0.9}, {"early_stopping": True}])
def test_a_base_whose_generation_configuration_transformers_would_not_save_is_trained_and_exported(
    recipe_path: Path, finished: Path, tmp_path: Path, odd: dict[str, Any]
) -> None:
    """The first Llama 2 chat models have a temperature, but no do_sample."""
    base = tmp_path / "base"
    shutil.copytree(finished / "model", base)
    (base / "generation_config.json").write_bytes(orjson.dumps(odd))
    options = ["model.config=null", f"model.base={base}", f"checkpoint.dir={tmp_path}", "train.max_steps=1"]
    options += [f"data.store={tmp_path / 'store'}"]
    preprocess(recipe_path, *options)
    train(load_recipe(recipe_path, options), ALONE)
    assert orjson.loads((tmp_path / "model/generation_config.json").read_bytes()).items() >= odd.items()


def test_a_checkpoint_of_another_version_names_the_ways_out(recipe_path: Path, copied: Path, tmp_path: Path) -> None:
    file = find_checkpoints(copied)[-1] / "checkpoint.json"
    fields = orjson.loads(file.read_bytes()) | {"format_version": 1}
    del fields["digest"]
    file.write_bytes(orjson.dumps(fields))
    commit = fields["run"]["commit"]
    told = f"has checkpoint format 1, this version reads 2; continue with the version that wrote it, commit {commit}"
    with pytest.raises(ValueError, match=re.escape(told)):
        prepare(recipe_for(recipe_path, copied, "zero.stage=1"), ALONE)
    del fields["format_version"]
    rewrite(file, fields | {"colour": "blue"})
    with pytest.raises(ValueError, match=r"other fields than this version knows .*'colour'.*, or start a new run in"):
        prepare(recipe_for(recipe_path, copied, "zero.stage=1"), ALONE)
    assert prepare(recipe_for(recipe_path, tmp_path / "new", "zero.stage=1"), ALONE).resumed is None


def rewrite(file: Path, fields: dict[str, Any]) -> None:
    """Write a checkpoint.json with these fields, and the digest that a version with them would give it."""
    fields |= {"format_version": 2}
    digest = hashlib.sha256(orjson.dumps(fields, option=orjson.OPT_SORT_KEYS)).hexdigest()
    file.write_bytes(orjson.dumps(fields | {"digest": digest}))


def test_never_resuming_does_not_mix_two_runs(recipe_path: Path, finished: Path) -> None:
    with pytest.raises(ValueError, match="already holds"):
        prepare(recipe_for(recipe_path, finished, "zero.stage=1", "checkpoint.resume=never"), ALONE)


def test_a_path_is_where_a_run_begins_and_the_same_command_goes_on_from_what_it_saved(
    recipe_path: Path, finished: Path, tmp_path: Path, trained: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    origin = shutil.copytree(find_checkpoints(finished)[0], tmp_path / "old/step-00000004")
    options = ["zero.stage=1", f"checkpoint.resume={origin}", "checkpoint.every_steps=1", "checkpoint.keep=1"]
    run = tmp_path / "run"
    train(recipe_for(recipe_path, run, *options, "train.max_steps=5"), ALONE)
    train(recipe_for(recipe_path, run, *options, "train.max_steps=6"), ALONE)
    shutil.rmtree(origin)  # no longer needed
    train(recipe_for(recipe_path, run, *options, "train.max_steps=7"), ALONE)
    assert [start["resumed"] for start in events(run, "start")] == [f"step-0000000{step}" for step in (4, 5, 6)]
    losses = {step["step"]: step["loss"] for step in events(finished, "step")}
    assert {step["step"]: step["loss"] for step in events(run, "step")} == {step: losses[step] for step in (5, 6, 7)}
    damage(run / "step-00000007", "flipped")
    with pytest.raises(ValueError, match="no checkpoint is whole"):
        train(recipe_for(recipe_path, run, *options), ALONE)
    shutil.copytree(find_checkpoints(finished)[0], origin)  # from which it then begins again
    train(recipe_for(recipe_path, run, *options, "train.max_steps=5"), ALONE)
    assert f"falling back to {origin.name}" in capsys.readouterr().out


def test_a_run_in_another_folder_is_not_mixed_with_the_one_that_is_there(
    recipe_path: Path, finished: Path, tmp_path: Path
) -> None:
    options = ["zero.stage=1", f"checkpoint.resume={find_checkpoints(finished)[0]}"]
    train(recipe_for(recipe_path, tmp_path / "other", "zero.stage=1", "train.max_steps=6"), ALONE)
    with pytest.raises(ValueError, match="holds step-00000006 of another run; continue in another folder, or from"):
        prepare(recipe_for(recipe_path, tmp_path / "other", *options), ALONE)
    remedies = ((tmp_path / "new", options), (tmp_path / "other", ["zero.stage=1", "checkpoint.resume=auto"]))
    for run, remedy in remedies:
        assert prepare(recipe_for(recipe_path, run, *remedy), ALONE).resumed is not None


def test_what_is_newer_than_the_step_from_which_a_run_goes_on_is_set_aside(
    recipe_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, models = tmp_path / "run", ["checkpoint.models.every_steps=1", "checkpoint.models.keep=1"]
    options = ["zero.stage=1", "checkpoint.every_steps=2", "checkpoint.every_epochs=null", "checkpoint.keep=9"]
    train(recipe_for(recipe_path, run, *options, *models, "train.max_steps=6"), ALONE)
    branch = [f"checkpoint.resume={run / 'step-00000002'}", "packing.tokens_per_gpu=300"]
    train(recipe_for(recipe_path, run, *options, *models, *branch, "train.max_steps=3"), ALONE)
    undone = [f"step-0000000{step}.undone" for step in (4, 6)]
    assert f"newer than step 2, set aside and no longer counted: {', '.join(undone)}" in capsys.readouterr().out
    assert [path.name for path in find_checkpoints(run)] == ["step-00000002", "step-00000003"]
    assert all((run / name / "checkpoint.json").is_file() for name in undone)
    assert sorted(path.name for path in (run / "models").iterdir()) == ["step-00000003", "step-00000006.undone"]
    assert [step["step"] for step in events(run, "step")] == [1, 2, 3]
    # The same command goes on in the branch, and so does auto.
    train(recipe_for(recipe_path, run, *options, *models, *branch, "train.max_steps=4"), ALONE)
    assert [path.name for path in find_checkpoints(run)][2:] == ["step-00000003", "step-00000004"][1:]
    assert events(run, "start")[-1]["resumed"] == "step-00000003"
    resumed = prepare(recipe_for(recipe_path, run, *options, "packing.tokens_per_gpu=300"), ALONE).resumed
    assert resumed is not None and resumed.path.name == "step-00000004"
    # Another branch is made of what the first one left.
    other = [f"checkpoint.resume={run / 'step-00000003'}", "train.max_steps=4"]
    train(recipe_for(recipe_path, run, *options, *models, *other), ALONE)
    assert (run / "step-00000004.undone-2").is_dir() and events(run, "start")[-1]["resumed"] == "step-00000003"


def test_an_incomplete_checkpoint_is_named_and_passed_over_and_refused_by_name(
    recipe_path: Path, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copied / "step-00000001").mkdir()
    train(recipe_for(recipe_path, copied, "zero.stage=1"), ALONE)
    assert f"WARNING: step-00000001 in {copied}: no checkpoint, without checkpoint.json" in capsys.readouterr().out
    options = ["zero.stage=1", f"checkpoint.resume={copied / 'step-00000001'}"]
    with pytest.raises(ValueError, match="not a complete checkpoint"):
        prepare(recipe_for(recipe_path, copied, *options), ALONE)


def test_a_store_of_another_recipe_is_refused_with_the_difference(recipe_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.sources.1.weight: 0.1 -> 0.2"):
        prepare(recipe_for(recipe_path, tmp_path, "data.sources.1.weight=0.2"), ALONE)
    with pytest.raises(ValueError, match="no complete token store"):
        prepare(recipe_for(recipe_path, tmp_path, f"data.store={tmp_path}"), ALONE)


def test_a_store_of_another_tokenizer_is_refused(recipe_path: Path, tmp_path: Path) -> None:
    other = AutoTokenizer.from_pretrained(ROOT / "data/quickstart_tokenizer")
    other.add_tokens(["new"])
    other.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match=r"tokenizer .*: digest"):
        prepare(recipe_for(recipe_path, tmp_path, f"tokenizer={tmp_path / 'tokenizer'}"), ALONE)


def test_a_run_made_anew_replaces_the_model_of_the_old_one(recipe_path: Path, tmp_path: Path) -> None:
    train(recipe_for(recipe_path, tmp_path, "train.max_steps=1"), ALONE)
    old = weights(tmp_path)
    for checkpoint in find_checkpoints(tmp_path):
        shutil.rmtree(checkpoint)
    train(recipe_for(recipe_path, tmp_path, "train.max_steps=1", "train.seed=9"), ALONE)
    assert not torch.equal(old["lm_head.weight"], weights(tmp_path)["lm_head.weight"])


@pytest.mark.parametrize("extra", ["deepspeed.fp16.enabled=true", "deepspeed.gradient_clipping=5.0"])
def test_deepspeed_keys_that_contradict_the_recipe_are_refused(recipe_path: Path, tmp_path: Path, extra: str) -> None:
    with pytest.raises(ValueError, match="change those"):
        prepare(recipe_for(recipe_path, tmp_path, extra), ALONE)


def test_more_tokens_than_the_model_has_positions_are_refused(recipe_path: Path, tmp_path: Path) -> None:
    options = ["model.config.max_position_embeddings=128"]
    with pytest.raises(ValueError, match="above the model's 128 positions"):
        prepare(recipe_for(recipe_path, tmp_path, *options), ALONE)


def test_an_automatic_learning_rate_for_an_unknown_model_is_refused(recipe_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give a number"):
        prepare(recipe_for(recipe_path, tmp_path, "optim.lr=auto"), ALONE)


@pytest.mark.parametrize("kind", ["refuses", "hangs"])
def test_a_wandb_server_that_does_not_answer_neither_stops_nor_delays_a_run(
    recipe_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
    kind: str,
) -> None:
    wandb.teardown()  # it remembers the server that it saw first
    monkeypatch.setattr(ochat_train.training.sinks, "_INIT_S", 2.0)
    server = socket.create_server(("127.0.0.1", 0))  # accepts connections, and never answers
    request.addfinalizer(server.close)
    port = free_port() if kind == "refuses" else server.getsockname()[1]
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("WANDB_API_KEY", "7" * 40)
    with ends():
        train(recipe_for(recipe_path, tmp_path, "log.wandb.project=none", "train.max_steps=2"), ALONE)
    told = capsys.readouterr().out
    assert told.count("cannot be reached") == 1
    assert {"refuses": "connection refused", "hangs": "deadline exceeded"}[kind] in told
    (folder,) = re.findall(r"wandb sync (\S+)", told)
    (file,) = Path(folder).glob("run-*.wandb")
    assert Path(folder).parent == tmp_path / "wandb"
    assert b"step/mfu" not in file.read_bytes() and b"step/weight_by_source/careful" in file.read_bytes()
    assert len(events(tmp_path, "step")) == 2
