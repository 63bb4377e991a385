"""The memory and the disk that a run takes and that there is, and the checkpointing that `auto` chooses."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from ochat_train.files import STEP_FOLDERS, step_name
from ochat_train.gpus import usable_gpus
from ochat_train.model.activations import Activations, Alone, Share, count_activations
from ochat_train.model.checkpointing import BY_TIME, Tiled, period_of, share_of
from ochat_train.model.lora import Kind
from ochat_train.model.memory import (
    BUCKET,
    MemoryNeeds,
    ModelSize,
    ZeroSetting,
    checkpoint_bytes,
    flat_copies,
    measure_size,
    memory_needs,
    run_bytes,
)
from ochat_train.model.pretrained import DTYPES
from ochat_train.recipe import LoraSection, Recipe

# The share of a GPU's memory for CUDA itself and its libraries (about 1.5 GB: context, workspaces of cuBLAS, buffers of
# NCCL), and for the gaps between allocated blocks. With expandable segments a gap is at most the rest of two pages of
# 20 MiB (kLargeBuffer of torch's allocator); the others are mapped anew. Chosen so, not measured on a GPU.
RESERVED = 0.06
_MOST_LOCAL = 8  # GPUs of a host, where the number is not known


# -------------------------------------------------------------------------------------------------------- memory


@dataclass(frozen=True, slots=True)
class AvailableMemory:
    """The memory for training: bytes of each GPU, None on a CPU; bytes of host memory that are free.

    is_here: whether the GPUs are in this machine; False for GPUs that are only planned for.
    """

    gpu_bytes: int | None
    host_bytes: int
    is_here: bool


def find_memory() -> AvailableMemory:
    """The memory of this machine, by its smallest GPU."""
    gpus = [torch.cuda.get_device_properties(number).total_memory for number in range(usable_gpus())]
    return AvailableMemory(min(gpus, default=None), free_host_bytes(), is_here=True)


_CGROUP_OF_PROCESS, _CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
# Of the two versions of control groups: where they are mounted, a group's limit and use, and the pages of files among
# its use that the kernel drops when it needs room.
_CGROUP_FILES = {
    "": ("", "memory.max", "memory.current", "inactive_file"),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def free_host_bytes() -> int:
    """The bytes of host memory that are free, of the machine and within the control groups of this process."""
    free = [psutil.virtual_memory().available]
    lines = _CGROUP_OF_PROCESS.read_text().splitlines() if _CGROUP_OF_PROCESS.is_file() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        kind = next((name for name in _CGROUP_FILES if name in controllers.split(",")), None)
        if kind is None:
            continue
        mounted, limit, use, reclaimable = _CGROUP_FILES[kind]
        group = Path(path.lstrip("/"))
        for parent in (group, *group.parents):  # each of them limits
            folder = _CGROUPS / mounted / parent
            with suppress(OSError, ValueError):  # the root has no limit; "max" is none
                room = int((folder / limit).read_text()) - int((folder / use).read_text())
                statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                free.append(max(0, room + int(statistics.get(reclaimable, 0))))
    return min(free)


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The memory that a recipe's run needs, and from which the needs of any other setting follow.

    policy: the activation checkpointing, chosen if the recipe says auto; activations are counted under it. num_local:
    processes of a host; None stands for all of them on a CPU, and for at most 8 with GPUs. is_alone: whether each
    sequence is run alone.
    """

    recipe: Recipe
    available: AvailableMemory
    config: Any
    size: ModelSize
    num_processes: int
    policy: str
    activations: Activations
    num_local: int | None = None
    is_alone: bool = False

    def setting(self, stage: int, *, offload: bool, num_processes: int, algorithm: Any = None) -> ZeroSetting:
        """The recipe's setting with another stage, offload, number of processes and, if given, optimizer."""
        zero = self.recipe.deepspeed.get("zero_optimization", {})
        bucket = int(zero.get("reduce_bucket_size", BUCKET))
        if not self.is_on_gpu:  # host memory that is never written is never allocated
            bucket = min(bucket, self.size.num_trained)
        return ZeroSetting(
            stage=stage,
            offload=offload,
            num_processes=num_processes,
            dtype=self.recipe.model.dtype,
            algorithm=algorithm or self.recipe.optim.algorithm,
            bucket=bucket,
            grad_accum=self.recipe.packing.grad_accum,
            num_buckets=2 if stage in (1, 2) and zero.get("overlap_comm") else 1,
        )

    @property
    def is_on_gpu(self) -> bool:
        """Whether the run is on GPUs."""
        return self.available.gpu_bytes is not None

    @property
    def own(self) -> ZeroSetting:
        """The setting of the recipe itself."""
        zero = self.recipe.zero
        return self.setting(zero.stage, offload=zero.offload == "optimizer", num_processes=self.num_processes)

    def needs(self, setting: ZeroSetting, activations: Activations | None = None) -> MemoryNeeds:
        """The needs of each process under a setting."""
        needs = memory_needs(self.size, activations or self.activations, setting, on_gpu=self.is_on_gpu)
        if self.is_alone and setting.stage == 3 and setting.num_processes > 1 and self.policy != "full":
            # DeepSpeed gives weights back after a module's last use; of those before it, by its code, it keeps them.
            needs = replace(needs, buffers=needs.buffers + DTYPES[setting.dtype].itemsize * self.size.num_weights)
        return needs

    def total(self, setting: ZeroSetting, activations: Activations | None = None) -> int:
        """Bytes of a process on its device; on a CPU including what is offloaded, which is the same memory."""
        needs = self.needs(setting, activations)
        return needs.total + (0 if self.is_on_gpu else needs.host + self._untrained_bytes)

    @property
    def _untrained_bytes(self) -> int:
        return DTYPES[self.recipe.model.dtype].itemsize * self.size.num_untrained

    def limit(self, setting: ZeroSetting) -> int:
        """The bytes that each process may take: of its GPU, or its share of host memory."""
        if self.available.gpu_bytes is not None:
            return int((1 - RESERVED) * self.available.gpu_bytes)
        return self.available.host_bytes // (self.num_local or setting.num_processes)

    def fits_device(self, setting: ZeroSetting, activations: Activations | None = None) -> bool:
        """Whether each process fits its device."""
        return self.total(setting, activations) <= self.limit(setting)

    def fits(self, setting: ZeroSetting, activations: Activations | None = None) -> bool:
        """Whether each process fits its device and, where host memory beside GPUs is known, that too."""
        is_in_host = not self.is_on_gpu or not self.available.is_here
        is_in_host = is_in_host or self.host_needs(setting) <= self.available.host_bytes
        return is_in_host and self.fits_device(setting, activations)

    def host_needs(self, setting: ZeroSetting) -> int:
        """Bytes of host memory beside GPUs at most: the model, which a node loads once, then what its processes have.

        These are offloaded states, or copies of trained weights for which a GPU lacks room while the engine is made.
        """
        num_local = self.num_local or min(setting.num_processes, _MOST_LOCAL)
        element = DTYPES[setting.dtype].itemsize
        lacks_room = self.size.weight_bytes(element) + element * self.size.num_trained > self.limit(setting)
        copies = flat_copies(self.size, setting) if lacks_room else 0
        in_run = num_local * max(copies, self.needs(setting).host)
        return self._untrained_bytes + max(element * self.size.num_weights, in_run)

    def count(self, policy: str, num_tokens: int | None = None) -> Activations:
        """The activations under another policy, for the fullest micro-batch or for `num_tokens` tokens."""
        return _count(self.recipe, self.config, self.size, policy, num_tokens, is_alone=self.is_alone)

    def describe(self) -> str:
        """The bytes that are planned and the limit, in a few words."""
        own = self.own
        return f"{show_bytes(self.total(own))} planned of {show_bytes(self.limit(own))} for each process"


def size_of(recipe: Recipe, config: Any, num_rows: int) -> ModelSize:
    """The size of the recipe's model; config: its transformers configuration. Raises ValueError as `measure_size` does.

    num_rows: how many rows of embedding and head are trained beside adapters.
    """
    return measure_size(
        config,
        num_rows=num_rows,
        lora_targets=recipe.model.lora.targets if recipe.model.lora else "all-linear",
        **({"lora_rank": None} | _adapters(recipe)),
    )


def kind_of(lora: LoraSection, device: torch.device) -> Kind:
    """The kind of the recipe's adapters on a device."""
    return Kind(lora.dora, lora.rslora, None if lora.base_bits is None else device, lora.targets)


def _adapters(recipe: Recipe) -> dict[str, Any]:
    """What of the recipe's adapters takes memory, as arguments of `measure_size` and `count_activations`."""
    lora = recipe.model.lora
    return {} if lora is None else {"lora_rank": lora.rank, "kind": kind_of(lora, torch.device("meta"))}


def plan_memory(
    recipe: Recipe,
    available: AvailableMemory,
    config: Any,
    size: ModelSize,
    num_processes: int,
    *,
    num_local: int | None = None,
    is_alone: bool = False,
) -> MemoryPlan:
    """The memory plan of the recipe's run; config: the model's transformers configuration. is_alone: see MemoryPlan.

    With model.checkpointing auto, its policy is the one that recomputes least among those that fit the device; full
    when none fits. Raises ValueError when the model's activations cannot be counted.
    """
    wanted = recipe.model.checkpointing
    for policy in _policies_of(config) if wanted == "auto" else (wanted,):
        activations = _count(recipe, config, size, policy, is_alone=is_alone)
        plan = MemoryPlan(recipe, available, config, size, num_processes, policy, activations, num_local, is_alone)
        if plan.fits_device(plan.own):
            break
    return plan


def _count(
    recipe: Recipe, config: Any, size: ModelSize, policy: str, num_tokens: int | None = None, *, is_alone: bool
) -> Activations:
    num_tokens = recipe.packing.tokens_per_gpu if num_tokens is None else num_tokens
    shared = recipe.packing.sequence_parallel
    of_process = Share(num_tokens, shared) if shared > 1 else num_tokens
    return count_activations(
        config,
        num_tokens=Alone(num_tokens, recipe.data.max_tokens) if is_alone else of_process,
        dtype=recipe.model.dtype,
        checkpointing=Tiled(policy, recipe.model.mlp_tiles),
        num_rows=size.num_rows,
        **_adapters(recipe),
    )


def _policies_of(config: Any) -> list[str]:
    """The policies of BY_TIME that a model of this configuration can have."""
    num_layers = getattr(config.get_text_config(), "num_hidden_layers", 1)
    return [policy for policy in BY_TIME if policy in ("none", "full") or (period_of(policy) or 0) <= num_layers]


def nearest_that_fits(plan: MemoryPlan) -> str:
    """The smallest change with which the recipe fits: first changes that cost nothing, then speed, then money."""
    recipe, own = plan.recipe, plan.own
    packing = recipe.packing
    capacity, least = packing.tokens_per_gpu, -(-recipe.data.max_tokens // packing.sequence_parallel)
    share = share_of(plan.policy)
    stages = (2,) if plan.size.num_quantised else (2, 3)
    for policy in _policies_of(plan.config):
        if share_of(policy) > share and plan.fits(own, plan.count(policy)):
            return f"set model.checkpointing: {policy}"
    for stage in stages:
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
    if shared := _shared_that_fits(plan):
        return f"set packing.sequence_parallel: {shared} and packing.tokens_per_gpu: {-(-packing.capacity // shared)}"
    for stage in stages:
        setting = plan.setting(stage, offload=True, num_processes=own.num_processes)
        if own.algorithm != "adamw_8bit" and plan.fits(setting):
            host = show_bytes(plan.host_needs(setting))
            return f"set zero.stage: {stage} and zero.offload: optimizer, with {host} of host memory"
    for stage in stages:
        setting = plan.setting(stage, offload=False, num_processes=own.num_processes, algorithm="adamw_8bit")
        if own.algorithm == "adamw" and plan.fits(setting):
            return f"set zero.stage: {stage}, zero.offload: none and optim.algorithm: adamw_8bit, which rounds averages"
    lora = recipe.model.lora
    if lora is not None and lora.base_bits is None:
        model = recipe.model.model_copy(update={"lora": lora.model_copy(update={"base_bits": 4})})
        quantised = recipe.model_copy(update={"model": model})
        with suppress(ValueError):  # where the base or this machine cannot have it
            other = plan_memory(
                quantised,
                plan.available,
                plan.config,
                size_of(quantised, plan.config, plan.size.num_rows),
                plan.num_processes,
                num_local=plan.num_local,
            )
            if other.fits(other.setting(2, offload=False, num_processes=own.num_processes)):
                also = " and zero.stage: 2" if own.stage == 3 else ""
                return f"set model.lora.base_bits: 4{also}, which rounds the base"
    for number in (own.num_processes * 2**power for power in range(1, 8)):
        for stage in stages:
            if plan.is_on_gpu and plan.fits(plan.setting(stage, offload=False, num_processes=number)):
                return f"take {number} GPUs with zero.stage: {stage}"
    return (
        "train adapters with model.lora, beside a base in 4 bits with model.lora.base_bits, take GPUs with more "
        "memory, or a smaller model"
    )


def _shared_that_fits(plan: MemoryPlan) -> int | None:
    """How many processes could share each micro-batch of the same size, so that it fits; None: none of those tried."""
    packing, num_heads = plan.recipe.packing, getattr(plan.config, "num_attention_heads", 0)
    for power in range(1, 6):
        shared: int = packing.sequence_parallel * 2**power
        if plan.is_alone or plan.num_processes % shared or num_heads % shared:
            break
        fewer = {"sequence_parallel": shared, "tokens_per_gpu": -(-packing.capacity // shared)}
        recipe = plan.recipe.model_copy(update={"packing": packing.model_copy(update=fewer)})
        if plan.fits(plan.own, _count(recipe, plan.config, plan.size, plan.policy, is_alone=False)):
            return shared
    return None


# ---------------------------------------------------------------------------------------------------------- disk


def show_bytes(num_bytes: float) -> str:
    """The number in GiB, below a tenth of a GiB in MiB."""
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 0.1 * 2**30 else f"{num_bytes / 2**20:,.1f} MiB"


def existing_parent(path: Path) -> Path:
    """`path` itself or the nearest folder above it that exists."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def free_bytes(path: Path) -> int:
    """The bytes that may still be written below `path`, which need not exist."""
    return shutil.disk_usage(existing_parent(path)).free


# A full disk, a full quota, a limit on the size of a file.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def room_for(num_bytes: int, folder: Path) -> Iterator[None]:
    """Wraps code that writes about `num_bytes` into `folder`: raises ValueError with the remedy when it lacks room."""
    free = free_bytes(folder)
    try:
        if free < num_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield
    except Exception as error:
        # Libraries in Rust raise exceptions of their own, with the number in the text.
        number = error.errno if isinstance(error, OSError) else None
        number = number or next((code for code in _NO_ROOM if f"(os error {code})" in str(error)), None)
        if number not in _NO_ROOM:
            raise
        raise ValueError(
            f"{os.strerror(number)}: {folder} takes {show_bytes(num_bytes)}, and {show_bytes(free)} are free at "
            f"{existing_parent(folder)}; make room there, or raise the limit, and run the same command again"
        ) from error


@dataclass(frozen=True, slots=True)
class DiskPlan:
    """The disk that a run takes, in bytes.

    checkpoint, model, light: one checkpoint, the exported model, one light checkpoint. num_kept, num_light: how many
    checkpoints and light ones stay. taken: what the folder holds of these already. free: what is free beside it.
    """

    folder: Path
    checkpoint: int
    model: int
    light: int
    num_kept: int
    num_light: int
    taken: int
    free: int

    @property
    def needed(self) -> int:
        """The most that the folder takes."""
        return run_bytes(self.checkpoint, self.model, self.light, keep=self.num_kept, num_light=self.num_light)

    @property
    def missing(self) -> int:
        """The bytes that are missing; 0 when the run fits."""
        return max(0, self.needed - self.taken - self.free)

    def describe(self) -> str:
        """One line with all of these figures."""
        return (
            f"{show_bytes(self.needed)} for {self.folder}: {self.num_kept + 1} checkpoints of "
            f"{show_bytes(self.checkpoint)}, the model of {show_bytes(self.model)} twice while it is replaced"
            + (f", {self.num_light} light ones of {show_bytes(self.light)}" if self.num_light else "")
            + (f"; {show_bytes(self.taken)} of it exist already" if self.taken else "")
            + f"; {show_bytes(self.free)} are free at {existing_parent(self.folder)}"
        )

    @property
    def remedy(self) -> str:
        """What to do when bytes are missing."""
        return f"free {show_bytes(self.missing)}, lower checkpoint.keep, or name another disk in checkpoint.dir"


# What a cut save, pruning or conversion leaves in a run's folder, and the next run removes.
LEFTOVERS = tuple(
    f"{folder}step-*.{kind}"
    for folder in ("", "models/", "best/")
    for kind in ("partial", "replaced", "pruned", "universal")
)
_REUSED = (
    STEP_FOLDERS,
    f"models/{STEP_FOLDERS}",
    f"best/{STEP_FOLDERS}",
    "model",
    "model.partial",
    "model.replaced",
    *LEFTOVERS,
)


def plan_disk(recipe: Recipe, size: ModelSize, num_steps: int, *, start: int | None = None) -> DiskPlan:
    """The disk of checkpoint.dir that the recipe's run of about `num_steps` steps takes.

    start: the step from which it goes on; what is newer will be set aside, so that its room is not the run's. None
    counts all as the run's.
    """
    folder = Path(recipe.checkpoint.dir)
    reused = [
        path
        for kind in _REUSED
        for path in folder.glob(kind)
        if not (start is not None and kind.endswith(STEP_FOLDERS) and path.name > step_name(start))
    ]
    return DiskPlan(
        folder=folder,
        checkpoint=checkpoint_bytes(
            size.num_trained,
            stage=recipe.zero.stage,
            dtype=recipe.model.dtype,
            algorithm=recipe.optim.algorithm,
        ),
        model=DTYPES[recipe.model.dtype].itemsize * (size.num_weights + size.num_untrained),
        light=DTYPES["bfloat16"].itemsize * (size.num_weights + size.num_untrained),
        num_kept=recipe.checkpoint.keep,
        num_light=_num_light(recipe, num_steps) + _num_best(recipe),
        taken=sum(
            file.lstat().st_size
            for path in reused
            if not path.is_symlink()
            for file in path.rglob("*")
            if file.is_file()
        ),
        free=free_bytes(folder),
    )


def _num_light(recipe: Recipe, num_steps: int) -> int:
    """The most light checkpoints that exist at once."""
    policy = recipe.checkpoint.models
    if policy.every_epochs is None and policy.every_steps is None:
        return 0
    if policy.keep is not None:
        return policy.keep + 1
    of_epochs = recipe.train.epochs // policy.every_epochs if policy.every_epochs else 0
    return of_epochs + (num_steps // policy.every_steps if policy.every_steps else 0)


def _num_best(recipe: Recipe) -> int:
    """As many light ones take the disk of the best models that exist at once: two, and one that is being written."""
    dtypes = DTYPES[recipe.model.dtype].itemsize // DTYPES["bfloat16"].itemsize
    return 0 if recipe.checkpoint.best is None else 3 * dtypes
