"""Causal attention over packed sequences, with three interchangeable backends.

Registered with transformers under ATTENTION_NAME, so that any of its models runs on packed batches: models pass
`cu_seqlens` and `max_seqlen` through to us as keyword arguments.
"""

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

Backend = Literal["flash_attn", "torch", "sdpa"]
BACKENDS: tuple[Backend, ...] = ("flash_attn", "torch", "sdpa")


@dataclass(frozen=True, slots=True)
class AttentionNeeds:
    """What a model asks of attention on a device: the inputs of the choice of a backend."""

    device_type: str
    dtype: torch.dtype
    head_dim: int
    has_softcap: bool


@dataclass(frozen=True, slots=True)
class BackendChoice:
    """The backend, and why: one line for the log."""

    backend: Backend
    reason: str


def choose_backend(wanted: Literal["auto", "flash_attn", "torch", "sdpa"], needs: AttentionNeeds) -> BackendChoice:
    """The wanted backend, or for `auto` the first of BACKENDS that is present and supports `needs`.

    Raises ValueError when the wanted one cannot do it, with the reason.
    """
    obstacles = {backend: _obstacle(backend, needs) for backend in BACKENDS}
    if wanted != "auto":
        if (obstacle := obstacles[wanted]) is not None:
            raise ValueError(f"model.attention {wanted} cannot be used here: {obstacle}; set model.attention: auto")
        return BackendChoice(wanted, "asked for by the recipe")
    backend = next(backend for backend in BACKENDS if obstacles[backend] is None)
    passed_over = [f"{other}: {obstacles[other]}" for other in BACKENDS[: BACKENDS.index(backend)]]
    return BackendChoice(backend, "; ".join(passed_over) or "the first choice is present")


def _obstacle(backend: Backend, needs: AttentionNeeds) -> str | None:
    """Why the backend cannot serve these needs; None when it can."""
    if backend == "sdpa":
        return None
    if backend == "flash_attn" and importlib.util.find_spec("flash_attn") is None:
        return "the package flash-attn is not installed (pip install 'ochat_train[gpu]')"
    if needs.device_type != "cuda":
        return "needs a CUDA device"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return "needs a GPU of compute capability 8.0 (Ampere) or newer"
    if needs.dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16, not {str(needs.dtype).removeprefix('torch.')}"
    if needs.head_dim > 256:
        return f"head size {needs.head_dim} is above 256"
    if backend == "torch" and needs.has_softcap:
        return "no softcap"
    if backend == "flash_attn":
        try:
            importlib.import_module("flash_attn")
        except ImportError as error:  # mostly a build for another version of torch
            return f"the package flash-attn cannot be imported: {error}"
    return None


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
    if backend == "flash_attn":
        return _flash_attn(q, k, v, cu_seqlens, max_seqlen, scale, window, softcap)
    if backend == "torch":
        return _torch_varlen(q, k, v, cu_seqlens, max_seqlen, scale, window)
    return _sdpa(q, k, v, cu_seqlens, max_seqlen, scale, window, softcap)


def _flash_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    from flash_attn import flash_attn_varlen_func  # an extra: present when the backend was chosen

    out: Tensor = flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        softmax_scale=scale,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        softcap=softcap or 0.0,
    )
    return out


def _torch_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # torch 2.11 does not have it
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
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
    outs = []
    for q_i, k_i, v_i in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        q_h, k_h, v_h = (part.transpose(0, 1)[None] for part in (q_i, k_i, v_i))  # [1, H, L, D]
        reaches_back = window is not None and len(q_i) > window
        if softcap is not None:
            out = _softcapped(q_h, k_h, v_h, scale, window, softcap)
        elif reaches_back:
            mask = _causal_mask(len(q_i), window, q.device)
            out = F.scaled_dot_product_attention(q_h, k_h, v_h, attn_mask=mask, scale=scale, enable_gqa=True)
        else:
            out = F.scaled_dot_product_attention(q_h, k_h, v_h, is_causal=True, scale=scale, enable_gqa=True)
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


def _softcapped(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float) -> Tensor:
    """The formula of `varlen_attention`, written out: torch's attention has no softcap. All [1, H, L, D]."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = softcap * torch.tanh((q @ k.transpose(2, 3)).float() * scale / softcap)
    scores = scores.masked_fill(~_causal_mask(q.shape[2], window, q.device), float("-inf"))
    return scores.softmax(dim=-1).to(v.dtype) @ v


def _causal_mask(length: int, window: int | None, device: torch.device) -> Tensor:
    """bool [L, L], true where row i may see column j."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < (window or length))


# What some models of transformers add to their attention scores: sinks (GPT-OSS), biases.
_UNSUPPORTED = ("s_aux", "sinks", "position_bias")


def register(backend: Backend) -> str:
    """Register varlen attention with transformers; returns the name for `attn_implementation`.

    The name is not among transformers' mask functions, so its models build no mask.
    """
    # transformers takes names with sdpa or flash in them for its own and asks whether the model has those.
    name = f"ochat_train_varlen_{BACKENDS.index(backend)}"

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
        out = varlen_attention(
            query[0].transpose(0, 1),
            key[0].transpose(0, 1),
            value[0].transpose(0, 1),
            cu_seqlens,
            max_seqlen,
            backend=backend,
            scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
            window=sliding_window,
            softcap=softcap,
        )
        return out[None], None  # [1, T, Hq, D]

    attend_function: Callable[..., tuple[Tensor, None]] = attend
    AttentionInterface.register(name, attend_function)
    return name
