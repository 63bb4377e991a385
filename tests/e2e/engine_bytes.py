"""The bytes of a small model's DeepSpeed engine: what its tensors take, found by looking at all that are alive.

python -m tests.e2e.engine_bytes STAGE DTYPE ...      one engine after the other; a JSON line of the first rank
"""

import gc
import sys
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from ochat_train.model.packed_lm import PackedCausalLM
from ochat_train.model.pretrained import DTYPES
from ochat_train.tokens.batch import collate
from ochat_train.tokens.encode import Example
from ochat_train.training.engine import (
    deepspeed_config,
    join_process_group,
    make_engine,
    make_optimizer,
    read_world,
)

NUM_TOKENS = 16  # so few that activations do not count beside the weights


def small_config() -> Any:
    """Of 1,114,560 weights, in matrices of above 100,000 each, so that stage 3 splits all of them between uses."""
    return AutoConfig.for_model(
        "llama",
        vocab_size=500,
        hidden_size=320,
        intermediate_size=400,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
    )


def engine_bytes(stage: int, dtype: str, save_to: Path | None = None) -> dict[str, int]:
    """Bytes of this process: weights, fp32 master, optimizer states; and all tensors behind the backward pass."""
    gc.collect()
    before = _live_bytes()
    lm = AutoModelForCausalLM.from_config(small_config(), dtype=DTYPES[dtype])
    model = PackedCausalLM(lm, attention="auto", device_type="cpu", checkpointing=True, num_conditions=1)
    optimizer = make_optimizer(model, algorithm="adamw", lr=1e-3, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1)
    extra = {"zero_optimization": {"reduce_bucket_size": 1000}}
    config = deepspeed_config(stage=stage, offload="none", dtype=dtype, grad_accum=1, grad_clip=1.0, extra=extra)
    engine = make_engine(model, optimizer, config)
    ids = np.arange(NUM_TOKENS, dtype=np.int32)
    batch = collate([Example(ids, np.ones(NUM_TOKENS, np.float32))], [0])
    behind_backward = 0
    for _ in range(2):  # the optimizer's states are made in the first step
        loss = engine(batch).nll
        engine.backward(loss, scale_wrt_gas=False)
        del loss
        behind_backward = _live_bytes() - before
        engine.step()
    basic = engine.basic_optimizer
    states = [value for state in basic.state.values() for value in state.values() if isinstance(value, Tensor)]
    # Stage 3 takes them out of the groups between steps.
    split = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)
    masters = split or [parameter for group in basic.param_groups for parameter in group["params"]]
    weights = [getattr(parameter, "ds_tensor", parameter) for parameter in engine.module.parameters()]
    if save_to is not None:
        engine.save_checkpoint(str(save_to), tag="deepspeed")
    found = {
        "weights": sum(weight.numel() * weight.element_size() for weight in weights),
        "master": sum(p.numel() * p.element_size() for p in masters) if stage else 0,
        "optimizer": sum(state.numel() * state.element_size() for state in states if state.numel() > 1),
        "behind_backward": behind_backward,
    }
    engine.destroy()
    return found


def _live_bytes() -> int:
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, torch.nn.Parameter) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def main() -> None:
    """Print the bytes of each engine that the command line names."""
    world = read_world()
    join_process_group(world)
    words = iter(sys.argv[1:])
    for stage, dtype in zip(words, words, strict=True):
        found = engine_bytes(int(stage), dtype)
        if world.is_main:
            print("BYTES " + orjson.dumps(found).decode(), flush=True)


if __name__ == "__main__":
    main()
