"""Stopping and continuing changes nothing, wherever the run is stopped."""

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import orjson
import pytest
import torch

from ochat_train.export import export
from ochat_train.training.checkpoint import (
    MANIFEST,
    Checkpoint,
    check_files,
    find_checkpoints,
    manifest_of,
    mark_file,
    read_checkpoint,
)
from tests.e2e.harness import (
    ROOT,
    events,
    preprocess,
    start_ranks,
    tiny_recipe,
    train,
    train_several,
    weights,
    write_dump,
)

# zero.stage and zero.offload of each kind of run.
KINDS = {str(stage): [f"zero.stage={stage}"] for stage in range(4)} | {
    f"{stage} offloaded": [f"zero.stage={stage}", "zero.offload=optimizer"] for stage in (2, 3)
}
KINDS["2 with 8 bits"] = ["zero.stage=2", "optim.algorithm=adamw_8bit"]
STAGES = (1, 3)


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    write_dump(folder, 80)
    path = tiny_recipe(folder)
    preprocess(path)
    return path


@pytest.fixture(scope="module")
def runs(recipe_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of six steps, the epoch ends between steps 4 and 5. Folders by name:

    "whole KIND" in one go; "every_2 STAGE" with every second layer computed again; "parted KIND" in two processes for
    three steps, and in two new ones for three more;
    "2 to 3" two steps in two processes at ZeRO 2, two in one process, the last two in two processes at ZeRO 3; "3 to 2"
    the same from ZeRO 3 over 1 to 2.
    """
    folder = tmp_path_factory.mktemp("runs")

    def run(name: str, num_steps: int, *options: str) -> list[str]:
        return [f"checkpoint.dir={folder / name}", f"train.max_steps={num_steps}", *options]

    first = [run(f"whole {kind}", 6, *options) for kind, options in KINDS.items()]
    first += [run(f"parted {kind}", 3, *options) for kind, options in KINDS.items()]
    first += [run(f"every_2 {stage}", 6, f"zero.stage={stage}", "model.checkpointing=every_2") for stage in STAGES]
    first += [run("2 to 3", 2, "zero.stage=2"), run("3 to 2", 2, "zero.stage=3")]
    train_several(recipe_path, *first)
    alone = ["packing.grad_accum=4"]  # as many micro-batches a step as two processes with two each
    second = [run("2 to 3", 4, "zero.stage=2", *alone), run("3 to 2", 4, "zero.stage=1", *alone)]
    train_several(recipe_path, *second, num_processes=1)
    third = [run(f"parted {kind}", 6, *options) for kind, options in KINDS.items()]
    third += [run("2 to 3", 6, "zero.stage=3"), run("3 to 2", 6, "zero.stage=2")]
    train_several(recipe_path, *third)
    return folder


@pytest.fixture(scope="module")
def unbroken(runs: Path) -> dict[int, Path]:
    """The run folders of six steps in one go, by ZeRO stage."""
    return {stage: runs / f"whole {stage}" for stage in STAGES}


def _assert_same_run(run: Path, other: Path) -> None:
    """Bitwise: the weights, and what was reported of every step but its speed."""
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    keys = ("step", "epoch", "examples_consumed", "loss", "loss_by_condition", "lr", "grad_norm", "tokens")
    last = {event["step"]: [event[key] for key in keys] for event in events(run, "step")}
    assert last == {event["step"]: [event[key] for key in keys] for event in events(other, "step")}


@pytest.mark.parametrize("kind", KINDS)
def test_three_steps_and_three_in_a_new_process_equal_six(runs: Path, kind: str) -> None:
    assert len(events(runs / f"parted {kind}", "step")) == 6  # one process writes, and no step was repeated
    _assert_same_run(runs / f"parted {kind}", runs / f"whole {kind}")


@pytest.mark.parametrize("stage", STAGES)
def test_checkpointing_changes_no_bit_of_a_run(runs: Path, stage: int) -> None:
    _assert_same_run(runs / f"every_2 {stage}", runs / f"whole {stage}")
    (start,) = events(runs / f"every_2 {stage}", "start")
    assert start["checkpointing"] == "every_2"


def test_8_bits_are_another_run_than_32(runs: Path) -> None:
    ours, theirs = weights(runs / "whole 2 with 8 bits"), weights(runs / "whole 2")
    assert not all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("name", ["2 to 3", "3 to 2"])
def test_a_run_on_other_numbers_of_processes_and_zero_stages_is_the_same_to_rounding(runs: Path, name: str) -> None:
    ours, theirs = weights(runs / name), weights(runs / "whole 2")
    # fp32 sums in another order. Adam's update is about the learning rate, 0.01, whatever the gradient's size, so an
    # error of one step's count or decay would be 1e-4 and more.
    assert max(float((ours[key] - theirs[key]).abs().max()) for key in theirs) < 5e-6
    steps, expected = events(runs / name, "step"), events(runs / "whole 2", "step")
    for key in ("step", "epoch", "examples_consumed", "lr", "tokens"):
        assert [step[key] for step in steps] == [step[key] for step in expected]
    assert [step["loss"] for step in steps] == pytest.approx([step["loss"] for step in expected], rel=1e-5)
    assert [step["num_processes"] for step in steps] == [2, 2, 1, 1, 2, 2]
    assert not list((runs / name).glob("*.universal"))


# The threads that save it do not get beyond their first file.
HELD = """
import time, ochat_train.training.saving as s
flush = s.flush
s.flush = lambda file: time.sleep(600 if str(file).startswith("SAVING") else 0) or flush(file)
"""


def test_a_run_killed_while_it_saves_continues_from_the_checkpoint_before(
    recipe_path: Path, unbroken: dict[int, Path], tmp_path: Path
) -> None:
    options = ["zero.stage=1", "train.max_steps=6", "checkpoint.every_steps=1", f"checkpoint.dir={tmp_path}"]
    saving = tmp_path / "step-00000003.partial"
    ranks = start_ranks("ochat_train.train", str(recipe_path), *options, code=HELD.replace("SAVING", str(saving)))
    ranks.wait_for((saving / "deepspeed").exists)
    for rank in range(2):
        ranks.signal(rank, signal.SIGKILL)
    assert [code for code, _ in ranks.end()] == [-signal.SIGKILL] * 2
    assert [path.name for path in find_checkpoints(tmp_path)] == ["step-00000001", "step-00000002"]
    output = train(recipe_path, *options)
    assert "continuing" in output and "step 2" in output
    assert saving.name in output and not saving.exists()
    _assert_same_run(tmp_path, unbroken[1])


def test_a_finished_run_is_left_as_it_is(recipe_path: Path, unbroken: dict[int, Path]) -> None:
    run = unbroken[1]
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name != "lock"}
    output = train(recipe_path, "zero.stage=1", "train.max_steps=6", f"checkpoint.dir={run}")
    assert "the run is complete at step 6" in output
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert {path for path in run.rglob("*") if path.is_file()} == {*before, run / "lock"}


def test_a_mistake_is_told_once_by_all_ranks_together(recipe_path: Path, unbroken: dict[int, Path]) -> None:
    overrides = ["zero.stage=1", "optim.warmup=0.5", f"checkpoint.dir={unbroken[1]}"]
    ended = start_ranks("ochat_train.train", str(recipe_path), *overrides).end()
    assert [code for code, _ in ended] == [1, 1]
    output = "".join(output for _, output in ended)
    assert output.count("error: cannot continue") == 1
    assert "optim.warmup: 0.05 -> 0.5" in output
    assert "Traceback" not in output


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
    ended = start_ranks("ochat_train.export", str(checkpoint), str(tmp_path / "model"), folders=[ROOT]).end()
    assert [code for code, _ in ended] == [0], ended
    ours, theirs = weights(tmp_path), weights(unbroken[stage])
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# ------------------------------------------------------------------------------------- checkpoints of strangers


class _Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._folder),)


def _poison(original: Path, folder: Path, pattern: str) -> Checkpoint:
    """A copy of a checkpoint in `folder` whose files of that pattern set a trap, with digests that fit."""
    path = Path(shutil.copytree(original, folder / original.name))
    files = sorted(path.glob(pattern))
    assert files
    for file in files:
        state = torch.load(file, weights_only=False)
        torch.save(state | {"stranger": _Trap(folder / "trap")}, file)
    checkpoint = read_checkpoint(path)
    marks = {name: mark_file(path / name) for name in checkpoint.files}
    (path / MANIFEST).write_bytes(manifest_of(replace(checkpoint, files=marks)))
    return read_checkpoint(path)


@pytest.mark.parametrize("pattern", ["random-*.pt", "deepspeed/*model_states.pt", "deepspeed/*optim_states.pt"])
@pytest.mark.parametrize("kind", ["1", "3", "2 with 8 bits"])
def test_a_checkpoint_that_would_run_code_is_refused_by_name(
    runs: Path, tmp_path: Path, kind: str, pattern: str
) -> None:
    whole = find_checkpoints(runs / f"whole {kind}")[-1]
    check_files(read_checkpoint(whole))
    poisoned = _poison(whole, tmp_path, pattern)
    with pytest.raises(ValueError, match=r"(_states|random-\d+)\.pt holds more than .*posix\.mkdir"):
        check_files(poisoned)
    assert not (tmp_path / "trap").exists()


def test_a_resume_refuses_code_in_one_line(recipe_path: Path, unbroken: dict[int, Path], tmp_path: Path) -> None:
    poisoned = _poison(find_checkpoints(unbroken[1])[-1], tmp_path, "random-00001.pt")
    options = ["zero.stage=1", f"checkpoint.dir={tmp_path / 'run'}", f"checkpoint.resume={poisoned.path}"]
    ended = start_ranks("ochat_train.train", str(recipe_path), *options).end()
    assert [code for code, _ in ended] == [1, 1]
    (line,) = [line for _, output in ended for line in output.splitlines() if line.startswith("error: ")]
    assert "random-00001.pt holds more than tensors and plain values (posix.mkdir)" in line
    assert not any("Traceback" in output for _, output in ended)
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize(
    "stage, pattern, options",
    [
        (1, "deepspeed/*model_states.pt", ["zero.stage=1"]),
        (3, "deepspeed/*optim_states.pt", ["zero.stage=3"]),
        (1, "deepspeed/*optim_states.pt", ["zero.stage=3"]),  # converted
        (1, "random-*.pt", ["zero.stage=1"]),
    ],
)
def test_nothing_of_a_checkpoint_is_run_when_it_is_loaded(
    recipe_path: Path, unbroken: dict[int, Path], tmp_path: Path, stage: int, pattern: str, options: list[str]
) -> None:
    """As if the scan of the files had missed it: the loading itself holds."""
    poisoned = _poison(find_checkpoints(unbroken[stage])[-1], tmp_path, pattern)
    blind = "import ochat_train.training.checkpoint as checkpoint\ncheckpoint._check_is_data = lambda file: None"
    options = [*options, f"checkpoint.dir={tmp_path / 'run'}", f"checkpoint.resume={poisoned.path}"]
    ended = start_ranks("ochat_train.train", str(recipe_path), *options, code=blind).end()
    assert all(code != 0 for code, _ in ended)
    assert any("mkdir" in output for _, output in ended), ended
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize("stage", STAGES)
def test_an_export_runs_nothing_of_a_checkpoint(
    unbroken: dict[int, Path], tmp_path: Path, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned = _poison(find_checkpoints(unbroken[stage])[-1], tmp_path, "deepspeed/*_states.pt")
    with pytest.raises(ValueError, match=r"posix\.mkdir"):
        export(poisoned.path, tmp_path / "model")
    monkeypatch.setattr("ochat_train.training.checkpoint._check_is_data", lambda file: None)
    with pytest.raises(UnpicklingError, match=r"posix\.mkdir"):
        export(poisoned.path, tmp_path / "model")
    assert not (tmp_path / "trap").exists() and not (tmp_path / "model").exists()
