"""Two processes train by one plan, or not at all."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.harness import events, preprocess, run_two, tiny_recipe, train, write_dump


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    write_dump(folder, 60)
    path = tiny_recipe(folder)
    text = path.read_text()
    path.write_text(text.replace("  max_tokens: 256", "  max_tokens: 256\n  eval_fraction: 0.2"))
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


@pytest.fixture
def hosts(recipe_path: Path, tmp_path: Path) -> list[Path]:
    """Two folders with a copy of the store in each."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        shutil.copytree(recipe_path.parent / "store", folder / "store")
    return folders


def test_hosts_with_equal_stores_train(recipe_path: Path, hosts: list[Path]) -> None:
    ended = run_two(recipe_path, hosts)
    assert [code for code, _ in ended] == [0, 0], ended
    assert events(hosts[0] / "run", "step")[-1]["progress"] == 1.0


@pytest.mark.parametrize("file", ["train/lengths", "train/weight_sums", "eval/lengths"])
def test_hosts_whose_stores_differ_in_one_example_are_refused_before_the_first_step(
    recipe_path: Path, hosts: list[Path], file: str
) -> None:
    index = hosts[1] / "store" / f"{file}.npy"
    values = np.load(index)
    values[3] *= 1.5
    np.save(index, values)
    ended = run_two(recipe_path, hosts, "data.verify=false")
    assert all(code not in (0, None) for code, _ in ended)
    assert "error: the processes disagree on the plan" in ended[0][1]
    assert not (hosts[0] / "run/metrics.jsonl").exists()
    assert os.listdir(hosts[0]) == ["store"]
