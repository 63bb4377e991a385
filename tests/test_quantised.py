"""The base of adapters in 4 bits: what is quantised, what it takes, and what is refused."""

import importlib.util

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from ochat_train.model.lora import Kind, add_adapters
from ochat_train.model.memory import measure_size
from ochat_train.model.quantised import layers_to_quantise, require_quantising, round_to_4_bits
from tests.test_lora import batch_with_rows, disturb, trained
from tests.test_packed_lm import make_model, make_packed

CPU = torch.device("cpu")


def adapted(*, dora: bool = False, base_bits: int | None = 4) -> PreTrainedModel:
    """A small Llama with adapters; beside rounded weights where none are quantised."""
    lm = make_model("llama")
    if base_bits is None:
        round_to_4_bits(lm, CPU)
    kind = Kind(dora=dora, quantise_on=None if base_bits is None else CPU)
    add_adapters(
        lm,
        rank=3,
        alpha=6.0,
        targets=["q_proj"],
        row_ids=(5, 90),
        seed=1,
        kind=kind,
    )
    return lm


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_the_planned_bytes_are_those_of_the_real_model(dora: bool) -> None:
    lm = adapted(dora=dora)
    plan = measure_size(lm.config, lora_rank=3, lora_targets=("q_proj",), num_rows=2, kind=Kind(dora, quantise_on=CPU))
    storages = {}
    for parameter in lm.parameters():
        tensors = [parameter]
        if (state := getattr(parameter, "quant_state", None)) is not None:
            tensors += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
        storages |= {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    assert plan.weight_bytes(4) == sum(storages.values())
    assert plan.num_trained == sum(parameter.numel() for parameter in trained(lm).values())


def test_only_linear_layers_between_embedding_and_head_are_quantised() -> None:
    lm = adapted()
    packed = {name for name, parameter in lm.named_parameters() if parameter.dtype == torch.uint8}
    assert len(packed) == 2 * 7 and not any("norm" in name or "embed" in name or "head" in name for name in packed)
    assert {parameter.dtype for parameter in trained(lm).values()} == {torch.float32}


def test_gradients_after_an_evaluation_are_those_beside_the_rounded_base_which_keeps_every_bit() -> None:
    """The plain model with the rounded weights is the naive version; an evaluation must not repack the weights."""
    models = [adapted(base_bits=None), adapted()]
    for lm in models:
        disturb(lm)
    plain, quantised = make_packed(models[0]), make_packed(models[1], checkpointing="full")
    before = {n: p.detach().clone() for n, p in quantised.named_parameters() if not p.requires_grad}
    for packed in (plain, quantised):
        with torch.no_grad():
            packed.eval()(batch_with_rows())
        packed.train()(batch_with_rows()).nll.backward()
    for name, parameter in trained(plain).items():
        given = trained(quantised)[name].grad
        assert given is not None and torch.allclose(given, parameter.grad, rtol=1e-5, atol=1e-5), name
    assert all(torch.equal(p, before[n]) for n, p in quantised.named_parameters() if n in before)


def test_experts_in_one_tensor_are_refused_and_a_router_stays_as_it_is() -> None:
    with pytest.raises(ValueError, match=r"base_bits quantises linear layers, which hold [\d,]+ of the [\d,]+ weights"):
        layers_to_quantise(make_model("mixtral"))
    lm = make_model("llama")
    lm.get_submodule("model.layers.0.mlp").add_module("gate", nn.Linear(64, 4))
    assert "model.layers.0.mlp.gate" not in layers_to_quantise(lm)


def test_a_missing_package_and_an_unknown_device_are_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    require_quantising(CPU)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"bitsandbytes quantises nothing on cuda:0 .*base_bits: null"):
            require_quantising(torch.device("cuda:0"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package bitsandbytes: pip install 'ochat_train\[qlora\]'"):
        require_quantising(CPU)
