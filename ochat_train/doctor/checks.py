"""What doctor checks: one function a check, each returns a Finding."""

import copy
import gc
import os
import platform
import resource
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from packaging.requirements import Requirement
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from ochat_train.doctor.finding import GIB, Finding
from ochat_train.model.kernels import Kernels, use_kernels
from ochat_train.model.lora import add_adapters, require_peft
from ochat_train.model.memory import ModelSize
from ochat_train.model.meta import meta_model
from ochat_train.model.packed_lm import PackedCausalLM
from ochat_train.model.pretrained import DTYPES
from ochat_train.recipe import Recipe
from ochat_train.report.plan import Rate
from ochat_train.report.tables import show_duration
from ochat_train.tokens.batch import PackedBatch, collate
from ochat_train.tokens.encode import Example
from ochat_train.tokens.order import Indices
from ochat_train.tokens.plan import PlanTable, RunPlan
from ochat_train.tokens.store import TokenStore
from ochat_train.tokens.tokenizer import ChatTokenizer
from ochat_train.training.disk import existing_parent, plan_disk, show_bytes
from ochat_train.training.memory_plan import Machine, MemoryPlan, find_machine
from ochat_train.training.planning import check_store, make_run_plan
from ochat_train.training.setup import check_options, deepspeed_configuration, peak_learning_rate
from ochat_train.training.sinks import check_sinks

_REACHED_WITHIN_S = 3.0
_SSH_PORT = 22
_CPU_FLOP = 1e13  # minutes on a few cores
_LENGTHS = (7, 33, 70, 18)  # of the sequences that are compared
_NARROWER = (1, 2, 4, 8, 16)
_FEW_LAYERS = 2
_CPU_COMPARED = GIB  # on a CPU a larger model would take minutes
_SMALL_VOCABULARY = 8192


def machine_of(gpu_gib: float | None) -> Machine:
    """This machine, or one with GPUs of `gpu_gib` GiB in its place."""
    here = find_machine()
    return here if gpu_gib is None else Machine(int(gpu_gib * GIB), here.host_bytes, is_here=False)


# ------------------------------------------------------------------------------------- versions and machine


def check_versions(requirements: Sequence[str] | None = None) -> Finding:
    """The installed versions against the ranges of pyproject.toml, as the installed package says them."""
    try:
        stated = metadata.requires("ochat_train") or [] if requirements is None else requirements
    except metadata.PackageNotFoundError:
        remedy = "pip install -c constraints.txt -e ."
        return Finding("versions", "warning", "ochat_train is not installed, so its tested ranges are unknown", remedy)
    shown, wrong = [f"python {platform.python_version()}"], []
    for requirement in map(Requirement, stated):
        # gpu: an attention kernel of another version is a problem, one that is not there is none.
        is_needed = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        is_used = is_needed or (requirement.marker is not None and requirement.marker.evaluate({"extra": "gpu"}))
        if not is_used:
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            if is_needed:
                wrong.append(f"{requirement.name} is not installed, tested with {requirement.specifier}")
            continue
        if requirement.name in ("torch", "deepspeed", "transformers", "flash-attn"):
            shown.append(f"{requirement.name} {version}")
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is not in {requirement.specifier}")
    if wrong:
        return Finding("versions", "problem", "; ".join(wrong), "pip install -c constraints.txt -e .")
    return Finding("versions", "ok", f"{', '.join(shown)}: all packages are in the tested ranges")


def check_accelerators(recipe: Recipe, machine: Machine) -> Finding:
    """Which accelerators are here, and whether the recipe's dtype suits them."""
    cores = f"{len(os.sched_getaffinity(0))} CPU cores, {show_bytes(machine.host_bytes)} of host memory free"
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        kinds = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
        here = f"{kinds}, {show_bytes(machine.gpu_bytes or 0)} each; {cores}"
    else:
        here = f"no GPU here; {cores}"
    if machine.gpu_bytes is not None and not machine.is_here:
        return Finding("accelerators", "ok", f"{here}; planned for GPUs of {show_bytes(machine.gpu_bytes)}")
    if machine.gpu_bytes is None and recipe.model.dtype == "bfloat16":
        remedy = "set model.dtype: float32 here, or say --gpu-gib N of the GPUs that you will rent"
        return Finding("accelerators", "warning", f"{here}; model.dtype bfloat16 is slow on a CPU", remedy)
    return Finding("accelerators", "ok", here)


def check_attention(recipe: Recipe, config: Any) -> Finding:
    """Which attention backend a run here would take, and whether the model can be run on packed batches at all."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        packed = PackedCausalLM(
            meta_model(config, DTYPES[recipe.model.dtype]),
            attention=recipe.model.attention,
            device_type=device,
            checkpointing="none",
            num_conditions=1,
        )
    except ValueError as error:
        return Finding("attention", "problem", str(error), "set model.attention: auto, or take another model")
    return Finding("attention", "ok", f"{packed.attention.backend} ({packed.attention.reason})")


# ------------------------------------------------------------------------------- isolation and gradients


def check_isolation(recipe: Recipe, config: Any, machine: Machine, kernels: Kernels) -> Finding:
    """Packed sequences against each alone in transformers' own layers, and whether any sees another.

    On a GPU in the recipe's dtype, on a CPU in float32. Each sequence has a condition of its own, so that the sums by
    condition are the losses of sequences.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = DTYPES[recipe.model.dtype] if device.type == "cuda" else torch.float32
    room = (machine.gpu_bytes or 0) // 2 if device.type == "cuda" else min(machine.host_bytes // 8, _CPU_COMPARED)
    fitting = fit_config(config, room, dtype)
    if fitting is None:
        detail = f"{config.model_type} was not compared: no smaller copy of it fits {show_bytes(room)}"
        return Finding("isolation", "warning", detail, "run doctor where more memory is free")
    small, made = fitting
    torch.manual_seed(recipe.train.seed)
    lm: PreTrainedModel = AutoModelForCausalLM.from_config(small, dtype=dtype).to(device)
    examples = _random_examples(small.vocab_size)
    losses, gradients = _each_alone(lm, examples, device)
    # The copy may have too few layers for every_N.
    policy = "none" if recipe.model.checkpointing == "none" else "full"
    packed = _as_in_a_run(lm, recipe, kernels, device, checkpointing=policy, num_conditions=len(examples))
    sums = packed(_batch(examples, device))
    sums.nll.backward()
    loss_error = _relative_error(sums.by_condition[0, 0], losses)
    gradient_error = max(
        _relative_error(parameter.grad, gradients[name])
        for name, parameter in packed.lm.named_parameters()
        if parameter.grad is not None
    )
    seen = _leak(packed, examples, device)
    # A layer has some ten operations in a row, each of 6e-8 in float32 and 4e-3 in bfloat16, and as many backwards. A
    # sequence that sees another one is off by more than 1e-2 in float32.
    tolerance, gradient_tolerance = (1e-4, 1e-3) if dtype == torch.float32 else (3e-2, 2e-1)
    detail = (
        f"{made}, {str(dtype).removeprefix('torch.')}, {packed.attention.backend}, {len(examples)} packed sequences "
        f"against each alone: losses differ by {loss_error:.1e} (at most {tolerance:.0e}), gradients by "
        f"{gradient_error:.1e} (at most {gradient_tolerance:.0e}); other tokens in one sequence move the losses of the "
        f"others by {seen:.1e} (at most 1e-06)"
    )
    if loss_error <= tolerance and gradient_error <= gradient_tolerance and seen <= 1e-6:
        return Finding("isolation", "ok", detail)
    remedy = (
        "do not train this model with this backend: set model.attention to another, or report it with these numbers"
    )
    return Finding("isolation", "problem", detail, remedy)


def _as_in_a_run(
    lm: PreTrainedModel,
    recipe: Recipe,
    kernels: Kernels,
    device: torch.device,
    *,
    checkpointing: str,
    num_conditions: int,
) -> PackedCausalLM:
    use_kernels(lm, kernels)
    packed = PackedCausalLM(
        lm,
        attention=recipe.model.attention,
        device_type=device.type,
        checkpointing=checkpointing,
        num_conditions=num_conditions,
    ).train()
    if recipe.model.compile:
        packed.compile_parts()
    return packed


def fit_config(config: Any, room: int, dtype: torch.dtype) -> tuple[Any, str] | None:
    """The configuration, or one of fewer layers, or a narrower one, whose comparison fits `room` bytes; and its name.

    The comparison has the weights and their gradients twice. None when none fits, or none can be made.
    """
    config = config.get_text_config()
    for factor in (None, *_NARROWER):
        small = copy.deepcopy(config)
        made = f"the model in full ({config.num_hidden_layers} layers)"
        if factor is not None:
            made = f"{_reduce(small, factor)} of the model's {config.num_hidden_layers} layers"
            made += "" if factor == 1 else f", 1/{factor} as wide, vocabulary of {small.vocab_size:,}"
        try:
            size = sum(parameter.numel() for parameter in meta_model(small, dtype).parameters())
        except ValueError:
            continue
        if 3 * size * dtype.itemsize <= room:
            return small, f"{made}, random weights"
    return None


def _reduce(config: Any, factor: int) -> int:
    """Make the configuration one of few layers, and narrower by `factor`; returns the number of layers."""
    config.num_hidden_layers = min(_FEW_LAYERS, config.num_hidden_layers)
    config.pad_token_id = None  # it may be above a small vocabulary, and nothing is padded
    if (kinds := getattr(config, "layer_types", None)) is not None:
        config.layer_types = kinds[: config.num_hidden_layers]
    if factor > 1:
        config.vocab_size = min(_SMALL_VOCABULARY, config.vocab_size)
        config.intermediate_size //= factor
        config.hidden_size //= factor
        heads = max(1, config.num_attention_heads // factor)
        of_keys = max(1, (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) // factor)
        config.num_attention_heads = heads
        config.num_key_value_heads = next(number for number in range(of_keys, 0, -1) if heads % number == 0)
    return int(config.num_hidden_layers)


def _random_examples(vocab_size: int) -> list[Example]:
    random = np.random.default_rng(0)
    return [
        Example(random.integers(0, vocab_size, length).astype(np.int32), np.ones(length, np.float32))
        for length in _LENGTHS
    ]


def _batch(examples: Sequence[Example], device: torch.device) -> PackedBatch:
    return collate(examples, np.arange(len(examples))).to(device)


def _each_alone(
    lm: PreTrainedModel, examples: Sequence[Example], device: torch.device
) -> tuple[Tensor, dict[str, Tensor]]:
    """f32[B], the losses of the stock model on one sequence at a time; the gradients of their sum, taken from it."""
    lm.set_attn_implementation("eager")
    lm.train()
    losses = []
    for example in examples:
        ids = torch.from_numpy(example.input_ids.astype(np.int64)).to(device)
        logits = lm(ids[None], use_cache=False).logits[0].float()
        loss = F.cross_entropy(logits[:-1], ids[1:], reduction="sum")
        loss.backward()
        losses.append(loss.detach())
    gradients = {name: p.grad for name, p in lm.named_parameters() if p.grad is not None}
    lm.zero_grad(set_to_none=True)
    return torch.stack(losses), gradients


def _relative_error(value: Tensor, reference: Tensor) -> float:
    """The norm of the difference by that of the reference; 0 where both are 0."""
    difference, size = float((value.float() - reference.float()).norm()), float(reference.float().norm())
    return difference / size if size else difference


def _leak(packed: PackedCausalLM, examples: Sequence[Example], device: torch.device) -> float:
    """The largest relative change of a sequence's loss when the tokens of another one are changed."""
    num_ids = packed.lm.config.get_text_config().vocab_size
    worst = 0.0
    with torch.no_grad():
        before = packed(_batch(examples, device)).by_condition[0, 0]
        for changed, example in enumerate(examples):
            others = list(examples)
            others[changed] = Example((example.input_ids + 1) % num_ids, example.loss_weights)
            after = packed(_batch(others, device)).by_condition[0, 0]
            moved = ((after - before).abs() / before)[torch.arange(len(examples)) != changed]
            worst = max(worst, float(moved.max()))
    return worst


# ----------------------------------------------------------------------------------------- tokens and store


def check_special_tokens(tokenizer: ChatTokenizer) -> Finding:
    """That each special token of the template is one id, and that text which spells one is not it."""
    name, ids = tokenizer.template.name, tokenizer.special_ids
    split = {token: len(found) for token, found in zip(ids, tokenizer.encode_texts(list(ids)), strict=True)}
    shown = ", ".join(
        f"{token} = {number}{' (added)' if token in tokenizer.added else ''}, as text {split[token]} ids"
        for token, number in ids.items()
    )
    return Finding("special tokens", "ok", f"each of {name} is one id, and text that spells it is not: {shown}")


def check_token_store(recipe: Recipe, tokenizer: ChatTokenizer, config: Any, *, is_quick: bool) -> Finding:
    """That the store is there, was made for this recipe, is whole, and has something to train on."""
    again = "run python -m ochat_train.preprocess with this recipe"
    store = Path(recipe.data.store)
    if not store.exists():
        state: Literal["warning", "problem"] = "warning" if is_quick else "problem"
        return Finding("store", state, f"data.store {store} does not exist yet", again)
    try:
        train, held_out = TokenStore(store, "train"), TokenStore(store, "eval")
        check_store(recipe, train.manifest, tokenizer)
        make_run_plan(recipe, train, config, 1)
        ends = [split[len(split) - 1] for split in (train, held_out) if len(split)]  # the far end of the Arrow files
    except (OSError, ValueError, LookupError) as error:
        return Finding("store", "problem", f"{store}: {error}", again)
    assert all(len(example.input_ids) == len(example.loss_weights) for example in ends)
    detail = (
        f"{store}, {train.fingerprint[:12]}: {len(train):,} examples, {int(train.lengths.sum()):,} tokens, weight "
        f"{float(train.weight_sums.sum()):,.6g}; {len(held_out):,} held out; longest {int(train.lengths.max()):,} of "
        f"packing.tokens_per_gpu {recipe.packing.tokens_per_gpu:,}"
    )
    return Finding("store", "ok", detail)


def check_settings(
    recipe: Recipe, config: Any, size: ModelSize, store: TokenStore | None, num_processes: int
) -> Finding:
    """The peak learning rate, DeepSpeed's configuration, and what the recipe's options need.

    store: None when there is none yet, and then a learning rate of auto is not known.
    """
    try:
        deepspeed_configuration(recipe)
        check_sinks(recipe)
        if recipe.model.lora is not None:
            require_peft()
        check_options(recipe, config, size, num_processes)
        if store is None:
            return Finding("settings", "ok", f"optim.lr {recipe.optim.lr}, zero.stage {recipe.zero.stage}")
        peak_lr = peak_learning_rate(recipe, config, store.manifest, num_processes)
    except ValueError as error:
        return Finding("settings", "problem", str(error), "correct the recipe, or install what it needs, as said")
    return Finding("settings", "ok", f"peak learning rate {peak_lr:.3g}, zero.stage {recipe.zero.stage}")


# ----------------------------------------------------------------------------------------------------- disk


def check_disk(recipe: Recipe, size: ModelSize, num_steps: int | None) -> Finding:
    """The disk that the run needs at most against what is free where its folder will be.

    num_steps: of the run, for the number of light checkpoints when all stay; None: not planned.
    """
    disk = plan_disk(recipe, size, num_steps or 0)
    if disk.missing:
        return Finding("disk", "problem", disk.describe(), disk.remedy)
    if not (parent := existing_parent(disk.folder)).is_dir() or not os.access(parent, os.W_OK):
        return Finding(
            "disk", "problem", f"{parent} is no folder that can be written", "name another folder in checkpoint.dir"
        )
    return Finding("disk", "ok", disk.describe())


# ---------------------------------------------------------------------------------------------------- steps


def check_steps(table: PlanTable, measured: Rate | None, batch_rate: float | None) -> Finding:
    """Steps, and hours where a speed is known: of an earlier run, or of the micro-batch that was run, in tokens/s."""
    num_processes = table.shape.world_size
    steps = f"{table.num_steps:,} steps on {num_processes} processes, {table.num_tokens:,} tokens"
    if measured is not None:
        rate, origin = measured.tokens_per_s, f"as measured in {measured.num_steps:,} steps of checkpoint.dir"
    elif batch_rate is not None:
        rate, origin = batch_rate, "modelled on the one micro-batch run above, without optimizer and communication"
    else:
        remedy = "train a few steps with train.max_steps=20, or python -m ochat_train.report plan RECIPE tokens_per_s=X"
        return Finding("steps", "warning", f"{steps}; hours are not known, since no speed was measured", remedy)
    seconds = table.num_tokens / (rate * num_processes)
    hours = f"{show_duration(seconds)} ({seconds * num_processes / 3600:.3g} GPU hours)"
    return Finding("steps", "ok", f"{steps}, {hours} at {rate:,.0f} tokens/s a process, {origin}")


# -------------------------------------------------------------------------------------------- ports and hosts


def check_port(port: str | None) -> Finding:
    """Whether the port on which processes meet is free here: MASTER_PORT of the environment, None if it is not set."""
    if port is None:
        return Finding("port", "ok", "MASTER_PORT is not set: launch.sh takes a free one")
    remedy = "set MASTER_PORT to another, or leave it out on one machine"
    if not port.isdecimal() or not 1 <= int(port) <= 65_535:
        return Finding("port", "problem", f"MASTER_PORT {port!r} is not a number from 1 to 65535", remedy)
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", int(port)))
        except OSError as error:
            return Finding("port", "problem", f"MASTER_PORT {port} cannot be used: {error.strerror}", remedy)
    return Finding("port", "ok", f"MASTER_PORT {port} is free")


def read_hosts(hostfile: Path) -> dict[str, int]:
    """The hosts of a DeepSpeed host file and their slots. Raises ValueError with the line that is wrong."""
    hosts: dict[str, int] = {}
    try:
        lines = hostfile.read_text().splitlines()
    except OSError as error:
        raise ValueError(f"HOSTFILE {hostfile} cannot be read: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        key, _, slots = words[-1].partition("=")
        if len(words) != 2 or key != "slots" or not slots.isdecimal() or not int(slots) or words[0] in hosts:
            raise ValueError(
                f"HOSTFILE {hostfile}, line {number}: {line.strip()!r} is not HOST slots=N, each host once"
            )
        hosts[words[0]] = int(slots)
    if not hosts:
        raise ValueError(f"HOSTFILE {hostfile} names no host")
    return hosts


def check_hosts(hosts: dict[str, int], *, by_ssh: bool = True) -> Finding:
    """Whether each host has an address and, by_ssh, answers where ssh listens; all at the same time."""
    with ThreadPoolExecutor(max_workers=len(hosts)) as pool:
        tried = pool.map(_try_host if by_ssh else _find_address, hosts)
        failures = [failure for failure in tried if failure is not None]
    if failures:
        remedy = "start the host and its sshd, or correct the name in HOSTFILE or ~/.ssh/config"
        return Finding("hosts", "problem", "; ".join(failures), remedy)
    found = "answer" if by_ssh else "have an address"
    return Finding("hosts", "ok", f"all {len(hosts)} hosts {found}, {sum(hosts.values())} processes")


def _find_address(host: str) -> str | None:
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        return f"{host} has no address ({error})"
    return None


def _try_host(host: str) -> str | None:
    name, port = _ssh_address(host)
    try:
        with socket.create_connection((name, port), timeout=_REACHED_WITHIN_S):
            return None
    except OSError as error:
        return f"{host}: {name} port {port} does not answer within {_REACHED_WITHIN_S:g} s ({error})"


def _ssh_address(host: str) -> tuple[str, int]:
    """The name and the port that ssh would take, after its configuration; without ssh the host itself, and 22."""
    if shutil.which("ssh") is None:
        return host, _SSH_PORT
    said = subprocess.run(["ssh", "-G", "--", host], capture_output=True, text=True)
    settings = dict(line.split(" ", 1) for line in said.stdout.splitlines() if " " in line)
    return settings.get("hostname", host), int(settings.get("port", _SSH_PORT))


# --------------------------------------------------------------------------------------- fullest micro-batch


def find_fullest(plan: RunPlan) -> Indices:
    """The positions of the examples of the micro-batch with the most tokens, over all steps."""
    bins = (positions for step in plan.steps() for positions in step.bins)
    return max(bins, key=lambda positions: int(plan.lengths[positions].sum()))


@dataclass(frozen=True, slots=True)
class BatchRun:
    """What running the fullest micro-batch found. tokens_per_s: None when it was not run."""

    finding: Finding
    tokens_per_s: float | None = None


def run_fullest(
    recipe: Recipe, config: Any, batch: PackedBatch, plan: MemoryPlan, kernels: Kernels, row_ids: Sequence[int]
) -> BatchRun:
    """Run one micro-batch forward and backward on this machine's one GPU, or on its CPU if that takes seconds.

    row_ids: those that are trained beside adapters, if the recipe has any.
    """
    on_gpu = torch.cuda.is_available()
    size, num_tokens = plan.size, len(batch.input_ids)
    element = DTYPES[recipe.model.dtype].itemsize
    weights, flop = element * size.num_weights, 6 * size.num_weights * num_tokens
    expected = weights + element * size.num_trained + plan.activations.peak
    if torch.cuda.device_count() > 1:
        return _not_run("there are several GPUs: one of them could not hold what ZeRO splits")
    if not on_gpu and weights > plan.machine.host_bytes // 4:
        return _not_run(
            f"weights of {show_bytes(weights)} are above a quarter of the {show_bytes(plan.machine.host_bytes)} free"
        )
    if not on_gpu and flop > _CPU_FLOP:
        return _not_run(f"{flop:.1e} FLOP are above {_CPU_FLOP:.0e}, too many for a CPU")
    if not on_gpu and expected > plan.machine.host_bytes:
        return _not_run(f"it needs {show_bytes(expected)}, of which {show_bytes(plan.machine.host_bytes)} are free")
    device = torch.device("cuda" if on_gpu else "cpu")
    try:
        seconds, peak = _forward_and_backward(recipe, config, batch, device, kernels, plan.policy, row_ids)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        detail = f"{num_tokens:,} tokens: out of memory, planned {show_bytes(expected)} ({str(error).splitlines()[0]})"
        remedy = "lower packing.tokens_per_gpu, set model.checkpointing: full, or raise zero.stage"
        return BatchRun(Finding("fullest micro-batch", "problem", detail, remedy))
    detail = (
        f"{num_tokens:,} tokens in {len(batch.cu_seqlens) - 1} sequences, forward and backward in {seconds:.2f} s; "
        f"peak {'not measured' if peak is None else show_bytes(peak)}, planned {show_bytes(expected)} (weights, "
        "gradients, activations; all tokens with a loss)"
    )
    return BatchRun(Finding("fullest micro-batch", "ok", detail), num_tokens / seconds)


def _not_run(reason: str) -> BatchRun:
    remedy = "run doctor on one GPU that holds the model"
    return BatchRun(Finding("fullest micro-batch", "warning", f"not run: {reason}", remedy))


def _is_out_of_memory(error: BaseException) -> bool:
    is_told_so = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return is_told_so or "can't allocate memory" in str(error)  # the CPU's allocator


def _forward_and_backward(
    recipe: Recipe,
    config: Any,
    batch: PackedBatch,
    device: torch.device,
    kernels: Kernels,
    checkpointing: str,
    row_ids: Sequence[int],
) -> tuple[float, int | None]:
    """Seconds when warm, and bytes at most above what there was; random weights, since values change neither."""
    gc.collect()
    before = _restart_peak(device)
    lm: PreTrainedModel = AutoModelForCausalLM.from_config(config.get_text_config(), dtype=DTYPES[recipe.model.dtype])
    if lora := recipe.model.lora:
        add_adapters(lm, rank=lora.rank, alpha=lora.alpha, targets=lora.targets, row_ids=row_ids, seed=0)
    lm.to(device)  # type: ignore[arg-type]  # transformers' own signature
    num_conditions = int(batch.condition_ids.max()) + 1
    model = _as_in_a_run(lm, recipe, kernels, device, checkpointing=checkpointing, num_conditions=num_conditions)
    warm_up = batch if recipe.model.compile else collate([], [])  # a batch of nothing warms up, but compiles nothing
    for part in (warm_up.to(device), batch.to(device)):
        started = time.perf_counter()
        model(part).nll.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    if device.type == "cuda":
        return seconds, torch.cuda.max_memory_allocated()
    return seconds, None if before is None else max(
        0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    )


def _restart_peak(device: torch.device) -> int | None:
    """Begin to measure the peak anew; returns the bytes that the process has on a CPU, None if Linux forbids it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return 0
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak of the resident memory
    except OSError:
        return None
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * resource.getpagesize()
