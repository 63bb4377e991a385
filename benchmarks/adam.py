"""AdamW on a CPU: torch's, torch's fused one, and DeepSpeed's, which is compiled at its first use (--deepspeed).

    python benchmarks/adam.py [--sizes N ...] [--repeats N] [--deepspeed]

Each updates N fp32 weights, in one tensor as ZeRO's partitions are, and with `bf16`, then copies them to bf16 weights,
as mixed precision and offload do. They run in turns in one thread, after a step that is not counted; nanoseconds of the
processor a weight. The weights after all steps are compared with those of the first way, the largest difference in
units of the learning rate. Numbers are printed and written to benchmarks/results/. --deepspeed needs a C++ compiler,
ninja and Python's headers.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from machine import describe_machine, write_results
from measure import seconds_of
from torch import nn

CPU = torch.device("cpu")
OPTIONS: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-5, "weight_decay": 0.1}


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000, 40_000_000])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--deepspeed", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ways: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "torch": torch.optim.AdamW,
        "torch fused": lambda *args, **kwargs: torch.optim.AdamW(*args, **kwargs, fused=True),
    }
    if options.deepspeed:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        ways["deepspeed"] = DeepSpeedCPUAdam
    results = describe_machine(("torch", "deepspeed")) | {"sizes": []}
    print(f"{'weights':>12}{'dtype':>6}", *(f"{name:>24}" for name in ways), "   apart")
    for size in options.sizes:
        for dtype in (torch.float32, torch.bfloat16):
            seconds, apart = measure(ways, size, dtype, options.repeats)
            found = [[1e9 / size * part for part in (median(times), min(times), max(times))] for times in seconds]
            short = str(dtype).removeprefix("torch.").replace("float", "f")
            shown = [f"{middle:8.2f} ({low:.2f} to {high:.2f})".rjust(24) for middle, low, high in found]
            print(f"{size:>12,}{short:>6}", *shown, f"{apart:8.1e}", flush=True)
            medians = dict(zip(ways, found, strict=True))
            results["sizes"].append({"weights": size, "dtype": short, "ns_a_weight": medians, "apart": apart})
    write_results("adam", results)


def measure(
    ways: dict[str, Callable[..., torch.optim.Optimizer]], size: int, dtype: torch.dtype, repeats: int
) -> tuple[list[list[float]], float]:
    """Seconds of each repeat of each way, and how far apart the weights are at the end, in learning rates."""
    torch.manual_seed(0)
    start, gradient = torch.randn(size), torch.randn(size)
    masters = [nn.Parameter(start.clone()) for _ in ways]
    weights = torch.empty(size, dtype=dtype)
    optimizers = [way([master], **OPTIONS) for way, master in zip(ways.values(), masters, strict=True)]

    def step(optimizer: torch.optim.Optimizer) -> None:
        (master,) = optimizer.param_groups[0]["params"]
        master.grad = gradient
        optimizer.step()
        if dtype != torch.float32:
            weights.copy_(master.detach())

    seconds: list[list[float]] = [[] for _ in ways]
    for repeat in range(1 + repeats):
        for times, optimizer in zip(seconds, optimizers, strict=True):
            taken = seconds_of(partial(step, optimizer), CPU, time.process_time)
            if repeat:
                times.append(taken)
    apart = max(float((master - masters[0]).detach().abs().max()) for master in masters) / OPTIONS["lr"]
    return seconds, apart


if __name__ == "__main__":
    main()
