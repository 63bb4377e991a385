"""Adapters beside a frozen base: what they compute, what learns, and what is left when they are merged."""

import copy
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ochat_train.model.lora import add_adapters, checksum, merge_adapters, require_peft, save_adapter
from ochat_train.model.packed_lm import PackedCausalLM
from ochat_train.tokens.batch import PackedBatch, collate
from ochat_train.tokens.encode import Example
from tests.test_packed_lm import make_examples, make_model, make_packed

ROW_IDS = (5, 90)
RANK, ALPHA = 3, 4.5
# fp32, against the same products in another order.
TOLERANCE = 1e-5
TIED = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


def adapt(lm: PreTrainedModel, *, row_ids: Sequence[int] = ROW_IDS, targets: Any = "all-linear", seed: int = 1) -> None:
    add_adapters(lm, rank=RANK, alpha=ALPHA, targets=targets, row_ids=row_ids, seed=seed)


def disturb(lm: nn.Module) -> None:
    """Give every trained weight another value: B begins as 0."""
    generator = torch.Generator().manual_seed(2)
    for parameter in lm.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def adapted(*, row_ids: Sequence[int] = ROW_IDS, **changes: Any) -> PackedCausalLM:
    """A small Llama whose adapters have learned something."""
    lm = make_model("llama", **changes)
    adapt(lm, row_ids=row_ids)
    disturb(lm)
    return make_packed(lm)


def batch_with_rows() -> PackedBatch:
    """Examples in which the tokens with rows are inputs and labels."""
    ids = np.array([1, 5, 90, 90, 7, 5, 8], dtype=np.int32)
    return collate([*make_examples(), Example(ids, np.ones(len(ids), dtype=np.float32))], [0, 1, 0, 1, 0])


def trained(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "phi3"])
def test_adapters_change_nothing_before_they_learn(model_type: str) -> None:
    batch = batch_with_rows()
    before, adapters, rows = (make_model(model_type) for _ in range(3))
    adapt(adapters, row_ids=())
    adapt(rows)
    with torch.no_grad():
        logits = make_packed(before).logits(batch)
        assert torch.equal(make_packed(adapters).logits(batch), logits)
        # The logits of rows are a product of their own.
        assert torch.allclose(make_packed(rows).logits(batch), logits, rtol=TOLERANCE, atol=TOLERANCE)


@TIED
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_a_gradient_reaches_every_adapter_and_row_and_nothing_else(tied: bool, checkpointing: str) -> None:
    packed = adapted(tie_word_embeddings=tied)
    packed = make_packed(packed.lm, checkpointing=checkpointing).train()
    packed(batch_with_rows()).nll.backward()
    for name, parameter in packed.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or bool(parameter.grad.flatten(1).any(dim=1).all()), name
    names = trained(packed.lm)
    assert sum(".lora_" in name for name in names) == 2 * 7 * 2  # A and B of 7 matrices in 2 layers
    assert len(names) == 28 + (1 if tied else 2)


@TIED
def test_a_batch_without_examples_gives_zero_gradients_to_all_that_is_trained(tied: bool) -> None:
    packed = adapted(tie_word_embeddings=tied).train()
    packed(collate([], [])).nll.backward()
    for name, parameter in trained(packed).items():
        assert parameter.grad is not None and not parameter.grad.any(), name


@TIED
def test_rows_are_trained_as_those_of_the_whole_weights_would_be(tied: bool) -> None:
    whole = make_packed(make_model("llama", tie_word_embeddings=tied))
    lm = make_model("llama", tie_word_embeddings=tied)
    adapt(lm)
    rows = make_packed(lm)
    for packed in (whole, rows):
        packed(batch_with_rows()).nll.backward()
    pairs = [(whole.lm.get_input_embeddings(), rows.lm.get_input_embeddings())]
    pairs += [(whole.lm.get_output_embeddings(), rows.lm.get_output_embeddings())]
    for expected, given in pairs:
        assert torch.allclose(given.rows.grad, expected.weight.grad[list(ROW_IDS)], rtol=TOLERANCE, atol=TOLERANCE)


@TIED
def test_the_loss_is_that_of_the_logits(tied: bool) -> None:
    packed = adapted(tie_word_embeddings=tied)
    batch = batch_with_rows()
    with torch.no_grad():
        nll = nn.functional.cross_entropy(packed.logits(batch), batch.labels, reduction="none")
        expected = (nll * batch.loss_weights)[batch.loss_weights != 0].sum()
        assert float(packed(batch).nll) == pytest.approx(float(expected), rel=TOLERANCE)


@TIED
@pytest.mark.parametrize("row_ids", [(), ROW_IDS], ids=["no rows", "rows"])
def test_merged_weights_give_the_logits_of_the_adapters(tied: bool, row_ids: Sequence[int]) -> None:
    packed = adapted(tie_word_embeddings=tied, row_ids=row_ids)
    merged = merge_adapters(packed.lm.state_dict(), scaling=ALPHA / RANK)
    plain = make_model("llama", tie_word_embeddings=tied)
    assert merged.keys() == plain.state_dict().keys()
    plain.load_state_dict(merged)
    batch = batch_with_rows()
    with torch.no_grad():
        logits = packed.logits(batch)
        assert torch.allclose(make_packed(plain).logits(batch), logits, rtol=TOLERANCE, atol=TOLERANCE)
        assert not torch.allclose(make_packed(make_model("llama")).logits(batch), logits, rtol=0.1, atol=0.1)


def test_merging_rounds_once() -> None:
    lm = make_model("llama").bfloat16()
    adapt(lm, row_ids=())
    disturb(lm)
    weights = lm.state_dict()
    assert {parameter.dtype for parameter in trained(lm).values()} == {torch.bfloat16}
    name = "model.layers.1.mlp.up_proj"
    exact = weights[f"{name}.base_layer.weight"].double() + ALPHA / RANK * (
        weights[f"{name}.lora_B.default.weight"].double() @ weights[f"{name}.lora_A.default.weight"].double()
    )
    merged = merge_adapters(weights, scaling=ALPHA / RANK)[f"{name}.weight"]
    assert merged.dtype == torch.bfloat16
    assert torch.allclose(merged.double(), exact, rtol=2**-8, atol=1e-6)  # bf16 has 8 significant bits


@TIED
@pytest.mark.parametrize("row_ids", [(), ROW_IDS], ids=["no rows", "rows"])
def test_peft_loads_the_adapter_and_gives_the_same_logits(tied: bool, row_ids: Sequence[int], tmp_path: Path) -> None:
    packed = adapted(tie_word_embeddings=tied, row_ids=row_ids)
    plain = make_model("llama", tie_word_embeddings=tied)
    save_adapter(tmp_path, packed.lm.state_dict(), plain, base="some/base", rank=RANK, alpha=ALPHA)
    theirs = peft.PeftModel.from_pretrained(plain, str(tmp_path)).eval()
    ids = torch.tensor([[1, 5, 90, 90, 7, 5, 8]])
    batch = collate([Example(ids[0].int().numpy(), np.ones(7, dtype=np.float32))], [0])
    with torch.no_grad():
        assert torch.allclose(theirs(ids).logits[0], packed.logits(batch), rtol=TOLERANCE, atol=TOLERANCE)


def test_an_adapter_names_its_layers_as_shortly_as_it_can(tmp_path: Path) -> None:
    for targets, written in ((["q_proj", "up_proj"], ["q_proj", "up_proj"]), (["0.mlp.up_proj"],) * 2):
        lm = make_model("llama")
        adapt(lm, targets=targets, row_ids=())
        save_adapter(tmp_path, lm.state_dict(), make_model("llama"), base="some/base", rank=RANK, alpha=ALPHA)
        config = peft.LoraConfig.from_pretrained(str(tmp_path))
        assert set(config.target_modules) == {f"model.layers.{name}" if "." in name else name for name in written}
        assert (config.r, config.lora_alpha, config.base_model_name_or_path) == (RANK, ALPHA, "some/base")


def test_rows_of_a_head_with_biases_are_not_written_for_peft(tmp_path: Path) -> None:
    lm, plain = make_model("phi"), make_model("phi")
    adapt(lm)
    with pytest.raises(ValueError, match=r"biases of the head of PhiForCausalLM.*without --adapter"):
        save_adapter(tmp_path, lm.state_dict(), plain, base="some/base", rank=RANK, alpha=ALPHA)


def test_the_state_holds_what_is_trained_and_loads_beside_the_same_base() -> None:
    packed, fresh = adapted(), adapted()
    state = packed.state_dict()
    bookkeeping = {"lm.frozen_checksum", "lm.model.embed_tokens.row_ids", "lm.lm_head.row_ids"}
    assert set(state) == set(trained(packed)) | {"loss_head.rows"} | bookkeeping
    for parameter in trained(fresh).values():
        parameter.data.zero_()
    fresh.load_state_dict(state)
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in state.items())
    missing = dict(state)
    del missing["lm.model.layers.0.mlp.up_proj.lora_A.default.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*up_proj\.lora_A"):
        fresh.load_state_dict(missing)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*something"):
        fresh.load_state_dict(state | {"lm.something": torch.zeros(1)})


def test_the_state_of_a_model_without_adapters_is_whole() -> None:
    packed = make_packed(make_model("llama"))
    state = packed.state_dict()
    assert set(state) == {name for name, _ in packed.named_parameters(remove_duplicate=False)}
    del state["lm.model.norm.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*norm\.weight"):
        packed.load_state_dict(state)


def test_adapters_are_not_loaded_beside_another_base() -> None:
    packed = adapted()
    lm = make_model("llama")
    lm.get_submodule("model.layers.0.mlp.up_proj").weight.data[0, 0] *= 1.001
    adapt(lm)
    with pytest.raises(ValueError, match=r"trained beside other weights than those of model\.base now"):
        make_packed(lm).load_state_dict(packed.state_dict())


def test_the_checksum_tells_bases_apart_but_not_by_their_embeddings() -> None:
    lm = make_model("llama").bfloat16()
    before = int(checksum(lm))
    assert 0 <= before < 2**24 and before == int(checksum(copy.deepcopy(lm)))
    lm.get_input_embeddings().weight.data += 1
    assert int(checksum(lm)) == before
    lm.get_submodule("model.norm").weight.data[3] *= 2
    assert int(checksum(lm)) != before


def test_adapters_are_decided_by_their_seed() -> None:
    models = [make_model("llama") for _ in range(3)]
    for lm, seed in zip(models, (1, 1, 2), strict=True):
        torch.rand(7)  # whatever was drawn before does not matter
        adapt(lm, seed=seed)
    name = "model.layers.0.mlp.up_proj.lora_A.default.weight"
    first, same, other = (dict(lm.named_parameters())[name] for lm in models)
    assert torch.equal(first, same) and not torch.equal(first, other)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj", "v_proj"], {f"model.layers.{n}.self_attn.{p}_proj" for n in (0, 1) for p in "qv"}),
        (["layers.1.mlp.up_proj"], {"model.layers.1.mlp.up_proj"}),
    ],
)
def test_targets_are_ends_of_names(targets: list[str], expected: set[str]) -> None:
    lm = make_model("llama")
    adapt(lm, row_ids=(), targets=targets)
    assert {name.partition(".lora_")[0] for name in trained(lm)} == expected


@pytest.mark.parametrize("target", ["w_pack", "lm_head", "proj", "embed_tokens", "mlp"])
def test_a_target_that_is_no_linear_layer_is_refused_with_those_that_are(target: str) -> None:
    with pytest.raises(ValueError, match=rf"targets '{target}'.*down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj"):
        adapt(make_model("llama"), targets=["q_proj", target])


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no linear layers besides its head"):
        adapt(make_model("gpt2"))


def test_rows_are_refused_where_the_embedding_does_more_than_look_up() -> None:
    lm = make_model("gemma3_text", head_dim=16)
    assert type(lm.get_input_embeddings()) is not nn.Embedding
    with pytest.raises(ValueError, match=r"template's tokens in Gemma3ForCausalLM.*train_template_tokens=false"):
        adapt(lm)
    adapt(make_model("gemma3_text", head_dim=16), row_ids=())


def test_without_peft_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    require_peft()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"model\.lora needs the package peft: pip install 'ochat_train\[lora\]'"):
        require_peft()
