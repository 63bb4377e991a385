"""Activation checkpointing: which layers of a model are recomputed in the backward pass, instead of kept."""

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
