"""Model FLOP utilisation: what a step's sequences need, against what the accelerators could do in its time."""

import re
from dataclasses import dataclass
from typing import Any

from ochat_train.model.pretrained import matrix_weights_of

_TERA = 1e12
# Dense bf16 with fp32 sums, in TFLOP/s, by the name that torch gives the device. From the makers' data sheets and
# architecture papers; where those print the figure with sparsity alone, half of it. AMD's MI250X is two devices.
# The V100 has no bf16. Other variants of a chip (Laptop, Ti, D, Max-Q) are other devices, and MIG is a part of one.
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
    """FLOP/s of dense bf16 matrix products on a device that torch calls so; None where the table has no figure."""
    return next((peak * _TERA for name, peak in PEAKS.items() if re.fullmatch(name, device_name)), None)


@dataclass(frozen=True, slots=True)
class Utilisation:
    """What training a model takes, and what a device can do.

    num_weights: entries of all matrices that a token passes. quadratic_length: q of the plan's costs, see
    `quadratic_length`. is_frozen: whether only adapters beside these matrices are trained. peak: FLOP/s of one device.
    """

    num_weights: int
    quadratic_length: int
    is_frozen: bool
    peak: float

    def flops(self, num_tokens: int, cost: int) -> float:
        """FLOP of sequences of `num_tokens` tokens, the sum of L, whose plan's `cost` is the sum of L * (q + L).

        With n = num_weights: 6 n * sum(L + L^2 / q), which for frozen matrices is n * sum(4 L + 6 L^2 / q).

        A matrix takes 2 n FLOP a token forward, and backward 2 n for the gradient of its input and 2 n for its own,
        which frozen ones do not have. Attention takes n / q of that for each pair of tokens, its causal half counted
        once; frozen or not, its backward pass is whole. Not counted: adapters, about 1 % of the weights, and what
        activation checkpointing computes again, since it trains nothing.
        """
        pairs = cost - self.quadratic_length * num_tokens  # sum(L^2)
        per_weight = 4 if self.is_frozen else 6
        return self.num_weights * (per_weight * num_tokens + 6 * pairs / self.quadratic_length)

    def of_step(self, num_tokens: int, cost: int, *, seconds: float, num_devices: int) -> float:
        """The share of the peak of all devices that a step reached, 0 to 1."""
        return self.flops(num_tokens, cost) / (seconds * num_devices * self.peak)


def find_utilisation(
    config: Any, *, quadratic_length: int, is_frozen: bool, dtype: str, device_name: str
) -> Utilisation | None:
    """How to tell the utilisation of a model of this transformers configuration.

    None where the peak is unknown: on a CPU, of weights in float32, on a device that the table lacks; and for a mixture
    of experts, of which a token passes only some.
    """
    peak = peak_flops(device_name)
    if peak is None or dtype != "bfloat16" or getattr(config.get_text_config(), "num_experts_per_tok", None):
        return None
    return Utilisation(matrix_weights_of(config), quadratic_length, is_frozen, peak)
