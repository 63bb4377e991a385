"""A model without memory: made of its configuration on the meta device, where tensors have sizes alone."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel


def meta_model(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a transformers configuration, without memory. Raises ValueError when none can be made of it."""
    config = config.get_text_config()
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:  # of many kinds: whatever a model's code says about values that it does not expect
        raise ValueError(f"no {config.model_type} can be made of this model's configuration: {error!r}") from error
    return model
