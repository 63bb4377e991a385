"""The process group, the optimizer and the DeepSpeed engine, from plain arguments; one training step."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from ochat_train.files import free_port, require_packages
from ochat_train.model.loss import ConditionSums, LossSums
from ochat_train.model.memory import BUCKET, ModelSize
from ochat_train.model.router import RouterSums
from ochat_train.recipe import OptimSection
from ochat_train.tokens.batch import PackedBatch

T = TypeVar("T")
# The variables that a launcher sets for each process, and their values without a launcher.
_WORLD_VARIABLES = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))


@dataclass(frozen=True, slots=True)
class World:
    """The place of this process among all processes of the run, and among those of its node."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    local_size: int = 1
    sequence_parallel: int = 1

    @property
    def num_groups(self) -> int:
        """Groups of `sequence_parallel` neighbouring ranks, each of which shares its micro-batches."""
        return self.size // self.sequence_parallel

    @property
    def own_bins(self) -> slice:
        """Where a step's micro-batches have those of this rank, or those that it has shares of."""
        return slice(self.rank // self.sequence_parallel, None, self.num_groups)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0


def read_world() -> World:
    """The world that the launcher's environment variables describe; one process without a launcher."""
    rank, size, local_rank = (int(os.environ.get(name, default)) for name, default in _WORLD_VARIABLES)
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)  # torchrun's, DeepSpeed's
    accelerator = get_accelerator()
    device = accelerator.device_name() if accelerator.device_name() == "cpu" else accelerator.device_name(local_rank)
    return World(rank, size, local_rank, torch.device(device), local_size)


def join_process_group(world: World) -> None:
    """Connect to the other ranks, by gloo on CPU and by the accelerator's own library elsewhere."""
    if "MASTER_ADDR" not in os.environ:  # started without a launcher: a group of one
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        os.environ |= {name: os.environ.get(name, default) for name, default in _WORLD_VARIABLES}
    if world.device.type == "cpu":
        # DeepSpeed would compile a shared-memory all-reduce here; plain gloo needs no compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("gloo", verbose=False)
    else:
        get_accelerator().set_device(world.local_rank)
        deepspeed.init_distributed(verbose=False)


# Keys of DeepSpeed that would replace the recipe's precision, optimizer, schedule or scale.
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
) -> dict[str, Any]:
    """DeepSpeed's configuration as a dict, with the keys of `extra` merged in.

    Stages 1 and 2 reduce gradients to the rank that keeps them, which sends half of what all-reducing them would.
    `extra` may change how: DeepSpeed's `overlap_comm` would wait for the device before each of these, so that with it
    they are all-reduced. Raises ValueError when another extra key would change one that this configuration sets.
    """
    if taken := sorted(_DECIDED_ELSEWHERE & extra.keys()):
        raise ValueError(f"deepspeed.{taken[0]}: the recipe's other sections decide this; change those")
    of_zero = extra.get("zero_optimization")
    of_zero = of_zero if isinstance(of_zero, dict) else {}  # anything else is refused below
    chosen = {"reduce_bucket_size": BUCKET, "use_multi_rank_bucket_allreduce": bool(of_zero.get("overlap_comm"))}
    zero: dict[str, Any] = {"stage": stage, **{key: of_zero.get(key, value) for key, value in chosen.items()}}
    if offload == "optimizer":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # one packed row
        "gradient_accumulation_steps": grad_accum,
        "gradient_clipping": grad_clip or 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own CPU Adam needs a compiler
        "bf16": {"enabled": dtype == "bfloat16"},
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device twice a micro-batch
        "checkpoint": {"use_node_local_storage": False, "load_universal": False},
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
                f"{path}.{key}: {value!r} contradicts {config[key]!r}, which ochat_train sets; leave the key out, or, "
                "where other sections of the recipe decide it, change those"
            )
        else:
            config[key] = value


def make_optimizer(model: nn.Module, optim: OptimSection, *, lr: float) -> torch.optim.Optimizer:
    """AdamW, AdamW with 8-bit states, or SGD, at the learning rate `lr`.

    Vectors (norms, biases) have weight decay only with optim.decay_vectors. With adamw_8bit, tensors below 4,096
    elements keep fp32 states.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": optim.weight_decay * optim.decay_vectors},
    ]
    if optim.algorithm == "sgd":
        return torch.optim.SGD(groups, lr=lr)
    if optim.algorithm == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit  # an extra: present once `check_adam8bit` has passed

        optimizer: torch.optim.Optimizer = AdamW8bit(groups, lr=lr, betas=optim.betas, eps=optim.eps)
        return optimizer
    return torch.optim.AdamW(groups, lr=lr, betas=optim.betas, eps=optim.eps, fused=True)


# bitsandbytes' kernels count elements in 32 bits: https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1785
_MOST_ELEMENTS = 2**31 - 1


def check_adam8bit(size: ModelSize, *, stage: int, num_processes: int) -> None:
    """Raise ValueError with the remedy when bitsandbytes is not installed or cannot update a model of this size.

    It keeps 2 bytes of states for each weight, where AdamW keeps 8. Each block of 256 weights shares two fp32 scales.
    Blocks are those of DeepSpeed's flat partition: they do not end where parameters do, so that another number of
    processes rounds differently.
    """
    require_packages("optim.algorithm adamw_8bit", "bitsandbytes", extra="adam8bit")
    if stage == 3:  # in sub-groups of 1e9 elements
        return
    num_elements = size.largest if stage == 0 else -(-size.num_trained // num_processes)
    if num_elements > _MOST_ELEMENTS:
        raise ValueError(
            f"optim.algorithm adamw_8bit updates at most {_MOST_ELEMENTS:,} weights at once, and zero.stage {stage} "
            f"gives each of {num_processes} processes {num_elements:,}; set zero.stage: 3, or train on more processes"
        )


def make_engine(model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> DeepSpeedEngine:
    """The DeepSpeed engine around the model, in training mode."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    if config["zero_optimization"]["stage"] == 3:
        split_weights(model, config)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    # DeepSpeed casts buffers with the weights; RoPE's frequencies in bf16 would be off by whole positions.
    for name, buffer in engine.module.named_buffers():
        buffer.data = buffers[name].to(engine.device)
    engine.train()  # transformers loads pretrained models in eval mode, where they skip checkpointing
    return engine


def split_weights(model: nn.Module, config: dict[str, Any]) -> None:
    """Split the weights among the ranks, as stage 3 has them: one after the other goes to the device and is split.

    `deepspeed.initialize` alone would first move all of them to the device.
    """

    def one_by_one(recurse: bool = True) -> Iterator[nn.Parameter]:
        for parameter in nn.Module.parameters(model, recurse):
            if get_accelerator().device_name() == "cpu":  # a copy, as on a device: DeepSpeed writes to it
                parameter.data = parameter.data.clone()
            yield parameter

    model.parameters = one_by_one  # type: ignore[method-assign]
    try:
        dtype = torch.bfloat16 if config["bf16"]["enabled"] else torch.float32
        deepspeed.zero.Init(module=model, config_dict_or_path=config, dtype=dtype)
    finally:
        del model.parameters


class OutOfMemory(MemoryError):
    """Raised when a micro-batch does not fit; the message says what to change."""


def train_step(
    engine: DeepSpeedEngine,
    batches: Sequence[PackedBatch],
    *,
    weight_sum: float,
    num_tokens: int,
    world_size: int,
    lr: float,
    mark: Callable[[str], None],
) -> tuple[list[LossSums], Tensor | float]:
    """One optimizer step over this rank's micro-batches; returns the sums of each and the gradient's norm.

    weight_sum is the sum of loss weights of the whole step, over all ranks and micro-batches, and num_tokens the number
    of its tokens. DeepSpeed averages gradients over ranks, so that each micro-batch contributes nll_sum * world_size /
    weight_sum, and the update is that of sum(w * nll) / sum(w) over the step. The balancing loss of a mixture counts
    with its coefficient times the micro-batch's share of the step's tokens. Where the norm is not finite, nothing was
    updated. Sums and norm stay on the device, so that the host does not wait for it here; DeepSpeed's own step waits
    when it checks the norm. mark is called with the name of each phase as it begins. Raises OutOfMemory.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    scale = world_size / weight_sum if weight_sum else 0.0
    router_scale = engine.module.router_coefficient * world_size / max(1, num_tokens)
    parts: list[LossSums] = []
    is_plain = engine.optimizer is engine.basic_optimizer  # stage 0 in fp32: DeepSpeed clips, but stores no norm
    norm = None
    for number, batch in enumerate(batches, start=1):
        try:
            mark(f"micro-batch {number} of {len(batches)}, forward")
            sums = engine(batch.to(engine.device))
            mark(f"micro-batch {number} of {len(batches)}, backward")
            loss = sums.nll * scale
            if sums.router is not None and router_scale:
                loss = loss + sums.router.loss * router_scale
            engine.backward(loss, scale_wrt_gas=False)
            if engine.is_gradient_accumulation_boundary() and is_plain:
                norm = _total_norm(engine.module)
            if norm is None or norm.isfinite():
                engine.step()
            else:  # as the other stages do by themselves
                engine.zero_grad()
                engine.micro_steps += 1
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemory(_explain_memory(batch, number, len(batches), error)) from error
        router = sums.router and sums.router._replace(loss=sums.router.loss.detach())
        parts.append(LossSums(sums.nll.detach(), sums.by_condition, router))
    if norm is not None:
        return parts, norm
    # Stage 3 keeps the norm of the step before when it skips one.
    return parts, math.inf if engine.optimizer.overflow else engine.get_global_grad_norm()


def _total_norm(module: nn.Module) -> Tensor:
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error is an out-of-memory error of torch, on an accelerator or the CPU, or of Python."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _explain_memory(batch: PackedBatch, number: int, num_batches: int, error: Exception) -> str:
    num_tokens, num_supervised = len(batch.input_ids), int((batch.loss_weights != 0).sum())
    return (
        f"rank {os.environ.get('RANK', '0')} ran out of memory in micro-batch {number} of {num_batches}: "
        f"{num_tokens:,} tokens, {num_supervised:,} with a loss, the longest sequence {batch.max_seqlen:,}. Lower "
        "packing.tokens_per_gpu (and raise packing.grad_accum), set model.checkpointing=full, a higher zero.stage or "
        "zero.offload=optimizer, or train on more processes. All of these may be changed when the run continues from "
        f"its newest checkpoint. ({(str(error).splitlines() or [repr(error)])[0]})"
    )


def sum_over_ranks(sums: ConditionSums) -> ConditionSums:
    """The sums over all ranks, on the CPU of every rank; `sums` itself is overwritten with them."""
    dist.all_reduce(sums.table)
    return ConditionSums(sums.table.cpu())


class RankReport(NamedTuple):
    """What a rank reports after a step: its times and memory, and whether it was asked to stop or still writes a save.

    grad_norm: of the whole step, the same on every rank.
    """

    grad_norm: Tensor | float
    data_wait_s: float
    peak_memory_bytes: float
    is_asked_to_stop: bool
    is_writing: bool


def reduce_over_ranks(
    sums: ConditionSums, router: RouterSums | None, report: RankReport, world: World
) -> tuple[ConditionSums, RouterSums | None, RankReport]:
    """On the CPU of every rank: the f64 sums over all ranks, and the largest of each value that any rank reports.

    One collective for all, because all ranks wait at each, and the only place of a step where our code waits for the
    device.
    """
    summed = [sums.table, *(router or ())]
    num_sums, num_values = sum(part.numel() for part in summed), len(report)
    both = torch.zeros(num_sums + world.size * num_values, dtype=torch.float64, device=sums.table.device)
    both[:num_sums] = torch.cat([part.flatten().double() for part in summed])
    for place, value in enumerate(report, start=num_sums + world.rank * num_values):
        both[place] = value  # one by one: a tensor made on the host would need a blocking copy
    dist.all_reduce(both)
    both = both.cpu()
    grad_norm, data_wait_s, memory, *answers = both[num_sums:].view(world.size, num_values).amax(dim=0).tolist()
    parts = both[:num_sums].split([part.numel() for part in summed])
    table, *of_router = (part.view(like.shape) for part, like in zip(parts, summed, strict=True))
    return (
        ConditionSums(table),
        RouterSums(*of_router) if of_router else None,
        RankReport(grad_norm, data_wait_s, memory, *map(bool, answers)),
    )


def is_any(answer: bool, world: World) -> bool:
    """Whether the answer of any rank is yes; the same on every rank."""
    answers = torch.tensor([float(answer)], device=world.device)
    dist.all_reduce(answers)
    return bool(answers)


def gather_objects(value: T) -> list[T]:
    """The value of every rank, in the order of ranks, on every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def say(world: World, text: str) -> None:
    """Print a line on the main rank only."""
    if world.is_main:
        print(text, flush=True)


class Refused(ValueError):
    """A mistake of the user that was found before training; every rank raises the same."""


class Failed(Exception):
    """An error that ends a run after it has begun; every rank raises the same."""


def together(action: Callable[[], T]) -> T:
    """This rank's result of `action`, after every rank has finished it. The action itself must not communicate.

    Raises Refused with all texts on every rank when it raised ValueError on any, so that no rank waits for another.
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
