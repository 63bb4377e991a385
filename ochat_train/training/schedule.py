"""The learning rate: its peak, and its value as a function of the fraction of examples consumed."""

import math
from typing import Any, NamedTuple

_PUBLISHED_BASE_LR = 3e-4
_PUBLISHED_TOKENS = 4e6


class PeakRate(NamedTuple):
    """The peak learning rate, and the reason for the log."""

    value: float
    reason: str


def auto_learning_rate(config: Any, supervised_tokens_per_step: float) -> PeakRate:
    """OpenChat's published peak: 3e-4 / a divisor of the kind of model * sqrt(supervised tokens a step / 4e6).

    config: the model's transformers configuration. The divisor is 1 for Llama 1 and 2, 6 for Mistral, 5.3 for Llama 3,
    5.5 for Gemma. Raises ValueError for a model without a published one. Source: the imoneoi/openchat repository,
    2024-05, which takes the name of the template for the kind of model.
    """
    if config.model_type == "mistral":
        kind, divisor = "Mistral", 6.0
    elif config.model_type == "llama" and config.hidden_size >= 4096:
        kind, divisor = ("Llama 3", 5.3) if config.vocab_size >= 128_000 else ("Llama 1 and 2", 1.0)
    elif config.model_type == "gemma" and config.hidden_size >= 3072:
        kind, divisor = "Gemma", 5.5
    else:
        raise ValueError(
            "optim.lr auto is published for Llama 2 and 3, Mistral and the first Gemma (7B and up), not for this "
            f"{config.model_type} of hidden size {config.hidden_size}; give a number, such as optim.lr=2e-5"
        )
    return PeakRate(
        _PUBLISHED_BASE_LR / divisor * math.sqrt(supervised_tokens_per_step / _PUBLISHED_TOKENS),
        f"auto, OpenChat's for {kind}: 3e-4 / {divisor:g} * sqrt({supervised_tokens_per_step:,.0f} supervised tokens a "
        f"step / {_PUBLISHED_TOKENS:,.0f})",
    )


def learning_rate(progress: float, *, peak: float, warmup: float, min_ratio: float) -> float:
    """The learning rate of the step that ends at `progress`, the share of all epochs' examples consumed, in (0, 1].

    Rises linearly to `peak` at `warmup`, then falls by half a cosine to `peak * min_ratio` at 1, and stays there.
    """
    progress = min(progress, 1.0)
    if progress < warmup:
        return peak * progress / warmup
    fall = (progress - warmup) / (1.0 - warmup) if warmup < 1.0 else 0.0
    return peak * (min_ratio + (1.0 - min_ratio) * 0.5 * (1.0 + math.cos(math.pi * fall)))
