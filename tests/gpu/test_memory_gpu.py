"""The planner of memory against what torch's allocator has at most on a GPU, in engines of one process."""

import gc
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ochat_train.model.activations import count_activations
from ochat_train.model.lora import add_adapters
from ochat_train.model.memory import ZeroSetting, measure_size, memory_needs
from ochat_train.model.packed_lm import PackedCausalLM
from ochat_train.recipe import OptimSection
from ochat_train.tokens.batch import PackedBatch, collate
from ochat_train.tokens.encode import Example
from ochat_train.training.engine import deepspeed_config, join_process_group, make_engine, make_optimizer, read_world

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
VOCABULARY, LAYERS, LENGTH = 32_000, 8, 4096
DEVICE = torch.device("cuda")


@pytest.fixture(scope="module", autouse=True)
def process_group() -> None:
    join_process_group(read_world())


def config() -> Any:
    """About 530 million weights, in layers of Llama's shape."""
    return AutoConfig.for_model(
        "llama",
        vocab_size=VOCABULARY,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=LENGTH,
    )


def full_batch(num_tokens: int) -> PackedBatch:
    ids = np.random.default_rng(0).integers(0, VOCABULARY, LENGTH).astype(np.int32)
    example = Example(ids, np.ones(LENGTH, np.float32))
    num_sequences = num_tokens // LENGTH
    return collate([example] * num_sequences, [0] * num_sequences)


def make_lm(lora_rank: int | None) -> Any:
    lm = AutoModelForCausalLM.from_config(config(), dtype=torch.bfloat16)
    if lora_rank is not None:
        add_adapters(lm, rank=lora_rank, alpha=lora_rank, targets="all-linear", row_ids=(), seed=0)
    return lm


@pytest.mark.parametrize("lora_rank", [None, 16], ids=["all weights", "adapters"])
@pytest.mark.parametrize("policy", ["none", "every_2", "full"])
@pytest.mark.parametrize("num_tokens", [8192, 16_384])
def test_the_activations_on_a_gpu_are_those_counted(policy: str, num_tokens: int, lora_rank: int | None) -> None:
    lm = make_lm(lora_rank).to(DEVICE)
    model = PackedCausalLM(lm, attention="auto", device_type="cuda", checkpointing=policy, num_conditions=1).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    batch = full_batch(num_tokens).to(DEVICE)
    for _ in range(2):  # the first makes the workspaces of libraries
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(batch).nll.backward()
        measured = torch.cuda.max_memory_allocated() - before
    counted = count_activations(
        config(), num_tokens=num_tokens, dtype="bfloat16", checkpointing=policy, lora_rank=lora_rank
    )
    assert measured == pytest.approx(counted.peak, rel=0.05)


@pytest.mark.parametrize(
    ("stage", "algorithm", "policy", "grad_accum", "lora_rank"),
    [
        (2, "adamw", "none", 1, None),
        (2, "adamw", "full", 2, None),
        (2, "adamw_8bit", "every_2", 1, None),
        (1, "adamw", "every_2", 1, None),
        (3, "adamw", "full", 1, None),
        (2, "adamw", "none", 1, 16),
    ],
)
def test_the_peak_of_a_step_is_the_planned_one(
    stage: int, algorithm: Any, policy: str, grad_accum: int, lora_rank: int | None
) -> None:
    num_tokens = 8192
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    lm = make_lm(lora_rank)
    model = PackedCausalLM(lm, attention="auto", device_type="cuda", checkpointing=policy, num_conditions=1)
    optimizer = make_optimizer(model, OptimSection(algorithm=algorithm), lr=1e-5)
    bucket = 50_000_000
    extra = {"zero_optimization": {"reduce_bucket_size": bucket}}
    options: dict[str, Any] = {"offload": "none", "dtype": "bfloat16", "grad_clip": 1.0}
    engine = make_engine(model, optimizer, deepspeed_config(stage=stage, grad_accum=grad_accum, extra=extra, **options))
    batch = full_batch(num_tokens).to(DEVICE)
    for _ in range(2):  # the optimizer's states are made in the first step
        torch.cuda.reset_peak_memory_stats()
        for _ in range(grad_accum):
            engine.backward(engine(batch).nll, scale_wrt_gas=False)
            engine.step()
    measured = torch.cuda.max_memory_allocated() - before
    engine.destroy()
    size = measure_size(config(), lora_rank=lora_rank, lora_targets="all-linear")
    activations = count_activations(
        config(), num_tokens=num_tokens, dtype="bfloat16", checkpointing=policy, lora_rank=lora_rank
    )
    setting = ZeroSetting(stage, False, 1, "bfloat16", algorithm, bucket=bucket, grad_accum=grad_accum)
    needs = memory_needs(size, activations, setting, on_gpu=True)
    assert measured == pytest.approx(needs.total, rel=0.05)
