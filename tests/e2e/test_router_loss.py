"""A mixture on two processes, at every ZeRO stage: the update of the naive loop, with transformers' balancing loss."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from ochat_train.recipe import Recipe, load_recipe
from ochat_train.tokens.store import TokenStore
from ochat_train.training.data import make_run_plan
from tests.e2e.harness import events, preprocess, tiny_recipe, train_several, write_dump

LR, COEFFICIENT, CHOSEN, EXPERTS = 0.3, 0.5, 2, 4  # SGD: Adam hides a wrong scale of the gradient
MIXTURE = {
    "model_type": "mixtral",
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": CHOSEN,
    "router_aux_loss_coef": COEFFICIENT,
}
WORLD_SIZE = 2
TOLERANCE = 1e-6  # fp32 sums in another order, three steps deep, on weights around 0.02 to 1


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch in three steps, the last of them with fewer examples than micro-batches."""
    folder = tmp_path_factory.mktemp("mixture")
    write_dump(folder, 52)
    optim = {"algorithm": "sgd", "lr": LR, "weight_decay": 0.0, "grad_clip": None, "warmup": 0, "min_lr": 1.0}
    model = {"config": MIXTURE, "dtype": "float32", "checkpointing": "none"}
    path = tiny_recipe(folder, model=model, optim=optim, train={"epochs": 1, "seed": 5})
    preprocess(path)
    return path


class Trained(NamedTuple):
    """The weights; of each step the balancing loss, and the largest share of an expert in its layer's choices."""

    weights: dict[str, Tensor]
    router_losses: list[float]
    shares: list[float]


def train_naively(recipe: Recipe, coefficient: float) -> Trained:
    """One process, stock attention on each sequence alone; the balancing loss of each micro-batch by transformers."""
    store = TokenStore(recipe.data.store)
    config = AutoConfig.for_model(**MIXTURE, vocab_size=1025)
    torch.manual_seed(recipe.train.seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    router_losses, shares = [], []
    for step in make_run_plan(recipe, store, config, WORLD_SIZE).steps():
        optimizer.zero_grad()
        router_loss, counts = 0.0, torch.zeros(MIXTURE["num_hidden_layers"], EXPERTS)  # type: ignore[call-overload]
        for positions in step.bins:
            loss, logits = torch.zeros(()), []
            for position in positions:
                example = store[int(position)]
                ids = torch.from_numpy(example.input_ids.astype(np.int64))[None]
                out: Any = model(ids, output_router_logits=True)
                nll = F.cross_entropy(out.logits[0, :-1], ids[0, 1:], reduction="none")
                loss = loss + (nll * torch.from_numpy(example.loss_weights.copy())[1:]).sum() / step.weight_sum
                logits.append(out.router_logits)
            if logits:
                of_layers = tuple(torch.cat(parts) for parts in zip(*logits, strict=True))
                balance: Any = load_balancing_loss_func(of_layers, EXPERTS, CHOSEN)
                balance = balance * len(of_layers[0]) / step.num_tokens
                (loss + coefficient * balance).backward()
                router_loss += float(balance.detach())
                for layer, part in enumerate(of_layers):
                    counts[layer] += F.one_hot(part.topk(CHOSEN).indices, EXPERTS).sum((0, 1))
        optimizer.step()
        router_losses.append(router_loss)
        shares.append(float((counts.max(1).values / counts.sum(1)).max()))
    return Trained({name: p.detach() for name, p in model.named_parameters()}, router_losses, shares)


@pytest.fixture(scope="module")
def naive(recipe_path: Path) -> Trained:
    return train_naively(load_recipe(recipe_path), COEFFICIENT)


@pytest.fixture(scope="module")
def runs(recipe_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folders of a run at each stage, with and without checkpointing, and of one without the loss; all output."""
    folder = tmp_path_factory.mktemp("runs")
    stages = [
        [f"zero.stage={stage}", f"checkpoint.dir={folder / f'{stage}'}", f"model.checkpointing={policy}"]
        for stage, policy in ((0, "full"), (1, "none"), (2, "every_2"), (3, "full"))
    ]
    off = ["model.router_aux_loss_coef=0", f"checkpoint.dir={folder / 'off'}"]
    return folder, train_several(recipe_path, *stages, off)


@pytest.mark.parametrize("run", ["0", "1", "2", "3"])
def test_two_processes_equal_the_naive_loop(runs: tuple[Path, str], naive: Trained, run: str) -> None:
    assert_equal(runs[0] / run, naive.weights)
    steps = events(runs[0] / run, "step")
    assert [step["router_loss"] for step in steps] == pytest.approx(naive.router_losses, rel=1e-5)
    assert [step["largest_expert_share"] for step in steps] == pytest.approx(naive.shares)


def test_a_coefficient_of_0_turns_the_loss_off_and_it_is_reported_all_the_same(
    runs: tuple[Path, str], naive: Trained, recipe_path: Path
) -> None:
    without = train_naively(load_recipe(recipe_path), 0.0)
    assert_equal(runs[0] / "off", without.weights)
    assert max(float((without.weights[name] - naive.weights[name]).abs().max()) for name in naive.weights) > 1e-3
    assert [step["router_loss"] for step in events(runs[0] / "off", "step")] == pytest.approx(without.router_losses)
    told = "router loss coefficient 0.5 (of the configuration of mixtral; model.router_aux_loss_coef changes it)"
    assert told in runs[1]
    assert "router loss coefficient 0 (asked for by the recipe; 0.5 in the configuration)" in runs[1]


def assert_equal(run: Path, expected: dict[str, Tensor]) -> None:
    """As transformers loads them: in the file each expert is for itself."""
    given = dict(AutoModelForCausalLM.from_pretrained(run / "model").named_parameters())
    assert given.keys() == expected.keys()
    assert max(float((given[name] - weight).detach().abs().max()) for name, weight in expected.items()) < TOLERANCE
