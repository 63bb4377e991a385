"""How long a run takes on a machine: speeds that were measured or published, and a model for what lacks one.

A speed says what share of its peak a device reached, counted with all that it computed, the forward pass that
activation checkpointing repeats included. The model gives another run on such a device the same share.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple

from ochat_train.files import read_json_lines
from ochat_train.model.checkpointing import share_of
from ochat_train.recipe import Recipe, load_recipe
from ochat_train.training.flops import Utilisation, peak_flops


class Speed(NamedTuple):
    """One line of SPEEDS: tokens a second of one device, and all that is needed to tell its share of the peak.

    device: as torch calls it. num_weights: entries of all matrices that a token passes, head included.
    attention_width: heads times head size, over all layers. pairs_per_token: sum(L^2) / sum(L) of the sequences, which
    is their length where all are equally long. checkpointing: full, none or every_N. num_devices: on which it was
    reached; of more than one, what they told each other is in its time. origin: by our benchmark, or by others. source:
    where from, with its date or file.
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
        """The share of its peak that the device reached, with everything that it computed twice."""
        peak = peak_flops(self.device)
        assert peak is not None, f"{self.device} has no peak in flops.PEAKS"
        per_token = self.num_weights + self.attention_width * self.pairs_per_token
        return (6 + 2 * share_of(self.checkpointing)) * per_token * self.tokens_per_s / peak


A100, H100 = "NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3"
_LLAMA_13B = 40 * (4 * 5120**2 + 3 * 5120 * 13824) + 32_000 * 5120
_MPT_13B, _MPT_7B = 40 * 12 * 5120**2 + 50_432 * 5120, 32 * 12 * 4096**2 + 50_432 * 4096  # of plain transformers
_WIDTH_13B, _WIDTH_7B = 40 * 5120, 32 * 4096
_OPENCHAT = "OpenChat V3.2 SUPER, 15 hours for about 80k conversations, 5 epochs (ZeRO-2, packed)"
_FOUNDRY = "llm-foundry, scripts/train/benchmarking/README.md (FSDP, sequences of equal length)"

# To add what was measured, put a line that `benchmarks/train_step.py` prints, as its result file has it under "speed",
# in front. Nobody wrote down the tokens of the published run; at 1,825 a conversation, 15 hours are 1,690 tokens/s.
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

# Bytes a second that a device sends to the others of its node: NVLink's figure for one direction (half of what its data
# sheet says for both), of which collectives of large messages are assumed to reach 0.8.
_REACHED = 0.8
BANDWIDTHS = {A100: _REACHED * 300e9, H100: _REACHED * 450e9, "NVIDIA H200": _REACHED * 450e9}
_BYTES = 2  # of a weight and of a gradient on their way, bfloat16


def communication_seconds(
    num_weights: int, *, num_devices: int, stage: int, grad_accum: int, bytes_per_s: float
) -> float:
    """What ZeRO takes in one optimizer step, when nothing else is done meanwhile.

    Ring collectives move num_weights * 2 bytes * (n - 1) / n out of each of n devices. Stages 0 and 1 do so with the
    gradients once a step, stages 2 and 3 with those of each micro-batch. All gather the weights: once a step, or in
    stage 3 in each forward and backward pass. (Stage 0 adds up and spreads gradients instead: as many bytes.)

    >>> round(communication_seconds(13 * 10**9, num_devices=8, stage=2, grad_accum=1, bytes_per_s=240e9), 4)
    0.1896
    """
    reduced = grad_accum if stage >= 2 else 1
    gathered = 2 * grad_accum if stage == 3 else 1
    return (reduced + gathered) * _BYTES * num_weights * (num_devices - 1) / num_devices / bytes_per_s


# --------------------------------------------------------------------------------------------------- predictions


@dataclass(frozen=True, slots=True)
class Work:
    """What a run asks of its machine.

    utilisation: of the model; its peak is replaced by the machine's. num_tokens, cost: the sums of L and of L * (q + L)
    over all sequences. efficiency: the share of the time in which ranks do not wait. num_micro_batches: over all ranks
    and steps.
    """

    utilisation: Utilisation
    checkpointing: str
    num_tokens: int
    cost: int
    efficiency: float
    num_micro_batches: int
    grad_accum: int
    stage: int

    @property
    def flops(self) -> float:
        """FLOP of the run, with the forward passes that are repeated: a third of all, or half of frozen matrices'."""
        forward = replace(self.utilisation, is_frozen=False).flops(self.num_tokens, self.cost) / 3
        return self.utilisation.flops(self.num_tokens, self.cost) + share_of(self.checkpointing) * forward


class Machine(NamedTuple):
    """Devices of one kind in one node. device: as torch calls it. needs_adapters: too few to train all of 13B."""

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
    """How long a run takes on a machine, modelled on `basis`.

    tokens_per_s: of one device. share: of the peak, by what trains the model, nothing that is repeated.
    communication_s: of all steps, in `seconds`.
    """

    machine: Machine
    basis: Speed
    seconds: float
    tokens_per_s: float
    share: float
    communication_s: float


def predict(work: Work, machine: Machine, speeds: Sequence[Speed] = SPEEDS) -> tuple[Prediction, ...]:
    """How long the work takes on the machine, once for each source of `speeds` that knows its device; nearest first.

    Of each source, the speed counts that is nearest: of the same checkpointing if there is one, then of the size of
    model that is the fewest times larger or smaller. A measured one comes before those published. Where no source knows
    the device, the nearest speed of all others lends its share of the peak. Empty where the device's peak is unknown.

        seconds = FLOP of the work / (share * peak * devices * efficiency) + communication

    A speed of several devices has communication in it already, which then counts twice: of the published ones, whose
    steps are large, about 1 %. Taken as done, it would be missing where steps are small.
    """
    peak = peak_flops(machine.device)
    if peak is None:
        return ()
    if machine.needs_adapters:
        work = replace(work, utilisation=replace(work.utilisation, is_frozen=True))

    def distance(speed: Speed) -> tuple[bool, bool, float]:
        ratio = speed.num_weights / work.utilisation.num_weights
        # Sizes count in steps of a factor of two: 13.0e9 against 12.9e9 says nothing.
        return speed.origin != "measured", speed.checkpointing != work.checkpointing, round(abs(math.log2(ratio)))

    of_device = sorted((speed for speed in speeds if speed.device == machine.device), key=distance)
    nearest: dict[str, Speed] = {}
    for speed in of_device or [min(speeds, key=distance)]:
        nearest.setdefault(speed.source, speed)
    return tuple(_predict(work, machine, speed, peak) for speed in nearest.values())


def _predict(work: Work, machine: Machine, basis: Speed, peak: float) -> Prediction:
    busy = work.flops / (basis.share * peak * machine.num_devices * work.efficiency)
    num_steps = work.num_micro_batches / (machine.num_devices * work.grad_accum)
    communication = 0.0
    if machine.num_devices > 1 and not work.utilisation.is_frozen:  # adapters are few
        communication = num_steps * communication_seconds(
            work.utilisation.num_weights,
            num_devices=machine.num_devices,
            stage=work.stage,
            grad_accum=work.grad_accum,
            bytes_per_s=BANDWIDTHS.get(machine.device, BANDWIDTHS[A100]),
        )
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
