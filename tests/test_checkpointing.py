"""Which layers are computed again, and that it changes no gradient."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

import ochat_train.model.checkpointing
from ochat_train.model.checkpointing import BY_TIME, check_policy, enable_checkpointing, share_of, tile_mlps
from ochat_train.model.lora import add_adapters
from ochat_train.model.packed_lm import PackedCausalLM
from tests.test_packed_lm import MODELS, make_batch, make_examples, make_model

LINEAR = [name for name in MODELS if name != "gpt2"]  # whose layers are of another class, which takes no adapters

NUM_LAYERS = 5
COMPUTED_AGAIN = {
    "none": [],
    "every_5": [0],
    "every_4": [0, 4],
    "every_3": [0, 3],
    "every_2": [0, 2, 4],
    "full": [0, 1, 2, 3, 4],
}


def gradients(lm: PreTrainedModel, policy: str, mlp_tiles: int = 1) -> tuple[dict[str, Tensor], list[int]]:
    """Of what is trained, by name; and how often each layer's MLP ran."""
    tile_mlps(lm, mlp_tiles)
    packed = PackedCausalLM(lm, attention="auto", device_type="cpu", checkpointing=policy, num_conditions=2).train()
    num_runs = [0] * NUM_LAYERS
    layers = [module for module in lm.modules() if isinstance(module, GradientCheckpointingLayer)]
    for number, layer in enumerate(layers):

        def count(*_: Any, number: int = number) -> None:
            num_runs[number] += 1

        layer.mlp.register_forward_pre_hook(count)
    packed(make_batch(make_examples())).nll.backward()
    return {name: p.grad for name, p in lm.named_parameters() if p.grad is not None}, num_runs


@pytest.mark.parametrize(
    ("model_type", "with_adapters"), [(name, False) for name in MODELS] + [(name, True) for name in LINEAR]
)
def test_the_layers_of_a_policy_are_computed_again_and_no_gradient_changes(
    model_type: str, with_adapters: bool
) -> None:
    lm = make_model(model_type, num_hidden_layers=NUM_LAYERS)
    if with_adapters:
        add_adapters(lm, rank=4, alpha=8, targets="all-linear", row_ids=(), seed=0)
        for name, parameter in lm.named_parameters():
            if "lora_B" in name:  # they begin as 0, and then those of A have no gradient
                torch.nn.init.normal_(parameter, std=0.02)
    expected, num_runs = gradients(copy.deepcopy(lm), "none")
    assert num_runs == [1] * NUM_LAYERS and all(bool(gradient.any()) for gradient in expected.values())
    for policy, again in COMPUTED_AGAIN.items():
        found, num_runs = gradients(copy.deepcopy(lm), policy)
        assert [number for number, runs in enumerate(num_runs) if runs == 2] == again, policy
        assert sum(num_runs) == NUM_LAYERS + len(again)
        assert found.keys() == expected.keys()
        # Bitwise: the same operations on the same values, on one machine.
        assert all(torch.equal(found[name], expected[name]) for name in expected), policy


@pytest.mark.parametrize(
    ("model_type", "with_adapters", "policy"),
    [("gpt2", False, "full"), ("llama", False, "none"), ("llama", True, "full")],
)
def test_mlps_in_tiles_have_the_same_gradients(model_type: str, with_adapters: bool, policy: str) -> None:
    lm = make_model(model_type, num_hidden_layers=NUM_LAYERS)
    if with_adapters:
        add_adapters(lm, rank=4, alpha=8, targets="all-linear", row_ids=(), seed=0)
        for name, parameter in lm.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
    expected, _ = gradients(copy.deepcopy(lm), policy)
    num_tokens: set[int] = set()
    for name, module in lm.named_modules():
        if name.endswith(("mlp.c_proj", "mlp.down_proj")):
            module.register_forward_pre_hook(lambda _, inputs: num_tokens.add(inputs[0].shape[-2]))
    for mlp_tiles in (3, make_batch(make_examples()).num_tokens + 1):  # which leaves some of them empty
        num_tokens.clear()
        found, _ = gradients(copy.deepcopy(lm), policy, mlp_tiles)
        assert max(num_tokens) == -(-len(make_batch(make_examples()).input_ids) // mlp_tiles)
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            assert float((gradient - expected[name]).norm()) <= 1e-5 * float(expected[name].norm()), name


def test_nothing_is_computed_again_in_evaluation_mode() -> None:
    lm = make_model("llama")
    packed = PackedCausalLM(lm, attention="auto", device_type="cpu", checkpointing="full", num_conditions=2).eval()
    runs: list[object] = []
    lm.get_submodule("model.layers.0.mlp").register_forward_pre_hook(lambda *call: runs.append(call))
    packed(make_batch(make_examples())).nll.backward()
    assert len(runs) == 1


def test_dropout_draws_the_same_numbers_again() -> None:
    lm = make_model("phi3", resid_pdrop=0.5, num_hidden_layers=NUM_LAYERS)
    found = []
    for policy in ("none", "full", "every_2"):
        torch.manual_seed(1)
        found.append(gradients(copy.deepcopy(lm), policy)[0])
    assert all(torch.equal(others[name], found[0][name]) for others in found[1:] for name in found[0])
    torch.manual_seed(2)
    other, _ = gradients(copy.deepcopy(lm), "none")
    assert not all(torch.equal(other[name], found[0][name]) for name in other)


def test_policies_are_tried_by_what_they_compute_again() -> None:
    shares = [share_of(policy) for policy in BY_TIME]
    assert shares == sorted(shares) == [0, 1 / 4, 1 / 3, 1 / 2, 1]


def test_a_policy_of_more_layers_than_there_are_is_refused() -> None:
    check_policy(f"every_{NUM_LAYERS}", NUM_LAYERS)
    with pytest.raises(ValueError, match=r"model\.checkpointing every_6 is above the model's 5 layers"):
        check_policy("every_6", NUM_LAYERS)
    with pytest.raises(ValueError, match="every_6 is above the model's 5 layers"):
        enable_checkpointing(make_model("llama", num_hidden_layers=NUM_LAYERS), "every_6")


def test_layers_that_cannot_be_chosen_one_by_one_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Another:
        """In place of transformers' base class of layers, which the model's are then not of."""

    monkeypatch.setattr(ochat_train.model.checkpointing, "GradientCheckpointingLayer", Another)
    with pytest.raises(ValueError, match="LlamaForCausalLM are checkpointed all or none; set full or none"):
        enable_checkpointing(make_model("llama"), "every_2")
