"""What a model of transformers does to hidden states and logits around its head."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ochat_train.model.text_part import base_of


class LogitsForm(NamedTuple):
    """logits = scale * head(hidden), and then, with a softcap, softcap * tanh(logits / softcap)."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """The logits of what the head returned."""
        logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def measure_logits(lm: PreTrainedModel) -> LogitsForm:
    """What the forward of `lm` does beside its layers and its head, in float32.

    Its forward runs with a few numbers in place of hidden states and a head that returns what it is given; no weight
    is read. Names of settings would not do: Granite divides by logits_scaling, and HyperCLOVA X multiplies by it. What
    is no LogitsForm is returned as the plain one: `probe` compares the model's logits.
    """
    head, is_training = lm.get_output_embeddings(), lm.training
    lm.eval()
    numbers = torch.tensor([[[0.0, 0.25, 1.0, -2.0, 2.0**100]]])  # the last one is at the softcap, if there is one
    try:
        with torch.no_grad(), _Replaced(lm, {base_of(lm): lambda *_, **__: _Output(numbers), head: _same}):
            made = lm(input_ids=torch.zeros(1, numbers.shape[-1], dtype=torch.long), use_cache=False).logits[0, 0]
    except Exception:  # of any kind: a forward that needs more than this is compared by the probe
        return LogitsForm()
    finally:
        lm.train(is_training)
    if made.shape != numbers[0, 0].shape:
        return LogitsForm()
    at_quarter, highest = float(made[1]), float(made[-1])
    softcap = highest if 0 < highest < 2.0**50 else None
    scale = at_quarter / 0.25 if softcap is None else 4 * softcap * math.atanh(at_quarter / softcap)
    form = LogitsForm(1.0 if math.isclose(scale, 1, rel_tol=1e-6) else scale, softcap)
    return form if torch.allclose(form(numbers[0, 0]), made.float(), rtol=1e-5) else LogitsForm()


def has_parts_before_head(lm: PreTrainedModel) -> bool:
    """Whether hidden states pass weights between the base and the head, as in BERT: those that are in neither."""
    of_both = {*base_of(lm).parameters(), *lm.get_output_embeddings().parameters()}
    return not of_both.issuperset(lm.parameters())


def before_head(lm: PreTrainedModel, hidden: Tensor) -> Tensor:
    """What the forward of `lm` gives its head for last hidden states [T, C] of its base, [T, C of the head].

    The forward runs with the hidden states in place of the base, and without the head. Their modules are replaced, not
    called, because ZeRO's hooks would gather their weights.
    """
    given: list[Tensor] = []

    def take(states: Tensor) -> Tensor:
        given.append(states)
        return states

    with _Replaced(lm, {base_of(lm): lambda *_, **__: _Output(hidden[None]), lm.get_output_embeddings(): take}):
        type(lm).forward(lm, input_ids=hidden.new_zeros(1, len(hidden), dtype=torch.long), use_cache=False)
    return given[0][0]


def _same(value: Tensor) -> Tensor:
    return value


class _Output(tuple[Tensor]):
    """What a base model returns: a tuple of hidden states, with names too; what it lacks is None."""

    def __new__(cls, hidden: Tensor) -> "_Output":
        return super().__new__(cls, (hidden,))

    def __getattr__(self, name: str) -> Any:
        return self[0] if name == "last_hidden_state" else None


class _Function(nn.Module):
    """A function in place of a module, whose attributes it has: xLSTM looks at the dtype of its head's weight."""

    def __init__(self, function: Callable[..., Any], replaced: nn.Module) -> None:
        super().__init__()
        self.forward = function
        vars(self)["replaced"] = replaced  # no part of this module

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["replaced"], name)


class _Replaced:
    """Functions in place of modules of `lm`, for a while; its forward finds them where the modules were."""

    def __init__(self, lm: nn.Module, functions: dict[Any, Callable[..., Any]]) -> None:
        self.places: list[tuple[Any, str, nn.Module, _Function]] = [
            (parent._modules, name, module, _Function(functions[module], module))
            for parent in lm.modules()
            for name, module in parent.named_children()
            if module in functions
        ]

    def __enter__(self) -> None:
        for modules, name, _, function in self.places:
            modules[name] = function

    def __exit__(self, *error: object) -> None:
        for modules, name, module, _ in self.places:
            modules[name] = module
