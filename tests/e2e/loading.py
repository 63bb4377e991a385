"""Engines whose model one of two processes has loaded, compared bit for bit with what each loads for itself.

python -m tests.e2e.loading KIND ...      one after the other; a JSON line of each rank for each KIND

KIND: JSON with base or config, stage, dtype, num_ids and lora.
"""

import sys
from typing import Any

import deepspeed
import orjson
import torch
from torch import Tensor, nn

from ochat_train.model.lora import add_adapters
from ochat_train.model.packed_lm import PackedCausalLM
from ochat_train.model.pretrained import load_model
from ochat_train.recipe import OptimSection
from ochat_train.training.engine import deepspeed_config, join_process_group, make_engine, make_optimizer, read_world
from ochat_train.training.loading import load_once


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers; of a split engine those of all ranks."""
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        return {name: tensor.detach().clone() for name, tensor in named}


def differences(found: nn.Module, expected: nn.Module) -> list[str]:
    """The names of what differs in a bit, a dtype or its shape, of what is there once only, and of other ties."""
    ours, theirs = tensors(found), tensors(expected)
    wrong = [name for name in ours.keys() & theirs.keys() if not is_same(ours[name], theirs[name])]
    ties = [
        {name for name, p in model.named_parameters(remove_duplicate=False)} - set(dict(model.named_parameters()))
        for model in (found, expected)
    ]
    return sorted({*wrong, *(ours.keys() ^ theirs.keys()), *(ties[0] ^ ties[1])})


def is_same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit for bit."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(tensor.contiguous().flatten().view(torch.uint8) for tensor in (a, b)))


def check(base: Any, config: Any, stage: int, dtype: str, num_ids: int, lora: bool) -> dict[str, Any]:
    """What differs after loading and in the engine, and how often this rank has loaded."""
    world = read_world()
    num_loads = 0

    def load() -> Any:
        nonlocal num_loads
        num_loads += 1
        return load_model(base, config, dtype=dtype, num_ids=num_ids, added_ids=[3], seed=5)

    lm = load_once(load, world)
    found = {"rank": world.rank, "loads": num_loads}
    naive = load_model(base, config, dtype=dtype, num_ids=num_ids, added_ids=[3], seed=5)
    found["loaded"] = differences(lm, naive)
    for each in (lm, naive) if lora else ():
        add_adapters(each, rank=4, alpha=8, targets="all-linear", row_ids=(3, num_ids - 1), seed=0)
    model = PackedCausalLM(lm, attention="auto", device_type="cpu", checkpointing="none", num_conditions=1)
    optimizer = make_optimizer(model, OptimSection(), lr=1e-3)
    options = deepspeed_config(stage=stage, offload="none", dtype=dtype, grad_accum=1, grad_clip=1.0, extra={})
    engine = make_engine(model, optimizer, options)
    found["engine"] = differences(engine.module.lm, naive)
    with torch.no_grad():  # what one rank writes is its own
        for parameter in lm.parameters():
            parameter.add_(world.rank)
    engine.destroy()
    return found


def main() -> None:
    """Print what each kind gives."""
    join_process_group(read_world())
    for word in sys.argv[1:]:
        print("FOUND " + orjson.dumps(check(**orjson.loads(word))).decode(), flush=True)


if __name__ == "__main__":
    main()
