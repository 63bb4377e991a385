"""Families that need more than packed attention, in two processes: the update of the naive loop in float64."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ochat_train.recipe import load_recipe
from ochat_train.tokens.store import TokenStore
from ochat_train.training.data import make_run_plan
from tests.e2e.harness import events, preprocess, tiny_recipe, train_several, write_dump

SEED, RATE, STAGES = 5, 0.5, (1, 3)
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
FEW_EXPERTS = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.0}  # the loss beside that of tokens is not in here
FAMILIES: dict[str, dict[str, Any]] = {
    # Attention sinks, a window in one of its two layers, experts.
    "gpt_oss": SIZES | FEW_EXPERTS | {"head_dim": 8, "num_local_experts": 4, "sliding_window": 16},
    # Linear attention in one of two layers, experts: each sequence alone.
    "qwen3_next": SIZES
    | FEW_EXPERTS
    | {
        "head_dim": 8,
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "layer_types": ["linear_attention", "full_attention"],
        **{
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    },
    # LongRoPE, with sequences below and above its border.
    "phi3": SIZES
    | {
        "original_max_position_embeddings": 96,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "original_max_position_embeddings": 96,
            "short_factor": [1.0] * 4,
            "long_factor": [2.0, 3.0, 4.0, 5.0],
        },
        **{"pad_token_id": None, "bos_token_id": None, "eos_token_id": None},
    },
    # Weights between the layers and the head, which are no part of its module.
    "modernbert-decoder": SIZES | {"local_attention": 16, "pad_token_id": 0},
    # Biases of its router that transformers never trains, and whose weights checkpoints must have all the same.
    "ernie4_5_moe": SIZES
    | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_num_shared_experts": 1}
    | {"moe_layer_start_index": 1, "moe_layer_end_index": 1, "router_aux_loss_coef": 0.0}
    | {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None},
    "granite": SIZES
    | {"logits_scaling": 4.0, "residual_multiplier": 0.5, "embedding_multiplier": 6.0, "attention_multiplier": 0.2},
}
# The float32 of the naive loop itself is off from float64 by rounding (norms and softmax stay in float32 by the models'
# own code). The engine rounds as often, in another order, so that its error is of that size; ten times leaves room for
# chance and hides no wrong scale, which is off by far more. Both are relative to the largest update of a parameter, and
# the loop's own error is checked to be small.
TIMES_ITS_ERROR, MOST_ROUNDING = 10, 1e-4


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs FAMILY-STAGE, of two steps each, in two processes."""
    folder = tmp_path_factory.mktemp("families")
    write_dump(folder, 24)
    optim = {"algorithm": "sgd", "lr": RATE, "weight_decay": 0.0, "grad_clip": 1e6, "warmup": 0.0, "min_lr": 1.0}
    recipe = tiny_recipe(folder, optim=optim, train={"epochs": 2, "seed": SEED, "max_steps": 2})
    preprocess(recipe)
    train_several(
        recipe,
        *(
            [
                f"model.config={orjson.dumps({'model_type': family, **config}).decode()}",
                f"zero.stage={stage}",
                f"checkpoint.dir={folder / f'{family}-{stage}'}",
            ]
            for family, config in FAMILIES.items()
            for stage in STAGES
        ),
    )
    return folder


class Naive:
    """A stock model, one process, one sequence at a time: the start, and the weights and losses after the steps."""

    def __init__(self, folder: Path, start: PreTrainedModel) -> None:
        recipe = load_recipe(folder / "recipe.yaml")
        self.store = TokenStore(recipe.data.store)
        self.start = start
        self.steps = list(make_run_plan(recipe, self.store, start.config, 2).steps())[: recipe.train.max_steps]
        self.start.set_attn_implementation("eager")
        self.start.set_experts_implementation("eager")  # which takes float64
        self.start.get_input_embeddings().padding_idx = None  # nothing is padded

    def train(self, dtype: torch.dtype) -> tuple[dict[str, Tensor], list[float]]:
        model = copy.deepcopy(self.start).to(dtype)
        losses = []
        for step in self.steps:
            loss_sum, weight_sum = torch.zeros((), dtype=dtype), 0.0
            for position in np.concatenate(step.bins):
                example = self.store[int(position)]
                ids = torch.from_numpy(example.input_ids.astype(np.int64))[None]
                nll = F.cross_entropy(model(ids, use_cache=False).logits[0, :-1], ids[0, 1:], reduction="none")
                loss = (nll * torch.from_numpy(example.loss_weights[1:].copy())).sum()
                loss.backward()
                loss_sum, weight_sum = loss_sum + loss.detach(), weight_sum + float(example.loss_weights[1:].sum())
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter -= RATE * parameter.grad / weight_sum
            model.zero_grad()
            losses.append(float(loss_sum) / weight_sum)
        return {name: parameter.detach().double() for name, parameter in model.named_parameters()}, losses


def exported(model: Path) -> dict[str, Tensor]:
    """The weights as transformers loads them: its files have the experts of some families one by one."""
    return dict(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).named_parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_two_processes_have_no_more_than_the_rounding_of_the_naive_loop(runs: Path, family: str) -> None:
    config = AutoConfig.for_model(family, **FAMILIES[family], vocab_size=1025)
    torch.manual_seed(SEED)
    naive = Naive(runs, AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    (exact, losses), (rounded, _) = naive.train(torch.float64), naive.train(torch.float32)
    start = dict(naive.start.named_parameters())
    largest = max(float((exact[name] - start[name].detach().double()).norm()) for name in exact)

    def error(given: dict[str, Tensor]) -> float:
        assert given.keys() == exact.keys()
        return max(float((given[name].detach().double() - exact[name]).norm()) for name in exact) / largest

    assert error(rounded) < MOST_ROUNDING
    for stage in STAGES:
        run = runs / f"{family}-{stage}"
        assert error(exported(run / "model")) < TIMES_ITS_ERROR * error(rounded)
        assert [step["loss"] for step in events(run, "step")] == pytest.approx(losses, rel=1e-5)  # fp32 sums
        backend = events(run, "start")[0]["attention"]
        assert backend == ("alone" if family == "qwen3_next" else "sdpa")
