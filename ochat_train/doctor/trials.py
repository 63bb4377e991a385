"""The checks of doctor that run a model: whether packed sequences see each other, and the fullest micro-batch."""

import gc
import os
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ochat_train.doctor.case import GIB, Case, Finding
from ochat_train.model.checkpointing import tile_mlps
from ochat_train.model.kernels import use_kernels
from ochat_train.model.lora import add_adapters
from ochat_train.model.packed_lm import PackedCausalLM
from ochat_train.model.pretrained import DTYPES, meta_model, shrink_config
from ochat_train.model.text_part import auto_class, is_multimodal, keep_text_part, set_attention
from ochat_train.tokens.batch import PackedBatch, collate
from ochat_train.tokens.encode import Example
from ochat_train.tokens.order import Indices
from ochat_train.tokens.plan import RunPlan
from ochat_train.training.engine import is_out_of_memory
from ochat_train.training.resources import kind_of, show_bytes

_CPU_FLOP = 1e13  # minutes on a few cores
_MEASURED_S = 1.0
_LENGTHS = (7, 33, 70, 18)  # of the sequences that are compared
_NARROWER = (2, 4, 8, 16)
_CPU_COMPARED = GIB  # on a CPU a larger model would take minutes
_SMALL_VOCABULARY = 8192


# ----------------------------------------------------------------------------------------------- isolation


def check_isolation(case: Case) -> Finding:
    """Packed sequences against each alone in transformers' own layers, and whether any sees another.

    On a GPU in the recipe's dtype, on a CPU in float32. Each sequence has a condition of its own, so that the sums by
    condition are the losses of sequences.
    """
    on_gpu = case.device.type == "cuda"
    dtype = DTYPES[case.recipe.model.dtype] if on_gpu else torch.float32
    room = (case.machine.gpu_bytes or 0) // 2 if on_gpu else min(case.machine.host_bytes // 8, _CPU_COMPARED)
    config = case.config
    small = fit_config(config, room, dtype)
    if small is None:
        detail = f"{config.model_type} was not compared: no smaller copy of it fits {show_bytes(room)}"
        return Finding("warning", detail, "run doctor where more memory is free")
    torch.manual_seed(case.recipe.train.seed)
    lm = keep_text_part(auto_class(config).from_config(small.config, dtype=dtype))
    lm.to(case.device)  # type: ignore[arg-type]  # transformers' own signature
    examples = _random_examples(small.config.get_text_config().vocab_size)
    alone = _run_each_alone(lm, examples)
    # The copy may have too few layers for every_N.
    policy = "none" if case.recipe.model.checkpointing == "none" else "full"
    packed = _pack_as_in_a_run(case, lm, checkpointing=policy, num_conditions=len(examples))
    sums = packed(_batch(examples).to(case.device))
    sums.nll.backward()
    loss_error = _relative_error(sums.by_condition.weighted.nll, alone.losses)
    gradient_error = max(
        _relative_error(parameter.grad, alone.gradients[name])
        for name, parameter in packed.lm.named_parameters()
        if parameter.grad is not None
    )
    leak = _largest_leak(packed, examples)
    # A layer has some ten operations in a row, each of 6e-8 in float32 and 4e-3 in bfloat16, and as many backwards. A
    # sequence that sees another one is off by more than 1e-2 in float32.
    tolerance, gradient_tolerance = (1e-4, 1e-3) if dtype == torch.float32 else (3e-2, 2e-1)
    detail = (
        f"{small.made}, {str(dtype).removeprefix('torch.')}, {packed.attention.backend}, {len(examples)} packed "
        f"sequences against each alone: losses differ by {loss_error:.1e} (at most {tolerance:.0e}), gradients by "
        f"{gradient_error:.1e} (at most {gradient_tolerance:.0e}); other tokens in one sequence move the losses of the "
        f"others by {leak:.1e} (at most 1e-06)"
    )
    if loss_error <= tolerance and gradient_error <= gradient_tolerance and leak <= 1e-6:
        return Finding("ok", detail)
    remedy = "do not train this model with this backend: set model.attention to another, or report these numbers"
    return Finding("problem", detail, remedy)


class SmallConfig(NamedTuple):
    """A configuration, and in words how it was made of the recipe's."""

    config: Any
    made: str


def fit_config(config: Any, room: int, dtype: torch.dtype) -> SmallConfig | None:
    """The configuration, or one of fewer layers, or a narrower one, whose comparison fits `room` bytes.

    The comparison has the weights and their gradients twice. None when none fits, or none can be made.
    """
    text, few = config.get_text_config(), shrink_config(config)
    layers = f"of the model's {text.num_hidden_layers} layers"
    candidates = [
        SmallConfig(config, f"the model in full ({text.num_hidden_layers} layers)"),
        SmallConfig(few, f"{few.get_text_config().num_hidden_layers} {layers}"),
    ]
    for factor in _NARROWER:
        num_heads = max(1, text.num_attention_heads // factor)
        small = shrink_config(config, num_heads=num_heads, vocab_size=_SMALL_VOCABULARY)
        of_small = small.get_text_config()
        made = f"{of_small.num_hidden_layers} {layers}, 1/{factor} as wide, vocabulary of {of_small.vocab_size:,}"
        candidates.append(SmallConfig(small, made))
    for candidate in candidates:
        try:
            size = sum(parameter.numel() for parameter in meta_model(candidate.config, dtype).parameters())
        except ValueError:
            continue
        if 3 * size * dtype.itemsize <= room:
            return candidate._replace(made=f"{candidate.made}, random weights")
    return None


def _random_examples(vocab_size: int) -> list[Example]:
    random = np.random.default_rng(0)
    return [
        Example(random.integers(0, vocab_size, length).astype(np.int32), np.ones(length, np.float32))
        for length in _LENGTHS
    ]


def _batch(examples: Sequence[Example]) -> PackedBatch:
    return collate(examples, np.arange(len(examples)))


class _Alone(NamedTuple):
    """losses: f32[B], of each sequence. gradients: of their sum, by the parameters' names."""

    losses: Tensor
    gradients: dict[str, Tensor]


def _run_each_alone(lm: PreTrainedModel, examples: Sequence[Example]) -> _Alone:
    """The stock model on one sequence at a time; no gradients are left in it."""
    set_attention(lm, "eager")
    lm.train(not is_multimodal(lm.config))  # some want to know in training which tokens are pictures
    losses = []
    for example in examples:
        ids = torch.from_numpy(example.input_ids.astype(np.int64)).to(lm.device)
        logits = lm(ids[None], use_cache=False).logits[0].float()
        loss = F.cross_entropy(logits[:-1], ids[1:], reduction="sum")
        loss.backward()
        losses.append(loss.detach())
    gradients = {name: p.grad for name, p in lm.named_parameters() if p.grad is not None}
    lm.zero_grad(set_to_none=True)
    return _Alone(torch.stack(losses), gradients)


def _relative_error(value: Tensor, reference: Tensor) -> float:
    """The norm of the difference by that of the reference; 0 where both are 0."""
    difference, size = float((value.float() - reference.float()).norm()), float(reference.float().norm())
    return difference / size if size else difference


def _largest_leak(packed: PackedCausalLM, examples: Sequence[Example]) -> float:
    """The largest relative change of a sequence's loss when the tokens of another one are changed."""
    num_ids, device = packed.lm.config.get_text_config().vocab_size, packed.lm.device
    largest = 0.0
    with torch.no_grad():
        before = packed(_batch(examples).to(device)).by_condition.weighted.nll
        for changed, example in enumerate(examples):
            others = list(examples)
            others[changed] = Example((example.input_ids + 1) % num_ids, example.loss_weights)
            after = packed(_batch(others).to(device)).by_condition.weighted.nll
            moved = ((after - before).abs() / before)[torch.arange(len(examples)) != changed]
            largest = max(largest, float(moved.max()))
    return largest


def _pack_as_in_a_run(case: Case, lm: PreTrainedModel, *, checkpointing: str, num_conditions: int) -> PackedCausalLM:
    """The model with the recipe's kernels, attention and compiling, as training has it."""
    use_kernels(lm, case.kernels.kernels)
    tile_mlps(lm, case.recipe.model.mlp_tiles)
    packed = PackedCausalLM(
        lm,
        attention=case.attention.backend,
        device_type=case.device.type,
        checkpointing=checkpointing,
        num_conditions=num_conditions,
    ).train()
    if case.recipe.model.compile:
        packed.compile_parts()
    return packed


# --------------------------------------------------------------------------------------- fullest micro-batch


def check_fullest(case: Case) -> Finding:
    """One micro-batch, forward and backward, on this machine's one GPU, or on its CPU if that takes seconds."""
    plan, free = case.memory, case.machine.host_bytes
    element = DTYPES[case.recipe.model.dtype].itemsize
    positions = find_fullest(case.plan)
    num_tokens = int(case.store.lengths[positions].sum())
    weights = case.size.weight_bytes(element)
    flop = 6 * case.size.num_weights * num_tokens
    expected = weights + element * case.size.num_trained + plan.activations.peak
    obstacle = None
    if not case.machine.is_here:
        obstacle = "the GPUs that this is planned for are not here"
    elif case.recipe.packing.sequence_parallel > 1:
        obstacle = "packing.sequence_parallel divides it among GPUs, and one of them could not hold it"
    elif torch.cuda.device_count() > 1:
        obstacle = "there are several GPUs: one of them could not hold what ZeRO splits"
    elif case.device.type == "cpu" and weights > free // 4:
        obstacle = f"weights of {show_bytes(weights)} are above a quarter of the {show_bytes(free)} free"
    elif case.device.type == "cpu" and flop > _CPU_FLOP:
        obstacle = f"{flop:.1e} FLOP are above {_CPU_FLOP:.0e}, too many for a CPU"
    elif case.device.type == "cpu" and expected > free:
        obstacle = f"it needs {show_bytes(expected)}, of which {show_bytes(free)} are free"
    if obstacle is not None:
        return Finding("warning", f"not run: {obstacle}", "run doctor on one GPU that holds the model")
    batch = collate([case.store[position] for position in positions.tolist()], case.store.condition_ids[positions])
    try:
        used = _forward_and_backward(case, batch)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        detail = f"{num_tokens:,} tokens: out of memory, planned {show_bytes(expected)} ({str(error).splitlines()[0]})"
        remedy = "lower packing.tokens_per_gpu, set model.checkpointing: full, or raise zero.stage"
        return Finding("problem", detail, remedy)
    case.tokens_per_s = num_tokens / used.seconds
    return Finding(
        "ok",
        f"{num_tokens:,} tokens in {len(positions)} sequences, forward and backward in {used.seconds:.3g} s (median of "
        f"{used.num_passes}); peak {'not measured' if used.peak is None else show_bytes(used.peak)}, planned "
        f"{show_bytes(expected)} (weights, gradients, activations; all tokens with a loss)",
    )


def find_fullest(plan: RunPlan) -> Indices:
    """The positions of the examples of the micro-batch with the most tokens, over all steps."""
    bins = (positions for step in plan.steps() for positions in step.bins)
    return max(bins, key=lambda positions: int(plan.lengths[positions].sum()))


class _Used(NamedTuple):
    """seconds: the median of the passes when warm. peak: the most bytes beyond what was there before; None: unknown."""

    seconds: float
    peak: int | None
    num_passes: int


def _forward_and_backward(case: Case, batch: PackedBatch) -> _Used:
    """What the micro-batch takes; random weights, since values change neither.

    The first pass of a process allocates and chooses kernels, and takes many times as long as later ones. So it is for
    the peak, and passes after it are timed for about a second, on a CPU with the threads that a process of the run has.
    """
    model, device = case.recipe.model, case.device
    gc.collect()
    before = _restart_peak(device)
    lm = keep_text_part(auto_class(case.config).from_config(case.config, dtype=DTYPES[model.dtype]))
    if lora := model.lora:
        add_adapters(
            lm,
            rank=lora.rank,
            alpha=lora.alpha,
            targets=lora.targets,
            row_ids=case.row_ids,
            seed=0,
            kind=kind_of(lora, device),
        )
    lm.to(device)  # type: ignore[arg-type]  # transformers' own signature
    num_conditions = int(batch.condition_ids.max()) + 1
    packed = _pack_as_in_a_run(case, lm, checkpointing=case.memory.policy, num_conditions=num_conditions)
    warm_up = batch if model.compile else collate([], [])  # a batch of nothing warms up, but compiles nothing
    for part in (warm_up.to(device), batch.to(device)):
        _time_pass(packed, part)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    if before is not None and device.type == "cpu":
        peak = max(0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)
    num_threads = torch.get_num_threads()
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // case.num_processes))  # as training does
    seconds: list[float] = []
    try:
        while sum(seconds) < _MEASURED_S:
            seconds.append(_time_pass(packed, batch.to(device)))
    finally:
        torch.set_num_threads(num_threads)
    return _Used(median(seconds), peak, len(seconds))


def _time_pass(packed: PackedCausalLM, batch: PackedBatch) -> float:
    """The seconds of a forward and a backward pass."""
    started = time.perf_counter()
    packed(batch).nll.backward()
    if packed.lm.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _restart_peak(device: torch.device) -> int | None:
    """Start to measure the peak again; returns the bytes that the process has on a CPU, None if Linux forbids it."""
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
