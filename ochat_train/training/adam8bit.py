"""AdamW with averages of 8 bits, by bitsandbytes: 2 bytes of states for each weight, where AdamW has 8.

Each block of 256 weights shares two scales in fp32. Blocks are of DeepSpeed's flat partition, so they do not end where
parameters do, and another number of processes rounds otherwise.
"""

import importlib.util
from typing import Any

import torch

from ochat_train.model.memory import ModelSize

# Its kernels count elements in 32 bits: https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1785
_MOST_ELEMENTS = 2**31 - 1


def check_adam8bit(size: ModelSize, *, stage: int, num_processes: int) -> None:
    """Raise ValueError, with the remedy, when bitsandbytes is not installed, or cannot update a model of this size."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            "optim.algorithm adamw_8bit needs the package bitsandbytes: pip install 'ochat_train[adam8bit]'"
        )
    if stage == 3:  # in sub-groups of 1e9 elements
        return
    num_elements = size.largest if stage == 0 else -(-size.num_trained // num_processes)
    if num_elements > _MOST_ELEMENTS:
        raise ValueError(
            f"optim.algorithm adamw_8bit updates at most {_MOST_ELEMENTS:,} weights at once, and zero.stage {stage} "
            f"gives each of {num_processes} processes {num_elements:,}; set zero.stage: 3, or train on more processes"
        )


def make_adam8bit(
    groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float
) -> torch.optim.Optimizer:
    """The optimizer over groups with their own weight decay; tensors below 4,096 elements keep averages in fp32."""
    from bitsandbytes.optim import AdamW8bit  # an extra: present when the recipe was checked

    optimizer: torch.optim.Optimizer = AdamW8bit(groups, lr=lr, betas=betas, eps=eps)
    return optimizer
