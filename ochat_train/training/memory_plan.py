"""The memory of a device: what a recipe takes of it, what is there, and the checkpointing that `auto` chooses."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ochat_train.model.activations import Activations, count_activations
from ochat_train.model.checkpointing import BY_TIME, period_of, share_of
from ochat_train.model.memory import MemoryNeeds, ModelSize, ZeroSetting, measure_size, memory_needs
from ochat_train.model.pretrained import DTYPES
from ochat_train.recipe import Recipe
from ochat_train.training.disk import show_bytes

# Of a GPU's memory: CUDA's own, the libraries', and what lies between allocated blocks.
RESERVED = 0.06
_MOST_LOCAL = 8  # GPUs of a host, where the number is not known


@dataclass(frozen=True, slots=True)
class Machine:
    """What there is for training: bytes of memory of each GPU, None on a CPU; bytes of host memory that are free.

    is_here: whether these GPUs are in this machine, and not only said to be rented.
    """

    gpu_bytes: int | None
    host_bytes: int
    is_here: bool


def find_machine() -> Machine:
    """This machine, by its smallest GPU."""
    gpus = [torch.cuda.get_device_properties(number).total_memory for number in range(torch.cuda.device_count())]
    return Machine(min(gpus, default=None), free_host_bytes(), is_here=True)


def smallest(machines: Sequence[Machine]) -> Machine:
    """The least of each kind of memory among the machines of a run."""
    gpus = [machine.gpu_bytes for machine in machines if machine.gpu_bytes is not None]
    return Machine(min(gpus, default=None), min(machine.host_bytes for machine in machines), is_here=True)


def free_host_bytes() -> int:
    """What Linux could give to new processes."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("Linux says MemAvailable")


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The needs of a recipe's run, and what those of any other setting follow from.

    policy: of checkpointing, whose activations these are; what auto chose, if the recipe says auto. num_local:
    processes of a host; None: all of them on a CPU, at most 8 with GPUs.
    """

    recipe: Recipe
    machine: Machine
    config: Any
    size: ModelSize
    num_processes: int
    policy: str
    activations: Activations
    num_local: int | None = None

    def setting(self, stage: int, *, offload: bool, num_processes: int, algorithm: Any = None) -> ZeroSetting:
        """The recipe with another stage, offload and number of processes, and perhaps optimizer."""
        zero = self.recipe.deepspeed.get("zero_optimization", {})
        bucket = int(zero.get("reduce_bucket_size", 500_000_000)) * (2 if zero.get("overlap_comm") else 1)
        if not self.is_on_gpu:  # what is not written takes no memory on a host
            bucket = min(bucket, self.size.num_trained)
        return ZeroSetting(
            stage=stage,
            offload=offload,
            num_processes=num_processes,
            dtype=self.recipe.model.dtype,
            algorithm=algorithm or self.recipe.optim.algorithm,
            bucket=bucket,
            grad_accum=self.recipe.packing.grad_accum,
        )

    @property
    def is_on_gpu(self) -> bool:
        """Whether the machine has GPUs."""
        return self.machine.gpu_bytes is not None

    @property
    def own(self) -> ZeroSetting:
        """The recipe's setting."""
        zero = self.recipe.zero
        return self.setting(zero.stage, offload=zero.offload == "optimizer", num_processes=self.num_processes)

    def needs(self, setting: ZeroSetting, activations: Activations | None = None) -> MemoryNeeds:
        """The needs of each process."""
        return memory_needs(self.size, activations or self.activations, setting, on_gpu=self.is_on_gpu)

    def total(self, setting: ZeroSetting, activations: Activations | None = None) -> int:
        """Bytes of a process on its device; on a CPU with what is offloaded, for it is the same memory."""
        needs = self.needs(setting, activations)
        return needs.total + (0 if self.is_on_gpu else needs.host)

    def limit(self, setting: ZeroSetting) -> int:
        """The bytes that each process may take: of its GPU, or as its share of host memory."""
        if self.machine.gpu_bytes is not None:
            return int((1 - RESERVED) * self.machine.gpu_bytes)
        return self.machine.host_bytes // (self.num_local or setting.num_processes)

    def fits_device(self, setting: ZeroSetting, activations: Activations | None = None) -> bool:
        """Whether each process has room on its device."""
        return self.total(setting, activations) <= self.limit(setting)

    def fits(self, setting: ZeroSetting, activations: Activations | None = None) -> bool:
        """Whether each process has room on its device and, if that is known, beside GPUs in host memory."""
        is_in_host = not self.is_on_gpu or not self.machine.is_here
        is_in_host = is_in_host or self.host_needs(setting) <= self.machine.host_bytes
        return is_in_host and self.fits_device(setting, activations)

    def host_needs(self, setting: ZeroSetting) -> int:
        """Bytes of a host's memory beside GPUs: each process loads the whole model; and what is offloaded."""
        num_local = self.num_local or min(setting.num_processes, _MOST_LOCAL)
        loaded = DTYPES[setting.dtype].itemsize * self.size.num_weights
        return num_local * max(loaded, self.needs(setting).host)

    def count(self, policy: str, num_tokens: int | None = None) -> Activations:
        """The activations under another policy, of the fullest micro-batch or of `num_tokens` tokens."""
        return _count(self.recipe, self.config, self.size, policy, num_tokens)

    def describe(self) -> str:
        """What is planned, and what there is, in a few words."""
        own = self.own
        return f"{show_bytes(self.total(own))} planned of {show_bytes(self.limit(own))} for each process"


def size_of(recipe: Recipe, config: Any, num_rows: int) -> ModelSize:
    """The size of the recipe's model, of this transformers configuration. Raises ValueError when there is none.

    num_rows: tokens whose rows are trained beside adapters.
    """
    lora = recipe.model.lora
    return measure_size(
        config,
        lora_rank=lora.rank if lora else None,
        lora_targets=lora.targets if lora else "all-linear",
        num_rows=num_rows,
    )


def plan_memory(
    recipe: Recipe, machine: Machine, config: Any, size: ModelSize, num_processes: int, *, num_local: int | None = None
) -> MemoryPlan:
    """The plan of the recipe's run on this machine, for a model of this transformers configuration.

    With model.checkpointing auto it has the policy that computes least again and fits the device; full when none does.
    Raises ValueError when the model's activations cannot be counted.
    """
    wanted = recipe.model.checkpointing
    for policy in _policies_of(config) if wanted == "auto" else (wanted,):
        activations = _count(recipe, config, size, policy)
        plan = MemoryPlan(recipe, machine, config, size, num_processes, policy, activations, num_local)
        if plan.fits_device(plan.own):
            break
    return plan


def _count(recipe: Recipe, config: Any, size: ModelSize, policy: str, num_tokens: int | None = None) -> Activations:
    lora = recipe.model.lora
    return count_activations(
        config,
        num_tokens=recipe.packing.tokens_per_gpu if num_tokens is None else num_tokens,
        dtype=recipe.model.dtype,
        checkpointing=policy,
        lora_rank=lora.rank if lora else None,
        lora_targets=lora.targets if lora else "all-linear",
        num_rows=size.num_rows,
    )


def _policies_of(config: Any) -> list[str]:
    """Those of BY_TIME that a model of this configuration can have."""
    num_layers = getattr(config, "num_hidden_layers", 1)
    return [policy for policy in BY_TIME if policy in ("none", "full") or (period_of(policy) or 0) <= num_layers]


def nearest_that_fits(plan: MemoryPlan) -> str:
    """The smallest change with which the recipe fits: those that cost nothing first, then speed, then money."""
    recipe, own = plan.recipe, plan.own
    capacity, least = recipe.packing.tokens_per_gpu, recipe.data.max_tokens
    share = share_of(plan.policy)
    for policy in _policies_of(plan.config):
        if share_of(policy) > share and plan.fits(own, plan.count(policy)):
            return f"set model.checkpointing: {policy}"
    for stage in (2, 3):
        if stage > own.stage and plan.fits(
            setting := plan.setting(stage, offload=own.offload, num_processes=own.num_processes)
        ):
            return f"set zero.stage: {setting.stage}"
    if plan.fits(own, plan.count(plan.policy, least)):
        low, high = least, capacity  # low fits, high does not
        while high - low > max(256, capacity // 16):
            middle = (low + high) // 2
            low, high = (middle, high) if plan.fits(own, plan.count(plan.policy, middle)) else (low, middle)
        return f"set packing.tokens_per_gpu: {low} (was {capacity}), and packing.grad_accum higher for as large a step"
    for stage in (2, 3):
        setting = plan.setting(stage, offload=True, num_processes=own.num_processes)
        if own.algorithm != "adamw_8bit" and plan.fits(setting):
            host = show_bytes(plan.host_needs(setting))
            return f"set zero.stage: {stage} and zero.offload: optimizer, with {host} of host memory"
    for stage in (2, 3):
        setting = plan.setting(stage, offload=False, num_processes=own.num_processes, algorithm="adamw_8bit")
        if own.algorithm == "adamw" and plan.fits(setting):
            return f"set zero.stage: {stage}, zero.offload: none and optim.algorithm: adamw_8bit, which rounds averages"
    for number in (own.num_processes * 2**power for power in range(1, 8)):
        for stage in (2, 3):
            if plan.is_on_gpu and plan.fits(plan.setting(stage, offload=False, num_processes=number)):
                return f"take {number} GPUs with zero.stage: {stage}"
    return "train adapters with model.lora, take GPUs with more memory, or a smaller model"
