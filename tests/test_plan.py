"""The epoch plan: every example once, no bin too full, one number as its position."""

import math
import os
import subprocess
import sys
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from ochat_train.recipe import Recipe, load_recipe
from ochat_train.tokens.plan import PlanShape, StepPlan, plan_digest, plan_epoch, quadratic_length
from ochat_train.tokens.store import Manifest
from ochat_train.train import deepspeed_configuration, peak_learning_rate, plan_shape

OPENCHAT_RECIPE = Path(__file__).parent.parent / "recipes" / "openchat_v3.2_super_13b.yaml"
Bins = list[list[int]]


@st.composite
def stores(draw: st.DrawFn) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float64], PlanShape]:
    """Lengths, weight sums and a shape that takes them. The weights are eighths: their sums are exact in f64."""
    capacity = draw(st.integers(1, 64))
    lengths = draw(st.lists(st.integers(1, capacity), max_size=80))
    eighths = draw(st.lists(st.integers(0, 8 * capacity), min_size=len(lengths), max_size=len(lengths)))
    shape = PlanShape(capacity, draw(st.integers(1, 9)), draw(st.sampled_from([4.0, 768.0, 61_440.0])))
    return np.array(lengths, np.int32), np.array(eighths, np.float64) / 8, shape


Store = tuple[npt.NDArray[np.int32], npt.NDArray[np.float64], PlanShape]
no_deadline = settings(deadline=None)  # shared machines pause
seeds = st.none() | st.integers(0, 2**63 - 1)


def bins_of(step: StepPlan) -> Bins:
    return [positions.tolist() for positions in step.bins]


def examples_of(step: StepPlan) -> list[int]:
    return [position for positions in bins_of(step) for position in positions]


def all_examples(steps: list[StepPlan]) -> list[int]:
    return [position for step in steps for position in examples_of(step)]


def as_values(steps: list[StepPlan]) -> list[tuple[Bins, float]]:
    return [(bins_of(step), step.weight_sum) for step in steps]


def sharegpt_like_lengths(num: int, *, mu: float = 6.8, seed: int = 0) -> npt.NDArray[np.int32]:
    """Lognormal conversation lengths (median e^mu tokens, a tail of thousands), cut at the context length."""
    return np.clip(np.random.default_rng(seed).lognormal(mu, 0.9, num), 8, 4096).astype(np.int32)


def weighted(lengths: npt.NDArray[np.int32], weight: float = 1.0) -> npt.NDArray[np.float64]:
    """Weight sums of examples whose tokens all have this weight."""
    return lengths.astype(np.float64) * weight


def fill(step: StepPlan, lengths: npt.NDArray[np.int32], shape: PlanShape) -> float:
    return int(lengths[examples_of(step)].sum()) / (shape.capacity * shape.num_bins)


def costs(step: StepPlan, lengths: npt.NDArray[np.int32], shape: PlanShape) -> list[float]:
    return [sum(float(n) + float(n) ** 2 / shape.quadratic_length for n in lengths[b]) for b in step.bins]


# ------------------------------------------------------------------------------------------------ every plan


@given(stores(), seeds, st.integers(0, 5))
@no_deadline
def test_every_example_is_trained_exactly_once_an_epoch(store: Store, seed: int | None, epoch: int) -> None:
    lengths, weights, shape = store
    steps = list(plan_epoch(lengths, weights, shape, seed=seed, epoch=epoch))
    assert sorted(all_examples(steps)) == list(range(len(lengths)))
    assert sum(step.num_examples for step in steps) == len(lengths)
    assert all(step.num_examples > 0 for step in steps)


@given(stores(), seeds)
@no_deadline
def test_no_bin_is_above_capacity_and_every_step_has_all_bins(store: Store, seed: int | None) -> None:
    lengths, weights, shape = store
    for step in plan_epoch(lengths, weights, shape, seed=seed, epoch=0):
        assert len(step.bins) == shape.num_bins
        for positions in step.bins:
            assert positions.dtype == np.int64
            assert int(lengths[positions].sum()) <= shape.capacity


@given(stores(), seeds)
@no_deadline
def test_the_weight_sum_of_a_step_is_exact(store: Store, seed: int | None) -> None:
    lengths, weights, shape = store
    for step in plan_epoch(lengths, weights, shape, seed=seed, epoch=0):
        assert isinstance(step.weight_sum, float)
        assert step.weight_sum == math.fsum(weights[examples_of(step)])


def test_weight_sums_of_a_tenth_keep_the_precision_of_doubles() -> None:
    lengths = sharegpt_like_lengths(2000)
    weights = weighted(lengths, float(np.float32(0.1)))
    for step in plan_epoch(lengths, weights, PlanShape(32_768, 8, 61_440.0), seed=0, epoch=0):
        # At most 500 additions, each rounded by 1.1e-16 relative to a partial sum that is not above the whole.
        assert step.weight_sum == pytest.approx(math.fsum(weights[examples_of(step)]), rel=500 * 1.2e-16)


@given(stores(), st.integers(0, 2**63 - 1), st.integers(0, 3))
@no_deadline
def test_the_same_inputs_give_the_same_plan(store: Store, seed: int, epoch: int) -> None:
    lengths, weights, shape = store
    first = list(plan_epoch(lengths, weights, shape, seed=seed, epoch=epoch))
    again = list(plan_epoch(lengths.copy(), weights.copy(), replace(shape), seed=seed, epoch=epoch))
    assert as_values(first) == as_values(again)
    digest = plan_digest(lengths, weights, shape, seed=seed)
    assert digest == plan_digest(lengths.copy(), weights.copy(), replace(shape), seed=seed)


@given(stores(), seeds, st.data())
@no_deadline
def test_seeking_to_the_end_of_a_step_gives_the_rest_of_the_unbroken_plan(
    store: Store, seed: int | None, data: st.DataObject
) -> None:
    lengths, weights, shape = store
    unbroken = list(plan_epoch(lengths, weights, shape, seed=seed, epoch=1))
    num_steps = data.draw(st.integers(0, len(unbroken)))
    consumed = sum(step.num_examples for step in unbroken[:num_steps])
    rest = list(plan_epoch(lengths, weights, shape, seed=seed, epoch=1, start=consumed))
    assert as_values(rest) == as_values(unbroken[num_steps:])


@given(stores(), seeds, st.integers(1, 9), st.integers(0, 64), st.data())
@no_deadline
def test_on_another_number_of_gpus_the_remaining_examples_are_trained_once(
    store: Store, seed: int | None, num_bins: int, more_room: int, data: st.DataObject
) -> None:
    lengths, weights, shape = store
    before = list(plan_epoch(lengths, weights, shape, seed=seed, epoch=2))
    done = before[: data.draw(st.integers(0, len(before)))]
    consumed = sum(step.num_examples for step in done)
    other = PlanShape(int(lengths.max(initial=1)) + more_room, num_bins, shape.quadratic_length)
    after = list(plan_epoch(lengths, weights, other, seed=seed, epoch=2, start=consumed))
    assert sorted(all_examples(done) + all_examples(after)) == list(range(len(lengths)))


@given(stores(), st.integers(0, 80))
@no_deadline
def test_without_a_seed_each_step_takes_the_next_examples_of_the_store(store: Store, start: int) -> None:
    lengths, weights, shape = store
    position = start
    for step in plan_epoch(lengths, weights, shape, seed=None, epoch=3, start=start):
        assert sorted(examples_of(step)) == list(range(position, position + step.num_examples))
        position += step.num_examples
    assert position == max(start, len(lengths))


@given(stores())
@no_deadline
def test_a_step_takes_as_many_examples_as_can_be_placed(store: Store) -> None:
    lengths, weights, shape = store
    position = 0
    for step in plan_epoch(lengths, weights, shape, seed=None, epoch=0):
        one_more = slice(position, position + step.num_examples + 1)
        position += step.num_examples
        if position < len(lengths):
            assert len(list(plan_epoch(lengths[one_more], weights[one_more], shape, seed=None, epoch=0))) > 1


# ------------------------------------------------------------------------------------------------ examples


def test_epochs_and_seeds_have_different_orders() -> None:
    lengths = sharegpt_like_lengths(300)
    weights = weighted(lengths)
    shape = PlanShape(8192, 2, 61_440.0)
    orders = {
        tuple(all_examples(list(plan_epoch(lengths, weights, shape, seed=seed, epoch=epoch))))
        for seed, epoch in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    }
    assert len(orders) == 5


def test_fewer_examples_than_bins_make_one_step_with_empty_bins() -> None:
    (step,) = plan_epoch(np.array([5, 7], np.int32), np.array([1.0, 2.0]), PlanShape(16, 8, 1e4), seed=0, epoch=0)
    assert sorted(map(len, step.bins)) == [0] * 6 + [1, 1]
    assert step.weight_sum == 3.0


def test_the_tail_of_an_epoch_is_a_step() -> None:
    lengths = np.full(9, 4, np.int32)
    steps = list(plan_epoch(lengths, weighted(lengths), PlanShape(8, 2, 1e4), seed=0, epoch=0))
    assert [step.num_examples for step in steps] == [4, 4, 1]


def test_an_empty_store_gives_no_steps() -> None:
    nothing = np.array([], np.int32)
    assert list(plan_epoch(nothing, weighted(nothing), PlanShape(8, 2, 1e4), seed=0, epoch=0)) == []


def test_a_position_at_the_end_gives_no_steps() -> None:
    lengths = np.full(9, 4, np.int32)
    assert list(plan_epoch(lengths, weighted(lengths), PlanShape(8, 2, 1e4), seed=0, epoch=0, start=9)) == []


def test_an_overlong_example_is_refused_with_its_position_and_the_limit() -> None:
    lengths = np.array([8, 9000, 8192], np.int32)
    with pytest.raises(ValueError, match=r"example 1 of the store has 9,000 tokens.*packing\.tokens_per_gpu 8,192"):
        next(plan_epoch(lengths, weighted(lengths), PlanShape(8192, 2, 1e4), seed=0, epoch=0))


def test_an_example_of_exactly_the_capacity_fits() -> None:
    lengths = np.array([8, 8, 8], np.int32)
    steps = list(plan_epoch(lengths, weighted(lengths), PlanShape(8, 2, 1e4), seed=0, epoch=0))
    assert [step.num_examples for step in steps] == [2, 1]


def test_long_sequences_are_spread_by_cost_not_only_by_tokens() -> None:
    # At q = 10 the long one costs 100 + 1,000 and a short one 25 + 62.5: all six short ones together cost less than the
    # long one, although they have more tokens.
    lengths = np.array([100, 25, 25, 25, 25, 25, 25], np.int32)
    (step,) = plan_epoch(lengths, weighted(lengths), PlanShape(200, 2, 10.0), seed=None, epoch=0)
    assert sorted(sorted(lengths[b].tolist()) for b in step.bins) == [[25] * 6, [100]]


def test_the_quadratic_length_is_where_attention_costs_as_much_as_the_matrices() -> None:
    # Per layer and token: 24 h^2 FLOP in matrices, 2 h L FLOP in causal attention: equal at L = 12 h.
    assert quadratic_length(5120) == 24 * 5120**2 / (2 * 5120) == 61_440


@pytest.mark.parametrize("mu", [6.3, 6.8, 7.3])  # medians of 540, 900 and 1,480 tokens
def test_steps_of_sharegpt_like_lengths_are_full_and_balanced(mu: float) -> None:
    lengths = sharegpt_like_lengths(5000, mu=mu)
    shape = PlanShape(32_768, 8, quadratic_length(5120))
    *full, tail = plan_epoch(lengths, weighted(lengths), shape, seed=0, epoch=0)
    assert len(full) > 10 and tail.num_examples > 0
    for step in full:
        # What is left open is less than one example a bin, 4,096 of 32,768 tokens at the very most, and on average
        # far less because short examples come last; the design's number for this is 0.2 points of fill.
        assert fill(step, lengths, shape) >= 0.97
        # The bin of most cost sets the step's time. Each example goes to the cheapest bin with room, so bins differ by
        # about the cost of the last, shortest ones; only where the cheapest bin is full is it more. First-fit has 1.4.
        cost = costs(step, lengths, shape)
        assert max(cost) / (sum(cost) / len(cost)) <= 1.02


FRESH_PROCESS = """
import numpy as np
from hashlib import sha256
from ochat_train.tokens.plan import PlanShape, plan_digest, plan_epoch
lengths = np.clip(np.random.default_rng(0).lognormal(6.8, 0.9, 500), 8, 4096).astype(np.int32)
shape = PlanShape(8192, 4, 61440.0)
whole = sha256()
for step in plan_epoch(lengths, lengths * 0.1, shape, seed=7, epoch=1):
    whole.update(repr(([b.tolist() for b in step.bins], step.weight_sum)).encode())
print(plan_digest(lengths, lengths * 0.1, shape, seed=7), whole.hexdigest())
"""


def test_a_fresh_process_computes_the_same_plan() -> None:
    lengths, shape = sharegpt_like_lengths(500), PlanShape(8192, 4, 61440.0)
    whole = sha256()
    for step in plan_epoch(lengths, weighted(lengths, 0.1), shape, seed=7, epoch=1):
        whole.update(repr((bins_of(step), step.weight_sum)).encode())
    expected = [plan_digest(lengths, weighted(lengths, 0.1), shape, seed=7), whole.hexdigest()]
    for hash_seed in ("0", "12345"):  # salts of hash(), as every process draws one
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        done = subprocess.run(
            [sys.executable, "-c", FRESH_PROCESS], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.split() == expected


def test_the_digest_changes_with_everything_the_plan_depends_on() -> None:
    lengths, shape = sharegpt_like_lengths(50), PlanShape(8192, 4, 61440.0)
    weights = weighted(lengths, 0.1)
    longer, heavier = lengths.copy(), weights.copy()
    longer[-1] += 1
    heavier[-1] += 1e-9
    digests = [
        plan_digest(lengths, weights, shape, seed=0),
        plan_digest(lengths, weights, shape, seed=1),
        plan_digest(longer, weights, shape, seed=0),
        plan_digest(lengths, heavier, shape, seed=0),
        plan_digest(lengths[:-1], weights[:-1], shape, seed=0),
        plan_digest(lengths, weights, replace(shape, capacity=8193), seed=0),
        plan_digest(lengths, weights, replace(shape, num_bins=5), seed=0),
        plan_digest(lengths, weights, replace(shape, quadratic_length=61441.0), seed=0),
    ]
    assert len(set(digests)) == len(digests)


# ---------------------------------------------------------------------------------- the published 13B recipe


@pytest.fixture(scope="module")
def openchat() -> Recipe:
    return load_recipe(OPENCHAT_RECIPE)


def llama_2_13b() -> Any:
    return LlamaConfig(
        vocab_size=32_000, hidden_size=5120, intermediate_size=13_824, num_hidden_layers=40, num_attention_heads=40
    )


def test_the_openchat_13b_recipe_plans_an_epoch_on_8_gpus(openchat: Recipe) -> None:
    shape = plan_shape(openchat, 8, llama_2_13b().hidden_size)
    assert shape == PlanShape(capacity=8 * 4096, num_bins=8, quadratic_length=12.0 * 5120)
    lengths = sharegpt_like_lengths(80_000)
    assert int(lengths.max()) == openchat.data.max_tokens
    weights = weighted(lengths, 0.5)
    steps = list(plan_epoch(lengths, weights, shape, seed=openchat.train.seed, epoch=0))
    assert sorted(all_examples(steps)) == list(range(80_000))
    for step in steps:
        assert len(step.bins) == 8
        assert max(int(lengths[positions].sum()) for positions in step.bins) <= 32_768
    # No more than the 2 points of bins' open ends (see above) beyond the tokens themselves, and the tail's step.
    assert len(steps) <= math.ceil(int(lengths.sum()) / (8 * 32_768) / 0.98) + 1
    # The last 20 steps again, by seeking.
    consumed = sum(step.num_examples for step in steps[:-20])
    rest = list(plan_epoch(lengths, weights, shape, seed=openchat.train.seed, epoch=0, start=consumed))
    assert as_values(rest) == as_values(steps[-20:])


def test_the_openchat_13b_recipe_means_this_deepspeed_configuration(openchat: Recipe) -> None:
    assert deepspeed_configuration(openchat) == {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 1_000_000_000,
    }


def test_the_openchat_13b_recipe_has_the_published_learning_rate(openchat: Recipe) -> None:
    manifest = Manifest(
        fingerprint="",
        made_from={},
        template="openchat_v3.2",
        conditions=["GPT4", "GPT3"],
        inference_condition="GPT4",
        added_tokens={},
        splits={"train": {"num_tokens": 100_000_000, "num_supervised_tokens": 60_000_000}},
        counts={},
        overlong={},
    )
    # 8 GPUs x 32,768 tokens x 0.6 with a loss = 157,286.4; sqrt(157,286.4 / 4e6) = 0.19829675; x 3e-4.
    # Rounded to 8 digits here.
    assert peak_learning_rate(openchat, llama_2_13b(), manifest, 8) == pytest.approx(5.9489024e-5, rel=1e-7)
    # A number in the recipe is taken as it is.
    fixed = load_recipe(OPENCHAT_RECIPE, ["optim.lr=2e-5"])
    assert peak_learning_rate(fixed, llama_2_13b(), manifest, 8) == 2e-5


def test_accumulation_counts_as_bins_and_as_tokens_of_a_step() -> None:
    recipe = load_recipe(OPENCHAT_RECIPE, ["packing.grad_accum=3"])
    assert plan_shape(recipe, 8, 5120).num_bins == 24
    assert deepspeed_configuration(recipe)["gradient_accumulation_steps"] == 3


def test_extra_deepspeed_keys_are_merged() -> None:
    extra = [
        "deepspeed.zero_optimization.overlap_comm=true",
        "deepspeed.zero_optimization.stage=2",  # said twice, but the same
        "deepspeed.wall_clock_breakdown=true",
        "deepspeed.bf16.immediate_grad_update=true",
    ]
    recipe = load_recipe(OPENCHAT_RECIPE, extra)
    config = deepspeed_configuration(recipe)
    assert config["zero_optimization"] == {"stage": 2, "overlap_comm": True}
    assert config["wall_clock_breakdown"] is True
    assert config["bf16"] == {"enabled": True, "immediate_grad_update": True}
    plain = deepspeed_configuration(load_recipe(OPENCHAT_RECIPE))
    assert {key for key in config if config[key] != plain.get(key)} == {
        "zero_optimization",
        "wall_clock_breakdown",
        "bf16",
    }


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("deepspeed.zero_optimization.stage=3", r"deepspeed\.zero_optimization\.stage: 3 contradicts 2"),
        ("deepspeed.gradient_accumulation_steps=2", r"deepspeed\.gradient_accumulation_steps: 2 contradicts 1"),
        ("deepspeed.gradient_clipping=0.5", r"deepspeed\.gradient_clipping: 0\.5 contradicts 1\.0"),
        ("deepspeed.bf16.enabled=false", r"deepspeed\.bf16\.enabled: False contradicts True"),
        ("deepspeed.bf16=false", r"deepspeed\.bf16: False contradicts"),
        ("deepspeed.train_micro_batch_size_per_gpu=4", r"deepspeed\.train_micro_batch_size_per_gpu: 4 contradicts 1"),
        ("deepspeed.data_types.grad_accum_dtype=bf16", r"deepspeed\.data_types\.grad_accum_dtype"),
        # Keys that the configuration does not have, with which DeepSpeed would overrule the recipe.
        ("deepspeed.fp16.enabled=true", r"deepspeed\.fp16: .*model and optim sections decide"),
        ("deepspeed.optimizer.type=Lamb", r"deepspeed\.optimizer: .*decide"),
        ("deepspeed.scheduler.type=WarmupLR", r"deepspeed\.scheduler: .*decide"),
        ("deepspeed.train_batch_size=64", r"deepspeed\.train_batch_size: .*decide"),
    ],
)
def test_an_extra_deepspeed_key_that_contradicts_the_recipe_is_refused(override: str, key: str) -> None:
    with pytest.raises(ValueError, match=key):
        deepspeed_configuration(load_recipe(OPENCHAT_RECIPE, [override]))
