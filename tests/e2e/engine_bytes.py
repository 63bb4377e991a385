"""The bytes of a small model's DeepSpeed engine: what its tensors take, found by looking at all that are alive.

python -m tests.e2e.engine_bytes KIND ...      one engine after the other; a JSON line of the first rank for each

KIND: JSON, the arguments of `engine_bytes`, with the key `policy` of `engine_peak`, with `overlap_comm` of
`engine_sent`.
"""

import gc
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from ochat_train.model.activations import LiveBytes, register_sized_attention
from ochat_train.model.lora import add_adapters
from ochat_train.model.packed_lm import PackedCausalLM
from ochat_train.model.pretrained import DTYPES
from ochat_train.recipe import OptimSection
from ochat_train.tokens.batch import collate
from ochat_train.tokens.encode import Example
from ochat_train.training.engine import (
    deepspeed_config,
    join_process_group,
    make_engine,
    make_optimizer,
    read_world,
)
from ochat_train.training.sequence_parallel import join_group

NUM_TOKENS = 16  # so few that activations do not count beside the weights


def small_config(num_layers: int = 1) -> Any:
    """In matrices of above 100,000 weights each, so that stage 3 splits all of them between uses."""
    return AutoConfig.for_model(
        "llama",
        vocab_size=500,
        hidden_size=320,
        intermediate_size=400,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=4096,
    )


def engine_bytes(stage: int, dtype: str, save_to: Path | None = None, algorithm: Any = "adamw") -> dict[str, int]:
    """Bytes of this process: weights, fp32 master, optimizer states; and all tensors behind the backward pass."""
    gc.collect()
    before = _live_bytes()
    lm = AutoModelForCausalLM.from_config(small_config(), dtype=DTYPES[dtype])
    model = PackedCausalLM(lm, attention="auto", device_type="cpu", checkpointing="full", num_conditions=1)
    engine = _make_engine(model, stage, dtype, algorithm, grad_accum=1)
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


def engine_peak(
    stage: int,
    dtype: str,
    policy: str,
    algorithm: Any = "adamw",
    grad_accum: int = 1,
    num_layers: int = 2,
    num_tokens: int = 128,
    lora_rank: int | None = None,
    bucket: int = 1000,
) -> dict[str, int]:
    """The bytes at most in the second step of an engine, whose attention keeps what flash attention does."""
    not_its = list(_live_tensors())  # held, so that no storage of the engine's takes the place of one of these
    others = {tensor.untyped_storage()._cdata for tensor in not_its}
    lm = AutoModelForCausalLM.from_config(small_config(num_layers), dtype=DTYPES[dtype])
    if lora_rank is not None:
        add_adapters(lm, rank=lora_rank, alpha=lora_rank, targets="all-linear", row_ids=(), seed=0)
    model = PackedCausalLM(lm, attention="auto", device_type="cpu", checkpointing=policy, num_conditions=1)
    model.lm.set_attn_implementation(register_sized_attention())
    engine = _make_engine(model, stage, dtype, algorithm, grad_accum, bucket)
    ids = np.arange(num_tokens, dtype=np.int32) % 500
    batch = collate([Example(ids, np.ones(num_tokens, np.float32))], [0])
    peaks = {}
    for _ in range(2):  # the optimizer's states are made in the first step
        with LiveBytes() as live:
            for tensor in _live_tensors():
                live.add(tensor, 0 if tensor.untyped_storage()._cdata in others else None)
            for _ in range(grad_accum):
                engine.backward(engine(batch).nll, scale_wrt_gas=False)
                if engine.is_gradient_accumulation_boundary():
                    peaks["backward"] = live.restart()
                engine.step()
            peaks["step"] = live.peak
    engine.destroy()
    return peaks


def engine_sent(
    stage: int,
    dtype: str,
    grad_accum: int,
    overlap_comm: bool | None,
    lora_rank: int | None = None,
    num_shares: int = 1,
    policy: str = "none",
) -> dict[str, int]:
    """What an engine does in its fourth step: bytes that collectives get, by kind; how often it waits for the device.

    Bytes are those of the whole tensor, before it is scattered or after it is gathered. In stage 3 weights are given
    back after every use, as those of models above 1e9 weights are. With num_shares 2 both processes share the batch.
    """
    lm = AutoModelForCausalLM.from_config(small_config(), dtype=DTYPES[dtype])
    if lora_rank is not None:
        add_adapters(lm, rank=lora_rank, alpha=lora_rank, targets="all-linear", row_ids=(), seed=0)
    world = replace(read_world(), sequence_parallel=num_shares)
    model = PackedCausalLM(
        lm,
        attention="auto",
        device_type="cpu",
        checkpointing=policy,
        num_conditions=1,
        exchange=join_group(world),
    )
    released = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0} if stage == 3 else {}
    overlap = {} if overlap_comm is None else {"overlap_comm": overlap_comm}
    engine = _make_engine(model, stage, dtype, "adamw", grad_accum, bucket=200_000, **released, **overlap)
    ids = np.arange(NUM_TOKENS, dtype=np.int32)
    batch = collate([Example(ids, np.ones(NUM_TOKENS, np.float32))], [0]).share(world.rank % num_shares, num_shares)
    for _ in range(4):  # DeepSpeed's timers begin in the third
        SENT.clear()
        for _ in range(grad_accum):
            engine.backward(engine(batch).nll, scale_wrt_gas=False)
            engine.step()
    engine.destroy()
    return dict(SENT)


SENT: Counter[str] = Counter()
# Where each of torch's collectives has its whole tensor: the number of its argument, or of a list of tensors.
_WHOLE = {
    "all_reduce": 0,
    "reduce": 0,
    "broadcast": 0,
    "all_gather": 0,
    "all_gather_into_tensor": 0,
    "reduce_scatter_tensor": 1,
    "all_to_all_single": 1,
}


def count_what_is_sent() -> None:
    """Count it in SENT from now on; before the process group is made, since DeepSpeed takes the functions then."""

    def counting(name: str, function: Any, place: int) -> Any:
        def count(*arguments: Any, **options: Any) -> Any:
            whole = arguments[place] if len(arguments) > place else next(iter(options.values()))
            tensors = whole if isinstance(whole, list) else [whole]
            SENT[name] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            return function(*arguments, **options)

        return count

    for name, place in _WHOLE.items():
        setattr(dist, name, counting(name, getattr(dist, name), place))
    accelerator: Any = get_accelerator()
    synchronize = accelerator.synchronize

    def wait(*arguments: Any) -> None:
        SENT["waits"] += 1
        synchronize(*arguments)

    accelerator.synchronize = wait


def _make_engine(
    model: PackedCausalLM, stage: int, dtype: str, algorithm: Any, grad_accum: int, bucket: int = 1000, **zero: Any
) -> Any:
    optimizer = make_optimizer(model, OptimSection(algorithm=algorithm), lr=1e-3)
    extra = {"zero_optimization": {"reduce_bucket_size": bucket, **zero}}
    config = deepspeed_config(
        stage=stage, offload="none", dtype=dtype, grad_accum=grad_accum, grad_clip=1.0, extra=extra
    )
    return make_engine(model, optimizer, config)


def _live_tensors() -> Iterator[Tensor]:
    gc.collect()
    for thing in gc.get_objects():
        if type(thing) in (Tensor, torch.nn.Parameter) and thing.device.type == "cpu":
            yield thing


def _live_bytes() -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in _live_tensors()}
    return sum(storages.values())


def main() -> None:
    """Print the bytes of each engine that the command line names."""
    count_what_is_sent()
    world = read_world()
    join_process_group(world)
    for word in sys.argv[1:]:
        kind = orjson.loads(word)
        measure = engine_sent if "overlap_comm" in kind else engine_peak if "policy" in kind else engine_bytes
        found = measure(**kind)
        if world.is_main:
            print("BYTES " + orjson.dumps(found).decode(), flush=True)


if __name__ == "__main__":
    main()
