"""`./launch.sh` through a crash and a Ctrl-C: both lose nothing, and the model is that of a run without them."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import orjson
import pytest
import torch

from ochat_train.training.checkpoint import find_checkpoints
from tests.e2e.harness import (
    await_steps,
    events,
    launch_environment,
    num_steps,
    preprocess,
    start_launch,
    tiny_recipe,
    train_several,
    weights,
    write_dump,
)


@dataclass(frozen=True, slots=True)
class Disturbed:
    """A run whose main process was killed, which was then asked to stop, and trained to its end.

    undisturbed: the folder of a run that nothing happened to.
    """

    run: Path
    undisturbed: Path
    stopped_code: int
    stopped_output: str
    stopped_checkpoint: str  # the newest one when it had stopped
    stopped_step: int  # the last one that metrics.jsonl had then
    last_output: str


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("restarts")
    write_dump(folder, 80)
    path = tiny_recipe(folder, train={"epochs": 8, "seed": 3})
    preprocess(path)
    return path


@pytest.fixture(scope="module")
def disturbed(recipe_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Disturbed:
    run, undisturbed = tmp_path_factory.mktemp("disturbed"), tmp_path_factory.mktemp("undisturbed")
    options = ["checkpoint.every_steps=1", f"checkpoint.dir={run}"]  # so that a step takes its time, too
    process = start_launch(recipe_path, *options, environment=launch_environment(MAX_RESTARTS="2"))
    await_steps(run, 3, process)
    os.kill(orjson.loads((run / "lock").read_bytes())["pid"], signal.SIGKILL)
    await_steps(run, num_steps(run) + 2, process)
    os.killpg(process.pid, signal.SIGINT)
    output = process.communicate(timeout=200)[0]
    checkpoint, step = find_checkpoints(run)[-1].name, events(run, "step")[-1]["step"]
    last_output = train_several(recipe_path, options, [f"checkpoint.dir={undisturbed}"])
    return Disturbed(run, undisturbed, process.returncode, output, checkpoint, step, last_output)


def test_a_killed_run_is_started_again_from_its_newest_checkpoint(disturbed: Disturbed) -> None:
    assert "restart 1 of at most 2" in disturbed.stopped_output, disturbed.stopped_output
    assert "restart 2" not in disturbed.stopped_output
    assert "continuing" in disturbed.stopped_output.partition("restart 1")[2]


def test_ctrl_c_saves_the_step_and_ends_with_75(disturbed: Disturbed) -> None:
    assert disturbed.stopped_code == 75, disturbed.stopped_output
    assert "finishing the step and saving" in disturbed.stopped_output
    assert "[ERROR]" not in disturbed.stopped_output  # which the launcher writes of every code but 0
    assert disturbed.stopped_checkpoint == f"step-{disturbed.stopped_step:08d}"
    assert "continuing" in disturbed.last_output


def test_the_model_is_that_of_an_undisturbed_run(disturbed: Disturbed) -> None:
    """Bitwise, and each step was reported once."""
    steps, others = events(disturbed.run, "step"), events(disturbed.undisturbed, "step")
    assert [(step["step"], step["loss"]) for step in steps] == [(step["step"], step["loss"]) for step in others]
    ours, theirs = weights(disturbed.run), weights(disturbed.undisturbed)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
