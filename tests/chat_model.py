"""A model small enough to be served in a test, exported as training exports."""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PretrainedConfig

from ochat_train.conversations.described import describe_template
from ochat_train.export import Configs, write_model
from ochat_train.tokens.tokenizer import ChatTokenizer

NUM_POSITIONS = 512


def write_chat_model(
    folder: Path,
    tokenizer: ChatTokenizer,
    kind: Callable[..., PretrainedConfig] = LlamaConfig,
    num_positions: int = NUM_POSITIONS,
    *,
    can_end: bool = True,
) -> Path:
    """A model with random weights, tiny-chat, as if it was trained under Careful and Hasty.

    can_end: whether it may say the end token, so that an answer ends before its limit.
    """
    torch.manual_seed(0)
    config = kind(
        vocab_size=tokenizer.num_ids,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=num_positions,
        initializer_range=0.2,  # so that no two tokens are about as likely
    )
    folder.mkdir(parents=True)
    write_model(
        folder,
        dict(AutoModelForCausalLM.from_config(config).state_dict()),
        configs=Configs(config, GenerationConfig(suppress_tokens=None if can_end else [tokenizer.end_id])),
        tokenizer=tokenizer,
        dtype=torch.float32,
        metadata={
            "template": describe_template(tokenizer.template),
            "inference_condition": "Careful",
            "conditions": ["Careful", "Hasty"],
            "run": {"recipe": {"name": "tiny-chat"}},
        },
    )
    return folder
