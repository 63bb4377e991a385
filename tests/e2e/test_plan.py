"""Two processes train by one plan, or not at all."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.harness import ENVIRONMENT, ROOT, events, free_port, preprocess, tiny_recipe, train, write_dump


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    write_dump(folder, 20)
    path = tiny_recipe(folder)
    preprocess(path)
    return path


def test_a_single_conversation_trains_on_two_processes(tmp_path: Path) -> None:
    write_dump(tmp_path, 1)
    path = tiny_recipe(tmp_path)
    preprocess(path)
    output = train(path)
    assert output.count("plan: 2 steps, ") == 1
    steps = events(tmp_path / "run", "step")
    assert [step["examples_consumed"] for step in steps] == [1, 2]
    assert {step["num_processes"] for step in steps} == {2}
    # Adam's first step moves every weight by about the learning rate, against the gradient.
    assert steps[1]["loss"] < steps[0]["loss"]


def run_on_two_hosts(recipe: Path, *hosts: Path) -> list[tuple[int, str]]:
    """Exit code and output of one process in each folder, which has its own store and its own run folder."""
    port = str(free_port())
    command = [sys.executable, "-m", "ochat_train.train", str(recipe), "data.store=store", "checkpoint.dir=run"]
    processes = []
    for rank, host in enumerate(hosts):
        world = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        processes.append(
            subprocess.Popen(
                command,
                cwd=host,
                env=ENVIRONMENT | world | {"MASTER_PORT": port, "PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


@pytest.fixture
def hosts(recipe_path: Path, tmp_path: Path) -> list[Path]:
    """Two folders with a copy of the store in each."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        shutil.copytree(recipe_path.parent / "store", folder / "store")
    return folders


def test_hosts_with_equal_stores_train(recipe_path: Path, hosts: list[Path]) -> None:
    ended = run_on_two_hosts(recipe_path, *hosts)
    assert [code for code, _ in ended] == [0, 0], ended
    assert events(hosts[0] / "run", "step")[-1]["progress"] == 1.0


@pytest.mark.parametrize("file", ["lengths", "weight_sums"])
def test_hosts_whose_stores_differ_in_one_example_are_refused_before_the_first_step(
    recipe_path: Path, hosts: list[Path], file: str
) -> None:
    index = hosts[1] / "store/train" / f"{file}.npy"
    values = np.load(index)
    values[3] *= 1.5
    np.save(index, values)
    ended = run_on_two_hosts(recipe_path, *hosts)
    assert all(code not in (0, None) for code, _ in ended)
    assert "error: the processes disagree on the plan" in ended[0][1]
    assert not (hosts[0] / "run/metrics.jsonl").exists()
    assert os.listdir(hosts[0]) == ["store"]
