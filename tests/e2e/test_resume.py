"""Stopping and continuing changes nothing, wherever the run is stopped."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import orjson
import pytest
import torch

from ochat_train.training.checkpoint import find_checkpoints
from tests.e2e.harness import (
    ENVIRONMENT,
    ROOT,
    events,
    preprocess,
    tiny_recipe,
    train,
    train_command,
    weights,
    write_dump,
)

STAGES = (1, 3)


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    write_dump(folder, 80)
    path = tiny_recipe(folder)
    preprocess(path)
    return path


@pytest.fixture(scope="module")
def unbroken(recipe_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The run folders of six steps in one go, by ZeRO stage; the epoch ends between steps 4 and 5."""
    runs = {}
    for stage in STAGES:
        runs[stage] = tmp_path_factory.mktemp(f"unbroken{stage}")
        train(recipe_path, f"zero.stage={stage}", "train.max_steps=6", f"checkpoint.dir={runs[stage]}")
    return runs


def _assert_same_run(run: Path, other: Path) -> None:
    """Bitwise: the weights, and what was reported of every step but its speed."""
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    keys = ("step", "epoch", "examples_consumed", "loss", "loss_by_condition", "lr", "grad_norm", "tokens")
    last = {event["step"]: [event[key] for key in keys] for event in events(run, "step")}
    assert last == {event["step"]: [event[key] for key in keys] for event in events(other, "step")}


@pytest.mark.parametrize("stage", STAGES)
def test_three_steps_and_three_in_a_new_process_equal_six(
    recipe_path: Path, unbroken: dict[int, Path], stage: int, tmp_path: Path
) -> None:
    options = [f"zero.stage={stage}", f"checkpoint.dir={tmp_path}"]
    train(recipe_path, *options, "train.max_steps=3")
    output = train(recipe_path, *options, "train.max_steps=6")
    assert "continuing" in output
    assert len(events(tmp_path, "step")) == 6  # one process writes, and no step was repeated
    _assert_same_run(tmp_path, unbroken[stage])


def test_a_run_killed_while_it_saves_continues_from_the_checkpoint_before(
    recipe_path: Path, unbroken: dict[int, Path], tmp_path: Path
) -> None:
    options = ["zero.stage=1", "train.max_steps=6", "checkpoint.every_steps=1", f"checkpoint.dir={tmp_path}"]
    process = subprocess.Popen(
        train_command(recipe_path, *options),
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    saving = tmp_path / "step-00000003.partial"
    deadline = time.monotonic() + 120
    # Into the middle of the save: the folder is there and DeepSpeed has begun to write into it.
    while not (saving / "deepspeed").exists():
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before its third save"
        time.sleep(0.0005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert saving.is_dir(), "the save was over before the kill"
    assert [path.name for path in find_checkpoints(tmp_path)] == ["step-00000001", "step-00000002"]
    output = train(recipe_path, *options)
    assert "continuing" in output and "step 2" in output
    assert saving.name in output and not saving.exists()
    _assert_same_run(tmp_path, unbroken[1])


def test_a_finished_run_is_left_as_it_is(recipe_path: Path, unbroken: dict[int, Path]) -> None:
    run = unbroken[1]
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    output = train(recipe_path, "zero.stage=1", "train.max_steps=6", f"checkpoint.dir={run}")
    assert "the run is complete at step 6" in output
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}


def test_a_mistake_is_told_once_by_all_ranks_together(recipe_path: Path, unbroken: dict[int, Path]) -> None:
    overrides = ["zero.stage=1", "optim.lr=0.5", f"checkpoint.dir={unbroken[1]}"]
    command = train_command(recipe_path, *overrides)
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert done.stderr.count("error: cannot continue") == 1
    assert "optim.lr: 0.01 -> 0.5" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_checkpoint_tells_where_the_run_is(unbroken: dict[int, Path]) -> None:
    (checkpoint,) = find_checkpoints(unbroken[3])[-1:]
    state = orjson.loads((checkpoint / "checkpoint.json").read_bytes())["state"]
    steps = events(unbroken[3], "step")
    assert state["step"] == 6
    assert state["examples_consumed"] == steps[-1]["examples_consumed"]
    assert state["tokens_seen"] == sum(step["tokens"] for step in steps)


@pytest.mark.parametrize("stage", STAGES)
def test_the_export_command_gives_the_model_of_the_run_again(
    unbroken: dict[int, Path], stage: int, tmp_path: Path
) -> None:
    """From the files of both ranks, at ZeRO 3 each with a part of every weight."""
    checkpoint = find_checkpoints(unbroken[stage])[-1]
    command = [sys.executable, "-m", "ochat_train.export", str(checkpoint), str(tmp_path / "model")]
    subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
    ours, theirs = weights(tmp_path), weights(unbroken[stage])
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
