"""How fast a run is: the share of its devices' peak that it reaches (MFU), and how long it takes on a machine.

Durations follow from speeds that were measured or published. A speed gives the share of its peak that a device reached,
counted with all that it computed, including the forward pass that activation checkpointing repeats. Another run on such
a device is assumed to reach the same share.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

from ochat_train.files import read_json_lines
from ochat_train.model.checkpointing import share_of
from ochat_train.model.memory import ZeroSetting
from ochat_train.model.pretrained import DTYPES, head_dim_of, matrix_weights_of
from ochat_train.recipe import Recipe, load_recipe
from ochat_train.tokens.plan import PlanTable

# ---------------------------------------------------------------------------------------------------- utilisation

_TERA = 1e12
# TFLOP/s of dense bf16 with fp32 sums, by torch's name of the device. From the makers' data sheets and architecture
# papers; where those print only the figure with sparsity, half of it. AMD's MI250X is two devices. The V100 has no
# bf16. Other variants of a chip (Laptop, Ti, D, Max-Q) are other devices, and a MIG instance is a part of one.
PEAKS = {
    r"NVIDIA A100(-SXM4-\d+GB|-PCIE-\d+GB| \d+GB PCIe)": 312.0,
    r"NVIDIA H100 80GB HBM3": 989.5,
    r"NVIDIA H100 PCIe": 756.5,
    r"NVIDIA H100 NVL": 835.5,
    r"NVIDIA H200": 989.5,
    r"NVIDIA H200 NVL": 835.5,
    r"NVIDIA B200": 2250.0,
    r"NVIDIA L40S": 362.0,
    r"NVIDIA L4": 121.0,
    r"NVIDIA A10": 125.0,
    r"NVIDIA RTX A6000": 154.8,
    r"NVIDIA GeForce RTX 3090": 71.0,
    r"NVIDIA GeForce RTX 4090": 165.2,
    r"NVIDIA GeForce RTX 5090": 209.5,
    r"AMD Instinct MI250X": 191.5,
    r"AMD Instinct MI300X": 1307.4,
}


def peak_flops(device_name: str) -> float | None:
    """FLOP/s of dense bf16 matrix products, by torch's name of the device; None where the table has no figure."""
    return next((peak * _TERA for name, peak in PEAKS.items() if re.fullmatch(name, device_name)), None)


class Gpu(NamedTuple):
    """A GPU that can be named for a plan. device: torch's name. gib: what torch finds in one, rounded down."""

    device: str
    gib: float


GPUS = {
    "A100-40GB": Gpu("NVIDIA A100-SXM4-40GB", 39.3),
    "A100-80GB": Gpu("NVIDIA A100-SXM4-80GB", 79.1),
    "H100": Gpu("NVIDIA H100 80GB HBM3", 79.1),
    "H200": Gpu("NVIDIA H200", 139.7),
    "3090": Gpu("NVIDIA GeForce RTX 3090", 23.6),
    "4090": Gpu("NVIDIA GeForce RTX 4090", 23.6),
}


@dataclass(frozen=True, slots=True)
class Utilisation:
    """The FLOP that training a model takes, and the FLOP/s of one device, its `peak`.

    num_weights: entries of all matrices that a token passes. quadratic_length: q of the plan's costs, see
    `quadratic_length`. is_frozen: whether only adapters beside these matrices are trained.
    """

    num_weights: int
    quadratic_length: int
    is_frozen: bool
    peak: float

    def flops(self, num_tokens: int, cost: int) -> float:
        """FLOP of sequences with num_tokens = sum(L) and cost = sum(L * (q + L)), L being their lengths.

        With n = num_weights: 6 n * sum(L + L^2 / q), which for frozen matrices is n * sum(4 L + 6 L^2 / q).

        A matrix takes 2 n FLOP a token forward, and backward 2 n for the gradient of its input and 2 n for its own,
        which frozen ones do not need. Attention takes n / q of that for each pair of tokens, its causal half counted
        once; its backward pass is the same whether weights are frozen or not. Not counted: adapters, about 1 % of the
        weights, and what activation checkpointing recomputes, since it trains nothing.
        """
        pairs = cost - self.quadratic_length * num_tokens  # sum(L^2)
        per_weight = 4 if self.is_frozen else 6
        return self.num_weights * (per_weight * num_tokens + 6 * pairs / self.quadratic_length)

    def of_step(self, num_tokens: int, cost: int, *, seconds: float, num_devices: int) -> float:
        """The share of the peak of all devices that a step reached, from 0 to 1."""
        return self.flops(num_tokens, cost) / (seconds * num_devices * self.peak)


def find_utilisation(
    config: Any, *, quadratic_length: int, is_frozen: bool, dtype: str, device_name: str
) -> Utilisation | None:
    """The utilisation of a model on a device; config: the model's transformers configuration.

    None where the peak is unknown: on a CPU, for float32 weights, for a device that PEAKS lacks.
    """
    peak = peak_flops(device_name)
    if peak is None or dtype != "bfloat16":
        return None
    return Utilisation(matrix_weights_of(config), quadratic_length, is_frozen, peak)


# --------------------------------------------------------------------------------------------------------- speeds


class Speed(NamedTuple):
    """A line of SPEEDS: tokens/s of one device, and all that gives its share of the peak.

    device: torch's name. num_weights: entries of all matrices that a token passes, head included. attention_width:
    heads times head size, over all layers. pairs_per_token: sum(L^2) / sum(L) of the sequences, which is their length
    where all are equally long. checkpointing: full, none or every_N. num_devices: how many trained together; their
    communication is part of the time. origin: by our benchmark, or by others. source: with its date or file.
    """

    device: str
    model: str
    num_weights: int
    attention_width: int
    pairs_per_token: float
    checkpointing: str
    num_devices: int
    tokens_per_s: float
    origin: Literal["measured", "published"]
    source: str

    @property
    def share(self) -> float:
        """The share of its peak that the device reached, including what it computed twice."""
        peak = peak_flops(self.device)
        assert peak is not None, f"{self.device} has no peak in PEAKS"
        per_token = self.num_weights + self.attention_width * self.pairs_per_token
        return (6 + 2 * share_of(self.checkpointing)) * per_token * self.tokens_per_s / peak


A100, H100 = "NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3"
_LLAMA_13B = 40 * (4 * 5120**2 + 3 * 5120 * 13824) + 32_000 * 5120
_MPT_13B, _MPT_7B = 40 * 12 * 5120**2 + 50_432 * 5120, 32 * 12 * 4096**2 + 50_432 * 4096  # of plain transformers
_WIDTH_13B, _WIDTH_7B = 40 * 5120, 32 * 4096
_OPENCHAT = "OpenChat V3.2 SUPER, 15 hours for about 80k conversations, 5 epochs (ZeRO-2, packed)"
_FOUNDRY = "llm-foundry, scripts/train/benchmarking/README.md (FSDP, sequences of equal length)"

# To add a measured speed, insert at the top the line that `benchmarks/train_step.py` prints, which its result file has
# under "speed". The tokens of the published run are unknown; at 1,825 a conversation, 15 hours are 1,690 tokens/s.
SPEEDS = (
    Speed(A100, "Llama-2-13B", _LLAMA_13B, _WIDTH_13B, 2102, "full", 8, 1690, "published", _OPENCHAT),
    Speed(A100, "MPT-13B", _MPT_13B, _WIDTH_13B, 4096, "full", 8, 2060, "published", _FOUNDRY),
    Speed(A100, "MPT-13B", _MPT_13B, _WIDTH_13B, 2048, "none", 8, 2262, "published", _FOUNDRY),
    Speed(A100, "MPT-7B", _MPT_7B, _WIDTH_7B, 4096, "full", 8, 3684, "published", _FOUNDRY),
    Speed(A100, "MPT-7B", _MPT_7B, _WIDTH_7B, 2048, "none", 8, 4641, "published", _FOUNDRY),
    Speed(H100, "MPT-13B", _MPT_13B, _WIDTH_13B, 4096, "full", 8, 4717, "published", _FOUNDRY),
    Speed(H100, "MPT-13B", _MPT_13B, _WIDTH_13B, 2048, "none", 8, 4792, "published", _FOUNDRY),
    Speed(H100, "MPT-7B", _MPT_7B, _WIDTH_7B, 4096, "full", 8, 8611, "published", _FOUNDRY),
    Speed(H100, "MPT-7B", _MPT_7B, _WIDTH_7B, 2048, "none", 8, 10643, "published", _FOUNDRY),
)

# Bytes/s that a device sends to the others of its node: NVLink's figure for one direction (half of what its data sheet
# gives for both), of which collectives of large messages are assumed to reach 0.8.
_REACHED = 0.8
BANDWIDTHS = {A100: _REACHED * 300e9, H100: _REACHED * 450e9, "NVIDIA H200": _REACHED * 450e9}


def bytes_sent(num_weights: int, num_trained: int, setting: ZeroSetting) -> float:
    """Bytes that each of n processes sends in one optimizer step, in the mean.

    A ring sends (n - 1) / n of a tensor to reduce, scatter or gather it, and all-reduces it by both. Gradients, of the
    trained weights, are reduced once a step in stages 0 and 1, and once a micro-batch in stages 2 and 3. These
    are gathered once a step in stages 1 and 2; in stage 3 all weights are, in each forward and backward pass. Both are
    sent in the weights' dtype.

    >>> bytes_sent(13 * 10**9, 13 * 10**9, ZeroSetting(2, False, 8, "bfloat16")) / 1e9
    45.5
    """
    reduced = (1 + setting.all_reduces) * (setting.grad_accum if setting.stage >= 2 else 1) * num_trained
    gathered = (0, num_trained, num_trained, 2 * setting.grad_accum * num_weights)[setting.stage]
    share = (setting.num_processes - 1) / setting.num_processes
    return DTYPES[setting.dtype].itemsize * share * (reduced + gathered)


def bytes_exchanged(config: Any, num_shares: int, element: int) -> float:
    """Bytes that each of `num_shares` processes with shares of a micro-batch sends forward for a token; backward again.

    config: the text configuration. element: bytes of a number. In each layer queries and outputs of all heads are sent,
    and keys and values, repeated as in `attend_in_group`, each to (N - 1) / N of the processes.
    """
    if num_shares == 1:
        return 0.0
    heads: int = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    kv_heads = kv_heads if kv_heads % num_shares == 0 else math.lcm(kv_heads, num_shares)
    width = 2 * (heads + kv_heads) * head_dim_of(config)
    num_layers: int = config.num_hidden_layers
    return element * num_layers * width * (num_shares - 1) / num_shares


# --------------------------------------------------------------------------------------------------- predictions


@dataclass(frozen=True, slots=True)
class Work:
    """The work of a run, whatever its machine.

    utilisation: of the model; its peak is replaced by the machine's. num_tokens, cost: sum(L) and sum(L * (q + L)) over
    all sequences. efficiency: the share of the time in which ranks do not wait. num_micro_batches: over all ranks and
    steps, each rank's share of one counting as one. exchanged: of `bytes_exchanged`.
    """

    utilisation: Utilisation
    checkpointing: str
    num_tokens: int
    cost: int
    efficiency: float
    num_micro_batches: int
    grad_accum: int
    stage: int
    exchanged: float = 0.0

    @property
    def flops(self) -> float:
        """FLOP of the run with repeated forward passes; a forward pass is a third of all, half for frozen matrices."""
        forward = replace(self.utilisation, is_frozen=False).flops(self.num_tokens, self.cost) / 3
        return self.utilisation.flops(self.num_tokens, self.cost) + share_of(self.checkpointing) * forward


def work_of(recipe: Recipe, config: Any, table: PlanTable, checkpointing: str) -> Work | None:
    """The work of a recipe's steps; None for a model about whose speed SPEEDS says nothing."""
    utilisation = find_utilisation(
        config,
        quadratic_length=table.shape.quadratic_length,
        is_frozen=recipe.model.lora is not None,
        dtype=recipe.model.dtype,
        device_name=H100,  # one whose peak is known
    )
    if utilisation is None:
        return None
    return Work(
        utilisation=utilisation,
        checkpointing=checkpointing,
        num_tokens=table.num_tokens,
        cost=int(table.rows["cost"].sum()),
        efficiency=table.efficiency,
        num_micro_batches=table.num_steps * table.shape.num_bins * recipe.packing.sequence_parallel,
        grad_accum=table.shape.grad_accum,
        stage=recipe.zero.stage,
        exchanged=bytes_exchanged(
            config.get_text_config(), recipe.packing.sequence_parallel, DTYPES[recipe.model.dtype].itemsize
        ),
    )


class Machine(NamedTuple):
    """Devices of one kind in one node. device: torch's name. needs_adapters: too few to train all of a 13B model."""

    name: str
    device: str
    num_devices: int
    needs_adapters: bool = False


MACHINES = (
    Machine("8 x A100 80 GB", A100, 8),
    Machine("8 x H100", H100, 8),
    Machine("1 x H100, adapters", H100, 1, needs_adapters=True),
)


class Prediction(NamedTuple):
    """The time of a run on a machine, predicted from the speed `basis`.

    tokens_per_s: of one device. share: of the peak, counting no repeated forward pass. communication_s: over all steps;
    part of `seconds`.
    """

    machine: Machine
    basis: Speed
    seconds: float
    tokens_per_s: float
    share: float
    communication_s: float


def predict(work: Work, machine: Machine, speeds: Sequence[Speed] = SPEEDS) -> tuple[Prediction, ...]:
    """The time of the work on the machine, once for each source of `speeds` that has its device; nearest first.

    Of each source, the nearest speed counts: one with the same checkpointing if there is one, then the one whose model
    is nearest in size. A measured speed comes before published ones. Where no source has the device, the nearest speed
    of all lends its share of the peak. Empty where the device's peak is unknown.

        seconds = FLOP of the work / (share * peak * devices * efficiency) + communication

    A speed of several devices includes communication already, so that it counts twice: about 1 % for the published
    ones, whose steps are large. Left out, it would be missing where steps are small.
    """
    peak = peak_flops(machine.device)
    if peak is None:
        return ()
    if machine.needs_adapters:
        work = replace(work, utilisation=replace(work.utilisation, is_frozen=True))

    def distance(speed: Speed) -> tuple[bool, bool, float]:
        ratio = speed.num_weights / work.utilisation.num_weights
        # Sizes are compared in factors of two: 13.0e9 is not farther than 12.9e9.
        return speed.origin != "measured", speed.checkpointing != work.checkpointing, round(abs(math.log2(ratio)))

    of_device = sorted((speed for speed in speeds if speed.device == machine.device), key=distance)
    nearest: dict[str, Speed] = {}
    for speed in of_device or [min(speeds, key=distance)]:
        nearest.setdefault(speed.source, speed)
    return tuple(_predict(work, machine, speed, peak) for speed in nearest.values())


def _predict(work: Work, machine: Machine, basis: Speed, peak: float) -> Prediction:
    busy = work.flops / (basis.share * peak * machine.num_devices * work.efficiency)
    num_steps = work.num_micro_batches / (machine.num_devices * work.grad_accum)
    num_weights = work.utilisation.num_weights
    num_trained = 0 if work.utilisation.is_frozen else num_weights  # adapters are small
    setting = ZeroSetting(work.stage, False, machine.num_devices, "bfloat16", grad_accum=work.grad_accum)
    bytes_per_s = BANDWIDTHS.get(machine.device, BANDWIDTHS[A100])
    exchanged = (2 + share_of(work.checkpointing)) * work.exchanged * work.num_tokens / machine.num_devices
    communication = (num_steps * bytes_sent(num_weights, num_trained, setting) + exchanged) / bytes_per_s
    seconds = busy + communication
    of_step = replace(work.utilisation, peak=peak).of_step
    return Prediction(
        machine=machine,
        basis=basis,
        seconds=seconds,
        tokens_per_s=work.num_tokens / (seconds * machine.num_devices),
        share=of_step(work.num_tokens, work.cost, seconds=seconds, num_devices=machine.num_devices),
        communication_s=communication,
    )


class Rate(NamedTuple):
    """Tokens a second of one GPU, and where the number is from: for a measured one, from how many steps and where.

    basis: on what a modelled one is modelled; None if it follows from the first plan's.
    """

    tokens_per_s: float
    origin: Literal["given", "measured", "modelled"]
    num_steps: int = 0
    num_processes: tuple[int, ...] = ()
    basis: Speed | None = None


def measured_rate(path: str, recipe: Recipe) -> Rate | None:
    """The rate that was measured in the run folder of the recipe, which was read from `path`; None without steps.

    The median of the steps, without the first tenth of them, in which a run warms up. An override that changes what
    the rate depends on leaves none, since it was measured for the recipe as it is.
    """
    if speed_sections(load_recipe(path)) != speed_sections(recipe):
        return None
    events = read_json_lines(Path(recipe.checkpoint.dir) / "metrics.jsonl")
    # Older versions did not write num_processes.
    steps = [event for event in events if event.get("event") == "step" and "num_processes" in event]
    if not steps:
        return None
    steps = steps[len(steps) // 10 :]
    tokens_per_s = median(step["tokens_per_s"] / step["num_processes"] for step in steps)
    return Rate(tokens_per_s, "measured", len(steps), tuple(sorted({step["num_processes"] for step in steps})))


def speed_sections(recipe: Recipe) -> tuple[object, ...]:
    """What must be equal for two plans to take equally long for the same sequences."""
    return recipe.model, recipe.zero, recipe.deepspeed
