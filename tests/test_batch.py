"""Packing: sequences end to end, labels shifted inside each sequence only."""

import math
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ochat_train.tokens.batch import PackedBatch, collate
from ochat_train.tokens.encode import Example
from tests.test_packed_lm import make_examples, make_model, make_packed

TENSORS = [field.name for field in fields(PackedBatch) if field.name not in ("max_seqlen", "num_tokens")]


def example(ids: list[int], weights: list[float]) -> Example:
    return Example(np.array(ids, np.int32), np.array(weights, np.float32))


@st.composite
def examples(draw: st.DrawFn) -> Example:
    ids = draw(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=20))
    weights = draw(st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0]), min_size=len(ids) - 1, max_size=len(ids) - 1))
    return example(ids, [0.0, *weights])  # nothing predicts the first token


conditioned = st.lists(st.tuples(examples(), st.integers(0, 3)), min_size=1, max_size=6)


def naive(pairs: list[tuple[Example, int]]) -> dict[str, list[Any]]:
    """The batch, a token at a time."""
    batch: dict[str, list[Any]] = {field.name: [] for field in fields(PackedBatch)}
    batch["cu_seqlens"].append(0)
    for sequence, condition in pairs:
        ids, weights = sequence.input_ids.tolist(), sequence.loss_weights.tolist()
        for position, id_ in enumerate(ids):
            is_last = position == len(ids) - 1
            batch["input_ids"].append(id_)
            batch["position_ids"].append(position)
            batch["labels"].append(0 if is_last else ids[position + 1])
            batch["loss_weights"].append(0.0 if is_last else weights[position + 1])
            batch["condition_ids"].append(condition)
            if batch["loss_weights"][-1] != 0:
                batch["loss_positions"].append(len(batch["input_ids"]) - 1)
        batch["cu_seqlens"].append(batch["cu_seqlens"][-1] + len(ids))
    return batch


@given(conditioned)
@settings(deadline=None)
def test_a_batch_equals_a_loop_over_its_tokens(pairs: list[tuple[Example, int]]) -> None:
    batch = collate([sequence for sequence, _ in pairs], [condition for _, condition in pairs])
    expected = naive(pairs)
    for name in TENSORS:
        assert getattr(batch, name).tolist() == expected[name], name
    assert batch.max_seqlen == max(len(sequence.input_ids) for sequence, _ in pairs)
    assert batch.num_tokens == len(expected["input_ids"])


@given(conditioned)
@settings(deadline=None)
def test_shifting_loses_no_weight(pairs: list[tuple[Example, int]]) -> None:
    batch = collate([sequence for sequence, _ in pairs], [condition for _, condition in pairs])
    total = math.fsum(sequence.weight_sum for sequence, _ in pairs)
    # Both are f64 sums of the same f32 values, at most 120 of them, in another order.
    assert float(batch.loss_weights.double().sum()) == pytest.approx(total, rel=120 * 1.2e-16)


@given(conditioned, st.sampled_from([1, 2, 7, 64]))
@settings(deadline=None)
def test_padding_is_one_more_sequence_without_a_loss(pairs: list[tuple[Example, int]], multiple: int) -> None:
    sequences, conditions = zip(*pairs, strict=True)
    plain, padded = collate(sequences, conditions), collate(sequences, conditions, multiple=multiple)
    num_tokens = len(plain.input_ids)
    padding = len(padded.input_ids) - num_tokens
    assert len(padded.input_ids) % multiple == 0 and 0 <= padding < multiple
    for name in ("input_ids", "position_ids", "labels", "loss_weights", "condition_ids"):
        assert torch.equal(getattr(padded, name)[:num_tokens], getattr(plain, name)), name
    assert padded.position_ids[num_tokens:].tolist() == list(range(padding))
    for name in ("input_ids", "labels", "loss_weights", "condition_ids"):
        assert not getattr(padded, name)[num_tokens:].any(), name
    assert torch.equal(padded.loss_positions, plain.loss_positions)
    borders = plain.cu_seqlens.tolist()
    assert padded.cu_seqlens.tolist() == (borders if padding == 0 else [*borders, num_tokens + padding])
    assert padded.max_seqlen == max(plain.max_seqlen, padding)  # kernels compute no further than this
    assert padded.num_tokens == num_tokens


@given(conditioned, st.sampled_from([1, 2, 4]))
@settings(deadline=None)
def test_shares_joined_are_the_batch(pairs: list[tuple[Example, int]], num: int) -> None:
    batch = collate([sequence for sequence, _ in pairs], [condition for _, condition in pairs], multiple=num)
    shares = [batch.share(place, num) for place in range(num)]
    assert {len(share.input_ids) for share in shares} == {len(batch.input_ids) // num}
    for name in ("input_ids", "position_ids", "labels", "loss_weights", "condition_ids"):
        assert torch.equal(torch.cat([getattr(share, name) for share in shares]), getattr(batch, name))
    for share in shares:
        assert share.loss_positions.tolist() == share.loss_weights.nonzero().flatten().tolist()
        assert share.cu_seqlens is batch.cu_seqlens and share.max_seqlen == batch.max_seqlen
    assert sum(share.num_tokens for share in shares) == batch.num_tokens


def test_nothing_is_padded_too() -> None:
    batch = collate([], [], multiple=8)
    assert batch.cu_seqlens.tolist() == [0, 1, 8] and batch.max_seqlen == 7
    assert batch.loss_positions.tolist() == []


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2"])
def test_padding_changes_no_sum_and_no_gradient(model_type: str) -> None:
    sums, gradients = [], []
    for multiple in (1, 64):  # 45 tokens
        packed = make_packed(make_model(model_type)).train()
        batch = collate(make_examples(), [0, 1, 0, 1], multiple=multiple)
        sums.append(packed(batch))
        sums[-1].nll.backward()
        gradients.append({name: parameter.grad for name, parameter in packed.named_parameters()})
    # fp32, and the same products in matrices of other sizes, whose sums are blocked otherwise: a few roundings of 6e-8.
    # A token of the padding that was attended to would be off by more than 1e-2.
    assert float(sums[1].nll) == pytest.approx(float(sums[0].nll), rel=2e-7)
    assert torch.allclose(sums[1].by_condition.table, sums[0].by_condition.table, rtol=2e-7, atol=0)
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradients[1][name] is not None, name
        assert float((gradients[1][name] - gradient).norm() / gradient.norm()) < 1e-6, name


def test_labels_never_cross_into_the_next_sequence() -> None:
    batch = collate([example([5, 6, 7], [0, 0, 1]), example([8, 9], [0, 0.1])], [1, 0])
    assert batch.labels.tolist() == [6, 7, 0, 9, 0]
    assert batch.loss_weights.tolist() == [0, 1, 0, pytest.approx(0.1, abs=1e-8), 0]  # 0.1 in f32 is 1.5e-9 off
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 3, 5]
    assert batch.condition_ids.tolist() == [1, 1, 1, 0, 0]


def test_dtypes_are_the_contracts() -> None:
    for batch in (collate([example([5, 6, 7], [0, 0, 1])], [0]), collate([], [])):
        dtypes = {name: getattr(batch, name).dtype for name in TENSORS}
        assert dtypes == {
            "input_ids": torch.int64,
            "position_ids": torch.int64,
            "labels": torch.int64,
            "loss_weights": torch.float32,
            "loss_positions": torch.int64,
            "cu_seqlens": torch.int32,
            "condition_ids": torch.int32,
        }
        # A tensor here would make every layer wait for the device.
        assert type(batch.max_seqlen) is int


def test_no_examples_make_one_token_that_counts_for_nothing() -> None:
    batch = collate([], [])
    assert batch.input_ids.tolist() == batch.labels.tolist() == batch.position_ids.tolist() == [0]
    assert batch.loss_weights.tolist() == [0.0] and batch.loss_positions.tolist() == []
    assert batch.cu_seqlens.tolist() == [0, 1]
    assert batch.max_seqlen == 1
    assert batch.condition_ids.tolist() == [0]


def test_sequences_of_one_token_have_a_place_and_no_loss() -> None:
    batch = collate([example([3], [0]), example([4, 5], [0, 1]), example([6], [0])], [0, 1, 2])
    assert batch.input_ids.tolist() == [3, 4, 5, 6]
    assert batch.labels.tolist() == [0, 5, 0, 0]
    assert batch.loss_weights.tolist() == [0, 1, 0, 0]
    assert batch.position_ids.tolist() == [0, 0, 1, 0]
    assert batch.cu_seqlens.tolist() == [0, 1, 3, 4]
    assert batch.max_seqlen == 2


def test_the_first_weight_of_a_sequence_never_reaches_its_neighbour() -> None:
    # An encoder's mistake, a weight on the first token, must not land on the last label of the sequence before.
    batch = collate([example([5, 6], [0, 1]), example([7, 8], [9, 1])], [0, 0])
    assert batch.loss_weights.tolist() == [1, 0, 1, 0]


def test_examples_stay_as_they_were_and_the_batch_owns_its_memory() -> None:
    sequence = example([5, 6], [0, 1])
    sequence.input_ids.flags.writeable = sequence.loss_weights.flags.writeable = False  # as from a memory map
    batch = collate([sequence], [0])
    batch.input_ids.add_(1)
    batch.loss_weights.add_(1)
    assert sequence.input_ids.tolist() == [5, 6]
    assert sequence.loss_weights.tolist() == [0, 1]


def test_for_the_cpu_nothing_is_pinned() -> None:
    batch = collate([example([5, 6, 7], [0, 0, 1])], [1])
    assert batch.pin(torch.device("cpu")) is batch


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_moving_keeps_every_field(device: str) -> None:
    batch = collate([example([5, 6, 7], [0, 0, 1]), example([8], [0])], [1, 0])
    moved = batch.to(device)
    assert type(moved.max_seqlen) is int and moved.max_seqlen == batch.max_seqlen
    for name in TENSORS:
        before, after = getattr(batch, name), getattr(moved, name)
        assert after.device.type == device
        assert (after.shape, after.dtype) == (before.shape, before.dtype)
        if device == "cpu":
            assert torch.equal(after, before)
