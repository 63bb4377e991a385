"""In the loss form answer each answer counts its weight once, however long it is and in however many examples."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ochat_train.tokens.loss_forms import spread_over_answers
from ochat_train.tokens.order import DataOrder
from ochat_train.tokens.overlong import fit
from ochat_train.tokens.plan import PlanShape, plan_epoch
from ochat_train.tokens.store import TokenStore
from tests.test_overlong import ROLES, WEIGHTS, Turns, laid_out
from tests.test_store import random_rows, write

ROUNDED = 2.0**-23  # of one f32


@given(
    turns=st.lists(
        st.tuples(st.sampled_from(ROLES), st.integers(0, 30) | st.integers(0, 400), WEIGHTS), min_size=1, max_size=10
    ),
    prefix=st.integers(0, 20),
    header=st.integers(1, 4),
    after_end=st.integers(0, 2),
    max_tokens=st.integers(30, 200) | st.just(10_000),
    context_tokens=st.integers(0, 100),
)
@settings(max_examples=300, deadline=None)
def test_each_answer_has_its_weight_once_spread_evenly_over_its_tokens(
    turns: Turns, prefix: int, header: int, after_end: int, max_tokens: int, context_tokens: int
) -> None:
    encoded = laid_out(turns, prefix=prefix, header=header, after_end=after_end)
    fitted = fit(encoded, max_tokens=max_tokens, overlong="split", context_tokens=context_tokens)
    given = np.zeros(len(encoded.example.input_ids))
    for part, lengths in zip(fitted.examples, fitted.answer_lengths, strict=True):
        spread = spread_over_answers(part.loss_weights, [len(part.input_ids)], lengths, [len(lengths)])
        assert spread.dtype == np.float32
        given[part.input_ids] += spread
    for turn, (_, _, weight) in zip(encoded.turns, turns, strict=True):
        own = given[turn.text_start : turn.weighted_end]
        assert own == pytest.approx(weight / len(own) if fitted.examples else 0, rel=ROUNDED)


@given(
    st.lists(
        st.lists(st.tuples(st.integers(1, 9), st.sampled_from([0.1, 1.0, 3.0])), min_size=1, max_size=4), max_size=6
    )
)
def test_examples_together_are_spread_as_each_alone(examples: list[list[tuple[int, float]]]) -> None:
    each = []
    for answers in examples:
        weights = np.concatenate([np.repeat(np.float32([0, weight]), [2, length]) for length, weight in answers])
        each.append((weights, np.array([length for length, _ in answers], np.int32)))
    alone = [spread_over_answers(weights, [len(weights)], lengths, [len(lengths)]) for weights, lengths in each]
    together = spread_over_answers(
        np.concatenate([np.empty(0, np.float32), *(weights for weights, _ in each)]),
        [len(weights) for weights, _ in each],
        np.concatenate([np.empty(0, np.int32), *(lengths for _, lengths in each)]),
        [len(lengths) for _, lengths in each],
    )
    assert together.tolist() == [weight for weights in alone for weight in weights.tolist()]


def test_answers_without_a_gap_between_them_keep_their_own_lengths() -> None:
    weights = np.array([0, 1, 1, 1, 1], np.float32)  # a template whose turns have no header
    assert spread_over_answers(weights, [5], np.array([1, 3], np.int32), [2]).tolist() == pytest.approx(
        [0, 1] + [1 / 3] * 3
    )


def test_a_store_opened_by_answer_has_the_sums_of_the_weights_that_it_gives(tmp_path: Path) -> None:
    rows = random_rows(800)
    write(tmp_path / "store", rows)
    by_token, by_answer = (TokenStore(tmp_path / "store", "train", form) for form in ("token", "answer"))
    for position in range(len(rows)):
        token, answer = by_token[position].loss_weights, by_answer[position].loss_weights
        num_trained = np.count_nonzero(token)
        assert answer.tolist() == [np.float32(weight / num_trained) if weight else 0.0 for weight in token]
        # The same additions of the same floats, so that the plan's normalizer is exactly that of the batches.
        assert by_answer.weight_sums[position] == answer.sum(dtype=np.float64)
    shape = PlanShape(capacity=128, world_size=2, grad_accum=2, quadratic_length=1000)
    plans = [
        list(plan_epoch(store.lengths, store.weight_sums, shape, DataOrder(len(store), seed=1), epoch=0))
        for store in (by_token, by_answer)
    ]
    assert [step.checksum for step in plans[0]] == [step.checksum for step in plans[1]]
    assert [step.weight_sum for step in plans[0]] != [step.weight_sum for step in plans[1]]
