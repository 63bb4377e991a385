"""Activation checkpointing: which layers, or MLPs in parts, are recomputed in the backward pass, instead of kept."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

# What `auto` tries, that which recomputes least first. A layer's forward pass is a third of its products, so a policy
# adds a third of the share of layers that it recomputes.
BY_TIME = ("none", "every_4", "every_3", "every_2", "full")


def period_of(policy: str) -> int | None:
    """1 for full, N for every_N, None for none. Layers 0, N, 2 N, ... are recomputed."""
    if policy == "none":
        return None
    return 1 if policy == "full" else int(policy.removeprefix("every_"))


def share_of(policy: str) -> float:
    """The share of a deep model's layers that are recomputed."""
    period = period_of(policy)
    return 0 if period is None else 1 / period


def check_policy(policy: str, num_layers: int) -> None:
    """Raise ValueError for an every_N of more layers than a model of `num_layers` has."""
    period = period_of(policy)
    if period is not None and period > max(num_layers, 1):
        raise ValueError(
            f"model.checkpointing {policy} is above the model's {num_layers} layers, so that none would be the N-th; "
            "lower N, or set none"
        )


def enable_checkpointing(lm: PreTrainedModel, policy: str) -> None:
    """Let `lm` keep activations by `policy`, in place: full, none or every_N.

    full: each layer keeps only its input, and is recomputed when its backward pass begins. every_N: layers 0, N, 2 N,
    ... do so; the others keep all that they need. The gradients are the same. Layers are transformers' own
    (GradientCheckpointingLayer), in the order of the model. Raises ValueError when N is above the number of layers, or
    when a model's layers cannot be chosen one by one.
    """
    period = period_of(policy)
    if period is None:
        return
    options = {"use_reentrant": False}
    if lm.device.type == "meta":
        options["preserve_rng_state"] = False  # the meta device has no random numbers
    if not lm.supports_gradient_checkpointing:
        raise ValueError(f"{type(lm).__name__} has no activation checkpointing; set model.checkpointing: none")
    # The first name replaces the second in the course of transformers 5.
    enable = getattr(lm, "activation_checkpointing_enable", None) or lm.gradient_checkpointing_enable
    enable(options)
    if period == 1:
        return
    layers = [module for module in lm.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"model.checkpointing {policy}: the layers of {type(lm).__name__} are checkpointed all or none; set full "
            "or none"
        )
    check_policy(policy, len(layers))
    for number, layer in enumerate(layers):
        layer.gradient_checkpointing = number % period == 0


class Tiled(NamedTuple):
    """A policy, and in how many parts MLPs run, see `tile_mlps`."""

    policy: str
    mlp_tiles: int


def tile_mlps(lm: PreTrainedModel, num_tiles: int) -> None:
    """Let the MLP of each layer run on `num_tiles` parts of the tokens, one after the other, in place.

    Each part keeps its input alone, and is computed again in its backward pass, so that what is inside of an MLP
    exists for one part at a time. The number of parts is fixed: in ZeRO's stage 3 all ranks gather weights equally
    often. An MLP is a child of a transformers layer that takes nothing but hidden states, and has matrices and no
    experts: these are left as they are. That it works on each token by itself is for `check_tiles` to say. Raises
    ValueError when there is none.
    """
    if num_tiles == 1:
        return
    layers = [module for module in lm.modules() if isinstance(module, GradientCheckpointingLayer)]
    mlps = [child for layer in layers for child in layer.children() if _is_mlp(child)]
    if not mlps:
        raise ValueError(f"no layer of {type(lm).__name__} has an MLP that takes hidden states alone")
    for mlp in mlps:
        mlp.forward = partial(_run_tiles, mlp.forward, num_tiles, lm.device.type != "meta")


def _is_mlp(module: nn.Module) -> bool:
    dims = [parameter.dim() for parameter in module.parameters()]
    return dims.count(2) > 1 and max(dims) == 2 and len(inspect.signature(module.forward).parameters) == 1


def _run_tiles(forward: Callable[[Tensor], Tensor], num_tiles: int, preserve_rng_state: bool, hidden: Tensor) -> Tensor:
    """forward(hidden), for hidden [..., T, C]; at once where nothing is kept for a backward pass."""
    if not torch.is_grad_enabled():
        return forward(hidden)
    run = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=preserve_rng_state)
    return torch.cat([run(tile) for tile in hidden.tensor_split(num_tiles, dim=-2)], dim=-2)
