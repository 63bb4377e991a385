"""Two processes, accumulation, uneven micro-batches, every ZeRO stage and loss form: the update of the naive loop."""

from pathlib import Path

import pytest

from ochat_train.recipe import load_recipe
from tests.e2e.harness import events, preprocess, tiny_recipe, train_several, weights, write_dump
from tests.e2e.naive import SGD, TOLERANCE, Trained, assert_equal, plan_of, train_naively

WORLD_SIZE = 2
STAGES = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch in three steps, the last of them with fewer examples than micro-batches."""
    folder = tmp_path_factory.mktemp("exact")
    write_dump(folder, 52)
    path = tiny_recipe(folder, optim=SGD, train={"epochs": 1, "seed": 5})
    preprocess(path)
    return path


@pytest.fixture(scope="module")
def naive(recipe_path: Path) -> dict[str, Trained]:
    """For each loss form: weights, losses and gradient norms of `train_naively`."""
    recipe = load_recipe(recipe_path)
    steps = list(plan_of(recipe, WORLD_SIZE)[1].steps())
    return {loss: train_naively(recipe, steps, loss) for loss in ("token", "answer")}


def test_the_run_has_uneven_and_empty_micro_batches_and_mixed_weights(recipe_path: Path) -> None:
    store, plan = plan_of(load_recipe(recipe_path), WORLD_SIZE)
    steps = list(plan.steps())
    assert len(steps) == 3
    assert len({int(store.lengths[positions].sum()) for positions in steps[0].bins}) > 1
    assert 0 < steps[-1].num_examples < WORLD_SIZE * 2  # some ranks have nothing with a weight, and must not hang
    assert set(store.condition_ids.tolist()) == {0, 1}


@pytest.fixture(scope="module")
def runs(recipe_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of runs: "stage N" of each ZeRO stage; at stage 2 "sevenfold", with all weights times seven, and
    "answer", of that loss form."""
    folder = tmp_path_factory.mktemp("runs")
    sevenfold = ["data.sources.0.weight=7.0", "data.sources.1.weight=0.7", f"data.store={folder / 'store'}"]
    preprocess(recipe_path, *sevenfold)
    stages = [[f"zero.stage={stage}", f"checkpoint.dir={folder / f'stage {stage}'}"] for stage in STAGES]
    sevenfold += ["zero.stage=2", f"checkpoint.dir={folder / 'sevenfold'}"]
    by_answer = ["train.loss=answer", "zero.stage=2", f"checkpoint.dir={folder / 'answer'}"]
    train_several(recipe_path, *stages, sevenfold, by_answer)
    return folder


@pytest.mark.parametrize("run", [*(f"stage {stage}" for stage in STAGES), "answer"])
def test_two_processes_equal_the_naive_loop(runs: Path, naive: dict[str, Trained], run: str) -> None:
    expected, losses, norms = naive["answer" if run == "answer" else "token"]
    assert_equal(weights(runs / run), expected)
    steps = events(runs / run, "step")
    assert [step["loss"] for step in steps] == pytest.approx(losses, rel=1e-5)  # fp32 sums
    assert [step["grad_norm"] for step in steps] == pytest.approx(norms, rel=1e-5)
    assert min(norms) < SGD["grad_clip"] < max(norms), norms


def test_the_form_of_the_loss_changes_the_update_and_is_named(runs: Path, naive: dict[str, Trained]) -> None:
    by_token, by_answer = naive["token"][0], naive["answer"][0]
    assert max(float((by_token[name] - by_answer[name]).abs().max()) for name in by_token) > 1000 * TOLERANCE
    assert [events(runs / run, "start")[0]["loss_form"] for run in ("stage 2", "answer")] == ["token", "answer"]


def test_multiplying_all_weights_changes_nothing(runs: Path, naive: dict[str, Trained]) -> None:
    assert_equal(weights(runs / "sevenfold"), naive["token"][0])
