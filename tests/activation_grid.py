"""Real passes of small models on the CPU, and the bytes of all tensors that they have."""

from typing import Any, Literal, NamedTuple

import numpy as np
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ochat_train.model.activations import Activations, count_activations, live_bytes, register_sized_attention
from ochat_train.model.checkpointing import Tiled, tile_mlps
from ochat_train.model.lora import add_adapters
from ochat_train.model.packed_lm import PackedCausalLM
from ochat_train.model.pretrained import DTYPES
from ochat_train.tokens.batch import PackedBatch, collate
from ochat_train.tokens.encode import Example

Dtype = Literal["bfloat16", "float32"]
NUM_TOKENS, WIDTH, MLP, KEYS, HEADS, LAYERS = 1200, 128, 352, 64, 4, 5
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, one head of keys": ("llama", {"num_key_value_heads": 1}),
    "llama, large vocabulary": ("llama", {"vocab_size": 20_000}),
    "mistral": ("mistral", {"sliding_window": 100}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "gemma2": ("gemma2", {"head_dim": 32, "sliding_window": 100}),
    "phi3": ("phi3", {"pad_token_id": 0}),
}
POLICIES = ("none", "every_4", "every_3", "every_2", "full")


def small(kind: str, **changes: Any) -> Any:
    """The configuration of a kind."""
    model_type, own = KINDS[kind]
    sizes = {
        "vocab_size": 512,
        "hidden_size": WIDTH,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
    }
    return AutoConfig.for_model(model_type, **{**sizes, **own, **changes})


def real_model(
    config: Any, dtype: Dtype, policy: str, lora_rank: int | None = None, num_rows: int = 0, mlp_tiles: int = 1
) -> PackedCausalLM:
    """The model on the CPU, with the `sdpa` backend."""
    lm: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
    if lora_rank is not None:
        add_adapters(lm, rank=lora_rank, alpha=lora_rank, targets="all-linear", row_ids=range(num_rows), seed=0)
    tile_mlps(lm, mlp_tiles)
    return PackedCausalLM(
        lm,
        attention="auto",
        device_type="cpu",
        checkpointing=policy,
        num_conditions=1,
        router_coefficient=float(lora_rank is None),
    ).train()


def full_batch(num_tokens: int, num_sequences: int = 2) -> PackedBatch:
    """A batch of `num_tokens` tokens, all but the sequences' first with a loss."""
    length = num_tokens // num_sequences
    example = Example(np.arange(length, dtype=np.int32) % 512, np.ones(length, np.float32))
    return collate([example] * num_sequences, [0] * num_sequences)


class Compared(NamedTuple):
    """Bytes of activations at most: counted on the meta device, and measured in a real pass."""

    counted: int
    measured: int

    @property
    def error(self) -> float:
        """Relative; positive: more was counted."""
        return self.counted / self.measured - 1


def compare(
    config: Any,
    dtype: Dtype,
    policy: str,
    *,
    num_tokens: int = NUM_TOKENS,
    lora_rank: int | None = None,
    num_rows: int = 0,
    mlp_tiles: int = 1,
) -> Compared:
    """The activations of a pass with attention of flash attention's sizes."""
    counted = count_activations(
        config,
        num_tokens=num_tokens,
        dtype=dtype,
        checkpointing=Tiled(policy, mlp_tiles),
        lora_rank=lora_rank,
        num_rows=num_rows,
    )
    model = real_model(config, dtype, policy, lora_rank, num_rows, mlp_tiles)
    model.lm.set_attn_implementation(register_sized_attention())
    return Compared(counted.peak, measure(model, full_batch(num_tokens)).peak)


def measure(model: PackedCausalLM, batch: PackedBatch) -> Activations:
    """What a real pass has, by its parts that can be told apart: `kept`, and the most, as if all were a layer's."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    with live_bytes([*model.parameters(), *model.buffers()]) as live:
        hidden, router = model.run_layers(batch)
        kept = live.now
        sums = model.loss_head(hidden, batch.labels, batch.loss_weights, batch.condition_ids, batch.loss_positions)
        del hidden
        (sums.nll if router is None else sums.nll + router.loss).backward()
    return Activations(kept=kept, layer=live.peak - kept, logits=0)
