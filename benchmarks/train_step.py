"""How fast one GPU trains layers of Llama-2-13B on packed conversations, ours beside others' ways, in one run.

    python benchmarks/train_step.py                      on a GPU, 10 minutes at most (see --minutes)
    python benchmarks/train_step.py --preset cpu         the same code on small shapes, to try it; 2 minutes

The measured step is forward and backward over one packed micro-batch, gradients added up into buffers that stay, as an
engine's do: without optimizer and communication, which are measured or calculated on their own, and without copying
tokens to the device. The model has the embedding and the head of the whole vocabulary and a few layers; since it is
also measured with fewer layers, the time of one layer, and that of embedding and head, follow. Weights are random.

Micro-batches are those that our plan of 8 ranks makes of ShareGPT-like lengths; about half of the tokens, in turns,
have a loss, of weight 1, so that all ways can compute it. See steps.py for the ways. All of one capacity and
checkpointing are measured in turns, on the same weights and tokens, after steps that do not count. Their losses, and
the gradients of some norms, must agree with ours, or the run fails; how closely is in TOLERANCES.

What the columns say, medians over all steps, with the quarters around them:

    tokens/s      tokens of a step / seconds, padding never counted
    layer tok/s   tokens / what one layer more takes
    TFLOP/s       6 FLOP a weight and token for layers, and for the head where there is a loss, and causal attention;
                  what checkpointing repeats is not counted
    of peak       of the fastest matrix product that was measured in the same run
    GB, planned   the most memory at one time, and what model/activations.py says of it
    waits         how often the host waits for the device in a step; on a CPU, operations that would make it wait
    40 layers     tokens/s of a GPU of 8 that train the whole model: 40 layers by the time of one, embedding and head;
                  the optimizer that training makes, over an eighth of the weights; the copies through buckets into
                  fp32 sums of training's own engine (ZeRO-2), over all of them; ZeRO-2's communication, none of it
                  hidden, as training/speed.py calculates it. +- is the extrapolation's error: the quarters of the time
                  of a layer, over the 36 layers that were not measured.

A configuration that runs out of memory, or cannot run here, is reported, and the others go on. Liger's kernels are in
ours and in transformers' where they can run, each beside the same without them. All numbers are written to
benchmarks/results/ after each repetition, the speeds as lines for the table in training/speed.py. Needs psutil.
"""

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import orjson
import torch
from machine import describe_machine, results_file, write_results
from measure import count_waits, peak_bytes, product_peak, seconds_of
from packing import sharegpt_like
from steps import (
    Way,
    count_padded,
    count_supervised,
    flattened,
    make_lm,
    ours,
    padded,
    upstream,
)
from transformers import LlamaConfig, PreTrainedModel

from ochat_train.model.activations import count_activations
from ochat_train.model.memory import ZeroSetting
from ochat_train.model.packed_lm import PackedCausalLM
from ochat_train.model.pretrained import matrix_weights_of, quadratic_length_of
from ochat_train.recipe import OptimSection
from ochat_train.tokens.batch import collate
from ochat_train.tokens.encode import Example
from ochat_train.tokens.order import DataOrder
from ochat_train.tokens.plan import PlanShape, plan_epoch
from ochat_train.training.engine import (
    deepspeed_config,
    join_process_group,
    make_engine,
    make_optimizer,
    read_world,
)
from ochat_train.training.speed import A100, BANDWIDTHS, Speed, bytes_sent, peak_flops

SEED = 0
NUM_EXAMPLES = 20_000
WORLD_SIZE = 8  # of the plan, and of the extrapolation
WHOLE = 40  # layers
TURN = 200  # tokens with a loss, then as many without, in the mean
PACKAGES = ("torch", "transformers", "numpy")
OPTIONAL_PACKAGES = ("flash-attn", "liger-kernel", "triton")

# How far a way may be from ours, relative: its loss, and the gradient of a norm as a vector. In fp32 sums are added in
# another order, over 1e4 tokens and a few layers. In bf16 each activation is rounded to 2^-9, here and there
# differently: a mean over thousands of tokens keeps little of it, a gradient about the square root of the layers times
# 2^-9 to 2^-7. Upstream's loss in bf16 rounds each token's loss, their sum, the number of tokens and the quotient to
# 2^-9 of itself: up to 2^-7 in all. A token that sees another conversation changes gradients by tens of per cent.
TOLERANCES = {
    (torch.float32, False): (1e-5, 1e-4),
    (torch.float32, True): (1e-5, 1e-4),
    (torch.bfloat16, False): (5e-4, 0.03),
    (torch.bfloat16, True): (2**-7, 0.05),
}


@dataclass(frozen=True, slots=True)
class Shape:
    """What is measured by default."""

    layers: tuple[int, int]
    width: int
    heads: int
    mlp: int
    vocab: int
    max_tokens: int
    capacities: tuple[int, ...]
    compared: int  # the capacity at which others are measured, too
    dtype: str


PRESETS = {
    "13b": Shape((2, 4), 5120, 40, 13_824, 32_002, 4096, (32_768, 36_864, 16_384, 8192), 32_768, "bfloat16"),
    "cpu": Shape((1, 2), 256, 4, 688, 4096, 512, (2048,), 2048, "float32"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure everything, print the tables and write the numbers down. Ends with 1 when losses do not agree."""
    options = parse(arguments)
    device = torch.device(options.device)
    dtype = getattr(torch, options.dtype)
    results = describe_machine(PACKAGES, OPTIONAL_PACKAGES, device.type)
    print(orjson.dumps(results, option=orjson.OPT_INDENT_2).decode())
    config = make_config(options)
    t = options.compared
    sizes = [(t, options.width, options.mlp), (t, options.mlp, options.width), (t, options.width, options.width)]
    peak = product_peak(sizes, dtype, device)
    print(f"fastest matrix product: {peak / 1e12:,.2f} TFLOP/s")
    lm = make_lm(config, dtype, device)

    results |= {"options": vars(options), "product_peak_tflops": peak / 1e12}

    def save(**found: Sequence[Any]) -> None:
        results.update({name: [asdict(one) for one in values] for name, values in found.items()})
        if options.write:
            write_results("train_step", results, options.results)

    def save_with(before: list[Measured], group: list[Measured]) -> None:
        save(steps=[*before, *group])

    deadline = time.monotonic() + 60 * options.minutes
    measured: list[Measured] = []
    for capacity in options.capacities:
        batches = make_batches(config, options, capacity)
        for policy in options.checkpointing:
            group = measure_group(lm, batches, capacity, policy, options, deadline, peak, partial(save_with, measured))
            show_group(group)
            measured += group
    differences = compare(measured, dtype)
    show_differences(differences)
    engine = time_engine(make_config(options, options.layers[0]), batches[0][:1], options)
    source = f"benchmarks/results/{results_file('train_step', results).name}"
    whole = extrapolate(measured, config, engine, results.get("gpu"), source)
    show_whole(whole, engine)
    save(steps=measured, differences=differences, whole=whole, engine=[engine])
    if wrong := [one for one in differences if not one.agrees]:
        sys.exit(f"{len(wrong)} of {len(differences)} do not agree with ours: " + ", ".join(one.name for one in wrong))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; those that are not given are the preset's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="13b")
    parser.add_argument("--device", choices=("cuda", "cpu"))
    parser.add_argument("--layers", type=int, nargs=2, metavar=("FEW", "MORE"), help="two numbers of layers")
    for name in ("width", "heads", "mlp", "vocab", "max-tokens", "compared"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--capacities", type=int, nargs="+", help="tokens of a micro-batch")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"))
    parser.add_argument("--attention", default="auto", help="ours: auto or a backend")
    parser.add_argument("--checkpointing", nargs="+", default=["full", "none", "every_2"])
    parser.add_argument("--kernels", nargs="+", choices=("none", "liger"), help="of ours; both where Liger can run")
    parser.add_argument("--compile", action="store_true", help="ours with compiled layers, too")
    parser.add_argument("--batches", type=int, default=2, help="different micro-batches of a configuration")
    parser.add_argument("--repeats", type=int, default=3, help="of each")
    parser.add_argument("--minutes", type=float, default=8.0, help="after these no configuration is begun")
    parser.add_argument("--no-write", dest="write", action="store_false", help="only print")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="instead of benchmarks/results")
    options = parser.parse_args(arguments)
    for name, value in asdict(PRESETS[options.preset]).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.device = options.device or ("cpu" if options.preset == "cpu" else "cuda")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is here; --preset cpu tries the same on a CPU")
    if options.kernels is None:  # the first is measured at all capacities
        has_liger = options.device == "cuda" and importlib.util.find_spec("liger_kernel") is not None
        options.kernels = ["liger", "none"] if has_liger else ["none"]
    if options.layers[0] >= options.layers[1]:
        parser.error(f"--layers {options.layers[0]} {options.layers[1]}: the second number must be the larger")
    return options


def make_config(options: argparse.Namespace, num_layers: int | None = None) -> LlamaConfig:
    """Llama of the shape that is asked for."""
    return LlamaConfig(
        vocab_size=options.vocab,
        hidden_size=options.width,
        intermediate_size=options.mlp,
        num_hidden_layers=num_layers or options.layers[1],
        num_attention_heads=options.heads,
        num_key_value_heads=options.heads,
        max_position_embeddings=options.max_tokens,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )


def make_batches(config: LlamaConfig, options: argparse.Namespace, capacity: int) -> list[list[Example]]:
    """The first rank's micro-batches of the first steps of a plan, with random tokens.

    For fewer --max-tokens than 4,096 all lengths are shorter in proportion.
    """
    rng = np.random.default_rng(SEED)
    lengths = sharegpt_like(rng, NUM_EXAMPLES)  # up to 4,096 tokens
    lengths = np.maximum(lengths * options.max_tokens // 4096, 2).astype(np.int32)
    whole = make_config(options, WHOLE)
    q = quadratic_length_of(whole, max_tokens=options.max_tokens)
    shape = PlanShape(capacity=capacity, world_size=WORLD_SIZE, grad_accum=1, quadratic_length=q)
    steps = plan_epoch(lengths, lengths.astype(np.float64), shape, DataOrder(NUM_EXAMPLES, SEED), epoch=0)
    return [
        [make_example(rng, int(length), config.vocab_size) for length in lengths[step.bins[0]]]
        for step in islice(steps, options.batches)
    ]


def make_example(rng: np.random.Generator, length: int, vocab_size: int) -> Example:
    """Random tokens, in turns of random lengths, every second of them with a loss."""
    weights = np.zeros(length, np.float32)
    start, has_loss = 0, False
    while start < length:
        end = start + 1 + int(rng.exponential(TURN))
        weights[start:end] = has_loss
        start, has_loss = end, not has_loss
    weights[0] = 0
    if not weights.any():
        weights[length // 2 :] = 1  # a short one is a question and an answer
    return Example(rng.integers(0, vocab_size, length).astype(np.int32), weights)


# ------------------------------------------------------------------------------------------------------ measuring


@dataclass(slots=True)
class Measured:
    """One way at one capacity and checkpointing. seconds: of each step; tokens and flops: likewise, of each step.

    norms: the gradients of some norms after the first micro-batch, to compare; they are not written down.
    """

    name: str
    capacity: int
    policy: str
    num_layers: int
    note: str = ""
    failure: str = ""
    seconds: list[float] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    num_supervised: list[int] = field(default_factory=list)
    pairs_per_token: float = 0.0
    tflops: float = 0.0
    of_peak: float = 0.0
    tokens_per_s: float = 0.0
    quarters: tuple[float, float] = (0.0, 0.0)
    layer_tokens_per_s: float | None = None
    layer_quarters: tuple[float, float] | None = None
    layer_of_peak: float | None = None
    rest_share: float | None = None
    padding_ratio: float = 1.0
    peak_bytes: int = 0
    planned_bytes: int | None = None
    waits: int = 0
    loss: float = 0.0
    norms: list[list[float]] = field(default_factory=list, repr=False)


def ways_of(
    lm: PreTrainedModel, capacity: int, policy: str, options: argparse.Namespace
) -> Iterator[tuple[str, int, Any]]:
    """Name, layers and maker of each way of a group; makers raise ValueError for what cannot be here."""
    few, more = options.layers
    variants = [(kernels, False) for kernels in options.kernels]
    if options.compile:
        variants += [(kernels, True) for kernels in options.kernels]
    for kernels, is_compiled in variants if capacity == options.compared else variants[:1]:
        words = [word for word, there in ((kernels, kernels != "none"), ("compiled", is_compiled)) if there]
        for num_layers in (more, few):
            make = partial(
                ours,
                lm,
                num_layers=num_layers,
                attention=options.attention,
                policy=policy,
                kernels=kernels,
                is_compiled=is_compiled,
            )
            yield "+".join(["ours", *words]), num_layers, make
    if capacity != options.compared:
        return
    batch_size = capacity // options.max_tokens
    yield "padded", more, partial(padded, lm, policy=policy, batch_size=batch_size)
    for name, with_liger in (("transformers", False), ("transformers+liger", True)):
        yield name, more, partial(flattened, lm, policy=policy, with_liger=with_liger, attention=options.attention)
    yield "upstream", more, partial(upstream, lm, policy=policy, attention=options.attention)


def measure_group(
    lm: PreTrainedModel,
    batches: list[list[Example]],
    capacity: int,
    policy: str,
    options: argparse.Namespace,
    deadline: float,
    peak: float,
    save: Callable[[list[Measured]], None],
) -> list[Measured]:
    """All ways of one capacity and checkpointing, their steps in turns; save is called after each repetition."""
    group: list[Measured] = []
    alive: list[tuple[Way, Measured, list[list[Any]]]] = []
    for name, num_layers, make in ways_of(lm, capacity, policy, options):
        one = Measured(name, capacity, policy, num_layers)
        group.append(one)
        if time.monotonic() > deadline:
            one.failure = "not run: no time left"
            continue
        if name == "padded":
            one.padding_ratio = padding_ratio(batches, capacity // options.max_tokens)
        with failures_of(one):
            way = make()
            inputs = [way.prepare(examples) for examples in batches]
            one.note = way.note
            look_at(lm, way, inputs[0], one)
            alive.append((way, one, inputs))
    for repeat in range(options.repeats + 1):
        for number, examples in enumerate(batches):
            for way, one, inputs in alive:
                if one.failure:
                    continue
                clear(lm)
                with failures_of(one):
                    seconds = seconds_of(partial(way.step, inputs[number]), lm.device)
                    if repeat == 0:  # it may compile for these sizes, and again, since what looked at a step is gone
                        continue
                    one.seconds.append(seconds)
                    one.num_tokens.append(sum(len(example.input_ids) for example in examples))
                    one.num_supervised.append(count_supervised(examples))
        for one in group:
            if one.seconds and not one.failure:
                summarise(one, lm.config, batches, options, peak)
        for more in group:
            few = [one for one in group if one.name == more.name and one.num_layers < more.num_layers]
            if few and few[0].seconds and more.seconds and not few[0].failure and not more.failure:
                tell_layers_apart(few[0], more, lm.config, peak)
        save(group)
    return group


@contextmanager
def failures_of(one: Measured) -> Iterator[None]:
    """What cannot be here, and what runs out of memory, is told of and goes no further."""
    try:
        yield
    except ValueError as error:
        one.failure = f"not here: {error}"
    except torch.OutOfMemoryError as error:
        one.failure = f"out of memory: {str(error).splitlines()[0]}"


def padding_ratio(batches: Sequence[Sequence[Example]], batch_size: int) -> float:
    """Tokens with padding over tokens without."""
    num_tokens = sum(len(example.input_ids) for examples in batches for example in examples)
    return sum(count_padded(examples, batch_size) for examples in batches) / num_tokens


def look_at(lm: PreTrainedModel, way: Way, parts: list[Any], one: Measured) -> None:
    """A first step that is not timed, for its loss and gradients; then one for its memory, and one for its waits."""
    clear(lm)
    one.loss = float(way.step(parts))
    last = lm.model.layers[way.num_layers - 1]
    norms = (lm.model.layers[0].input_layernorm, last.post_attention_layernorm, lm.model.norm)
    one.norms = [norm.weight.grad.float().tolist() for norm in norms]
    clear(lm)
    known = [tensor for parameter in lm.parameters() for tensor in (parameter.data, parameter.grad)]
    one.peak_bytes = peak_bytes(lambda: way.step(parts), lm.device, known)
    clear(lm)
    one.waits = count_waits(lambda: way.step(parts), lm.device)


def clear(lm: PreTrainedModel) -> None:
    """Gradients to zero, where they are."""
    torch._foreach_zero_([parameter.grad for parameter in lm.parameters()])


def layer_flops(config: Any, num_tokens: float, pairs: float) -> float:
    """FLOP of training one layer on so many tokens, and pairs, the sum of L^2."""
    weights = 4 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size
    return 6 * (weights * num_tokens + config.hidden_size * pairs)


def summarise(
    one: Measured, config: Any, batches: list[list[Example]], options: argparse.Namespace, peak: float
) -> None:
    """The figures of a way from its steps."""
    lengths = [np.array([len(example.input_ids) for example in examples], np.float64) for examples in batches]
    one.pairs_per_token = float(sum((ls**2).sum() for ls in lengths) / sum(ls.sum() for ls in lengths))
    rates, flops = [], []
    for seconds, num_tokens, supervised in zip(one.seconds, one.num_tokens, one.num_supervised, strict=True):
        rates.append(num_tokens / seconds)
        needed = one.num_layers * layer_flops(config, num_tokens, num_tokens * one.pairs_per_token)
        flops.append((needed + 6 * config.vocab_size * config.hidden_size * supervised) / seconds)
    one.tokens_per_s, one.tflops, one.of_peak = median(rates), median(flops) / 1e12, median(flops) / peak
    first, _, third = quantiles(rates) if len(rates) > 1 else rates * 3
    one.quarters = first, third
    if one.name.startswith("ours") and one.num_layers == config.num_hidden_layers:
        one.planned_bytes = plan_bytes(config, int(lengths[0].sum()), one, options)


def plan_bytes(config: Any, num_tokens: int, one: Measured, options: argparse.Namespace) -> int:
    """What the planner says of weights, gradients of their dtype, and the activations of one micro-batch."""
    activations = count_activations(config, num_tokens=num_tokens, dtype=options.dtype, checkpointing=one.policy)
    head_and_embedding = 2 * config.vocab_size * config.hidden_size
    layer = 4 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size + 2 * config.hidden_size
    num_weights = head_and_embedding + config.num_hidden_layers * layer + config.hidden_size
    return 2 * num_weights * getattr(torch, options.dtype).itemsize + activations.peak


def tell_layers_apart(few: Measured, more: Measured, config: Any, peak: float) -> None:
    """What one layer takes: the difference of each pair of steps, which ran one after the other."""
    layers = more.num_layers - few.num_layers
    pairs = zip(more.seconds, few.seconds, more.num_tokens, strict=True)
    times = [(long - short) / layers / num_tokens for long, short, num_tokens in pairs]
    per_token = median(times)
    more.layer_tokens_per_s = 1 / per_token
    first, _, third = quantiles(times) if len(times) > 1 else times * 3
    more.layer_quarters = 1 / third, 1 / first
    more.layer_of_peak = layer_flops(config, 1, more.pairs_per_token) / per_token / peak
    more.rest_share = 1 - more.num_layers * per_token * more.tokens_per_s


# ------------------------------------------------------------------------------------------------------ agreement


@dataclass(frozen=True, slots=True)
class Difference:
    """How far a way's loss and gradients are from ours, relative; tolerances: how far they may be."""

    name: str
    capacity: int
    policy: str
    loss: float
    gradient: float
    tolerances: tuple[float, float]

    @property
    def agrees(self) -> bool:
        """Whether both are within; NaN is not."""
        return self.loss <= self.tolerances[0] and self.gradient <= self.tolerances[1]


def compare(measured: Sequence[Measured], dtype: torch.dtype) -> list[Difference]:
    """Each way, and ours under other checkpointing, against the first of ours of the same capacity and layers."""
    found = []
    done = [one for one in measured if one.norms]
    for one in done:
        same = [other for other in done if (other.capacity, other.num_layers) == (one.capacity, one.num_layers)]
        mine = [other for other in same if other.name.startswith("ours")]  # none where all ran out of memory
        if not mine or one is mine[0]:
            continue
        reference = mine[0]
        gradients = [
            np.linalg.norm(np.subtract(its, expected)) / np.linalg.norm(expected)
            for its, expected in zip(one.norms, reference.norms, strict=True)
        ]
        found.append(
            Difference(
                one.name,
                one.capacity,
                one.policy,
                abs(one.loss / reference.loss - 1),
                float(max(gradients)),
                TOLERANCES[dtype, one.name == "upstream"],
            )
        )
    return found


# -------------------------------------------------------------------------------------------------- extrapolation


@dataclass(frozen=True, slots=True)
class EngineTime:
    """Seconds a weight, on one device. optimizer: of a step of training's own optimizer with the norm before and the
    cast after it. copies: of what its engine adds to a backward pass, buckets and fp32 sums."""

    optimizer: float
    copies: float


def time_engine(config: LlamaConfig, examples: list[Example], options: argparse.Namespace) -> EngineTime:
    """Training's engine beside the same model without it, in turns, on few tokens, so that weights take the time."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    join_process_group(read_world())
    plain, inner = (
        PackedCausalLM(
            make_lm(config, dtype, device),
            attention=options.attention,
            device_type=device.type,
            checkpointing="none",
            num_conditions=1,
        ).train()
        for _ in range(2)
    )
    for parameter in inner.parameters():
        parameter.grad = None
    setting = {"stage": 2, "offload": "none", "dtype": options.dtype, "grad_accum": 1, "grad_clip": 1.0}
    engine = make_engine(inner, make_optimizer(inner, OptimSection(), lr=1e-5), deepspeed_config(**setting, extra={}))
    batch = collate(examples, [0] * len(examples)).to(device)
    steps, copies = [], []
    for _ in range(options.repeats + 2):  # the first two make states and workspaces
        without = seconds_of(lambda: plain(batch).nll.backward(), device)
        backward = seconds_of(lambda: engine.backward(engine(batch).nll, scale_wrt_gas=False), device)
        copies.append(backward - without)
        steps.append(seconds_of(engine.step, device))
    num_weights = sum(parameter.numel() for parameter in plain.parameters())
    engine.destroy()
    return EngineTime(median(steps[2:]) / num_weights, median(copies[2:]) / num_weights)


@dataclass(frozen=True, slots=True)
class Whole:
    """The whole model on 8 GPUs, calculated: seconds of one optimizer step of one micro-batch on each.

    tokens_per_s: of a GPU; error: of layers_s + rest_s, as a share. speed: the line for the table in
    training/speed.py, without communication.
    """

    name: str
    capacity: int
    policy: str
    layers_s: float
    rest_s: float
    optimizer_s: float
    copies_s: float
    communication_s: float
    tokens_per_s: float
    error: float
    speed: str | None


def extrapolate(
    measured: Sequence[Measured], config: Any, engine: EngineTime, gpu: str | None, source: str
) -> list[Whole]:
    """40 layers by the time of one; the optimizer over an eighth of the weights; ZeRO-2's bytes over NVLink.

    source: the file of the results. Without a known GPU the bandwidth is an A100's.
    """
    whole = LlamaConfig(**{**config.to_dict(), "num_hidden_layers": WHOLE})
    num_weights = matrix_weights_of(whole) + config.vocab_size * config.hidden_size
    sent = bytes_sent(num_weights, num_weights, ZeroSetting(2, False, WORLD_SIZE, "bfloat16"))
    communication = sent / BANDWIDTHS.get(gpu or A100, BANDWIDTHS[A100])
    found = []
    for one in measured:
        if one.layer_tokens_per_s is None or one.rest_share is None or one.layer_quarters is None:
            continue
        num_tokens = median(one.num_tokens)
        layers_s = WHOLE * num_tokens / one.layer_tokens_per_s
        rest_s = one.rest_share * num_tokens / one.tokens_per_s
        optimizer_s, copies_s = engine.optimizer * num_weights / WORLD_SIZE, engine.copies * num_weights
        alone = layers_s + rest_s + optimizer_s + copies_s
        slow, fast = one.layer_quarters
        error = (WHOLE - one.num_layers) * num_tokens * (1 / slow - 1 / fast) / 2
        speed = Speed(
            device=gpu or "",
            model=f"Llama-2-13B, {WHOLE} layers by the time of one, {one.name}, {one.capacity:,} tokens",
            num_weights=matrix_weights_of(whole),
            attention_width=WHOLE * config.hidden_size,
            pairs_per_token=round(one.pairs_per_token),
            checkpointing=one.policy,
            num_devices=1,
            tokens_per_s=round(num_tokens / alone),
            origin="measured",
            source=source,
        )
        found.append(
            Whole(
                one.name,
                one.capacity,
                one.policy,
                layers_s,
                rest_s,
                optimizer_s,
                copies_s,
                communication,
                num_tokens / (alone + communication),
                error / (layers_s + rest_s),
                repr(speed) if gpu is not None and peak_flops(gpu) else None,
            )
        )
    return found


# --------------------------------------------------------------------------------------------------------- tables


def show_group(group: Sequence[Measured]) -> None:
    """One line for each way."""
    first = group[0]
    print(f"\n{first.capacity:,} tokens, checkpointing {first.policy}")
    print(
        f"  {'':22} {'layers':>6} {'tokens/s':>10} {'quarters':>17} {'layer tok/s':>11} {'TFLOP/s':>8} {'of peak':>7} "
        f"{'layer':>6} {'GB':>6} {'planned':>7} {'waits':>5} {'loss':>9}"
    )
    for one in group:
        if one.failure:
            print(f"  {one.name:22} {one.num_layers:>6} {one.failure}")
            continue
        layer = "" if one.layer_tokens_per_s is None else f"{one.layer_tokens_per_s:,.0f}"
        of_peak = "" if one.layer_of_peak is None else f"{100 * one.layer_of_peak:.1f} %"
        planned = "" if one.planned_bytes is None else f"{one.planned_bytes / 1e9:.3g}"
        padding = f", padding {one.padding_ratio:.2f}" if one.padding_ratio > 1 else ""
        quarters = " to ".join(f"{rate:,.0f}" for rate in one.quarters)
        print(
            f"  {one.name:22} {one.num_layers:>6} {one.tokens_per_s:>10,.0f} {quarters:>17} {layer:>11} "
            f"{one.tflops:>8,.2f} {100 * one.of_peak:>5.1f} % {of_peak:>6} {one.peak_bytes / 1e9:>6.3g} {planned:>7} "
            f"{one.waits:>5} {one.loss:>9.5f}  {one.note}{padding}"
        )


def show_differences(differences: Sequence[Difference]) -> None:
    """How far each way is from ours."""
    print("\nagainst ours: the loss and the gradients of norms, relative, and how far they may be")
    for one in differences:
        print(
            f"  {one.name:22} {one.capacity:>7,} {one.policy:8} loss {one.loss:.1e} of {one.tolerances[0]:.1e}, "
            f"gradient {one.gradient:.1e} of {one.tolerances[1]:.1e} {'' if one.agrees else '  DOES NOT AGREE'}"
        )


def show_whole(whole: Sequence[Whole], engine: EngineTime) -> None:
    """The extrapolation and its assumptions."""
    print(
        f"\n{WHOLE} layers on {WORLD_SIZE} GPUs, calculated: seconds of a step. For 1e9 weights the optimizer "
        f"took {1e9 * engine.optimizer:.3f} s, the engine's copies {1e9 * engine.copies:.3f} s; communication is 2 x 2 "
        "bytes a weight x 7/8 over 0.8 of NVLink's one direction, none hidden"
    )
    for one in whole:
        print(
            f"  {one.name:22} {one.capacity:>7,} {one.policy:8} layers {one.layers_s:.3f}, embedding and head "
            f"{one.rest_s:.3f}, +- {100 * one.error:.1f} %, optimizer {one.optimizer_s:.3f}, copies {one.copies_s:.3f}"
            f", communication {one.communication_s:.3f}: {one.tokens_per_s:,.0f} tokens/s a GPU"
        )
    for one in whole:
        if one.speed is not None:
            print(f"    {one.speed},")


if __name__ == "__main__":
    main()
