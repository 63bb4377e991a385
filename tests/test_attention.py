"""Attention over packed sequences against the written-out formula, and what transformers' models see of it."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, MistralConfig, MistralModel

from ochat_train.model.attention import AttentionOptions, Backend, register, varlen_attention
from ochat_train.model.sdpa import repeat_heads

LENGTHS = (5, 1, 23, 16, 1)


def borders(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def random_qkv(
    lengths: tuple[int, ...] = LENGTHS, *, heads: int = 4, kv_heads: int = 2, head_dim: int = 16, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), num, head_dim) for num in (heads, kv_heads, kv_heads)]
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    return q * scale, k, v


def naive_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The docstring's formula in f64, over all T x T pairs with one mask."""
    q, k, v = q.double(), k.double(), v.double()
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    visible = torch.zeros(len(q), len(q), dtype=torch.bool)
    for begin, end in pairwise(cu_seqlens.tolist()):
        for i in range(begin, end):
            first = begin if window is None else max(begin, i - window + 1)
            visible[i, first : i + 1] = True
    scores = torch.einsum("ihd,jhd->hij", q, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, len(q), 1)], dim=-1)
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1)[..., : len(k)], v)


def naive_rows(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, *, scale: float, window: int | None, softcap: float | None = None
) -> Tensor:
    """Some rows of the formula for one sequence, in the inputs' dtype: [R, Hq, D] without a square of the length."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    distance = rows[:, None] - torch.arange(len(k), device=k.device)[None, :]
    hidden = (distance < 0) | (distance >= (window or len(k)))
    scores = torch.einsum("ihd,jhd->hij", q[rows], k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v)


def with_gradients(attend: Callable[..., Tensor], *parts: Tensor) -> tuple[Tensor, ...]:
    """The output, and the gradients of a fixed random projection of it."""
    leaves = [part.detach().clone().requires_grad_() for part in parts]
    out = attend(*leaves)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return (out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(out.dtype)))


def relative_error(value: Tensor, reference: Tensor) -> float:
    return float((value.detach().double() - reference.detach()).norm() / reference.detach().norm())


# Norm of the difference over the norm. f32 rounds by 6e-8; dot products of up to 256 terms, exp and a sum of up to
# 40 terms come on top, and the gradient goes through them twice. Mixing in one token of another sequence shows as 0.01.
TOLERANCE = 1e-6


def check_against_naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[int, ...] = LENGTHS,
    *,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    has_sinks: bool = False,
    backend: Backend = "sdpa",
) -> None:
    cu_seqlens, scale = borders(lengths), scale or q.shape[-1] ** -0.5
    sinks = (torch.linspace(-2, 3, q.shape[1]),) if has_sinks else ()  # of small and of large probability

    def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        options = AttentionOptions(cu_seqlens, max(lengths), scale, window, softcap, sinks)
        return varlen_attention(q, k, v, options, backend=backend)

    def attend_naively(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        return naive_attention(q, k, v, cu_seqlens, scale=scale, window=window, softcap=softcap, sinks=sinks)

    values = with_gradients(attend, q, k, v, *sinks)
    references = with_gradients(attend_naively, q, k, v, *sinks)
    # Gradients are measured against all together: those of q and k are zero where a token sees only itself.
    whole = float(torch.stack([gradient.norm() for gradient in references[1:]]).norm())
    scales = (float(references[0].norm()), *[whole] * (len(references) - 1))
    for name, value, reference, size in zip(("out", "dq", "dk", "dv", "ds"), values, references, scales, strict=False):
        assert value.shape == reference.shape
        assert value.dtype == torch.float32
        assert float((value.double() - reference).norm()) < TOLERANCE * size, name


# ------------------------------------------------------------------------------------------------ values


def test_keys_and_values_are_not_copied_where_there_is_nothing_to_repeat() -> None:
    k, v = torch.randn(2, 5, 4, 8)
    assert all(after is before for after, before in zip(repeat_heads(k, v, 4), (k, v), strict=True))


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1), (8, 2)])
def test_it_equals_the_formula_with_grouped_heads(heads: int, kv_heads: int) -> None:
    check_against_naive(*random_qkv(heads=heads, kv_heads=kv_heads))


@pytest.mark.parametrize("head_dim", [8, 64, 80, 128, 256])
def test_it_equals_the_formula_at_every_head_size(head_dim: int) -> None:
    check_against_naive(*random_qkv(head_dim=head_dim))


# The longest sequence has 23 tokens, another one 16 and 5.
@pytest.mark.parametrize("window", [1, 2, 5, 16, 22, 23, 24, 1000])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_it_equals_the_formula_in_a_window(window: int, softcap: float | None) -> None:
    check_against_naive(*random_qkv(), window=window, softcap=softcap)


@pytest.mark.parametrize("softcap", [1.0, 50.0])
def test_it_equals_the_formula_with_a_softcap(softcap: float) -> None:
    check_against_naive(*random_qkv(scale=5.0), softcap=softcap)  # scores large enough to be bent


@pytest.mark.parametrize("lengths", [LENGTHS, (1,), (100, 1, 70)])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (5, None), (None, 2.0), (5, 2.0)])
def test_it_equals_the_formula_with_sinks(lengths: tuple[int, ...], window: int | None, softcap: float | None) -> None:
    check_against_naive(*random_qkv(lengths, head_dim=20), lengths, window=window, softcap=softcap, has_sinks=True)


def test_it_equals_the_formula_with_another_scale() -> None:
    check_against_naive(*random_qkv(), scale=0.7)


@pytest.mark.parametrize("lengths", [(1,), (1, 1, 1), (40,), (1, 39), (39, 1)])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (3, None), (None, 2.0)])
def test_it_equals_the_formula_at_the_edges(
    lengths: tuple[int, ...], window: int | None, softcap: float | None
) -> None:
    check_against_naive(*random_qkv(lengths), lengths, window=window, softcap=softcap)


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (3, None), (None, 2.0), (3, 2.0)])
def test_it_equals_the_formula_for_many_short_sequences(window: int | None, softcap: float | None) -> None:
    lengths = tuple(int(length) for length in torch.randint(1, 9, (100,), generator=torch.Generator().manual_seed(0)))
    check_against_naive(*random_qkv(lengths), lengths, window=window, softcap=softcap)


@pytest.mark.parametrize(
    ("length", "window", "softcap"), [(4096, None, None), (1500, None, 2.0), (131_072, 64, None), (20_000, 100, 2.0)]
)
def test_it_equals_rows_of_the_formula_in_a_long_sequence(
    length: int, window: int | None, softcap: float | None
) -> None:
    """And the gradients of these rows' outputs. 131,072 tokens without a window, 1.7e10 scores, are for tests/gpu."""
    rows = torch.tensor([0, 1, 62, 63, 64, 99, 100, 1023, 1024, length // 2, length - 1])
    leaves = [part.requires_grad_() for part in random_qkv((length,), heads=2, kv_heads=1, head_dim=8)]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    options = AttentionOptions(borders((length,)), length, 0.3, window, softcap)
    out = varlen_attention(*leaves, options, backend="sdpa")[rows]
    expected = naive_rows(*wide, rows, scale=0.3, window=window, softcap=softcap)
    assert relative_error(out, expected) < TOLERANCE
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(out, leaves, cotangent)
    references = torch.autograd.grad(expected, wide, cotangent.double())
    whole = float(torch.stack([reference.norm() for reference in references]).norm())
    for name, value, reference in zip("qkv", gradients, references, strict=True):
        assert float((value.double() - reference).norm()) < TOLERANCE * whole, name


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (3, None), (None, 2.0)])
def test_a_token_alone_sees_its_own_value(window: int | None, softcap: float | None) -> None:
    q, k, v = random_qkv((1, 1, 1))
    options = AttentionOptions(borders((1, 1, 1)), 1, 0.25, window, softcap)
    out = varlen_attention(q, k, v, options, backend="sdpa")
    assert torch.equal(out, v.repeat_interleave(2, dim=1))


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (4, None), (None, 2.0), (4, 2.0)])
def test_no_token_attends_across_a_boundary(window: int | None, softcap: float | None) -> None:
    cu_seqlens = borders(LENGTHS)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        options = AttentionOptions(cu_seqlens, max(LENGTHS), 0.25, window, softcap)
        return varlen_attention(q, k, v, options, backend="sdpa")

    q, k, v = random_qkv()
    out = attend(q, k, v)
    for begin, end in pairwise(cu_seqlens.tolist()):
        changed = [part.clone() for part in (q, k, v)]
        for part in changed:
            part[begin:end] = torch.randn(part[begin:end].shape) * 100
        after = attend(*changed)
        assert not torch.equal(after[begin:end], out[begin:end])
        assert torch.equal(after[:begin], out[:begin]) and torch.equal(after[end:], out[end:])


def test_no_token_sees_what_comes_later() -> None:
    options = AttentionOptions(borders(LENGTHS), max(LENGTHS), 0.25)
    q, k, v = random_qkv()
    out = varlen_attention(q, k, v, options, backend="sdpa")
    k[15:], v[15:] = 99.0, -99.0  # row 15 is in the middle of the third sequence, rows 6 to 28
    after = varlen_attention(q, k, v, options, backend="sdpa")
    # Not bitwise: the kernel may add the masked keys' exact zeros in another order.
    assert relative_error(after[:15], out[:15].double()) < TOLERANCE
    assert not torch.equal(after[15:], out[15:])


@pytest.mark.parametrize("length", [6, 7, 8, 15])
def test_a_window_means_what_it_means_in_transformers(length: int) -> None:
    config = MistralConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=7,
    )
    torch.manual_seed(0)
    model = MistralModel(config).eval()
    model.set_attn_implementation("eager")
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)  # the default makes attention nearly uniform, and errors small
    ids = torch.randint(50, (1, length))
    with torch.no_grad():
        expected = model(ids, use_cache=False).last_hidden_state
        model.set_attn_implementation(register("sdpa"))
        packed = model(
            ids,
            use_cache=False,
            position_ids=torch.arange(length)[None],
            cu_seqlens=borders((length,)),
            max_seqlen=length,
        ).last_hidden_state
    # One f32 layer; a window that is off by one token differs by 0.1 here.
    assert relative_error(packed, expected.double()) < TOLERANCE


# ------------------------------------------------------------------------------------------------ in transformers


class Attention(torch.nn.Module):
    """What a model's attention layer looks like to the registered function."""

    is_causal = True


def call_registered(module: torch.nn.Module | None = None, **changes: Any) -> tuple[Tensor, None]:
    q, k, v = random_qkv((3, 4))
    arguments: dict[str, Any] = {
        "query": q.transpose(0, 1)[None],  # [1, Hq, T, D]
        "key": k.transpose(0, 1)[None],
        "value": v.transpose(0, 1)[None],
        "attention_mask": None,
        "cu_seqlens": borders((3, 4)),
        "max_seqlen": 4,
    }
    result: tuple[Tensor, None] = AttentionInterface()[register("sdpa")](module or Attention(), **(arguments | changes))
    return result


def test_the_registered_function_equals_varlen_attention() -> None:
    q, k, v = random_qkv((3, 4))
    out, weights = call_registered(scaling=0.3, sliding_window=2, softcap=5.0)
    expected = varlen_attention(q, k, v, AttentionOptions(borders((3, 4)), 4, 0.3, 2, 5.0), backend="sdpa")
    assert weights is None
    assert torch.equal(out, expected[None])  # [1, T, Hq, D]
    unscaled = varlen_attention(q, k, v, AttentionOptions(borders((3, 4)), 4, 16**-0.5), backend="sdpa")
    assert torch.equal(call_registered()[0], unscaled[None])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cu_seqlens": None}, "without cu_seqlens"),
        ({"max_seqlen": None}, "without cu_seqlens"),
        ({"attention_mask": torch.zeros(1, 1, 7, 7)}, "no mask"),
        ({"query": torch.zeros(2, 4, 7, 16)}, "one row"),
        ({"key": torch.zeros(1, 2, 9, 16)}, "no cache"),
        ({"dropout": 0.1}, "attention dropout of 0.1"),
        ({"sinks": torch.zeros(4)}, "needs sinks"),  # another one for each token, of Inkling 2
    ],
)
def test_the_registered_function_refuses_what_would_mix_sequences_or_change_the_result(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        call_registered(**changes)


def test_the_registered_function_refuses_a_layer_that_looks_ahead() -> None:
    module = Attention()
    module.is_causal = False
    with pytest.raises(ValueError, match="both directions"):
        call_registered(module)


# ------------------------------------------------------------------------------------------------ lengths, compilation


class CountReads(TorchDispatchMode):
    """Counts operators on int32 tensors: only borders are such."""

    def __init__(self) -> None:
        super().__init__()
        self.num = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num += any(isinstance(arg, Tensor) and arg.dtype == torch.int32 for arg in args)
        return operator(*args, **(kwargs or {}))


def test_lengths_are_read_once_for_all_layers_of_a_batch() -> None:
    """On a GPU reading them waits for all that was asked of it."""
    q, k, v = random_qkv()
    cu_seqlens = borders(LENGTHS)

    def num_reads() -> int:
        with CountReads() as reads:
            varlen_attention(q, k, v, AttentionOptions(cu_seqlens, max(LENGTHS), 0.25, window=3), backend="sdpa")
        return reads.num

    first = num_reads()
    assert first > 0 and num_reads() == 0 and num_reads() == 0
    cu_seqlens = borders(LENGTHS)  # another batch, of the same lengths
    assert num_reads() == first and num_reads() == 0


def test_other_lengths_in_the_same_tensor_are_seen() -> None:
    q, k, v = random_qkv((20, 26))
    cu_seqlens = borders((20, 26))
    for lengths in ((20, 26), (3, 43)):
        cu_seqlens.copy_(borders(lengths))
        out = varlen_attention(q, k, v, AttentionOptions(cu_seqlens, max(lengths), 0.25), backend="sdpa")
        expected = naive_attention(q, k, v, borders(lengths), scale=0.25, window=None, softcap=None)
        assert relative_error(out, expected) < TOLERANCE


def make_layer(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Callable[..., Tensor]:
    """A layer around the registered function: hidden [1, T, 256], cu_seqlens, max_seqlen -> [1, T, 4, 64]."""
    attend = AttentionInterface()[name]
    torch.manual_seed(0)
    projection = torch.nn.Linear(256, 3 * 256, device=device, dtype=dtype)
    module = Attention()

    def layer(hidden: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        # [1, H, T, D] as a transformers model has them.
        q, k, v = projection(hidden).view(1, -1, 3, 4, 64).transpose(1, 3).unbind(2)
        out, _ = attend(module, q, k, v, None, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
        result: Tensor = torch.nn.functional.silu(out)
        return result

    return layer


BATCHES = ((5, 1, 23), (16, 7), (9, 10, 11), (30, 1, 1, 1), (50,), (2, 2, 2, 2, 2))


def test_a_compiled_layer_gives_the_same_and_is_not_compiled_anew_for_each_batch() -> None:
    layer = make_layer(register("sdpa"))
    counter = CompileCounter()
    compiled = torch.compile(layer, backend=counter)
    for lengths in BATCHES:
        hidden = torch.randn(1, sum(lengths), 256, requires_grad=True)
        arguments = (hidden, borders(lengths), max(lengths))
        out, expected = compiled(*arguments), layer(*arguments)
        assert torch.equal(out, expected)
        cotangent = torch.randn(out.shape)
        assert torch.equal(*(torch.autograd.grad(values, hidden, cotangent)[0] for values in (out, expected)))
    # The graph is broken at the call of sdpa, into two; each is made for the first sizes, and once more for any.
    assert counter.frame_count <= 4


def test_torch_s_own_call_stays_in_the_graph_of_a_compiled_layer() -> None:
    """Traced, not run: it needs a GPU."""
    graphs = []
    num_tokens = 0

    def trace(graph: torch.fx.GraphModule, _: Any) -> Callable[..., tuple[Tensor, ...]]:
        graphs.append(graph)
        return lambda *_: (torch.zeros(1, num_tokens, 4, 64),)

    compiled = torch.compile(make_layer(register("torch")), backend=trace, fullgraph=True)
    for lengths in BATCHES:
        num_tokens = sum(lengths)
        with torch.no_grad():
            compiled(torch.randn(1, num_tokens, 256), borders(lengths), max(lengths))
    for graph in graphs:
        assert any("_varlen_attn" in str(node.target) for node in graph.graph.nodes)
    assert len(graphs) <= 2  # for the first sizes, and for any
