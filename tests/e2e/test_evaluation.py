"""An evaluation says the same on any number of processes."""

from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from transformers import AutoModelForCausalLM

from ochat_train.conversations.template import TEMPLATES
from ochat_train.report.page import as_html
from ochat_train.report.run import read_run
from ochat_train.report.run_sections import run_document
from ochat_train.tokens.recondition import Frame, frame_of, recondition
from ochat_train.tokens.store import TokenStore
from ochat_train.tokens.tokenizer import load_tokenizer
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


def assert_naive_leaning(run: Path, path: Path, found: dict[str, Any]) -> None:
    """One sequence at a time with transformers' own loss, on the exported model."""
    store = TokenStore(path, "eval")
    position = next(place for place in range(len(store)) if store.name(place) == found["id"])
    tokenizer = load_tokenizer(str(path / "tokenizer"), TEMPLATES["openchat_v3.2"])
    frames = [frame_of(tokenizer, condition) for condition in store.manifest.conditions]
    own = int(store.condition_ids[position])
    first, second = frames[own], frames[1 - own]
    assert isinstance(first, Frame) and isinstance(second, Frame)
    assert store.manifest.conditions[own] == found["condition"]
    lm = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    losses = []
    for example in (store[position], recondition(store[position], first, second)):
        ids = torch.tensor(example.input_ids[None], dtype=torch.int64)
        labels = ids.masked_fill(torch.tensor(example.loss_weights[None] == 0), -100)
        losses.append(lm(ids, labels=labels).loss.item())
    assert found["leaning"] == pytest.approx(losses[1] - losses[0], abs=1e-5)


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
    alone, shared = (orjson.loads((runs[number] / "leanings.json").read_bytes()) for number in (1, 2))
    assert alone["step"] == 2 and len(alone["most"]) + len(alone["least"]) > 0
    leanings = [value for of_condition in alone["leanings"].values() for value in of_condition]
    assert sum(map(len, shared["leanings"].values())) == len(leanings) == len(TokenStore(tmp_path / "store", "eval"))
    for end, extreme in (("most", max), ("least", min)):
        assert alone[end][0]["leaning"] == pytest.approx(extreme(leanings), abs=1e-5)
        assert shared[end][0]["leaning"] == pytest.approx(alone[end][0]["leaning"], abs=1e-4)
    assert_naive_leaning(runs[1], tmp_path / "store", alone["most"][0])
    page = as_html(run_document(read_run(runs[1])))
    assert "that lean most" in page and alone["most"][0]["id"] in page
    for step, other in zip(events(runs[1], "step"), events(runs[2], "step"), strict=True):
        assert other["weight_by_source"] == step["weight_by_source"]
        assert sum(step["weight_by_source"].values()) == pytest.approx(1)
        assert_close(other["loss_by_condition"], step["loss_by_condition"])
        assert other["peak_memory_bytes"] > 2**27 and other["mfu"] is None
