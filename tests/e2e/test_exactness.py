"""Two processes, accumulation, uneven micro-batches, every ZeRO stage and loss form: the update of the naive loop."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from ochat_train.recipe import Recipe, load_recipe
from ochat_train.tokens.plan import StepPlan
from ochat_train.tokens.store import TokenStore
from ochat_train.training.data import make_run_plan
from ochat_train.training.schedule import learning_rate
from tests.e2e.harness import events, preprocess, tiny_recipe, train_several, weights, write_dump

# SGD, because Adam hides a wrong scale of the gradient. The clip acts in some steps and not in others: behind a clip a
# wrong scale hides too.
SGD = {"algorithm": "sgd", "lr": 0.5, "weight_decay": 0.1, "grad_clip": 1.5, "warmup": 0.5}
WORLD_SIZE = 2
STAGES = (0, 1, 2, 3)
# fp32 sums in another order, three steps deep, on weights around 0.02 to 1.
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch in three steps, the last of them with fewer examples than micro-batches."""
    folder = tmp_path_factory.mktemp("exact")
    write_dump(folder, 52)
    path = tiny_recipe(folder, optim=SGD, train={"epochs": 1, "seed": 5})
    preprocess(path)
    return path


def _plan(recipe: Recipe) -> tuple[TokenStore, list[StepPlan]]:
    store = TokenStore(recipe.data.store)
    assert recipe.model.config is not None
    config = AutoConfig.for_model(**recipe.model.config, vocab_size=1025)
    return store, list(make_run_plan(recipe, store, config, WORLD_SIZE).steps())


def _terms(nll: Tensor, weights: Tensor, loss: str) -> tuple[Tensor, float]:
    """An example's part of the numerator and of the denominator of a step's loss; nll and weights: f32[L - 1]."""
    if loss == "token":
        return (nll * weights).sum(), float(weights.sum())
    borders = (torch.nonzero(weights[1:] != weights[:-1]).flatten() + 1).tolist()
    runs = zip(nll.tensor_split(borders), weights.tensor_split(borders), strict=True)
    answers = [(float(weight[0]), answer.mean()) for answer, weight in runs if weight[0]]
    return sum((weight * mean for weight, mean in answers), torch.zeros(())), sum(weight for weight, _ in answers)


Trained = tuple[dict[str, Tensor], list[float], list[float]]


@pytest.fixture(scope="module")
def naive(recipe_path: Path) -> dict[str, Trained]:
    """For each loss form: weights, losses and gradient norms of `_train_naively`."""
    return {loss: _train_naively(load_recipe(recipe_path), loss) for loss in ("token", "answer")}


def _train_naively(recipe: Recipe, loss_form: str) -> Trained:
    """One process, one sequence at a time, stock attention and full logits."""
    store, steps = _plan(recipe)
    assert recipe.model.config is not None
    torch.manual_seed(recipe.train.seed)
    config = AutoConfig.for_model(**recipe.model.config, vocab_size=1025)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.SGD([{"params": matrices, "weight_decay": 0.1}, {"params": vectors}], lr=0.5)
    losses, norms, consumed = [], [], 0
    for step in steps:
        examples = [store[int(position)] for positions in step.bins for position in positions]
        consumed += len(examples)
        optimizer.zero_grad()
        loss_sum = total = 0.0
        for example in examples:
            ids = torch.from_numpy(example.input_ids.astype(np.int64))[None]
            nll = F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
            loss, weight = _terms(nll, torch.from_numpy(example.loss_weights.copy())[1:], loss_form)
            loss.backward()
            loss_sum, total = loss_sum + loss.item(), total + weight
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad /= total
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), SGD["grad_clip"])))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(consumed / len(store), peak=0.5, warmup=0.5, min_ratio=0.1)
        optimizer.step()
        losses.append(loss_sum / total)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}, losses, norms


def test_the_run_has_uneven_and_empty_micro_batches_and_mixed_weights(recipe_path: Path) -> None:
    store, steps = _plan(load_recipe(recipe_path))
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
    _assert_equal(weights(runs / run), expected)
    steps = events(runs / run, "step")
    assert [step["loss"] for step in steps] == pytest.approx(losses, rel=1e-5)  # fp32 sums
    assert [step["grad_norm"] for step in steps] == pytest.approx(norms, rel=1e-5)
    assert min(norms) < SGD["grad_clip"] < max(norms), norms


def test_the_form_of_the_loss_changes_the_update_and_is_named(runs: Path, naive: dict[str, Trained]) -> None:
    by_token, by_answer = naive["token"][0], naive["answer"][0]
    assert max(float((by_token[name] - by_answer[name]).abs().max()) for name in by_token) > 1000 * TOLERANCE
    assert [events(runs / run, "start")[0]["loss_form"] for run in ("stage 2", "answer")] == ["token", "answer"]


def test_multiplying_all_weights_changes_nothing(runs: Path, naive: dict[str, Trained]) -> None:
    _assert_equal(weights(runs / "sevenfold"), naive["token"][0])


def _assert_equal(given: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert given.keys() == expected.keys()
    worst = max(float((given[name] - expected[name]).abs().max()) for name in expected)
    assert worst < TOLERANCE
