"""The host memory at most while the processes of a node load a model: each for itself, and one for all.

    python benchmarks/loading.py [--processes 4] [--layers 12]

The base has float16 weights in safetensors, as Llama 2 has them, and is trained in bfloat16. Measured is the sum of the
processes' PSS, in which memory that several share counts once, above what they had before: until the model is ready to
be moved to its device, and, for ZeRO 3, until its weights are split. All is on the CPU; the parts of the split weights
would else be on the GPUs. Results are printed and written to benchmarks/results/.
"""

import argparse
import os
import re
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}

import torch
import torch.distributed as dist
from machine import describe_machine, write_results
from transformers import AutoConfig, AutoModelForCausalLM

from ochat_train.model.pretrained import load_model
from ochat_train.training.engine import deepspeed_config, join_process_group, read_world, split_weights
from ochat_train.training.loading import load_once

VOCABULARY, WIDTH = 32_000, 1024
MIB = 2**20


def main() -> None:
    """Measure both ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--layers", type=int, default=12)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model_bytes = make_base(folder, options.layers)
        results: dict[str, Any] = {
            **describe_machine(["torch", "transformers", "deepspeed", "safetensors"]),
            "processes": options.processes,
            "model_mib": round(model_bytes / MIB),
        }
        load = partial(load_model, folder, None, dtype="bfloat16", num_ids=VOCABULARY + 2, added_ids=[5], seed=0)
        for stage in (2, 3):
            for name, is_once in (("each", False), ("once", True)):
                peak = measure(partial(load_and_split, load, stage, is_once), options.processes)
                results[f"stage {stage}, {name}, mib"] = round(peak / MIB)
                print(f"zero.stage {stage}, loaded {name}: {peak / MIB:,.0f} MiB, {peak / model_bytes:.2f} models")
    write_results("loading", results)


def make_base(folder: str, num_layers: int) -> int:
    """Write a base in float16; returns the bytes of its weights."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2816,
        num_hidden_layers=num_layers,
        num_attention_heads=8,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    model.save_pretrained(folder, max_shard_size="100MB")
    return sum(parameter.nbytes for parameter in model.parameters())


def load_and_split(load: Callable[[], Any], stage: int, is_once: bool) -> Any:
    """What a rank does."""
    model = load_once(load, read_world()) if is_once else load()
    if stage == 3:
        options = {"offload": "none", "dtype": "bfloat16", "grad_accum": 1, "grad_clip": 1.0, "extra": {}}
        split_weights(model, deepspeed_config(stage=3, **options))
    return model


def measure(action: Callable[[], Any], num_processes: int) -> int:
    """The sum of the processes' PSS at most, in bytes, above that before the action."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    gate, opened = os.pipe()
    ready_end, ready = os.pipe()
    pids = []
    for rank in range(num_processes):
        if (pid := os.fork()) == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ |= {"WORLD_SIZE": str(num_processes), "LOCAL_SIZE": str(num_processes)}
            try:
                join_process_group(read_world())
                os.write(ready, b".")
                os.read(gate, 1)
                model = action()
                dist.barrier()
                time.sleep(0.5)  # to be measured
                del model
            except BaseException as error:
                print(f"rank {rank}: {error!r}", file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        pids.append(pid)
    for _ in pids:
        os.read(ready_end, 1)
    before = peak = pss(pids)
    os.write(opened, b"." * num_processes)
    left = set(pids)
    while left:
        peak = max(peak, pss(pids))
        for pid in tuple(left):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                left.remove(pid)
                assert status == 0, f"a process ended with {status}"
    return peak - before


def pss(pids: list[int]) -> int:
    """Bytes of these processes, each page divided by the number of processes that have it."""
    total = 0
    for pid in pids:
        with suppress(OSError, AttributeError, TypeError):  # it has ended
            found = re.search(r"^Pss: +(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
            total += int(found[1]) * 1024  # type: ignore[index]
    return total


if __name__ == "__main__":
    main()
