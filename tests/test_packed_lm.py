"""Models of transformers on packed batches, against the same models on each sequence alone."""

import copy
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ochat_train.model.packed_lm import PackedCausalLM
from ochat_train.tokens.batch import PackedBatch, collate
from ochat_train.tokens.encode import Example

VOCABULARY = 97
LENGTHS = (5, 23, 1, 16)
SIZE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
# GPT-2's learned positions are absolute: the only ones here for which it matters that each sequence counts from 0.
# Windows are shorter than two of the sequences. Gemma2: window in one layer, none in the other, and both softcaps.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 7},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma2": {
        "head_dim": 16,
        "sliding_window": 8,
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "phi3": {"pad_token_id": 0},
    "granite": {"logits_scaling": 8.0, "residual_multiplier": 0.5, "embedding_multiplier": 3.0},
    "gpt2": {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
}


def make_model(model_type: str, **changes: Any) -> PreTrainedModel:
    """A small model whose weights are large enough that attention is not nearly uniform."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZE, **MODELS.get(model_type, {}), **changes})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def make_packed(lm: PreTrainedModel, *, checkpointing: str = "none") -> PackedCausalLM:
    return PackedCausalLM(lm, attention="auto", device_type="cpu", checkpointing=checkpointing, num_conditions=2)


def make_examples(*, silent: bool = False) -> list[Example]:
    """Sequences of LENGTHS; two thirds of the tokens have a weight (none when `silent`)."""
    random = np.random.default_rng(0)
    examples = []
    for length in LENGTHS:
        weights = random.random(length) * (random.random(length) > 0.33) * (not silent)
        weights[0] = 0
        examples.append(Example(random.integers(0, VOCABULARY, length).astype(np.int32), weights.astype(np.float32)))
    return examples


def make_batch(examples: list[Example]) -> PackedBatch:
    return collate(examples, [0, 1, 0, 1])


def each_alone(lm: PreTrainedModel, examples: list[Example]) -> tuple[Tensor, Tensor]:
    """Logits [T, V] and the weighted sum of nll of the stock model, run on one sequence at a time."""
    logits, total = [], torch.zeros(())
    for example in examples:
        ids = torch.from_numpy(example.input_ids.astype(np.int64))
        logits.append(lm(ids[None], use_cache=False).logits[0].float())
        nll = F.cross_entropy(logits[-1][:-1], ids[1:], reduction="none")
        total = total + (nll * torch.from_numpy(example.loss_weights[1:])).sum()
    return torch.cat(logits), total


def relative_error(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


# Two f32 layers: 1e-7 for each of some ten operations in a row, and backwards as many again. A sequence that sees
# another one is off by more than 0.1 in this measure.
LOGITS_TOLERANCE = 2e-6
GRADIENT_TOLERANCE = 5e-6


@pytest.mark.parametrize("checkpointing", ["none", "full", "every_2"])
@pytest.mark.parametrize("model_type", MODELS)
def test_packed_sequences_equal_each_alone_in_the_stock_model(model_type: str, checkpointing: str) -> None:
    stock = make_model(model_type)
    packed = make_packed(copy.deepcopy(stock), checkpointing=checkpointing)
    stock.set_attn_implementation("eager")
    examples = make_examples()
    batch = make_batch(examples)
    packed.train()
    sums = packed(batch)
    sums.nll.backward()
    expected_logits, expected_nll = each_alone(stock.train(), examples)
    expected_nll.backward()
    assert relative_error(sums.nll.detach(), expected_nll.detach()) < LOGITS_TOLERANCE
    assert relative_error(packed.logits(batch).detach(), expected_logits.detach()) < LOGITS_TOLERANCE
    gradients = {name: parameter.grad for name, parameter in packed.lm.named_parameters()}
    for name, parameter in stock.named_parameters():
        gradient = gradients.pop(name)
        assert gradient is not None and parameter.grad is not None, name
        assert relative_error(gradient, parameter.grad) < GRADIENT_TOLERANCE, name
    assert not gradients


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("model_type", MODELS)
def test_evaluation_mode_gives_the_same_values(model_type: str, checkpointing: str) -> None:
    stock = make_model(model_type)
    packed = make_packed(copy.deepcopy(stock), checkpointing=checkpointing)
    stock.set_attn_implementation("eager")
    examples = make_examples()
    batch = make_batch(examples)
    packed.eval()
    with torch.no_grad():
        expected_logits, expected_nll = each_alone(stock.eval(), examples)
        assert relative_error(packed(batch).nll, expected_nll) < LOGITS_TOLERANCE
        assert relative_error(packed.logits(batch), expected_logits) < LOGITS_TOLERANCE


@pytest.mark.parametrize("model_type", MODELS)
def test_evaluation_mode_makes_no_cache(model_type: str) -> None:
    packed = make_packed(make_model(model_type)).eval()
    caches: list[object] = []
    packed.lm.base_model.register_forward_hook(lambda *call: caches.append(call[-1].past_key_values))
    with torch.no_grad():
        packed(make_batch(make_examples()))
    assert caches == [None]


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("model_type", MODELS)
def test_changing_one_sequence_leaves_the_others_bitwise_as_they_were(model_type: str, mode: bool) -> None:
    packed = make_packed(make_model(model_type)).train(mode)
    examples = make_examples()
    batch = make_batch(examples)
    with torch.no_grad():
        before = packed.hidden(batch)
        for changed, (begin, end) in enumerate(pairwise(batch.cu_seqlens.tolist())):
            others = list(examples)
            ids = (examples[changed].input_ids + 1) % VOCABULARY
            others[changed] = Example(ids, examples[changed].loss_weights)
            after = packed.hidden(make_batch(others))
            assert not torch.equal(after[begin:end], before[begin:end])
            assert torch.equal(after[:begin], before[:begin])
            assert torch.equal(after[end:], before[end:])


@pytest.mark.parametrize(
    ("model_type", "without"),
    [
        ("mistral", {"sliding_window": None}),
        ("gemma2", {"sliding_window": 64}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"final_logit_softcapping": None}),
    ],
)
def test_windows_and_softcaps_matter_in_these_comparisons(model_type: str, without: dict[str, Any]) -> None:
    batch = make_batch(make_examples())
    with torch.no_grad():
        logits = make_packed(make_model(model_type)).logits(batch)
        assert relative_error(make_packed(make_model(model_type, **without)).logits(batch), logits) > 0.01


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
@pytest.mark.parametrize("examples", [make_examples(silent=True), []], ids=["no weights", "no examples"])
def test_a_batch_without_a_loss_gives_zero_gradients(model_type: str, examples: list[Example]) -> None:
    packed = make_packed(make_model(model_type), checkpointing="full").train()
    sums = packed(collate(examples, [0] * len(examples)))
    assert sums.nll == 0 and sums.nll.requires_grad
    sums.nll.backward()
    for name, parameter in packed.named_parameters():
        # None would make this rank skip a reduction that the others wait in.
        assert parameter.grad is not None, name
        assert torch.count_nonzero(parameter.grad) == 0 and bool(parameter.grad.isfinite().all()), name


def test_the_loss_by_condition_is_that_of_its_sequences_alone() -> None:
    packed = make_packed(make_model("llama"))
    examples = make_examples()
    with torch.no_grad():
        sums = packed(make_batch(examples))
        for condition in (0, 1):
            mine = examples[condition::2]
            alone = packed(collate(mine, [condition] * len(mine)))
            assert relative_error(sums.by_condition.weighted.nll[condition], alone.nll) < LOGITS_TOLERANCE
            weight = sum(example.weight_sum for example in mine)
            assert float(sums.by_condition.weighted.weight[condition]) == pytest.approx(
                weight, rel=1e-7
            )  # one f32 rounding


def test_the_choice_of_attention_is_reported_and_an_impossible_one_refused() -> None:
    packed = make_packed(make_model("llama"))
    assert packed.attention.backend == "sdpa" and "CUDA" in packed.attention.reason
    lm = make_model("llama")
    with pytest.raises(ValueError, match=r"model\.attention torch cannot be used here"):
        PackedCausalLM(lm, attention="torch", device_type="cpu", checkpointing="none", num_conditions=1)
