"""A model small enough to be served in a test, exported as training exports."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PretrainedConfig

from ochat_train.conversations.described import describe_template
from ochat_train.conversations.schema import Conversation
from ochat_train.export import Configs, write_model
from ochat_train.tokens.encode import Encoded
from ochat_train.tokens.rendered import encode_all
from ochat_train.tokens.tokenizer import ChatTokenizer

NUM_POSITIONS = 512


def write_chat_model(
    folder: Path,
    tokenizer: ChatTokenizer,
    kind: Callable[..., PretrainedConfig] = LlamaConfig,
    num_positions: int = NUM_POSITIONS,
    *,
    can_end: bool = True,
    says: Sequence[Conversation] = (),
    base_chat_template: str | None = None,
    data: dict[str, str] | None = None,
) -> Path:
    """A model with random weights, tiny-chat, as if it was trained under Careful and Hasty.

    can_end: whether it may say the end token, so that an answer ends before its limit. says: what it is trained to say.
    base_chat_template, data: as an export has them.
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
    model = AutoModelForCausalLM.from_config(config)
    if says:
        _train(model, [encoded for outcome in encode_all(says, tokenizer.template, tokenizer) for encoded in outcome])
    write_model(
        folder,
        dict(model.state_dict()),
        configs=Configs(config, GenerationConfig(suppress_tokens=None if can_end else [tokenizer.end_id])),
        tokenizer=tokenizer,
        dtype=torch.float32,
        metadata={
            "template": describe_template(tokenizer.template),
            "inference_condition": "Careful",
            "conditions": ["Careful", "Hasty"],
            "base_chat_template": base_chat_template,
            "run": {"recipe": {"name": "tiny-chat", "data": data or {}}},
        },
    )
    return folder


def _train(model: Any, conversations: Sequence[Encoded]) -> None:
    """Until each answer is what the model finds most likely, by far."""
    optimizer, loss = torch.optim.Adam(model.parameters(), lr=3e-3), 1.0
    while loss > 0.02:
        loss = 0.0
        for encoded in conversations:
            ids = torch.from_numpy(encoded.example.input_ids).long()[None]
            weights = torch.from_numpy(encoded.example.loss_weights)[1:]
            logprobs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            mean = -(logprobs * weights).sum() / weights.sum()
            mean.backward()
            loss = max(loss, float(mean.detach()))
        optimizer.step()
        optimizer.zero_grad()
