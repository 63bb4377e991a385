"""Attention over packed sequences by torch's scaled_dot_product_attention: on any device, and the reference."""

import weakref
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class AttentionOptions(NamedTuple):
    """Where the sequences are, and how their scores are made; see `varlen_attention`.

    A named tuple, because torch.compile traces those.

    cu_seqlens: i32[B + 1]; sequence i is rows cu_seqlens[i] to cu_seqlens[i + 1]. max_seqlen: the longest one's length.
    sinks: [Hq], the score of a key beside all others, whose value is 0; None: there is none.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
    """A call for each sequence: the formula of `varlen_attention`, [T, Hq, D]."""
    lengths = read_lengths(options.cu_seqlens)
    # [1, H, L, D] each. Split at the end and joined whole, because each view costs more than a short sequence does.
    parts = (part.transpose(0, 1)[None].split(lengths, dim=2) for part in (q, k, v))
    outs = [_one_sequence(q_i, k_i, v_i, options).transpose(1, 2) for q_i, k_i, v_i in zip(*parts, strict=True)]
    return torch.cat(outs, dim=1).squeeze(0)


_last_read: tuple[weakref.ref[Tensor], int, list[int]] | None = None


def read_lengths(cu_seqlens: Tensor) -> list[int]:
    """The lengths on the host, read once for all layers of a batch: on a GPU reading waits for all work before it.

    They belong to the tensor, not to its values: every layer gets the same object from the model.
    """
    global _last_read
    if _last_read is not None and _last_read[0]() is cu_seqlens and _last_read[1] == cu_seqlens._version:
        return _last_read[2]
    lengths: list[int] = cu_seqlens.diff().tolist()
    _last_read = (weakref.ref(cu_seqlens), cu_seqlens._version, lengths)
    return lengths


_SMALLEST_BLOCK = 64


def _one_sequence(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
    """[1, Hq, L, D] from q [1, Hq, L, D], k and v [1, Hkv, L, D]. A window costs about L times its size, not L^2.

    The first `window` tokens see all before them. The others are cut into blocks, each of which sees itself and the
    window before it: all blocks in one call, to which keys of neighbours are given more than once.
    """
    length, window = q.shape[2], options.window
    if window is None or window >= length:
        return _masked(q, k, v, None, options)
    first = _masked(q[:, :, :window], k[:, :, :window], v[:, :, :window], None, options)
    size = min(max(window // 4, _SMALLEST_BLOCK), length - window)
    num_blocks = -(-(length - window) // size)
    padding = (0, 0, 0, window + num_blocks * size - length)  # after the end, where no token of the sequence looks
    q_blocks = F.pad(q[0, :, window:], padding).unflatten(1, (num_blocks, size)).transpose(0, 1)  # [N, Hq, size, D]
    span = size + window - 1
    k_blocks, v_blocks = (
        F.pad(part[0, :, 1:], padding).unfold(1, span, size).permute(1, 0, 3, 2)  # [N, Hkv, span, D]
        for part in (k, v)
    )
    rest = _masked(q_blocks, k_blocks, v_blocks, _band(size, span, window, q.device), options)
    rest = rest.transpose(0, 1).flatten(1, 2)[None, :, : length - window]
    return torch.cat([first, rest], dim=2)


def _band(rows: int, columns: int, window: int, device: torch.device) -> Tensor:
    """bool [rows, columns], true where a token sees another: rows are the last `rows` tokens of the columns."""
    distance = torch.arange(columns - rows, columns, device=device)[:, None] - torch.arange(columns, device=device)
    return (distance >= 0) & (distance < window)


def _masked(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, options: AttentionOptions) -> Tensor:
    """[N, Hq, R, D] from q [N, Hq, R, D], k and v [N, Hkv, C, D], for what is visible [R, C]; None: causal, R = C."""
    if options.softcap is None:
        rows, width = q.shape[2], v.shape[3]
        if options.sinks is not None:
            q, k, v, visible = _with_sink(q, k, v, visible, options.sinks / options.scale)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, is_causal=visible is None, scale=options.scale, enable_gqa=True
        )
        return out[:, :, -rows:, :width]
    # torch's attention has no softcap.
    if visible is None:
        visible = _band(q.shape[2], q.shape[2], q.shape[2], q.device)
    k, v = repeat_heads(k, v, q.shape[1])
    scores = options.softcap * torch.tanh((q @ k.transpose(2, 3)).float() * options.scale / options.softcap)
    scores = scores.masked_fill(~visible, float("-inf"))
    if options.sinks is not None:
        sinks = options.sinks.float()[None, :, None, None].expand(*scores.shape[:3], 1)
        return torch.cat([sinks, scores], dim=3).softmax(dim=-1)[..., 1:].to(v.dtype) @ v
    return scores.softmax(dim=-1).to(v.dtype) @ v


def _with_sink(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, sinks: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The inputs with a key before all others, whose product with each query is that head's sink and whose value is 0.

    The product is made in additional dimensions, eight or fewer, since kernels take multiples of eight. Where the mask
    is causal, a query comes before all others, too.
    """
    more = 8 - q.shape[3] % 8
    column = sinks.to(q.dtype)[None, :, None, None].expand(len(q), -1, q.shape[2], 1)
    q = F.pad(torch.cat([q, column], dim=3), (0, more - 1))
    k, v = F.pad(k, (0, more, 1, 0)), F.pad(v, (0, q.shape[3] - v.shape[3], 1, 0))
    is_sink = torch.zeros_like(k[:1, :1])
    is_sink[..., 0, -more] = 1
    if visible is None:
        return F.pad(q, (0, 0, 1, 0)), k + is_sink, v, None
    return q, k + is_sink, v, F.pad(visible, (1, 0), value=True)


def repeat_heads(k: Tensor, v: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """k and v [N, Hkv, ...] with each head repeated, so that there are `num_heads`; themselves where there are."""
    groups = num_heads // k.shape[1]
    if groups == 1:  # repeat_interleave would copy them
        return k, v
    return k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
