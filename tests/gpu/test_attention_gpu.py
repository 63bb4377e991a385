"""The CUDA backends of attention against the formula's reference on the CPU. Needs a GPU: pytest -m gpu tests/gpu."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import LlamaConfig, LlamaForCausalLM

from ochat_train.model.attention import (
    BACKENDS,
    TABLE,
    AttentionNeeds,
    AttentionOptions,
    Backend,
    Support,
    choose_backend,
    register,
    varlen_attention,
)
from ochat_train.model.packed_lm import PackedCausalLM
from ochat_train.tokens.batch import PackedBatch, collate
from ochat_train.tokens.encode import Example
from tests.test_attention import make_layer, naive_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA is not available"),
]

DEVICE = "cuda"
LENGTHS = (5, 1, 230, 64, 65, 1, 128)
each_backend = pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "sdpa"])


def needs(head_dim: int, has_softcap: bool, dtype: torch.dtype) -> AttentionNeeds:
    return AttentionNeeds(torch.cuda.get_device_capability(), dtype, head_dim, has_softcap)


def is_supported(row: Support, asked: AttentionNeeds) -> bool:
    """What the table says of this GPU, whether or not the package is installed."""
    assert row.majors is not None and row.head_dims is not None and asked.capability is not None
    largest, multiple = row.head_dims
    return (
        row.majors[0] <= asked.capability[0] <= row.majors[1]
        and asked.head_dim <= largest
        and asked.head_dim % multiple == 0
        and (row.has_softcap or not asked.has_softcap)
    )


def can_run(backend: Backend, asked: AttentionNeeds) -> bool:
    """Whether the backend can do it here. What the table denies must be refused; a package that is missing skips."""
    if not any(is_supported(row, asked) for row in TABLE if row.backend == backend):
        with pytest.raises(ValueError, match=f"model.attention {backend} cannot be used here"):
            choose_backend(backend, asked)
        return False
    try:
        choose_backend(backend, asked)
    except ValueError as error:
        pytest.skip(str(error))  # a package that is not installed, or another GPU
    return True


def borders(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def run(
    backend: Backend,
    qkv: list[Tensor],
    lengths: tuple[int, ...],
    *,
    window: int | None,
    softcap: float | None,
) -> list[Tensor]:
    """The output and the gradients of q, k and v under a fixed projection, f32 on the CPU."""
    q, k, v = (part.detach().clone().requires_grad_() for part in qkv)
    options = AttentionOptions(borders(lengths).to(q.device), max(lengths), q.shape[-1] ** -0.5, window, softcap)
    out = varlen_attention(q, k, v, options, backend=backend)
    # Values that bf16 holds exactly, so that every run projects on the same direction.
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(out)
    return [out.detach().float().cpu(), *(g.float().cpu() for g in torch.autograd.grad(out, [q, k, v], cotangent))]


def check_against_reference(
    backend: Backend,
    *,
    lengths: tuple[int, ...] = LENGTHS,
    heads: int = 8,
    kv_heads: int = 8,
    head_dim: int = 64,
    window: int | None = None,
    softcap: float | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    if not can_run(backend, needs(head_dim, softcap is not None, dtype)):
        return
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), num, head_dim) for num in (heads, kv_heads, kv_heads)]
    rounded = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    # The reference starts from the same rounded inputs, in f32 on the CPU, where nothing uses TF32.
    references = run("sdpa", [part.float() for part in rounded], lengths, window=window, softcap=softcap)
    values = run(backend, [part.to(DEVICE) for part in rounded], lengths, window=window, softcap=softcap)
    whole = float(torch.stack([gradient.norm() for gradient in references[1:]]).norm())
    scales = (float(references[0].norm()), whole, whole, whole)
    for name, value, reference, size in zip(("out", "dq", "dk", "dv"), values, references, scales, strict=True):
        error = float((value - reference).norm()) / size
        # Norms, gradients against all three together. bf16 rounds by 2^-8 = 0.0039 at most, 0.0017 in the mean square.
        # The output is rounded once and the probabilities before it once: 0.0024. A gradient has three more roundings
        # in a row (of the output that it is centred with, of the scores' gradient, and its own): 0.004. Twice that for
        # kernels that round more often: torch's own bf16 attention on a CPU comes to 0.003. A border off by one is
        # above 0.07 here, and a window off by one at 64 above 0.03. (At 229 it is 0.0005 and passes: those windows are
        # here for the kernels' edges; the CPU tests hold their meaning.)
        assert error < (0.005 if name == "out" else 0.008), (name, error)


@each_backend
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2), (6, 1)])
def test_grouped_heads(backend: Backend, heads: int, kv_heads: int) -> None:
    check_against_reference(backend, heads=heads, kv_heads=kv_heads)


@each_backend
@pytest.mark.parametrize("head_dim", [64, 80, 96, 100, 128, 192, 256, 264])
def test_head_sizes(backend: Backend, head_dim: int) -> None:
    check_against_reference(backend, head_dim=head_dim, heads=4, kv_heads=2)


@each_backend
@pytest.mark.parametrize("window", [1, 2, 63, 64, 65, 229, 230, 4096])
def test_windows(backend: Backend, window: int) -> None:
    check_against_reference(backend, heads=4, kv_heads=2, window=window)


@each_backend
@pytest.mark.parametrize("window", [None, 33])
@pytest.mark.parametrize("softcap", [1.0, 50.0])
def test_softcaps(backend: Backend, softcap: float, window: int | None) -> None:
    check_against_reference(backend, heads=4, kv_heads=2, softcap=softcap, window=window)


@each_backend
@pytest.mark.parametrize("lengths", [(1,), (1, 1, 1), (1, 300), (300, 1), (513,)])
def test_sequences_of_one_token_and_of_odd_lengths(backend: Backend, lengths: tuple[int, ...]) -> None:
    check_against_reference(backend, lengths=lengths, heads=4, kv_heads=2)


@each_backend
@pytest.mark.parametrize("window", [None, 16])
def test_many_short_sequences(backend: Backend, window: int | None) -> None:
    lengths = tuple(int(length) for length in np.random.default_rng(0).integers(1, 40, 1000))
    check_against_reference(backend, lengths=lengths, heads=4, kv_heads=2, window=window)


@each_backend
@pytest.mark.parametrize("window", [None, 4096])
def test_a_sequence_of_131072_tokens(backend: Backend, window: int | None) -> None:
    """A few rows against the formula in f64, and the gradients of these rows' outputs with respect to everything."""
    length, heads, kv_heads, head_dim = 131_072, 2, 1, 128
    if not can_run(backend, needs(head_dim, False, torch.bfloat16)):
        return
    rows = torch.tensor([0, 1, 63, 64, 4095, 4096, 65_535, 65_536, 131_071], device=DEVICE)
    torch.manual_seed(0)
    shapes = [(length, num, head_dim) for num in (heads, kv_heads, kv_heads)]
    leaves = [torch.randn(shape, device=DEVICE).bfloat16().requires_grad_() for shape in shapes]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    options = AttentionOptions(borders((length,)).to(DEVICE), length, head_dim**-0.5, window)
    out = varlen_attention(*leaves, options, backend=backend)
    expected = naive_rows(*wide, rows, scale=head_dim**-0.5, window=window)
    # Scores are near a normal distribution here, so a row of 131,072 averages as many values: outputs near 0.003.
    cotangent = torch.randn_like(expected).bfloat16()
    gradients = torch.autograd.grad(out[rows], leaves, cotangent.to(out.dtype))
    references = torch.autograd.grad(expected, wide, cotangent.double())
    # The same tolerances as above: what rounds does not become more with the length, since kernels add in f32.
    for value, reference in zip(out[rows].detach(), expected.detach(), strict=True):
        assert float((value.double() - reference).norm() / reference.norm()) < 0.005
    whole = float(torch.stack([reference.norm() for reference in references]).norm())
    for name, value, reference in zip("qkv", gradients, references, strict=True):
        assert float((value.double() - reference).norm()) / whole < 0.008, name


@each_backend
def test_f16(backend: Backend) -> None:
    # 11 significant bits: within bf16's tolerance with room to spare.
    check_against_reference(backend, heads=4, kv_heads=2, dtype=torch.float16)


@each_backend
@pytest.mark.parametrize("window", [None, 16])
def test_no_token_attends_across_a_boundary(backend: Backend, window: int | None) -> None:
    if not can_run(backend, needs(64, False, torch.bfloat16)):
        return
    cu_seqlens = borders(LENGTHS).to(DEVICE)
    q, k, v = (torch.randn(sum(LENGTHS), 4, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return varlen_attention(q, k, v, AttentionOptions(cu_seqlens, max(LENGTHS), 0.125, window), backend=backend)

    before = attend(q, k, v)
    begin, end = 6, 236  # the third sequence; all lengths stay, and with them the kernel's splits
    changed = [part.clone() for part in (q, k, v)]
    for part in changed:
        part[begin:end] = 7.0
    after = attend(*changed)
    assert torch.equal(after[:begin], before[:begin]) and torch.equal(after[end:], before[end:])
    assert not torch.equal(after[begin:end], before[begin:end])


def test_auto_takes_a_backend_without_a_loop_over_sequences() -> None:
    asked = needs(128, False, torch.bfloat16)
    choice = choose_backend("auto", asked)
    assert choice.backend != "sdpa"
    # The first automatic row that is not refused when it is asked for.
    for row in TABLE:
        if row.is_automatic and row.backend != choice.backend and is_supported(row, asked):
            with pytest.raises(ValueError, match=r"not installed|cannot be imported|another version"):
                choose_backend(row.backend, asked)
        if row.backend == choice.backend:
            break


def test_sdpa_reads_the_lengths_once_a_batch() -> None:
    q, k, v = (torch.randn(sum(LENGTHS), 4, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    cu_seqlens = borders(LENGTHS).to(DEVICE)

    def attend() -> Tensor:
        return varlen_attention(q, k, v, AttentionOptions(cu_seqlens, max(LENGTHS), 0.125), backend="sdpa")

    first = attend()  # waits for the lengths
    torch.cuda.set_sync_debug_mode("error")  # any other wait raises
    try:
        second = attend()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, second)


@each_backend
def test_a_compiled_layer_gives_the_same_and_is_compiled_once_for_all_lengths(backend: Backend) -> None:
    if not can_run(backend, needs(64, False, torch.bfloat16)):
        return
    layer = make_layer(register(backend), DEVICE, torch.bfloat16)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(layer, backend=counter)
    for lengths in (LENGTHS, (300, 7), (19, 20, 21), (64, 1, 1, 1), (500,)):
        hidden = torch.randn(1, sum(lengths), 4 * 64, device=DEVICE, dtype=torch.bfloat16)
        arguments = (hidden, borders(lengths).to(DEVICE), max(lengths))
        out, expected = compiled(*arguments).detach(), layer(*arguments).detach()
        # The same kernels up to fusion: a rounding of bf16.
        assert float((out - expected).norm() / expected.norm()) < 0.004
    # Once for the first sizes and once for all others; twice where the graph is broken at the kernel.
    assert counter.frame_count <= 4


def make_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=997,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def make_batch() -> PackedBatch:
    random = np.random.default_rng(0)
    examples = []
    for length in LENGTHS:
        weights = (random.random(length) > 0.3).astype(np.float32)
        weights[0] = 0
        examples.append(Example(random.integers(0, 997, length).astype(np.int32), weights))
    return collate(examples, [0] * len(examples))


def losses_of_a_step(lm: LlamaForCausalLM, attention: str, device: str) -> tuple[float, float, Tensor]:
    """The mean loss before and after one SGD step on the same batch, and the gradient of the output embeddings."""
    packed: Any = PackedCausalLM(
        lm.to(device),  # type: ignore[arg-type]  # transformers' decorator hides the type
        attention=attention,
        device_type=device,
        checkpointing="full",
        num_conditions=1,
    )
    packed.train()
    batch = make_batch().to(device)
    weight_sum = float(batch.loss_weights.sum())
    optimizer = torch.optim.SGD(packed.parameters(), lr=0.5)
    before = packed(batch).nll / weight_sum
    before.backward()
    gradient = lm.get_output_embeddings().weight.grad
    assert isinstance(gradient, Tensor)
    gradient = gradient.float().cpu().clone()
    optimizer.step()
    with torch.no_grad():
        after = packed(batch).nll / weight_sum
    return float(before.detach()), float(after), gradient


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_packed_llama_trains_a_step(backend: Backend) -> None:
    if backend != "sdpa" and not can_run(backend, needs(64, False, torch.bfloat16)):
        return
    lm = make_llama().bfloat16()
    # The same bf16 weights in f32 on the CPU.
    before, after, gradient = losses_of_a_step(copy.deepcopy(lm).float(), "sdpa", "cpu")
    before_gpu, after_gpu, gradient_gpu = losses_of_a_step(lm, backend, DEVICE)
    # The mean of 345 token losses near log 997 = 6.9. Each logit, near 0.3 in size, has passed some ten roundings of
    # 0.002: an error near 0.002 a token, of either sign.
    assert before_gpu == pytest.approx(before, abs=0.01)
    # Hidden states and probabilities, each after some ten roundings of 0.0017 in the mean square: 0.008. Twice that.
    assert float((gradient_gpu - gradient).norm() / gradient.norm()) < 0.016
    # The step lowers the loss, by what it does in f32 up to the rounding of bf16 weights: 2^-9 of each weight is of the
    # order of the update itself, so only the direction is asked for.
    assert after < before and after_gpu < before_gpu
