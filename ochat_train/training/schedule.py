"""The learning rate: its peak, and its value as a function of the fraction of examples consumed."""

import math
from typing import Any

_PUBLISHED_BASE_LR = 3e-4
_PUBLISHED_TOKENS = 4e6


def auto_learning_rate(config: Any, supervised_tokens_per_step: float) -> float:
    """OpenChat's published peak: 3e-4 * sqrt(supervised tokens a step / 4e6) / a factor of the kind of model.

    config: the model's transformers configuration. The factor is 1 for Llama 1 and 2, 6 for Mistral, 5.3 for Llama 3.
    Raises ValueError for a model without a published factor. Source: the imoneoi/openchat repository, 2024-05.
    """
    if config.model_type == "mistral":
        divisor = 6.0
    elif config.model_type == "llama" and config.hidden_size >= 4096:
        divisor = 5.3 if config.vocab_size >= 128_000 else 1.0
    else:
        raise ValueError(
            "optim.lr auto is published for Llama 2 and 3 (7B and up) and Mistral, not for this "
            f"{config.model_type} of hidden size {config.hidden_size}; give a number, such as optim.lr=2e-5"
        )
    return _PUBLISHED_BASE_LR / divisor * math.sqrt(supervised_tokens_per_step / _PUBLISHED_TOKENS)


def learning_rate(progress: float, *, peak: float, warmup: float, min_ratio: float) -> float:
    """The learning rate of the step that ends at `progress`, the share of all epochs' examples consumed, in (0, 1].

    Rises linearly to `peak` at `warmup`, then falls by half a cosine to `peak * min_ratio` at 1, and stays there.
    """
    progress = min(progress, 1.0)
    if progress < warmup:
        return peak * progress / warmup
    fall = (progress - warmup) / (1.0 - warmup) if warmup < 1.0 else 0.0
    return peak * (min_ratio + (1.0 - min_ratio) * 0.5 * (1.0 + math.cos(math.pi * fall)))
