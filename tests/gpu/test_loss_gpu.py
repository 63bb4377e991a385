"""The loss head on a GPU, where its products of bf16 are fp32, against fp64. Needs a GPU: pytest -m gpu tests/gpu."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ochat_train.model.lora import HeadWithRows
from ochat_train.model.loss import CHUNK_TOKENS, LossHead

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA is not available"),
]

WIDTH, VOCABULARY = 256, 4000
NUM_TOKENS = 3 * CHUNK_TOKENS + 77
# A rounding to bf16 is 0.17 % in the mean square. Logits are not rounded on a GPU, their gradient is. That by the
# hidden states is rounded as a product and when it is scaled: 0.24 %, with all 0.3 %. Those by parameters are fp32
# sums, rounded once: 0.17 %, and 0.2 % with the weighted hidden states. A sum in bf16 would be off by more with every
# chunk.
OF_HIDDEN, OF_PARAMETERS = 0.0035, 0.0022


def make_inputs(dtype: torch.dtype) -> list[Tensor]:
    """hidden, labels, loss_weights, condition_ids, loss_positions."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(NUM_TOKENS, generator=generator) * (torch.rand(NUM_TOKENS, generator=generator) > 0.2)
    inputs = [
        torch.randn(NUM_TOKENS, WIDTH, generator=generator).to(dtype),
        torch.randint(VOCABULARY, (NUM_TOKENS,), generator=generator),
        weights,
        torch.randint(2, (NUM_TOKENS,), generator=generator).int(),
        weights.nonzero().squeeze(1),
    ]
    hidden, *others = (part.cuda() for part in inputs)
    return [hidden.requires_grad_(), *others]


def make_head(dtype: torch.dtype, *, has_rows: bool) -> nn.Linear:
    torch.manual_seed(1)
    head = nn.Linear(WIDTH, VOCABULARY, dtype=dtype, device="cuda")
    return HeadWithRows(head, torch.tensor([5, 3999], device="cuda"), None) if has_rows else head


def relative_error(value: Tensor, reference: Tensor) -> float:
    return float((value.double() - reference).norm() / reference.norm())


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("has_rows", [False, True])
@pytest.mark.parametrize("softcap", [None, 0.5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_loss_and_gradients_are_those_of_fp64(
    dtype: torch.dtype, softcap: float | None, has_rows: bool, is_compiled: bool
) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    head, inputs = make_head(dtype, has_rows=has_rows), make_inputs(dtype)
    loss_head = LossHead(head, softcap=softcap, num_conditions=2)
    if is_compiled:
        loss_head.compile_chunk()
    sums = loss_head(*inputs)
    exact, hidden = copy.deepcopy(head).double(), inputs[0].detach().double().requires_grad_()
    logits = exact(hidden) if softcap is None else softcap * torch.tanh(exact(hidden) / softcap)
    expected = (F.cross_entropy(logits, inputs[1], reduction="none") * inputs[2].double()).sum()
    # fp32 from bf16 values: what is rounded are sums of 256 products and of 4,000 exponentials, and 5,000 losses.
    assert relative_error(sums.nll, expected) < 1e-6
    values = torch.autograd.grad(0.3 * sums.nll, [inputs[0], *head.parameters()])
    references = torch.autograd.grad(0.3 * expected, [hidden, *exact.parameters()])
    for number, (value, reference) in enumerate(zip(values, references, strict=True)):
        bound = 2e-6 if dtype == torch.float32 else OF_PARAMETERS if number else OF_HIDDEN
        assert value.dtype == dtype and relative_error(value, reference) < bound, number


@pytest.mark.parametrize("is_compiled", [False, True])
def test_no_host_waits_for_the_head(is_compiled: bool) -> None:
    head, inputs = make_head(torch.bfloat16, has_rows=True), make_inputs(torch.bfloat16)
    loss_head = LossHead(head, softcap=None, num_conditions=2)
    if is_compiled:
        loss_head.compile_chunk()
    loss_head(*inputs).nll.backward()  # libraries are loaded and kernels compiled
    try:
        torch.cuda.set_sync_debug_mode("error")
        (0.3 * loss_head(*inputs).nll).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_chunk_takes_its_logits_twice_in_fp32() -> None:
    vocabulary = 32_000
    head = nn.Linear(WIDTH, vocabulary, bias=False, device="cuda", dtype=torch.bfloat16)
    inputs = make_inputs(torch.bfloat16)
    loss_head = LossHead(head, softcap=None, num_conditions=2)
    loss_head(*inputs)  # the workspace of cuBLAS
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss_head(*inputs)
    peak = torch.cuda.max_memory_allocated() - before
    # The rest: gradients by hidden states [S, C] and what goes into them.
    assert peak == pytest.approx(4 * vocabulary * (2 * CHUNK_TOKENS + WIDTH), rel=0.05)
