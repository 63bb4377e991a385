"""Causal attention over packed sequences, by interchangeable backends.

Registered with transformers under names of our own, so that any of its models runs on packed batches: models pass
`cu_seqlens` and `max_seqlen` through to us as keyword arguments.
"""

import importlib
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.nn.attention import activate_flash_attention_impl, current_flash_attention_impl, restore_flash_attention_impl
from transformers import AttentionInterface

from ochat_train.model.attention_backends import BACKENDS, TABLE, Backend

# q [T, Hq, D], k and v [T, Hkv, D], cu_seqlens, max_seqlen, scale, window, softcap -> [T, Hq, D]
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, int, float, int | None, float | None], Tensor]


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    backend: Backend,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention inside each sequence: [T, Hq, D] from q [T, Hq, D] and k, v [T, Hkv, D].

    Sequence i is rows cu_seqlens[i] to cu_seqlens[i+1]. For each of them, with K and V repeated to Hq heads:

        scores = q @ k.T * scale;  if softcap: scores = softcap * tanh(scores / softcap)
        scores[i, j] = -inf where j > i, or where window is given and i - j >= window
        out = softmax(scores) @ v

    A window of W lets a token see itself and W - 1 tokens before it, as in transformers.
    """
    return _kernel(backend)(q, k, v, cu_seqlens, max_seqlen, scale, window, softcap)


def _kernel(backend: Backend) -> Kernel:
    """What a backend runs, found once for a model, so that a compiled layer holds no imports."""
    if backend == "sdpa":
        return _sdpa
    if backend in ("torch", "torch_fa3"):
        # torch keeps this for the whole process: what an earlier model took must not stay.
        if backend == "torch_fa3":
            activate_flash_attention_impl("FA3")
        elif current_flash_attention_impl() is not None:
            restore_flash_attention_impl()
        return _torch_varlen()
    return _flash(_package(backend).flash_attn_varlen_func)


def _package(backend: Backend) -> Any:
    return importlib.import_module(next(row.module for row in TABLE if row.backend == backend and row.module))


def _is_traceable(backend: Backend) -> bool:
    """Whether torch.compile can keep a backend's kernels in its graph, because they are operators of torch.

    FlashAttention 2's are, and those of newer builds of 3. Those of 4 are compiled when they are called. The loop of
    sdpa would be compiled anew for every batch.
    """
    if backend == "flash_attn_3":
        return isinstance(getattr(_package(backend), "_flash_attn_forward", None), CustomOpDef)
    return backend in ("flash_attn", "torch", "torch_fa3")


def _flash(function: Callable[..., Any]) -> Kernel:
    """The call that FlashAttention 2, 3 and 4 have in common."""

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        out = function(
            q,
            k,
            v,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
            max_seqlen_q=max_seqlen,
            max_seqlen_k=max_seqlen,
            softmax_scale=scale,
            causal=True,
            softcap=softcap or 0.0,
            # Without a window the default stays, which 4 writes in another way: (None, None), not (-1, -1).
            **({} if window is None else {"window_size": (window - 1, 0)}),
        )
        # 4 also returns the log of the sums of exponentials, and so did 3 until 2025.
        tensor: Tensor = out[0] if isinstance(out, tuple) else out
        return tensor

    return attend


def _torch_varlen() -> Kernel:
    from torch.nn.attention.varlen import varlen_attn

    takes_groups = "enable_gqa" in inspect.signature(varlen_attn).parameters  # torch 2.11 does not

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        assert softcap is None  # choose_backend
        options: dict[str, Any] = {}
        if takes_groups:
            options["enable_gqa"] = True
        else:
            groups = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        out = varlen_attn(
            q,
            k,
            v,
            cu_seqlens,
            cu_seqlens,
            max_seqlen,
            max_seqlen,
            scale=scale,
            window_size=(-1 if window is None else window - 1, 0),
            **options,
        )
        assert isinstance(out, Tensor)
        return out

    return attend


def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    lengths = _lengths(cu_seqlens)
    # [1, H, L, D] each. Split at the end and joined whole, because each view costs more than a short sequence does.
    parts = (part.transpose(0, 1)[None].split(lengths, dim=2) for part in (q, k, v))
    outs = [
        _one_sequence(q_i, k_i, v_i, scale, window, softcap).transpose(1, 2)
        for q_i, k_i, v_i in zip(*parts, strict=True)
    ]
    return torch.cat(outs, dim=1).squeeze(0)


_last_read: tuple[weakref.ref[Tensor], int, list[int]] | None = None


def _lengths(cu_seqlens: Tensor) -> list[int]:
    """The lengths on the host, read once for all layers of a batch: on a GPU reading waits for all work before it.

    They belong to the tensor, not to its values: every layer gets the same object from the model.
    """
    global _last_read
    if _last_read is not None and _last_read[0]() is cu_seqlens and _last_read[1] == cu_seqlens._version:
        return _last_read[2]
    lengths: list[int] = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
    _last_read = (weakref.ref(cu_seqlens), cu_seqlens._version, lengths)
    return lengths


_SMALLEST_BLOCK = 64


def _one_sequence(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None) -> Tensor:
    """[1, Hq, L, D] from q [1, Hq, L, D], k and v [1, Hkv, L, D]. A window costs about L times its size, not L^2.

    The first `window` tokens see all before them. The others are cut into blocks, which see themselves and as much of a
    window in front of them: all blocks in one call, in which keys of neighbours are there more than once.
    """
    length = q.shape[2]
    if window is None or window >= length:
        return _masked(q, k, v, scale, None, softcap)
    first = _masked(q[:, :, :window], k[:, :, :window], v[:, :, :window], scale, None, softcap)
    size = min(max(window // 4, _SMALLEST_BLOCK), length - window)
    num_blocks = -(-(length - window) // size)
    padding = (0, 0, 0, window + num_blocks * size - length)  # behind the end, where no token of the sequence sees
    q_blocks = F.pad(q[0, :, window:], padding).unflatten(1, (num_blocks, size)).transpose(0, 1)  # [N, Hq, size, D]
    span = size + window - 1
    k_blocks, v_blocks = (
        F.pad(part[0, :, 1:], padding).unfold(1, span, size).permute(1, 0, 3, 2)  # [N, Hkv, span, D]
        for part in (k, v)
    )
    rest = _masked(q_blocks, k_blocks, v_blocks, scale, _band(size, span, window, q.device), softcap)
    rest = rest.transpose(0, 1).flatten(1, 2)[None, :, : length - window]
    return torch.cat([first, rest], dim=2)


def _band(rows: int, columns: int, window: int, device: torch.device) -> Tensor:
    """bool [rows, columns], true where a token sees another: rows are the last `rows` tokens of the columns."""
    distance = torch.arange(columns - rows, columns, device=device)[:, None] - torch.arange(columns, device=device)
    return (distance >= 0) & (distance < window)


def _masked(q: Tensor, k: Tensor, v: Tensor, scale: float, visible: Tensor | None, softcap: float | None) -> Tensor:
    """[N, Hq, R, D] from q [N, Hq, R, D], k and v [N, Hkv, C, D], for what is visible [R, C]; None: causal, R = C."""
    if softcap is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, is_causal=visible is None, scale=scale, enable_gqa=True
        )
    if visible is None:
        visible = _band(q.shape[2], q.shape[2], q.shape[2], q.device)
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    # torch's attention has no softcap.
    scores = softcap * torch.tanh((q @ k.transpose(2, 3)).float() * scale / softcap)
    return scores.masked_fill(~visible, float("-inf")).softmax(dim=-1).to(v.dtype) @ v


# What some models of transformers add to their attention scores: sinks (GPT-OSS), biases.
_UNSUPPORTED = ("s_aux", "sinks", "position_bias")


def register(backend: Backend) -> str:
    """Register varlen attention with transformers; returns the name for `attn_implementation`.

    The name is not among transformers' mask functions, so its models build no mask.
    """
    # transformers takes names with sdpa or flash in them for its own and asks whether the model has those.
    name = f"ochat_train_varlen_{BACKENDS.index(backend)}"
    kernel = _kernel(backend)

    def attend(
        module: torch.nn.Module,
        query: Tensor,  # [1, Hq, T, D]
        key: Tensor,  # [1, Hkv, T, D]
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        # Each of these would mix sequences or change the result silently.
        if cu_seqlens is None or max_seqlen is None:
            raise ValueError("packed attention was called without cu_seqlens; run the model through PackedCausalLM")
        if attention_mask is not None or query.shape[0] != 1 or query.shape[2] != key.shape[2]:
            raise ValueError("packed attention takes one row, no mask and no cache")
        if dropout:
            raise ValueError(f"attention dropout {dropout} is not supported; set model.config.attention_dropout: 0")
        if getattr(module, "is_causal", True) is False:
            raise ValueError(f"{type(module).__name__} attends in both directions; a causal model is needed")
        for name in _UNSUPPORTED:
            if others.get(name) is not None:
                raise ValueError(f"{type(module).__name__} needs {name} in its attention, which is not supported yet")
        out = kernel(
            query[0].transpose(0, 1),
            key[0].transpose(0, 1),
            value[0].transpose(0, 1),
            cu_seqlens,
            max_seqlen,
            query.shape[-1] ** -0.5 if scaling is None else scaling,
            sliding_window,
            softcap,
        )
        return out[None], None  # [1, T, Hq, D]

    attend_function: Callable[..., tuple[Tensor, None]] = attend
    # One break in the graph of a layer, and nothing of a backend compiled that cannot be.
    AttentionInterface.register(name, attend_function if _is_traceable(backend) else torch.compiler.disable(attend))
    return name
