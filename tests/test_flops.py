"""What training takes, against a count by hand, and the peaks of devices by the names that torch gives them."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from ochat_train.model.pretrained import quadratic_length_of
from ochat_train.tokens.packing import cost_of
from ochat_train.training.speed import Utilisation, find_utilisation, peak_flops

CONFIG = LlamaConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
)
H100 = "NVIDIA H100 80GB HBM3"


def utilisation(config: Any = CONFIG, *, is_frozen: bool = False) -> Utilisation:
    q = quadratic_length_of(config, max_tokens=256)
    found = find_utilisation(config, quadratic_length=q, is_frozen=is_frozen, dtype="bfloat16", device_name=H100)
    assert found is not None
    return found


def by_hand(lengths: list[int], *, per_weight: int) -> float:
    projections = 3 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64) + 97 * 32
    # Of L^2 / 2 pairs that a causal mask leaves: two products of 32 each, 2 FLOP a product, three passes.
    attention = 3 * 2 * 2 * 32 / 2 * 3
    return sum(per_weight * projections * length + attention * length**2 for length in lengths)


# The quadratic length is a whole number: 228 in place of 228.3 here.
ROUNDED = 2e-3


@pytest.mark.parametrize(("is_frozen", "per_weight"), [(False, 6), (True, 4)])
@pytest.mark.parametrize("lengths", [[1], [200, 3, 77], [256] * 5])
def test_a_step_takes_what_a_count_by_hand_says(lengths: list[int], is_frozen: bool, per_weight: int) -> None:
    found = utilisation(is_frozen=is_frozen)
    cost = sum(cost_of(length, found.quadratic_length) for length in lengths)
    expected = by_hand(lengths, per_weight=per_weight)
    assert found.flops(sum(lengths), cost) == pytest.approx(expected, rel=ROUNDED)
    share = found.of_step(sum(lengths), cost, seconds=0.5, num_devices=4)
    assert share == pytest.approx(expected / (0.5 * 4 * 989.5e12), rel=ROUNDED)


MIXTURE = MixtralConfig(
    **(CONFIG.to_dict() | {"num_local_experts": 4, "num_experts_per_tok": 2, "model_type": "mixtral"})
)


@pytest.mark.parametrize("config", [CONFIG, MIXTURE], ids=["llama", "mixtral"])
def test_a_step_takes_what_torch_counts(config: Any) -> None:
    """Of the operations that really run; torch counts attention whole, we its causal half. Experts run one by one."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
    ids = torch.arange(64)[None]
    with FlopCounterMode(display=False) as counter:
        model(ids).logits.sum().backward()
    found = utilisation(config)
    attention = by_hand([64], per_weight=0)
    ours = found.flops(64, cost_of(64, found.quadratic_length)) + attention
    # The frequencies of positions, and the first layer's input, of which no gradient is needed past the embedding.
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_an_unknown_peak_gives_no_utilisation() -> None:
    options = {"quadratic_length": 228, "is_frozen": False}
    for device, dtype in (("cpu", "bfloat16"), (H100, "float32"), ("Tesla V100-SXM2-32GB", "bfloat16")):
        assert find_utilisation(CONFIG, dtype=dtype, device_name=device, **options) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("device", "tera"),
    [
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        (H100, 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA B200", 2250),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA A10", 125),
        ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 5090", 209.5),
        ("AMD Instinct MI250X", 191.5),
        ("AMD Instinct MI300X", 1307.4),
    ],
)
def test_a_known_device_has_its_makers_figure(device: str, tera: float) -> None:
    assert peak_flops(device) == pytest.approx(tera * 1e12)


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        "Tesla V100-SXM2-32GB",
        "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA L40",
        "NVIDIA A10G",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA RTX 6000 Ada Generation",
    ],
)
def test_a_device_that_only_sounds_alike_has_none(device: str) -> None:
    assert peak_flops(device) is None
