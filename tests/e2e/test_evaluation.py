"""An evaluation says the same on any number of processes."""

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import events, preprocess, tiny_recipe, train, write_dump

# Weights that two steps of AdamW moved, on sums of fp32 in another order; the parts are the same.
TOLERANCE = 1e-4


def assert_close(given: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert given.keys() == expected.keys()
        for name in expected:
            assert_close(given[name], expected[name])
    else:
        assert given == (pytest.approx(expected, rel=TOLERANCE) if isinstance(expected, float) else expected)


def test_one_process_and_two_tell_the_same(tmp_path: Path) -> None:
    write_dump(tmp_path, 60)
    recipe = tiny_recipe(tmp_path)
    held_out = "data.eval_fraction=0.2"
    preprocess(recipe, held_out)
    runs = {}
    for num_processes, grad_accum in ((1, 4), (2, 2)):  # the same steps
        runs[num_processes] = tmp_path / f"run{num_processes}"
        options = [held_out, f"packing.grad_accum={grad_accum}", f"checkpoint.dir={runs[num_processes]}"]
        train(recipe, *options, "zero.stage=3", "train.max_steps=2", num_processes=num_processes)
    one, two = (events(runs[number], "eval") for number in (1, 2))
    assert [evaluation["step"] for evaluation in one] == [0, 2]
    assert one[-1]["probe"] is not None and one[-1]["accuracy"] > 0
    assert_close(dict(enumerate(two)), dict(enumerate(one)))
    for step, other in zip(events(runs[1], "step"), events(runs[2], "step"), strict=True):
        assert other["weight_by_source"] == step["weight_by_source"]
        assert sum(step["weight_by_source"].values()) == pytest.approx(1)
        assert_close(other["loss_by_condition"], step["loss_by_condition"])
        assert other["peak_memory_bytes"] > 2**27 and other["mfu"] is None
