"""On a CPU: packed against padded steps, and the loss head in chunks against full logits, in about a minute.

    python benchmarks/cpu_step.py [--repeats 3]
    python benchmarks/cpu_step.py --stages RECIPE [--steps 12]

--stages measures instead a recipe's own steps at ZeRO 0 and 2, in turns, in the two processes that launch.sh starts on
a CPU: seconds of the wall for each step after the first two, those of the processor for the whole command, and the most
memory of a process.

Packed against padded: layers of the width of a small model, micro-batches that our plan makes of ShareGPT-like lengths,
shortened alike to at most --max-tokens; padded are batches of as many conversations as fit if all had that length, in
their order, each padded to its longest. Measured in turns, on the same weights and tokens:

    whole     a whole step, each way as it is: our head sees the tokens with a loss, transformers' has full logits
    layers    forward and backward of the layers alone, up to the last hidden states, on both sides

What is gained is seconds padded / seconds packed, aimed at 0.95 of the padding ratio, tokens with padding / tokens.

The head: loss and gradients of given hidden states, of which half or all have a loss; LossHead against F.linear, float
and cross_entropy over all of them. Bytes are the most of all tensors at one time, beside hidden states and weight.

Seconds are those of the processor in one thread, which do not grow while others use the machine. All losses and
gradients must agree within 1e-5 and 1e-4, relative; sums are in another order. Numbers
are medians of pairs that ran one after the other, with the least and the most; they are written to
benchmarks/results/. Needs psutil.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import orjson
import torch
import torch.nn.functional as F
from machine import describe_machine, write_results
from measure import peak_bytes, seconds_of
from steps import Way, count_supervised, make_lm, ours, padded, twin
from torch import Tensor, nn
from train_step import clear, make_batches, make_config, padding_ratio
from transformers import PreTrainedModel

from ochat_train.files import free_port
from ochat_train.model.loss import LossHead
from ochat_train.model.packed_lm import PackedCausalLM
from ochat_train.tokens.encode import Example

CPU = torch.device("cpu")
AIM = 0.95
PACKAGES = ("torch", "transformers", "numpy")
TOLERANCES = (1e-5, 1e-4)  # of losses and of gradients, in fp32: sums of about 1e4 terms in another order


@dataclass(frozen=True, slots=True)
class Comparison:
    """Seconds of both ways, of each pair; bytes at most; how far apart loss and gradients are, relative."""

    name: str
    ours: list[float]
    others: list[float]
    our_bytes: int
    other_bytes: int
    loss: float
    gradient: float

    @property
    def gains(self) -> list[float]:
        """How many times as long the other took, of each pair."""
        return [other / mine for mine, other in zip(self.ours, self.others, strict=True)]

    @property
    def agrees(self) -> bool:
        """Whether the results are the same; NaN is not."""
        return self.loss <= TOLERANCES[0] and self.gradient <= TOLERANCES[1]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write down. Ends with 1 when results do not agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {
        "repeats": 3,
        "batches": 2,
        "width": 576,
        "heads": 9,
        "mlp": 1536,
        "vocab": 4096,
        "max-tokens": 512,
        "capacity": 2048,
        "head-tokens": 3072,
        "head-vocab": 8192,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--layers", type=int, nargs=2, default=(1, 2), help="the second is the number of layers")
    parser.add_argument("--stages", metavar="RECIPE", help="measure this recipe's steps at ZeRO 0 and 2 instead")
    parser.add_argument("--steps", type=int, default=12, help="of each run of --stages")
    parser.add_argument("--no-write", dest="write", action="store_false", help="only print")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = describe_machine(PACKAGES)
    print(orjson.dumps(results, option=orjson.OPT_INDENT_2).decode())
    if options.stages:
        results |= {"recipe": options.stages, "stages": measure_stages(options.stages, options.steps, options.repeats)}
        if options.write:
            write_results(f"cpu_stages_{Path(options.stages).stem}", results)
        return

    config = make_config(options)
    lm = make_lm(config, torch.float32, CPU)
    batches = make_batches(config, options, options.capacity)
    batch_size = options.capacity // options.max_tokens
    padding = padding_ratio(batches, batch_size)
    steps = [
        compare_ways(lm, "whole", *whole_ways(lm, batch_size), batches, options.repeats),
        compare_ways(lm, "layers", *layer_ways(lm, batch_size), batches, options.repeats),
    ]
    print(f"\npadding ratio {padding:.3f}, {batch_size} conversations in a padded batch")
    for one in steps:
        gain = median(one.gains)
        print(f"{describe(one)}: {gain / padding:.3f} of the padding ratio, {told(gain / padding >= AIM)}")
    heads = [
        compare_heads(name, options.head_tokens, options.width, options.head_vocab, share, options.repeats)
        for name, share in (("head, half", 0.5), ("head, all", 1.0))
    ]
    print(f"\n{options.head_tokens:,} hidden states of {options.width}, {options.head_vocab:,} tokens to choose from")
    for one in heads:
        print(f"{describe(one)}, memory {one.our_bytes / 1e6:,.0f} MB against {one.other_bytes / 1e6:,.0f} MB")

    results |= {
        "options": vars(options),
        "padding_ratio": padding,
        "aim": AIM,
        "comparisons": [asdict(one) | {"median_gain": median(one.gains)} for one in [*steps, *heads]],
    }
    if options.write:
        write_results("cpu_step", results)
    if wrong := [one.name for one in [*steps, *heads] if not one.agrees]:
        sys.exit(f"results do not agree: {', '.join(wrong)}")


def measure_stages(recipe: str, num_steps: int, repeats: int) -> list[dict[str, Any]]:
    """Runs of a recipe at each stage in turns; raises CalledProcessError for one that fails."""
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        store = f"data.store={folder}/store"
        subprocess.run([sys.executable, "-m", "ochat_train.preprocess", recipe, store], check=True, capture_output=True)
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "critical", "--num_gpus", "2"]
        for repeat in range(repeats):
            for stage in (0, 2):
                run = Path(folder) / f"{stage}-{repeat}"
                options = [f"zero.stage={stage}", f"checkpoint.dir={run}", f"train.max_steps={num_steps}", store]
                command = [*launcher, "--master_port", str(free_port()), "--module", "ochat_train.train", recipe]
                before = resource.getrusage(resource.RUSAGE_CHILDREN)
                subprocess.run(
                    [*command, *options], check=True, capture_output=True, env=os.environ | {"DS_ACCELERATOR": "cpu"}
                )
                after = resource.getrusage(resource.RUSAGE_CHILDREN)
                steps = [
                    event
                    for event in map(orjson.loads, (run / "metrics.jsonl").read_bytes().splitlines())
                    if event["event"] == "step"
                ]
                runs.append(
                    {
                        "stage": stage,
                        "seconds": [event["seconds"] for event in steps[2:]],
                        "processor_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
                        "peak_memory_bytes": max(event["peak_memory_bytes"] for event in steps),
                        "losses": [event["loss"] for event in steps],
                    }
                )
                print(
                    f"stage {stage}: {median(runs[-1]['seconds']):.3f} s a step, {runs[-1]['processor_seconds']:.1f} s "
                    f"of the processor, {runs[-1]['peak_memory_bytes'] / 2**30:.2f} GiB",
                    flush=True,
                )
    return runs


def describe(one: Comparison) -> str:
    """Times, gain and agreement."""
    times = f"{1000 * median(one.ours):,.0f} ms against {1000 * median(one.others):,.0f} ms"
    gained = f"gained {median(one.gains):.3f} ({min(one.gains):.3f} to {max(one.gains):.3f})"
    return f"{one.name:12} {times}, {gained}; loss {one.loss:.0e}, gradient {one.gradient:.0e}"


def told(is_met: bool) -> str:
    """The aim."""
    return f"aim {AIM:g} {'met' if is_met else 'MISSED'}"


# --------------------------------------------------------------------------------------------- packed and padded


def whole_ways(lm: PreTrainedModel, batch_size: int) -> tuple[Way, Way]:
    """Ours, and padded."""
    num_layers = lm.config.num_hidden_layers
    mine = ours(lm, num_layers=num_layers, attention="sdpa", policy="none", kernels="none", is_compiled=False)
    return mine, padded(lm, policy="none", batch_size=batch_size)


def layer_ways(lm: PreTrainedModel, batch_size: int) -> tuple[Way, Way]:
    """The same up to the last hidden states, whose squares are what is minimised."""
    whole, padded_whole = whole_ways(lm, batch_size)
    packed = PackedCausalLM(
        twin(lm), attention="sdpa", device_type="cpu", checkpointing="none", num_conditions=1
    ).train()
    plain = twin(lm)

    def packed_loss(part: Any) -> Tensor:
        batch, _ = part
        return packed.hidden(batch).square().mean(dim=1).sum()

    def padded_loss(part: Any) -> Tensor:
        mask = part["attention_mask"]
        states = plain.model(input_ids=part["input_ids"], attention_mask=mask, use_cache=False).last_hidden_state
        return (states.square().mean(dim=2) * mask).sum()

    num_layers = lm.config.num_hidden_layers
    return (
        Way("packed layers", num_layers, whole.prepare, packed_loss),
        Way("padded layers", num_layers, padded_whole.prepare, padded_loss),
    )


def compare_ways(
    lm: PreTrainedModel, name: str, mine: Way, other: Way, batches: Sequence[Sequence[Example]], repeats: int
) -> Comparison:
    """Both ways in turns, over all micro-batches."""
    assert all(count_supervised(examples) for examples in batches)
    inputs = [(mine.prepare(examples), other.prepare(examples)) for examples in batches]
    known = [tensor for parameter in lm.parameters() for tensor in (parameter.data, parameter.grad)]
    found = []
    for way, parts in zip((mine, other), inputs[0], strict=True):
        clear(lm)
        loss = float(way.step(parts))
        gradient = torch.cat([parameter.grad.flatten() for parameter in lm.parameters()])
        clear(lm)
        found.append((loss, gradient, peak_bytes(partial(way.step, parts), CPU, known)))
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for of_ways in inputs:
            for way, parts, column in zip((mine, other), of_ways, seconds, strict=True):
                clear(lm)
                column.append(seconds_of(partial(way.step, parts), CPU, time.process_time))
    return comparison(name, seconds, found)


def comparison(
    name: str, seconds: tuple[list[float], list[float]], found: Sequence[tuple[float, Tensor, int]]
) -> Comparison:
    """found: loss, gradient and bytes of ours and of the other."""
    (loss, gradient, size), (other_loss, other_gradient, other_size) = found
    return Comparison(
        name,
        *seconds,
        our_bytes=size,
        other_bytes=other_size,
        loss=abs(loss / other_loss - 1),
        gradient=float((gradient - other_gradient).norm() / other_gradient.norm()),
    )


# ----------------------------------------------------------------------------------------------------------- head


def compare_heads(name: str, num_tokens: int, width: int, vocab_size: int, share: float, repeats: int) -> Comparison:
    """LossHead and full logits in turns; share: of the tokens that have a loss."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, width, generator=generator).requires_grad_()
    head = nn.Linear(width, vocab_size, bias=False)
    nn.init.normal_(head.weight, std=0.02, generator=generator)
    labels = torch.randint(vocab_size, (num_tokens,), generator=generator)
    weights = (torch.rand(num_tokens, generator=generator) < share).float()
    conditions = torch.zeros(num_tokens, dtype=torch.int32)
    ours = LossHead(head, softcap=None, num_conditions=1).train()
    positions = weights.nonzero().squeeze(1)

    def chunked() -> Tensor:
        return ours(hidden, labels, weights, conditions, positions).nll

    def full() -> Tensor:
        logits = F.linear(hidden, head.weight).float()
        return (F.cross_entropy(logits, labels, reduction="none") * weights).sum()

    def step(loss: Callable[[], Tensor]) -> float:
        hidden.grad = head.weight.grad = None
        value = loss()
        value.backward()
        return float(value.detach())

    found = []
    for way in (chunked, full):
        loss = step(way)
        gradient = torch.cat([hidden.grad.flatten(), head.weight.grad.flatten()])
        known = [hidden, head.weight, labels, weights, conditions]
        size = peak_bytes(partial(step, way), CPU, known) - sum(tensor.nbytes for tensor in known)
        found.append((loss, gradient, size))
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for way, column in zip((chunked, full), seconds, strict=True):
            column.append(seconds_of(partial(step, way), CPU, time.process_time))
    return comparison(name, seconds, found)


if __name__ == "__main__":
    main()
