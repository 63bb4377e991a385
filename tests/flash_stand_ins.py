"""Stand-ins for attention packages that need a GPU, so that our call of them is tested on a CPU.

They are not the packages. Each has the arguments, in their order and with their defaults, and the results that the
named version has, checks what that version checks, and computes in plain torch what its documentation says. So a wrong
name, a window that is off by one, or a result taken for another is found here; a wrong kernel is not.
"""

import functools
import sys
import types
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from ochat_train.model.sdpa import AttentionOptions


def documented(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float | None,
    is_causal: bool,
    window_size: tuple[int | None, int | None],
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """FlashAttention's words: query i attends to keys i - left to i + right, inclusive; -1 or None: without end.

    Returns out [T, Hq, D] and the log of the sums of exponentials [Hq, T].
    """
    assert cu_seqlens.dtype == torch.int32 and cu_seqlens.is_contiguous()
    assert type(max_seqlen) is int and max_seqlen == int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
    assert q.shape[1] % k.shape[1] == 0 and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    left, right = (None if end is None or end < 0 else end for end in window_size)
    right = 0 if is_causal else right
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    outs, sums = [], []
    for begin, end in pairwise(cu_seqlens.tolist()):
        scores = torch.einsum("ihd,jhd->hij", q[begin:end], k[begin:end])
        scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
        if softcap > 0:
            scores = torch.tanh(scores / softcap) * softcap
        position = torch.arange(end - begin)
        ahead = position[None, :] - position[:, None]
        hidden = torch.zeros_like(ahead, dtype=torch.bool)
        if left is not None:
            hidden |= ahead < -left
        if right is not None:
            hidden |= ahead > right
        scores = scores.masked_fill(hidden, float("-inf"))
        outs.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), v[begin:end]))
        sums.append(scores.logsumexp(-1))
    return torch.cat(outs), torch.cat(sums, dim=1)


def flash_attn_2_8_3(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Any = None,
) -> Tensor:
    assert cu_seqlens_k is cu_seqlens_q and max_seqlen_k == max_seqlen_q and dropout_p == 0
    return documented(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale, causal, window_size, softcap)[0]


def flash_attn_3_0_0b1(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Any = None,
    seqused_k: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Any = None,
    q_descale: Any = None,
    k_descale: Any = None,
    v_descale: Any = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: Any = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Tensor:
    assert cu_seqlens_k is cu_seqlens_q and max_seqlen_k == max_seqlen_q and q.shape[-1] % 8 == 0
    return documented(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale, causal, window_size, softcap)[0]


@functools.wraps(flash_attn_3_0_0b1)
def flash_attn_3_with_sums(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """With the second result that its builds returned until 2025; see Dao-AILab/flash-attention pull request 1851."""
    out = flash_attn_3_0_0b1(*args, **kwargs)
    return out, out.new_zeros(out.shape[1], out.shape[0])


def flash_attn_4_0_0b36(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Any = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    min_seqlen_k: int | None = None,
    seqused_q: Any = None,
    seqused_k: Any = None,
    gather_kv_indices: Any = None,
    page_table: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    learnable_sink: Any = None,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: Any = None,
    deterministic: bool = False,
    score_mod: Any = None,
    score_mod_bwd: Any = None,
    mask_mod: Any = None,
    block_sparse_tensors: Any = None,
    aux_tensors: Any = None,
    aux_scalars: Any = None,
    return_lse: bool = False,
    scheduler_metadata: Any = None,
    seqlen_k_per_split: Any = None,
    disable_scheduler_metadata: bool = False,
    gather_bwd_recompute_p: bool = False,
    gather_bwd_token_chunk: Any = None,
) -> tuple[Tensor, Tensor]:
    assert qv is None and cu_seqlens_q is not None and cu_seqlens_k is cu_seqlens_q
    assert max_seqlen_q is not None and max_seqlen_k == max_seqlen_q and q.shape[-1] % 8 == 0
    assert not torch.compiler.is_compiling()  # it compiles kernels when it is called, and is no operator of torch
    return documented(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale, causal, window_size, softcap)


def flash_attn_4_of_2_8_3(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_q: Any = None,
    seqused_k: Any = None,
    page_table: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    learnable_sink: Any = None,
    softcap: float = 0.0,
    pack_gqa: Any = None,
) -> tuple[Tensor, Tensor]:
    """The package flash-attn 2.8.3 also carries an early flash_attn.cute, which knows no longest sequence."""
    raise AssertionError("refused before it is called")


def varlen_attn_2_13(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Any = None,
    block_table: Any = None,
    num_splits: int | None = None,
) -> Any:
    assert enable_gqa or query.shape[1] == key.shape[1]
    return varlen_attn_2_11(
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        return_aux=return_aux,
        scale=scale,
        window_size=window_size,
    )


def varlen_attn_2_11(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Any:
    """It is causal when the right end of its window is 0."""
    assert cu_seq_k is cu_seq_q and max_k == max_q
    out, log_sums = documented(query, key, value, cu_seq_q, max_q, scale, False, window_size, 0.0)
    return (out, log_sums.detach()) if return_aux is not None and return_aux.lse else out  # a gradient is ignored


def varlen_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor, options: AttentionOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward pass of FlashAttention, as its paper has it: what it is given of the forward pass, it uses."""
    groups = q.shape[1] // k.shape[1]
    wide_k, wide_v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    position = torch.arange(len(q))
    sequence = torch.bucketize(position, options.cu_seqlens[1:], right=True)
    ahead = position[None, :] - position[:, None]
    visible = (sequence[:, None] == sequence) & (ahead <= 0) & (-ahead < (options.window or len(q)))
    scores = torch.einsum("ihd,jhd->hij", q, wide_k) * options.scale
    p = (scores - log_sums[..., None]).exp() * visible
    of_p = torch.einsum("ihd,jhd->hij", gradient, wide_v)
    of_scores = p * (of_p - (gradient * out).sum(-1).T[..., None]) * options.scale
    return (
        torch.einsum("hij,jhd->ihd", of_scores, wide_k),
        torch.einsum("hij,ihd->jhd", of_scores, q).unflatten(1, (-1, groups)).sum(2),
        torch.einsum("hij,ihd->jhd", p, gradient).unflatten(1, (-1, groups)).sum(2),
    )


PACKAGES = {
    "flash_attn": flash_attn_2_8_3,
    "flash_attn_interface": flash_attn_3_0_0b1,
    "flash_attn.cute": flash_attn_4_0_0b36,
}


def install(monkeypatch: pytest.MonkeyPatch, **functions: Any) -> None:
    """Make the packages of these functions importable, a dot in their names as __, and no other one of PACKAGES."""
    present = {name.replace("__", "."): function for name, function in functions.items()}
    assert present.keys() <= PACKAGES.keys()
    for name in PACKAGES:
        module: types.ModuleType | None = None  # importing it raises ModuleNotFoundError
        if name in present:
            module = types.ModuleType(name)
            module.flash_attn_varlen_func = present[name]  # type: ignore[attr-defined]  # made here
        elif name == "flash_attn" and "flash_attn.cute" in present:
            module = types.ModuleType(name)  # flash-attn-4 alone leaves a package without FlashAttention 2
        monkeypatch.setitem(sys.modules, name, module)
