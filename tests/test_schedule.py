"""The learning rate over a run, and OpenChat's rule for its peak."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import Gemma2Config, GemmaConfig, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config

from ochat_train.training.schedule import auto_learning_rate, learning_rate

# One rounding of f64 for each of the few operations of the formula.
EXACT = 1e-14
shares = st.floats(0, 1)


@pytest.mark.parametrize(
    ("progress", "rate"),
    [
        (0.0, 0.0),
        (0.01, 2e-5 * 0.2),
        (0.025, 2e-5 * 0.5),
        (0.05, 2e-5),  # the peak, where the warm-up ends
        (0.05 + 0.95 / 2, 2e-5 * 0.55),  # half-way down: the mean of 1 and 0.1
        (0.05 + 0.95 / 3, 2e-5 * (0.1 + 0.9 * 0.75)),  # cos 60 degrees = 1/2
        (1.0, 2e-6),
        (1.5, 2e-6),  # never up again behind the end
        (7.0, 2e-6),
    ],
)
def test_it_rises_linearly_and_falls_by_half_a_cosine(progress: float, rate: float) -> None:
    assert learning_rate(progress, peak=2e-5, warmup=0.05, min_ratio=0.1) == pytest.approx(rate, rel=EXACT, abs=0)


def test_without_warmup_it_starts_at_the_peak() -> None:
    assert learning_rate(0.0, peak=1.0, warmup=0.0, min_ratio=0.1) == 1.0
    assert learning_rate(0.5, peak=1.0, warmup=0.0, min_ratio=0.1) == pytest.approx(0.55, rel=EXACT)
    assert learning_rate(1.0, peak=1.0, warmup=0.0, min_ratio=0.1) == pytest.approx(0.1, rel=EXACT)


def test_with_nothing_but_warmup_it_rises_to_the_end() -> None:
    assert learning_rate(0.25, peak=2.0, warmup=1.0, min_ratio=0.1) == 0.5
    assert learning_rate(1.0, peak=2.0, warmup=1.0, min_ratio=0.1) == 2.0
    assert learning_rate(3.0, peak=2.0, warmup=1.0, min_ratio=0.1) == 2.0


def test_a_min_ratio_of_one_holds_the_peak() -> None:
    assert {learning_rate(p, peak=2.0, warmup=0.1, min_ratio=1.0) for p in (0.1, 0.3, 0.9, 1.0, 2.0)} == {2.0}


@given(first=shares, second=shares, warmup=shares, min_ratio=shares)
def test_it_is_monotone_before_and_behind_the_peak(
    first: float, second: float, warmup: float, min_ratio: float
) -> None:
    early, late = sorted((first, second))
    before, after = (learning_rate(p, peak=1.0, warmup=warmup, min_ratio=min_ratio) for p in (early, late))
    if late < warmup:
        assert before <= after
    elif early >= warmup:
        # A cosine of nearly equal angles may come out in the wrong order by its last bit.
        assert after <= before + 1e-15


@given(progress=st.floats(0, 10), warmup=shares, min_ratio=shares)
def test_it_stays_between_zero_and_the_peak(progress: float, warmup: float, min_ratio: float) -> None:
    rate = learning_rate(progress, peak=1.0, warmup=warmup, min_ratio=min_ratio)
    assert 0.0 <= rate <= 1.0 + 1e-15  # min + (1 - min) rounds
    if progress >= warmup:
        assert rate >= min_ratio - 1e-15


@given(progress=shares, warmup=st.floats(0.001, 0.999))
def test_a_small_step_in_progress_is_a_small_step_in_rate(progress: float, warmup: float) -> None:
    step = 1e-6
    here, there = (learning_rate(p, peak=1.0, warmup=warmup, min_ratio=0.0) for p in (progress, progress + step))
    # The steepest slopes: 1 / warmup going up, pi / 2 / (1 - warmup) going down.
    assert abs(there - here) <= step * max(1 / warmup, math.pi / 2 / (1 - warmup)) * 1.001 + 1e-15


LLAMA_2_7B = LlamaConfig(vocab_size=32_000, hidden_size=4096)
LLAMA_2_13B = LlamaConfig(vocab_size=32_000, hidden_size=5120, num_attention_heads=40)
LLAMA_3_8B = LlamaConfig(vocab_size=128_256, hidden_size=4096)
GEMMA_7B = GemmaConfig(hidden_size=3072)
MISTRAL_7B = MistralConfig(vocab_size=32_000, hidden_size=4096)


@pytest.mark.parametrize(
    ("config", "peak"),
    [
        (LLAMA_2_7B, 3e-4),
        (LLAMA_2_13B, 3e-4),
        (LLAMA_3_8B, 3e-4 / 5.3),
        (MISTRAL_7B, 5e-5),
        (GEMMA_7B, 3e-4 / 5.5),
    ],
    ids=["llama 2 7b", "llama 2 13b", "llama 3 8b", "mistral 7b", "gemma 7b"],
)
def test_auto_is_the_published_peak_of_the_family(config: PreTrainedConfig, peak: float) -> None:
    assert auto_learning_rate(config, 4e6).value == pytest.approx(peak, rel=EXACT)
    # The square root of the tokens with a loss: a quarter of them, half the rate.
    assert auto_learning_rate(config, 1e6).value == pytest.approx(peak / 2, rel=EXACT)
    assert auto_learning_rate(config, 40_000).value == pytest.approx(peak / 10, rel=EXACT)


def test_auto_says_whose_rule_it_took_and_what_for() -> None:
    assert auto_learning_rate(GEMMA_7B, 12_345).reason == (
        "auto, OpenChat's for Gemma: 3e-4 / 5.5 * sqrt(12,345 supervised tokens a step / 4,000,000)"
    )


@pytest.mark.parametrize(
    "config",
    [
        Qwen2Config(hidden_size=4096),
        GemmaConfig(hidden_size=2048),
        Gemma2Config(hidden_size=3584),
        LlamaConfig(vocab_size=49_152, hidden_size=576, num_attention_heads=9),  # SmolLM2
        LlamaConfig(vocab_size=32_000, hidden_size=2048),  # TinyLlama
    ],
    ids=["qwen2", "gemma 2b", "gemma 2", "smollm2", "tinyllama"],
)
def test_auto_is_refused_where_nothing_is_published(config: PreTrainedConfig) -> None:
    with pytest.raises(ValueError, match=rf"optim\.lr auto .*{config.model_type} of hidden size .*optim\.lr=2e-5"):
        auto_learning_rate(config, 4e6)
