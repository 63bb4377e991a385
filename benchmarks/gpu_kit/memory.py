"""Stage: whole steps of the engine: planned against allocated memory, waits of the host, share of the peak.

    python -m benchmarks.gpu_kit.memory FILE PRESET

Layers of Llama-2-13B with the whole vocabulary, ZeRO-2 in one process, the optimizer included, on micro-batches of
different sizes, as train_step.py makes them. On a CPU no allocator is asked, and memory is only planned.
"""

import argparse
import gc
import json
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import train_step as benchmark
from measure import find_waits, product_peak, seconds_of
from steps import count_supervised, make_lm

from ochat_train.model.activations import count_activations
from ochat_train.model.kernels import choose_kernels, use_kernels
from ochat_train.model.memory import ZeroSetting, measure_size, memory_needs
from ochat_train.model.packed_lm import PackedCausalLM
from ochat_train.recipe import OptimSection
from ochat_train.tokens.batch import CUDA_MULTIPLE, collate
from ochat_train.training.engine import (
    deepspeed_config,
    join_process_group,
    make_engine,
    make_optimizer,
    read_world,
    train_step,
)

OPTIONS = {
    "gpu": ["--preset", "13b", "--layers", "2", "4", "--batches", "3"],
    "cpu": ["--preset", "cpu", "--width", "64", "--compared", "512", "--max-tokens", "128", "--batches", "2"],
}
POLICIES = {"gpu": ("full", "none", "every_2"), "cpu": ("full",)}
REPEATS = 2  # passes over all micro-batches, after one that makes states and workspaces


def main() -> None:
    """Run the policies, write each as it ends."""
    file, preset = Path(sys.argv[1]), sys.argv[2]
    options = benchmark.parse(OPTIONS[preset])
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    join_process_group(read_world())
    t = options.compared
    sizes = [(t, options.width, options.mlp), (t, options.mlp, options.width), (t, options.width, options.width)]
    found: dict[str, Any] = {"product_peak_tflops": product_peak(sizes, dtype, device) / 1e12, "engines": []}
    for policy in POLICIES[preset]:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        one: dict[str, Any] = {"policy": policy, "failure": ""}
        try:
            one |= measure(policy, options, 1e12 * found["product_peak_tflops"])
        except (RuntimeError, MemoryError) as error:
            one["failure"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        found["engines"].append(one)
        file.write_text(json.dumps(found, indent=1))
        print(one, flush=True)
    sys.exit(any(one["failure"] for one in found["engines"]))


def measure(policy: str, options: argparse.Namespace, peak: float) -> dict[str, Any]:
    """One engine: its memory, and its steps in turns over the micro-batches."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    is_gpu = device.type == "cuda"
    config = benchmark.make_config(options)
    examples = benchmark.make_batches(config, options, options.compared)
    before = torch.cuda.memory_allocated() if is_gpu else 0
    lm = make_lm(config, dtype, device)
    for parameter in lm.parameters():
        parameter.grad = None
    kernels = choose_kernels("auto", config, device=device, dtype=dtype, is_compiled=False).kernels
    use_kernels(lm, kernels)
    model = PackedCausalLM(lm, attention="auto", device_type=device.type, checkpointing=policy, num_conditions=1)
    zero = {"stage": 2, "offload": "none", "dtype": options.dtype, "grad_accum": 1, "grad_clip": 1.0}
    engine = make_engine(model, make_optimizer(model, OptimSection(), lr=1e-5), deepspeed_config(**zero, extra={}))
    multiple = CUDA_MULTIPLE if is_gpu else 1
    batches = [collate(each, [0] * len(each), multiple=multiple).pin(device) for each in examples]

    def step(number: int) -> None:
        batch = batches[number]
        sums = {"weight_sum": float(batch.loss_weights.sum()), "num_tokens": batch.num_tokens}
        train_step(engine, [batch], **sums, world_size=1, lr=1e-5, mark=lambda phase: None)

    for number in range(len(batches)):
        step(number)
    if is_gpu:
        torch.cuda.reset_peak_memory_stats()
    rates, shares = [], []
    for number in [*range(len(batches))] * REPEATS:
        seconds = seconds_of(partial(step, number), device)
        lengths = [len(example.input_ids) for example in examples[number]]
        num_tokens, pairs = sum(lengths), sum(length**2 for length in lengths)
        flops = options.layers[1] * benchmark.layer_flops(config, num_tokens, pairs)
        flops += 6 * config.vocab_size * config.hidden_size * count_supervised(examples[number])
        rates.append(num_tokens / seconds)
        shares.append(flops / seconds / peak)
    allocated = torch.cuda.max_memory_allocated() - before if is_gpu else None
    reserved = torch.cuda.max_memory_reserved() if is_gpu else None
    waits = find_waits(partial(step, 0), device)
    attention = model.attention.backend
    engine.destroy()
    counted = {"num_tokens": max(len(batch.input_ids) for batch in batches), "dtype": options.dtype}
    activations = count_activations(config, checkpointing=policy, **counted)
    needs = memory_needs(
        measure_size(config, lora_rank=None), activations, ZeroSetting(2, False, 1, options.dtype), on_gpu=is_gpu
    )
    return {
        "attention": attention,
        "kernels": kernels,
        "planned_bytes": needs.total,
        "allocated_bytes": allocated,
        "reserved_bytes": reserved,
        "waits": Counter(waits),
        "tokens_per_s": median(rates),
        "of_product_peak": median(shares),
    }


if __name__ == "__main__":
    main()
