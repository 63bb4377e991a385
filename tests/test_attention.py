"""Attention over packed sequences against the written-out formula, and the choice of its backend."""

import importlib.util
import sys
import types
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, MistralConfig, MistralModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from ochat_train.model.attention import (
    BACKENDS,
    AttentionNeeds,
    Backend,
    choose_backend,
    register,
    varlen_attention,
)

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
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *, scale: float, window: int | None, softcap: float | None
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
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(~visible, float("-inf")).softmax(-1), v)


def with_gradients(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, ...]:
    """The output, and the gradients of a fixed random projection of it."""
    leaves = [part.detach().clone().requires_grad_() for part in (q, k, v)]
    out = attend(*leaves)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return (out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(out.dtype)))


def relative_error(value: Tensor, reference: Tensor) -> float:
    return float((value.double() - reference).norm() / reference.norm())


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
) -> None:
    cu_seqlens, scale = borders(lengths), scale or q.shape[-1] ** -0.5
    values = with_gradients(
        lambda q, k, v: varlen_attention(
            q, k, v, cu_seqlens, max(lengths), backend="sdpa", scale=scale, window=window, softcap=softcap
        ),
        q,
        k,
        v,
    )
    references = with_gradients(
        lambda q, k, v: naive_attention(q, k, v, cu_seqlens, scale=scale, window=window, softcap=softcap), q, k, v
    )
    # Gradients are measured against all three together: those of q and k are zero where a token sees only itself.
    whole = float(torch.stack([gradient.norm() for gradient in references[1:]]).norm())
    scales = (float(references[0].norm()), whole, whole, whole)
    for name, value, reference, size in zip(("out", "dq", "dk", "dv"), values, references, scales, strict=True):
        assert value.shape == reference.shape
        assert value.dtype == torch.float32
        assert float((value.double() - reference).norm()) < TOLERANCE * size, name


# ------------------------------------------------------------------------------------------------ values


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


def test_it_equals_the_formula_with_another_scale() -> None:
    check_against_naive(*random_qkv(), scale=0.7)


@pytest.mark.parametrize("lengths", [(1,), (1, 1, 1), (40,), (1, 39), (39, 1)])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (3, None), (None, 2.0)])
def test_it_equals_the_formula_at_the_edges(
    lengths: tuple[int, ...], window: int | None, softcap: float | None
) -> None:
    check_against_naive(*random_qkv(lengths), lengths, window=window, softcap=softcap)


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (3, None), (None, 2.0)])
def test_a_token_alone_sees_its_own_value(window: int | None, softcap: float | None) -> None:
    q, k, v = random_qkv((1, 1, 1))
    out = varlen_attention(q, k, v, borders((1, 1, 1)), 1, backend="sdpa", scale=0.25, window=window, softcap=softcap)
    assert torch.equal(out, v.repeat_interleave(2, dim=1))


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (4, None), (None, 2.0), (4, 2.0)])
def test_no_token_attends_across_a_boundary(window: int | None, softcap: float | None) -> None:
    cu_seqlens = borders(LENGTHS)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return varlen_attention(
            q, k, v, cu_seqlens, max(LENGTHS), backend="sdpa", scale=0.25, window=window, softcap=softcap
        )

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
    cu_seqlens = borders(LENGTHS)
    q, k, v = random_qkv()
    out = varlen_attention(q, k, v, cu_seqlens, max(LENGTHS), backend="sdpa", scale=0.25)
    k[15:], v[15:] = 99.0, -99.0  # row 15 is in the middle of the third sequence, rows 6 to 28
    after = varlen_attention(q, k, v, cu_seqlens, max(LENGTHS), backend="sdpa", scale=0.25)
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


# ------------------------------------------------------------------------------------------------ backends


@pytest.fixture
def flash_attn_is(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Make the package flash_attn present or absent, whatever this machine has."""
    find_spec = importlib.util.find_spec

    def pretend(present: bool) -> None:
        def find(name: str, package: str | None = None) -> Any:
            return (find_spec("torch") if present else None) if name == "flash_attn" else find_spec(name, package)

        monkeypatch.setattr(importlib.util, "find_spec", find)
        monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))

    return pretend


def needs(**changes: Any) -> AttentionNeeds:
    usual: dict[str, Any] = {
        "device_type": "cuda",
        "dtype": torch.bfloat16,
        "head_dim": 128,
        "has_softcap": False,
    }
    return AttentionNeeds(**(usual | changes))


def test_auto_on_cpu_takes_sdpa_and_says_why_not_the_others(flash_attn_is: Callable[[bool], None]) -> None:
    flash_attn_is(False)
    choice = choose_backend("auto", needs(device_type="cpu"))
    assert choice.backend == "sdpa"
    assert "flash_attn: the package flash-attn is not installed (pip install 'ochat_train[gpu]')" in choice.reason
    assert "torch: needs a CUDA device" in choice.reason
    flash_attn_is(True)
    choice = choose_backend("auto", needs(device_type="cpu"))
    assert choice.backend == "sdpa"
    assert "flash_attn: needs a CUDA device" in choice.reason


CHOICES: list[tuple[bool, dict[str, Any], Backend, str]] = [
    (False, {}, "torch", "flash-attn is not installed"),
    (False, {"dtype": torch.float16}, "torch", "flash-attn is not installed"),
    (False, {"head_dim": 256}, "torch", "flash-attn is not installed"),
    (False, {"has_softcap": True}, "sdpa", "torch: no softcap"),
    (False, {"head_dim": 320}, "sdpa", "torch: head size 320 is above 256"),
    (False, {"dtype": torch.float32}, "sdpa", "torch: needs bfloat16 or float16, not float32"),
    (True, {}, "flash_attn", "first choice"),
    (True, {"has_softcap": True}, "flash_attn", "first choice"),
    (True, {"head_dim": 320}, "sdpa", "flash_attn: head size 320 is above 256; torch: head size 320"),
    (True, {"dtype": torch.float32}, "sdpa", "flash_attn: needs bfloat16 or float16, not float32"),
]


@pytest.mark.parametrize(("present", "changes", "backend", "reason"), CHOICES)
def test_auto_takes_the_first_backend_that_can(
    flash_attn_is: Callable[[bool], None], present: bool, changes: dict[str, Any], backend: Backend, reason: str
) -> None:
    flash_attn_is(present)
    choice = choose_backend("auto", needs(**changes))
    assert choice.backend == backend
    assert reason in choice.reason


def test_a_flash_attn_that_cannot_be_imported_is_passed_over(
    flash_attn_is: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The usual failure: built for another version of torch."""
    flash_attn_is(True)
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # importing it raises ImportError
    choice = choose_backend("auto", needs())
    assert choice.backend == "torch"
    assert "flash-attn cannot be imported" in choice.reason


REFUSALS: list[tuple[Backend, dict[str, Any], str]] = [
    ("flash_attn", {}, "flash-attn is not installed"),
    ("torch", {"device_type": "cpu"}, "needs a CUDA device"),
    ("torch", {"has_softcap": True}, "no softcap"),
    ("torch", {"head_dim": 257}, "head size 257 is above 256"),
    ("torch", {"dtype": torch.float32}, "not float32"),
]


@pytest.mark.parametrize(("wanted", "changes", "reason"), REFUSALS)
def test_a_backend_that_cannot_is_refused_with_the_remedy(
    flash_attn_is: Callable[[bool], None], wanted: Backend, changes: dict[str, Any], reason: str
) -> None:
    flash_attn_is(False)
    with pytest.raises(ValueError, match=rf"model\.attention {wanted} cannot .*{reason}.*set model\.attention: auto"):
        choose_backend(wanted, needs(**changes))


def test_a_backend_that_can_is_taken_as_asked(flash_attn_is: Callable[[bool], None]) -> None:
    flash_attn_is(True)
    for wanted in BACKENDS:
        assert choose_backend(wanted, needs()).backend == wanted
    assert choose_backend("sdpa", needs(dtype=torch.float32, head_dim=320, has_softcap=True)).backend == "sdpa"


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
    expected = varlen_attention(q, k, v, borders((3, 4)), 4, backend="sdpa", scale=0.3, window=2, softcap=5.0)
    assert weights is None
    assert torch.equal(out, expected[None])  # [1, T, Hq, D]
    unscaled = varlen_attention(q, k, v, borders((3, 4)), 4, backend="sdpa", scale=16**-0.5)
    assert torch.equal(call_registered()[0], unscaled[None])


@pytest.mark.parametrize("backend", BACKENDS)
def test_transformers_builds_no_mask_for_us_and_takes_our_name_for_none_of_its_own(backend: Backend) -> None:
    name = register(backend)
    assert name in AttentionInterface()
    assert name not in ALL_MASK_ATTENTION_FUNCTIONS
    assert not any(own in name for own in ("flash", "sdpa", "flex", "eager", "paged"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cu_seqlens": None}, "without cu_seqlens"),
        ({"max_seqlen": None}, "without cu_seqlens"),
        ({"attention_mask": torch.zeros(1, 1, 7, 7)}, "no mask"),
        ({"query": torch.zeros(2, 4, 7, 16)}, "one row"),
        ({"key": torch.zeros(1, 2, 9, 16)}, "no cache"),
        ({"dropout": 0.1}, "attention dropout 0.1"),
        ({"s_aux": torch.zeros(4)}, "needs s_aux"),  # GPT-OSS's sinks
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
