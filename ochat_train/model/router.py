"""The loss that balances the experts of a mixture, and how evenly its routers choose."""

import sys
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ochat_train.model.pretrained import meta_model
from ochat_train.model.ulysses import Exchange

# What transformers' families call the coefficient: all but two by the first name. DBRX has it in ffn_config.
_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef", "moe_loss_weight")


class Balance(NamedTuple):
    """A model's balancing loss in transformers. num_chosen: experts of a token. coefficient: the configuration's."""

    num_chosen: int
    coefficient: float


class RouterSums(NamedTuple):
    """Sums over the tokens of one micro-batch: ranks and micro-batches add up.

    loss: f32 scalar, its tokens times its balancing loss, which is without the coefficient. counts: f32[layers,
    experts], how many tokens chose each expert, without gradient.
    """

    loss: Tensor
    counts: Tensor

    @property
    def largest_share(self) -> float:
        """The largest share of a layer's choices that one of its experts has; 1 / experts where all have the same."""
        return float((self.counts.amax(dim=1) / self.counts.sum(dim=1)).max())


class RouterChoice(NamedTuple):
    """The coefficient of a mixture's balancing loss in a run, and the reason for the log."""

    coefficient: float
    reason: str

    def __str__(self) -> str:
        return f"router loss coefficient {self.coefficient:g} ({self.reason})"


def balance_of(lm: PreTrainedModel) -> Balance | None:
    """The balancing loss of a model; None where transformers has none for it.

    A family has one when the module of its class has `load_balancing_loss_func`. The formula is the same in all that we
    can train, which `probe` checks; sizes are where the model's own forward takes them from.
    """
    if not is_mixture(lm) or not hasattr(sys.modules[type(lm).__module__], "load_balancing_loss_func"):
        return None
    text = lm.config.get_text_config()
    places = (lm, text, getattr(text, "ffn_config", None))
    found = [getattr(place, name) for name in _COEFFICIENTS for place in places if hasattr(place, name)]
    num_chosen = getattr(lm, "num_experts_per_tok", None) or getattr(text, "num_experts_per_tok", None)
    return Balance(int(num_chosen), float(found[0])) if num_chosen and found else None


def choose_router_loss(wanted: float | Literal["auto"], config: Any, *, is_frozen: bool) -> RouterChoice | None:
    """The coefficient of a run; for auto the configuration's, or 0 where routers are frozen beside adapters.

    config: the model's, of transformers; None where it is no mixture. Raises ValueError for a number where there is no
    such loss.
    """
    lm = meta_model(config, torch.bfloat16)
    balance, name = balance_of(lm), lm.config.model_type
    if balance is None:
        if wanted not in ("auto", 0):
            raise ValueError(
                f"model.router_aux_loss_coef {wanted:g}: transformers has no balancing loss for {name}; set auto"
            )
        return RouterChoice(0.0, f"transformers has no balancing loss for {name}") if is_mixture(lm) else None
    if wanted != "auto":
        return RouterChoice(wanted, f"asked for by the recipe; {balance.coefficient:g} in the configuration")
    if is_frozen:
        return RouterChoice(0.0, "adapters leave the routers as they are; model.router_aux_loss_coef asks for it")
    return RouterChoice(balance.coefficient, f"of the configuration of {name}; model.router_aux_loss_coef changes it")


def is_mixture(lm: PreTrainedModel) -> bool:
    """Whether the model has routers: modules of those classes whose outputs transformers records as router_logits."""
    classes: set[type] = set()
    for part in lm.modules():
        recorders = (getattr(type(part), "_can_record_outputs", None) or {}).get("router_logits", [])
        classes |= {recorder.target_class for recorder in (recorders if isinstance(recorders, list) else [recorders])}
    return any(isinstance(module, tuple(classes)) for module in lm.modules())


def sum_router_loss(
    router_logits: tuple[Tensor, ...], num_chosen: int, num_tokens: int, exchange: Exchange | None = None
) -> RouterSums:
    """The sums of a micro-batch's first `num_tokens` tokens n; the others only fill it.

    router_logits: of each layer, [..., E] of T tokens. In fp32, as `load_balancing_loss_func` of transformers, whose
    means are over the tokens of all layers together:

        p = softmax(router_logits);  f[e] = mean of (e is among the num_chosen largest of p);  P[e] = mean of p[e]
        loss = n * E * sum(f * P)

    exchange: of the ranks that have shares of the micro-batch, whose f is that of the whole. The loss is linear in P,
    so that theirs add up to that of the whole. No probabilities are kept for the backward pass: they are computed again
    from the logits.
    """
    layers = [
        checkpoint(
            _sums_of_layer,
            logits.flatten(0, -2)[:num_tokens],
            num_chosen,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for logits in router_logits
    ]
    counts, probabilities = (torch.stack(parts) for parts in zip(*layers, strict=True))  # [layers, E]
    chosen = counts.sum(0) if exchange is None else exchange.sum(counts.sum(0))
    num_rows = chosen.sum() / num_chosen  # of f and P; a micro-batch of nothing has a loss of 0
    products = (chosen * probabilities.sum(0)).sum() * counts.shape[1]
    return RouterSums(products / (num_rows * len(layers)).clamp(min=1), counts)


def _sums_of_layer(logits: Tensor, num_chosen: int) -> tuple[Tensor, Tensor]:
    """f32[E] each: how many of n tokens chose an expert, and the sum of its probabilities; logits [n, E]."""
    probabilities = logits.float().softmax(dim=-1)
    chosen = probabilities.detach().topk(num_chosen, dim=-1).indices.flatten()
    ones = torch.ones(chosen.shape, dtype=torch.float32, device=logits.device)
    return ones.new_zeros(logits.shape[1]).scatter_add(0, chosen, ones), probabilities.sum(dim=0)


def add_router_sums(parts: list[RouterSums]) -> RouterSums | None:
    """The sums over all parts, without gradient; None of none."""
    if not parts:
        return None
    return RouterSums(*(torch.stack(values).detach().double().sum(dim=0) for values in zip(*parts, strict=True)))
