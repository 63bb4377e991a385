"""Attention sinks with a kernel that knows none: what it returns is changed before its own backward pass reads it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ochat_train.model.sdpa import AttentionOptions

# q, k, v, options -> out [T, Hq, D] and the log of the sums of exponentials, f32[Hq, T]
Forward = Callable[[Tensor, Tensor, Tensor, AttentionOptions], tuple[Tensor, Tensor]]
# gradient of out, q, k, v, out, log of the sums, options -> gradients of q, k, v
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, AttentionOptions], tuple[Tensor, Tensor, Tensor]]


def attend_with_sinks(
    q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions, *, forward: Forward, backward: Backward
) -> Tensor:
    """[T, Hq, D] with `options.sinks`, from the two passes of a kernel of flash attention without sinks.

    A sink s adds exp(s) to a sum of exponentials, exp(l): the output is multiplied by exp(l - l'), where
    l' = log(exp(l) + exp(s)). A backward pass of flash attention computes each probability anew as exp(score - l), and
    from the output only its product with the output's gradient; with l' and the new output both are those of the
    softmax with the sink. The sink's gradient is minus its probability, times that product, summed over the tokens.
    """
    out: Tensor = _WithSinks.apply(q, k, v, options.sinks, options, forward, backward)  # type: ignore[no-untyped-call]
    return out


class _WithSinks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor,
        options: AttentionOptions,
        forward: Forward,
        backward: Backward,
    ) -> Tensor:
        plain, log_sums = forward(q, k, v, options)
        with_sinks = torch.logaddexp(log_sums, sinks.float()[:, None])
        out = (plain * (log_sums - with_sinks).exp().T[..., None]).to(q.dtype)
        ctx.save_for_backward(q, k, v, sinks, out, with_sinks)
        ctx.options, ctx.backward_of_kernel = options, backward
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out, log_sums = ctx.saved_tensors
        gradients = ctx.backward_of_kernel(gradient.contiguous(), q, k, v, out, log_sums, ctx.options)
        products = (gradient.float() * out.float()).sum(dim=-1)  # [T, Hq]
        of_sinks = -((sinks.float()[:, None] - log_sums).exp() * products.T).sum(dim=1)
        return (*gradients, of_sinks.to(sinks.dtype), None, None, None)
