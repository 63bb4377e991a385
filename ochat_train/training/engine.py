"""The process group and the DeepSpeed engine, from plain arguments."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from ochat_train.files import free_port
from ochat_train.tokens.batch import PackedBatch
from ochat_train.training.adam8bit import make_adam8bit

T = TypeVar("T")
# What a launcher tells each process, and what holds without a launcher.
_WORLD_VARIABLES = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))


@dataclass(frozen=True, slots=True)
class World:
    """This process among all processes of the run, and among the local ones of its node."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that writes and prints."""
        return self.rank == 0


def read_world() -> World:
    """The world as the launcher's environment describes it; one process when there was no launcher."""
    rank, size, local_rank = (int(os.environ.get(name, default)) for name, default in _WORLD_VARIABLES)
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)  # torchrun's, DeepSpeed's
    accelerator = get_accelerator()
    device = accelerator.device_name() if accelerator.device_name() == "cpu" else accelerator.device_name(local_rank)
    return World(rank, size, local_rank, torch.device(device), local_size)


def join_process_group(world: World) -> None:
    """Connect to the other ranks: gloo on CPU, the accelerator's own library else."""
    if "MASTER_ADDR" not in os.environ:  # started without a launcher: a group of one
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        os.environ |= {name: os.environ.get(name, default) for name, default in _WORLD_VARIABLES}
    if world.device.type == "cpu":
        # DeepSpeed would compile a shared-memory all-reduce at this point; plain gloo needs no compiler on the machine.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("gloo", verbose=False)
    else:
        get_accelerator().set_device(world.local_rank)
        deepspeed.init_distributed(verbose=False)


# Keys of DeepSpeed that would put another precision, optimizer, schedule or scale in place of the recipe's.
_DECIDED_ELSEWHERE = {
    "amp",
    "fp16",
    "torch_autocast",
    "optimizer",
    "scheduler",
    "prescale_gradients",
    "train_batch_size",
}


def deepspeed_config(
    *,
    stage: int,
    offload: str,
    dtype: str,
    grad_accum: int,
    grad_clip: float | None,
    extra: dict[str, Any],
    is_shared: bool = True,
    loads_universal: bool = False,
) -> dict[str, Any]:
    """DeepSpeed's configuration as a dict; `extra` keys are merged in.

    is_shared: checkpoints lie where all nodes see them. loads_universal: the run begins with converted states.

    Raises ValueError when an extra key would change one that the recipe's other sections decide.
    """
    if taken := sorted(_DECIDED_ELSEWHERE & extra.keys()):
        raise ValueError(f"deepspeed.{taken[0]}: the recipe's model and optim sections decide this; change those")
    zero: dict[str, Any] = {"stage": stage}
    if offload == "optimizer":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # one packed row
        "gradient_accumulation_steps": grad_accum,
        "gradient_clipping": grad_clip or 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # its own CPU Adam needs a compiler on the machine
        "bf16": {"enabled": dtype == "bfloat16"},
        "steps_per_print": 10**9,
        "checkpoint": {"use_node_local_storage": not is_shared, "load_universal": loads_universal},
    }
    if dtype == "bfloat16":
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    _merge(config, extra, "deepspeed")
    return config


def _merge(config: dict[str, Any], extra: dict[str, Any], path: str) -> None:
    for key, value in extra.items():
        if isinstance(config.get(key), dict) and isinstance(value, dict):
            _merge(config[key], value, f"{path}.{key}")
        elif key in config and config[key] != value:
            raise ValueError(
                f"{path}.{key}: {value!r} contradicts {config[key]!r}, which the recipe's other sections decide; "
                "change those"
            )
        else:
            config[key] = value


def make_optimizer(
    model: nn.Module, *, algorithm: str, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW, also with states of 8 bits, or SGD over the parameters; matrices decay, vectors (norms, biases) do not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    if algorithm == "sgd":
        return torch.optim.SGD(groups, lr=lr)
    if algorithm == "adamw_8bit":
        return make_adam8bit(groups, lr=lr, betas=betas, eps=eps)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps)


def make_engine(model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> DeepSpeedEngine:
    """The DeepSpeed engine around the model."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    # DeepSpeed casts buffers with the weights; RoPE's frequencies in bf16 would be off by positions at long contexts.
    for name, buffer in engine.module.named_buffers():
        buffer.data = buffers[name].to(buffer.device)
    engine.train()  # transformers hands out pretrained models in eval mode, where they skip checkpointing
    return engine


class OutOfMemory(MemoryError):
    """A micro-batch that did not fit, with what to change."""


def train_step(
    engine: DeepSpeedEngine,
    batches: Sequence[PackedBatch],
    *,
    weight_sum: float,
    world_size: int,
    lr: float,
    mark: Callable[[str], None],
) -> tuple[Tensor, Tensor | float]:
    """One optimizer step over this rank's micro-batches; returns their sums f32[M, 2, 3, K] and the gradient's norm.

    weight_sum is the whole step's, over all ranks and micro-batches. DeepSpeed averages gradients over ranks, so each
    micro-batch contributes nll_sum * world_size / weight_sum, and the update is that of
    sum(w * nll) / sum(w) over the step. The sums are those of LossSums.by_condition, of each of M micro-batches of this
    rank. Where the norm is not finite, nothing was updated. Neither is read from the device here, so that the host does
    not wait for it; DeepSpeed's step does, where it looks at the norm. mark is called with what begins. Raises
    OutOfMemory.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    scale = world_size / weight_sum if weight_sum else 0.0
    totals: list[Tensor] = []
    is_plain = engine.optimizer is engine.basic_optimizer  # fp32 replicas: DeepSpeed clips, but keeps no norm
    norm = None
    for number, batch in enumerate(batches, start=1):
        try:
            mark(f"micro-batch {number} of {len(batches)}, forward")
            sums = engine(batch.to(engine.device))
            mark(f"micro-batch {number} of {len(batches)}, backward")
            engine.backward(sums.nll * scale, scale_wrt_gas=False)
            if engine.is_gradient_accumulation_boundary() and is_plain:
                norm = _total_norm(engine.module)
            if norm is None or norm.isfinite():
                engine.step()
            else:  # as the other stages do by themselves
                engine.zero_grad()
                engine.micro_steps += 1
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemory(_explain_memory(batch, number, len(batches), error)) from error
        totals.append(sums.by_condition)
    if norm is not None:
        return torch.stack(totals), norm
    # Stage 3 keeps the norm of the step before when it skips one.
    return torch.stack(totals), math.inf if engine.optimizer.overflow else engine.get_global_grad_norm()


def _total_norm(module: nn.Module) -> Tensor:
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator of torch failed, on an accelerator or on the CPU, or Python's own."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _explain_memory(batch: PackedBatch, number: int, num_batches: int, error: RuntimeError) -> str:
    num_tokens, num_supervised = len(batch.input_ids), int((batch.loss_weights != 0).sum())
    return (
        f"rank {os.environ.get('RANK', '0')} ran out of memory in micro-batch {number} of {num_batches}: "
        f"{num_tokens:,} tokens, {num_supervised:,} with a loss, the longest sequence {batch.max_seqlen:,}. Lower "
        "packing.tokens_per_gpu (and raise packing.grad_accum), set model.checkpointing=full, a higher zero.stage or "
        "zero.offload=optimizer, or train on more processes. All of these may be changed when the run goes on from its "
        f"newest checkpoint. ({str(error).splitlines()[0]})"
    )


def sum_over_ranks(values: Tensor) -> Tensor:
    """The elementwise sum over all ranks, on every rank."""
    dist.all_reduce(values)
    return values


def sum_and_gather(values: Tensor, mine: Sequence[Tensor | float], world: World) -> tuple[Tensor, Tensor]:
    """On the CPU of every rank: the elementwise sum of the f64[...] values over all ranks, and each one's n `mine`.

    The second is f64[world size, n]. One collective for both, since at each of them all ranks wait, and the one place
    of a step where the host waits for the device.
    """
    both = torch.zeros(values.numel() + world.size * len(mine), dtype=torch.float64, device=values.device)
    both[: values.numel()] = values.flatten()
    for number, value in enumerate(mine, start=values.numel() + world.rank * len(mine)):
        both[number] = value  # a number is filled in; a tensor of them would be copied from memory that is not pinned
    dist.all_reduce(both)
    both = both.cpu()
    return both[: values.numel()].view_as(values), both[values.numel() :].view(world.size, len(mine))


def gather_objects(value: T) -> list[T]:
    """The value of every rank, in the order of ranks, on every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def say(world: World, text: str) -> None:
    """Print a line, by the main rank alone."""
    if world.is_main:
        print(text, flush=True)


class Refused(ValueError):
    """A mistake of the user's that was found before training; every rank raises the same."""


class Failed(Exception):
    """What ends a run that has begun; every rank raises the same."""


def together(action: Callable[[], T]) -> T:
    """This rank's result of `action`, when every rank has one. The action itself must not talk to other ranks.

    Raises Refused on all ranks, with the texts, when it raised ValueError on any: so no rank waits for one that left.
    """
    results: list[T] = []
    mistake = None
    try:
        results.append(action())
    except ValueError as error:
        mistake = str(error)
    mistakes = dict.fromkeys(text for text in gather_objects(mistake) if text is not None)
    if mistakes:
        raise Refused("\n".join(mistakes))
    return results[0]
