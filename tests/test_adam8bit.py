"""AdamW with averages of 8 bits: near AdamW, of the planned size, and refused where it cannot be."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ochat_train.model.memory import ModelSize
from ochat_train.recipe import OptimSection
from ochat_train.training.engine import check_adam8bit, make_optimizer

LR, NUM_STEPS = 1e-3, 50


def trained(algorithm: Any) -> tuple[Tensor, torch.optim.Optimizer]:
    """The weights of a noisy regression after NUM_STEPS."""
    torch.manual_seed(0)
    model = nn.Linear(256, 64)
    optimizer = make_optimizer(model, OptimSection(algorithm=algorithm), lr=LR)
    target = torch.randn(64, 256)
    for _ in range(NUM_STEPS):
        inputs = torch.randn(128, 256)
        optimizer.zero_grad()
        (model(inputs) - inputs @ target.T - torch.randn(128, 64)).square().mean().backward()
        optimizer.step()
    return model.weight.detach(), optimizer


def test_weights_stay_near_those_of_adamw() -> None:
    (start, _), (ours, _), (theirs, _) = (trained(name) for name in ("sgd", "adamw_8bit", "adamw"))
    moved = float((theirs - start).norm())
    assert moved > 0
    # Of 8 bits one is the sign, and the rest has steps of about 1 % below a block's largest value and wider ones
    # further down, where an average of squares of 1e-4 of the largest is off by some 10 %, and its update by half of
    # that. A wrong scale, decay or count of steps moves weights by as much as they have moved.
    assert 0 < float((ours - theirs).norm()) < 0.05 * moved


def test_a_weight_has_two_bytes_of_state_and_scales() -> None:
    _, optimizer = trained("adamw_8bit")
    states: dict[Any, dict[str, Any]] = optimizer.state
    (matrix,) = (state for parameter, state in states.items() if parameter.dim() == 2)
    names = ("state1", "state2", "absmax1", "absmax2")
    num_bytes = sum(matrix[name].numel() * matrix[name].element_size() for name in names)
    assert num_bytes == 64 * 256 * (2 + 8 / 256)


def size_of(num_weights: int) -> ModelSize:
    return ModelSize(num_weights, num_weights, num_weights // 10, num_weights // 10)


def test_a_process_with_more_weights_than_the_kernels_count_is_refused() -> None:
    check_adam8bit(size_of(13 * 10**9), stage=2, num_processes=8)
    check_adam8bit(size_of(13 * 10**9), stage=3, num_processes=1)
    with pytest.raises(ValueError, match=r"zero\.stage 2 gives each of 4 processes 3,250,000,000; set zero\.stage: 3"):
        check_adam8bit(size_of(13 * 10**9), stage=2, num_processes=4)
    check_adam8bit(size_of(13 * 10**9), stage=0, num_processes=1)  # replicas are updated one matrix at a time
