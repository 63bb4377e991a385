"""The naive loop: one process, one sequence at a time, stock attention and full logits."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from ochat_train.recipe import Recipe
from ochat_train.tokens.plan import RunPlan, StepPlan
from ochat_train.tokens.store import TokenStore
from ochat_train.training.data import make_run_plan
from ochat_train.training.schedule import learning_rate

# SGD, because Adam hides a wrong scale of the gradient. The clip acts in some steps and not in others: behind a clip a
# wrong scale hides too.
SGD = {"algorithm": "sgd", "lr": 0.5, "weight_decay": 0.1, "grad_clip": 1.5, "warmup": 0.5}
# fp32 sums in another order, three steps deep, on weights around 0.02 to 1.
TOLERANCE = 1e-6

Trained = tuple[dict[str, Tensor], list[float], list[float]]


def plan_of(recipe: Recipe, num_processes: int) -> tuple[TokenStore, RunPlan]:
    """The store and the plan of a run on so many processes."""
    store = TokenStore(recipe.data.store)
    assert recipe.model.config is not None
    config = AutoConfig.for_model(**recipe.model.config, vocab_size=1025)
    return store, make_run_plan(recipe, store, config, num_processes)


def train_naively(recipe: Recipe, steps: Sequence[StepPlan], loss_form: str = "token") -> Trained:
    """Weights, losses and gradient norms of a run with the optimizer SGD."""
    store = TokenStore(recipe.data.store)
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


def _terms(nll: Tensor, weights: Tensor, loss: str) -> tuple[Tensor, float]:
    """An example's part of the numerator and of the denominator of a step's loss; nll and weights: f32[L - 1]."""
    if loss == "token":
        return (nll * weights).sum(), float(weights.sum())
    borders = (torch.nonzero(weights[1:] != weights[:-1]).flatten() + 1).tolist()
    runs = zip(nll.tensor_split(borders), weights.tensor_split(borders), strict=True)
    answers = [(float(weight[0]), answer.mean()) for answer, weight in runs if weight[0]]
    return sum((weight * mean for weight, mean in answers), torch.zeros(())), sum(weight for weight, _ in answers)


def assert_equal(given: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same weights."""
    assert given.keys() == expected.keys()
    worst = max(float((given[name] - expected[name]).abs().max()) for name in expected)
    assert worst < TOLERANCE
