"""The loss that balances a mixture's experts is transformers' own, over a micro-batch's real tokens."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from ochat_train.model.packed_lm import PackedCausalLM
from ochat_train.model.router import RouterSums, choose_router_loss
from ochat_train.model.small import small_model
from ochat_train.tokens.batch import collate
from ochat_train.tokens.encode import Example

# The names that families have for the coefficient, and JetMoE's two routers a layer.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"router_aux_loss_coef": 0.25},
    "granitemoe": {"router_aux_loss_coef": 0.25},
    "jetmoe": {"aux_loss_coef": 0.25},
}


def config_of(family: str) -> Any:
    return AutoConfig.for_model(family, **FAMILIES.get(family, {}))


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_transformers(family: str) -> None:
    """Packed beside tokens that only fill the batch up, and with layers computed again where a family can do that."""
    lm = small_model(config_of(family), longest=64)
    stock = copy.deepcopy(lm)
    policy = "full" if lm.supports_gradient_checkpointing else "none"
    packed = PackedCausalLM(
        lm, attention="sdpa", device_type="cpu", checkpointing=policy, num_conditions=1, router_coefficient=0.25
    ).train()
    ids = np.random.default_rng(0).integers(3, 100, 30).astype(np.int32)
    sums = packed(collate([Example(ids, np.ones(30, np.float32))], [0], multiple=16))
    assert sums.router is not None
    router: RouterSums = sums.router
    out = stock.train()(torch.from_numpy(ids.astype(np.int64))[None], output_router_logits=True, use_cache=False)
    assert float(router.loss.detach()) / 30 == pytest.approx(float(out.aux_loss.detach()), rel=1e-6)
    assert router.counts.sum(1).tolist() == [30 * lm.num_experts_per_tok] * len(router.counts)
    router.loss.backward()
    (30 * out.aux_loss).backward()
    expected = {name: p.grad for name, p in stock.named_parameters() if p.grad is not None}
    size = max(float(gradient.norm()) for gradient in expected.values())
    for name, parameter in packed.lm.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=1e-5 * size)
    found = choose_router_loss("auto", stock.config, is_frozen=False)
    assert found is not None and found.coefficient == 0.25


def test_a_micro_batch_of_nothing_has_a_loss_of_0_with_gradients() -> None:
    lm = small_model(config_of("qwen3_moe"), longest=64)
    packed = PackedCausalLM(
        lm, attention="sdpa", device_type="cpu", checkpointing="none", num_conditions=1, router_coefficient=1.0
    ).train()
    router = packed(collate([], [])).router
    assert router is not None and float(router.loss.detach()) == 0 and not router.counts.any()
    router.loss.backward()


def test_the_coefficient_is_chosen_and_said() -> None:
    mixture, others, dense = (config_of(family) for family in ("qwen3_moe", "deepseek_v3", "llama"))
    assert str(choose_router_loss("auto", mixture, is_frozen=True)).startswith("router loss coefficient 0 (adapters")
    asked = choose_router_loss(0.5, mixture, is_frozen=True)
    assert asked is not None and asked.coefficient == 0.5
    said = "router loss coefficient 0 (transformers has no balancing loss for deepseek_v3)"
    assert str(choose_router_loss("auto", others, is_frozen=False)) == said
    assert choose_router_loss("auto", dense, is_frozen=False) is choose_router_loss(0.0, dense, is_frozen=False) is None
    for config in (others, dense):
        with pytest.raises(ValueError, match=r"model.router_aux_loss_coef 0.1: transformers has no balancing loss for"):
            choose_router_loss(0.1, config, is_frozen=False)
