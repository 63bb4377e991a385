"""Ranks that share micro-batches: the update of the naive loop, and of one process, from two and four processes."""

from pathlib import Path
from typing import Any

import orjson
import pytest

from ochat_train.recipe import load_recipe
from tests.e2e.harness import events, preprocess, tiny_recipe, train_several, weights, write_dump
from tests.e2e.naive import SGD, assert_equal, plan_of, train_naively

CAPACITY, STEPS = 256, 3
HELD_OUT = "data.eval_fraction=0.2"
SHARED_BY_4 = "packing.sequence_parallel=4"
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
MODELS: dict[str, dict[str, Any]] = {
    "one head of keys": SIZES | {"model_type": "llama", "num_key_value_heads": 1},
    "windows": SIZES | {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 24},
    # LongRoPE, with sequences below and above its border.
    "frequencies by length": SIZES
    | {
        **{"model_type": "phi3", "num_key_value_heads": 2, "original_max_position_embeddings": 96},
        **{"pad_token_id": None, "bos_token_id": None, "eos_token_id": None},
        "rope_parameters": {
            **{"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 96},
            **{"short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0]},
        },
    },
    # Sinks, a window in one of its two layers, experts with a balancing loss.
    "sinks": SIZES
    | {
        **{"model_type": "gpt_oss", "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16},
        **{"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.5},
    },
}
# name: model, processes, ranks that share a micro-batch, ZeRO stage, checkpointing
RUNS: dict[str, tuple[str, int, int, int, str]] = {
    "2 in 2, stage 1": ("one head of keys", 2, 2, 1, "none"),
    "2 in 2, stage 2": ("frequencies by length", 2, 2, 2, "full"),
    "2 in 2, stage 3": ("windows", 2, 2, 3, "full"),
    "2 in 4, stage 3": ("windows", 4, 2, 3, "none"),
    "sinks in 1": ("sinks", 1, 1, 1, "none"),
    "sinks in 2": ("sinks", 2, 2, 1, "none"),
    "sinks in 4": ("sinks", 4, 4, 2, "every_2"),  # which has two heads of keys
    "moved": ("one head of keys", 4, 2, 1, "full"),
}
TILED = ("2 in 2, stage 1", "2 in 2, stage 3")  # whose MLPs run in three parts


def overrides_of(name: str, folder: Path) -> list[str]:
    """The overrides of a run, into folder/name."""
    model, _, shared, stage, checkpointing = RUNS[name]
    return [
        HELD_OUT,
        f"model.config={orjson.dumps(MODELS[model]).decode()}",
        f"model.checkpointing={checkpointing}",
        f"model.mlp_tiles={3 if name in TILED else 1}",
        f"packing.sequence_parallel={shared}",
        f"packing.tokens_per_gpu={CAPACITY // shared}",
        f"zero.stage={stage}",
        f"checkpoint.dir={folder / name}",
    ]


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    write_dump(folder, 80)
    path = tiny_recipe(folder, optim=SGD, train={"epochs": 1, "seed": 5, "max_steps": STEPS})
    preprocess(path, HELD_OUT)
    return path


@pytest.fixture(scope="module")
def runs(recipe_path: Path) -> Path:
    """The folder of all RUNS; of "moved" the third step is made by ranks that share otherwise."""
    folder = recipe_path.parent
    for number in (1, 2, 4):
        names = [name for name, (_, num_processes, *_) in RUNS.items() if num_processes == number]
        overrides = [overrides_of(name, folder) for name in names]
        if number == 4:
            overrides.append([*overrides[-1], SHARED_BY_4])
            overrides[-2].append("train.max_steps=2")
        train_several(recipe_path, *overrides, num_processes=number)
    return folder


@pytest.mark.parametrize("name", [name for name in RUNS if "stage" in name])
def test_ranks_that_share_micro_batches_equal_the_naive_loop(runs: Path, recipe_path: Path, name: str) -> None:
    recipe = load_recipe(recipe_path, overrides_of(name, runs))
    planned = list(plan_of(recipe, RUNS[name][1])[1].steps())[:STEPS]
    assert len(planned) == STEPS
    expected, losses, norms = train_naively(recipe, planned)
    assert_equal(weights(runs / name), expected)
    steps = events(runs / name, "step")
    assert [step["loss"] for step in steps] == pytest.approx(losses, rel=1e-5)  # fp32 sums
    assert [step["grad_norm"] for step in steps] == pytest.approx(norms, rel=1e-5)


@pytest.mark.parametrize("name", ["sinks in 2", "sinks in 4"])
def test_router_losses_and_held_out_losses_are_those_of_one_process(runs: Path, name: str) -> None:
    assert_equal(weights(runs / name), weights(runs / "sinks in 1"))
    for kind in ("step", "eval"):
        mine, theirs = events(runs / name, kind), events(runs / "sinks in 1", kind)
        fields = [field for field in theirs[0] if field in COMPARED]
        assert len(mine) == len(theirs) and len(fields) > 5
        for field in fields:
            assert numbers([e[field] for e in mine]) == pytest.approx(numbers([e[field] for e in theirs]), rel=1e-5)
    assert events(runs / name, "step")[0]["router_loss"] > 0


# Of the lines of steps and evaluations: what does not depend on the number of processes or on time.
COMPARED = (
    *("examples_consumed", "loss", "loss_by_condition", "router_loss", "largest_expert_share", "grad_norm", "skipped"),
    *("tokens", "supervised_tokens", "fill", "weight_by_source"),
    *("accuracy", "accuracy_by_condition", "perplexity", "unweighted_loss", "probe", "probe_by_condition"),
)


def numbers(value: Any) -> list[Any]:
    """The numbers in a value of metrics.jsonl."""
    if isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        return [number for part in inner for number in numbers(part)]
    return [] if value is None else [value]


def test_a_run_goes_on_where_ranks_share_otherwise_with_the_examples_that_are_left(
    runs: Path, recipe_path: Path
) -> None:
    (_, first), (_, second) = (
        plan_of(load_recipe(recipe_path, [*overrides_of("moved", runs), *more]), 4) for more in ([], [SHARED_BY_4])
    )
    steps = list(first.steps())[:2]
    steps.append(next(second.steps(sum(step.num_examples for step in steps))))
    recipe = load_recipe(recipe_path, overrides_of("moved", runs))
    assert_equal(weights(runs / "moved"), train_naively(recipe, steps)[0])
