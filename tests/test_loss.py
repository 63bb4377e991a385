"""The loss over the head in chunks, against all logits at once."""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from ochat_train.model import loss
from ochat_train.model.activations import live_bytes
from ochat_train.model.lora import HeadWithRows
from ochat_train.model.loss import LossHead, LossSums
from tests.host_waits import host_waits

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import loss_head as benchmark

CHUNK = 8
WIDTH, VOCABULARY, CONDITIONS = 6, 131, 3


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_TOKENS", CHUNK)


def make_head(*, bias: bool = False, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(WIDTH, VOCABULARY, bias=bias, dtype=dtype)


def make_inputs(num_tokens: int, num_weighted: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """hidden, labels, loss_weights, condition_ids."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.zeros(num_tokens)
    where = torch.randperm(num_tokens, generator=generator)[:num_weighted]
    weights[where] = torch.rand(num_weighted, generator=generator) + 0.05
    return [
        torch.randn(num_tokens, WIDTH, generator=generator).to(dtype).requires_grad_(),
        torch.randint(VOCABULARY, (num_tokens,), generator=generator),
        weights,
        torch.randint(CONDITIONS, (num_tokens,), generator=generator).to(torch.int32),
    ]


def half_right(head: nn.Linear, inputs: list[Tensor]) -> list[Tensor]:
    """The inputs with every second label the likeliest token."""
    hidden, labels, *others = inputs
    return [hidden, torch.where(torch.arange(len(labels)) % 2 == 0, head(hidden).argmax(dim=1), labels), *others]


def naive_nll(head: nn.Linear, hidden: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
    """f32[T], from all logits at once."""
    logits = head(hidden).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, labels, reduction="none")


def gradients(value: Tensor, head: nn.Linear, hidden: Tensor) -> list[Tensor]:
    """By the hidden states and by all parameters that are trained."""
    wanted = [hidden, *(parameter for parameter in head.parameters() if parameter.requires_grad)]
    return list(torch.autograd.grad(value, wanted, retain_graph=True))


def loss_sums(
    head: nn.Linear, inputs: list[Tensor], *, softcap: float | None = None, training: bool = True
) -> LossSums:
    return sums_of(LossHead(head, softcap=softcap, num_conditions=CONDITIONS).train(training), inputs)


def sums_of(loss_head: LossHead, inputs: list[Tensor]) -> LossSums:
    sums: LossSums = loss_head(*inputs, inputs[2].nonzero().squeeze(1))
    return sums


def relative_error(value: Tensor, reference: Tensor) -> float:
    value, reference = value.detach().double(), reference.detach().double()
    return float((value - reference).norm() / reference.norm())


# f32 rounds by 6e-8 and both sides add at most 131 exponentials and 60 tokens, in different orders.
TOLERANCE = 1e-6


@pytest.mark.parametrize("softcap", [None, 0.5])
@pytest.mark.parametrize("bias", [False, True])
# Around the border of a chunk, of two chunks, and with every position weighted.
@pytest.mark.parametrize("num_weighted", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 1, 60])
def test_chunks_equal_all_logits_at_once(num_weighted: int, bias: bool, softcap: float | None) -> None:
    head, inputs = make_head(bias=bias), make_inputs(60, num_weighted)
    hidden, labels, weights, _ = inputs
    sums = loss_sums(head, inputs, softcap=softcap)
    expected = (naive_nll(head, hidden, labels, softcap) * weights).sum()
    assert sums.nll.dtype == torch.float32
    assert relative_error(sums.nll, expected) < TOLERANCE
    for value, reference in zip(gradients(sums.nll, head, hidden), gradients(expected, head, hidden), strict=True):
        assert relative_error(value, reference) < TOLERANCE


@pytest.mark.parametrize("softcap", [None, 0.5])
def test_conditions_add_up_and_equal_each_condition_alone(softcap: float | None) -> None:
    head = make_head()
    inputs = hidden, labels, weights, conditions = half_right(head, make_inputs(60, 35))
    sums = loss_sums(head, inputs, softcap=softcap, training=False)
    nll = naive_nll(head, hidden, labels, softcap)
    correct = head(hidden).argmax(dim=1) == labels  # a softcap changes no order
    for condition in range(CONDITIONS):
        mine = (conditions == condition) & (weights != 0)
        weighted, unweighted = sums.by_condition.weighted, sums.by_condition.unweighted
        assert relative_error(weighted.nll[condition], (nll * weights)[mine].sum()) < TOLERANCE
        assert relative_error(weighted.weight[condition], weights[mine].sum()) < TOLERANCE
        assert relative_error(weighted.correct[condition], weights[mine & correct].sum()) < TOLERANCE
        assert relative_error(unweighted.nll[condition], nll[mine].sum()) < TOLERANCE
        assert unweighted.weight[condition] == mine.sum()
        assert 0 < unweighted.correct[condition] == (mine & correct).sum() < mine.sum()
    totals = sums.by_condition.weighted.with_total()
    assert relative_error(totals.nll[0], sums.nll) < TOLERANCE
    assert relative_error(totals.weight[0], weights.sum()) < TOLERANCE
    assert relative_error(totals.loss[0], sums.nll / weights.sum()) < TOLERANCE
    assert sums.by_condition.unweighted.with_total().weight[0] == 35


def test_in_training_nobody_asks_for_the_likeliest_token() -> None:
    """It takes another pass over the logits, and only evaluations report it."""
    head = make_head()
    inputs = half_right(head, make_inputs(60, 35))
    training, evaluation = (loss_sums(head, inputs, training=mode).by_condition for mode in (True, False))
    assert torch.count_nonzero(training.weighted.correct) == 0 < torch.count_nonzero(evaluation.weighted.correct)
    for ours, others in ((training.weighted, evaluation.weighted), (training.unweighted, evaluation.unweighted)):
        assert torch.equal(ours.nll, others.nll) and torch.equal(ours.weight, others.weight)


def test_of_equal_logits_the_first_is_the_likeliest() -> None:
    """As argmax says; logits in bf16 are often equal."""
    hidden, _, weights, conditions = make_inputs(2, 2)
    head = make_head()
    with torch.no_grad():
        head.weight.copy_(head.weight[:1].expand_as(head.weight))
    sums = loss_sums(head, [hidden, torch.tensor([0, 1]), weights, conditions], training=False)
    assert sums.by_condition.unweighted.correct.sum() == 1


def test_sums_by_condition_are_f32_without_gradient() -> None:
    sums = loss_sums(make_head(), make_inputs(20, 10))
    assert sums.nll.requires_grad and sums.nll.shape == ()
    values = sums.by_condition.table
    assert values.dtype == torch.float32 and values.shape == (2, 3, CONDITIONS) and not values.requires_grad


def test_a_condition_that_is_absent_has_sums_of_zero() -> None:
    hidden, labels, weights, _ = make_inputs(20, 10)
    values = loss_sums(make_head(), [hidden, labels, weights, torch.ones(20, dtype=torch.int32)]).by_condition.table
    assert torch.count_nonzero(values[:, :, [0, 2]]) == 0 and bool((values[:, :2, 1] > 0).all())


def test_positions_of_weight_zero_never_influence() -> None:
    head, inputs = make_head(bias=True), make_inputs(60, 20)
    hidden, labels, weights, conditions = inputs
    sums = loss_sums(head, inputs)
    silent = weights == 0
    with torch.no_grad():
        other = hidden.clone()
        other[silent] = float("nan")  # 0 * NaN would be NaN
    other.requires_grad_()
    changed = [other, labels.masked_fill(silent, 5), weights, conditions.masked_fill(silent, 2)]
    sums_changed = loss_sums(head, changed)
    assert torch.equal(sums_changed.nll, sums.nll)
    assert torch.equal(sums_changed.by_condition.table, sums.by_condition.table)
    for value, reference in zip(
        gradients(sums_changed.nll, head, other), gradients(sums.nll, head, hidden), strict=True
    ):
        assert torch.equal(value, reference)
    assert torch.count_nonzero(gradients(sums.nll, head, hidden)[0][silent]) == 0


@pytest.mark.parametrize("num_tokens", [1, 30])
def test_without_a_weighted_token_the_sum_is_zero_and_gradients_are_zeros(num_tokens: int) -> None:
    head, inputs = make_head(bias=True), make_inputs(num_tokens, 0)
    sums = loss_sums(head, inputs)
    assert sums.nll == 0 and torch.count_nonzero(sums.by_condition.table) == 0
    sums.nll.backward()
    # Gradients that are None would leave this rank out of a reduction that the others wait in.
    for gradient in (inputs[0].grad, head.weight.grad, head.bias.grad):
        assert gradient is not None
        assert torch.count_nonzero(gradient) == 0 and bool(gradient.isfinite().all())


def test_weights_of_a_tenth_stay_f32_under_a_bf16_head() -> None:
    head = make_head(dtype=torch.bfloat16)
    hidden, labels, _, _ = make_inputs(64, 0, torch.bfloat16)
    weights, conditions = torch.full((64,), 0.1), torch.zeros(64, dtype=torch.int32)
    sums = loss_sums(head, [hidden, labels, weights, conditions])
    # The f64 sum of 64 f32 tenths is exact (a power of two of them). In bf16, 0.1 is 0.10009765625: 1e-3 too much.
    assert float(sums.by_condition.weighted.weight[0]) == 64 * float(torch.tensor(0.1))
    assert sums.nll.dtype == sums.by_condition.table.dtype == torch.float32
    # The same bf16 logits on both sides; f32 from there on.
    expected = (naive_nll(head, hidden, labels, None) * weights).sum()
    assert relative_error(sums.nll, expected) < TOLERANCE
    assert relative_error(sums.by_condition.weighted.nll[0], expected) < TOLERANCE


def test_sums_of_a_full_micro_batch_do_not_drift(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_TOKENS", 8192)
    num_tokens = 32_768  # the published capacity of a GPU
    hidden = torch.zeros(num_tokens, WIDTH)
    weights = torch.full((num_tokens,), 0.1)
    labels, conditions = torch.zeros(num_tokens, dtype=torch.int64), torch.zeros(num_tokens, dtype=torch.int32)
    with torch.no_grad():
        sums = loss_sums(make_head(), [hidden, labels, weights, conditions])
    exact = weights.double().sum()
    # One rounding to f32. Adding one by one in f32 is off by 2.6e-4, and every reported loss with it.
    assert relative_error(sums.by_condition.weighted.weight[0], exact) < 1e-7
    # Every token's nll is log V; one more rounding for it, one for its product.
    log_v = torch.tensor(float(VOCABULARY)).double().log()
    assert relative_error(sums.by_condition.weighted.nll[0], exact * log_v) < 3e-7
    assert relative_error(sums.nll, exact * log_v) < 1e-6  # torch's f32 sum, pairwise


SCALES = pytest.mark.parametrize("scale", [1.0, 2.0 / 77, 1e-12, 3e9])


@SCALES
@pytest.mark.parametrize("softcap", [None, 0.5])
def test_every_gradient_is_that_of_fp64_whatever_it_is_multiplied_with(scale: float, softcap: float | None) -> None:
    """train_step multiplies the sum with processes / weight, after the gradients are made."""
    head, inputs = make_head(bias=True), make_inputs(60, 50)
    sums = loss_sums(head, inputs, softcap=softcap)
    exact = copy.deepcopy(head).double()
    hidden = inputs[0].detach().double().requires_grad_()
    logits = exact(hidden) if softcap is None else softcap * torch.tanh(exact(hidden) / softcap)
    expected = (F.cross_entropy(logits, inputs[1], reduction="none") * inputs[2].double()).sum()
    for value, reference in zip(
        gradients(scale * sums.nll, head, inputs[0]), gradients(scale * expected, exact, hidden), strict=True
    ):
        assert value.dtype == torch.float32
        assert relative_error(value, reference) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_likely_label_keeps_its_small_gradient(dtype: torch.dtype) -> None:
    """p - 1 = -8.3e-7. fp32 holds p as 1 - 14 * 6e-8, bf16 as 1, whose gradient would be 0."""
    head = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[14.0], [0.0]]))
    head, hidden = head.to(dtype), torch.ones(1, 1, dtype=dtype, requires_grad=True)
    inputs = [hidden, torch.tensor([0]), torch.ones(1), torch.zeros(1, dtype=torch.int32)]
    by_hidden, by_weight = gradients(loss_sums(head, inputs).nll, head, hidden)
    missing = 1 / (1 + torch.tensor(14.0).double().exp())
    # log p is known to 6e-8 / 2 of 8.3e-7, 4 %; p - 1 would be off by as much again.
    assert relative_error(by_weight[0], -missing) < 0.04
    assert relative_error(by_hidden, -14 * missing) < 0.04


def test_going_back_twice_gives_the_same_gradients() -> None:
    head, inputs = make_head(bias=True), make_inputs(60, 50)
    sums = loss_sums(head, inputs)
    first, second = (gradients(0.3 * sums.nll, head, inputs[0]) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_inside_of_a_checkpoint_nothing_changes(use_reentrant: bool) -> None:
    head, inputs = make_head(bias=True), make_inputs(60, 50)
    expected = loss_sums(head, inputs).nll
    expected.backward()
    references = [inputs[0].grad, *(parameter.grad for parameter in head.parameters())]
    inputs[0].grad = None
    head.zero_grad()

    def nll(hidden: Tensor) -> Tensor:
        return loss_sums(head, [hidden, *inputs[1:]]).nll

    value = checkpoint(nll, inputs[0], use_reentrant=use_reentrant)
    assert isinstance(value, Tensor) and torch.equal(value, expected)
    value.backward()
    for given, reference in zip([inputs[0].grad, *(p.grad for p in head.parameters())], references, strict=True):
        assert given is not None and reference is not None and torch.equal(given, reference)


# ---- Rows, and what is not trained ----

ROW_IDS = torch.tensor([3, 77])


def with_rows(*, bias: bool, is_frozen: bool = True) -> HeadWithRows:
    """A head whose rows have learned something."""
    head = HeadWithRows(make_head(bias=bias), ROW_IDS, None)
    with torch.no_grad():
        head.rows += torch.randn(head.rows.shape, generator=torch.Generator().manual_seed(3))
    head.weight.requires_grad_(not is_frozen)
    return head


@pytest.mark.parametrize("is_frozen", [True, False])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 0.5])
def test_rows_stand_in_place_of_those_of_the_weight(softcap: float | None, bias: bool, is_frozen: bool) -> None:
    head, inputs = with_rows(bias=bias, is_frozen=is_frozen), make_inputs(60, 50)
    inputs[1][::5] = ROW_IDS[0]  # as labels too
    sums = loss_sums(head, inputs, softcap=softcap)
    expected = (naive_nll(head, inputs[0], inputs[1], softcap) * inputs[2]).sum()
    assert relative_error(sums.nll, expected) < TOLERANCE
    given, references = (gradients(value, head, inputs[0]) for value in (sums.nll, expected))
    assert len(given) == 2 + bias + (not is_frozen)
    for value, reference in zip(given, references, strict=True):
        assert relative_error(value, reference) < TOLERANCE


@pytest.mark.parametrize("num_weighted", [0, 50])
def test_what_is_frozen_gets_no_gradient(num_weighted: int) -> None:
    head, inputs = with_rows(bias=False), make_inputs(60, num_weighted)
    loss_sums(head, inputs).nll.backward()
    assert head.weight.grad is None
    assert head.rows.grad is not None and bool(head.rows.grad.any()) == bool(num_weighted)
    assert inputs[0].grad is not None


def products(head: nn.Linear, inputs: list[Tensor], *, with_gradients: bool = True) -> tuple[float, float]:
    """Matrix products of the weighted tokens in forward and backward, in units of [S, V, C]."""
    unit = 2 * int(torch.count_nonzero(inputs[2])) * VOCABULARY * WIDTH
    with FlopCounterMode(display=False) as forward, torch.set_grad_enabled(with_gradients):
        nll = loss_sums(head, inputs).nll
    with FlopCounterMode(display=False) as backward:
        if nll.requires_grad:
            nll.backward()
    return forward.get_total_flops() / unit, backward.get_total_flops() / unit


def test_no_more_products_are_made_than_are_needed() -> None:
    head, inputs = make_head(), make_inputs(60, 50)
    assert products(head, inputs) == (3, 0)
    assert products(head, inputs, with_gradients=False) == (1, 0)
    head.weight.requires_grad_(False)
    assert products(head, inputs) == (2, 0)
    inputs[0] = inputs[0].detach()
    assert products(head, inputs) == (1, 0)
    head.weight.requires_grad_(True)
    assert products(head, inputs) == (2, 0)  # of an embedding and a head alone


def test_without_gradients_the_sums_are_the_same() -> None:
    head, inputs = with_rows(bias=True), make_inputs(60, 50)
    sums = loss_sums(head, inputs)
    with torch.no_grad():
        alone = loss_sums(head, inputs)
    assert not alone.nll.requires_grad and sums.nll.requires_grad
    assert torch.equal(sums.nll, alone.nll) and torch.equal(sums.by_condition.table, alone.by_condition.table)


def test_a_weight_shared_with_the_embedding_gets_both_gradients() -> None:
    embedding = nn.Embedding(VOCABULARY, WIDTH)
    head = make_head()
    head.weight = embedding.weight
    _, labels, weights, conditions = make_inputs(60, 50)
    ids = labels.flip(0)
    expected = (naive_nll(head, embedding(ids), labels, None) * weights).sum()
    (reference,) = torch.autograd.grad(expected, head.weight)
    sums = loss_sums(head, [embedding(ids), labels, weights, conditions])
    (value,) = torch.autograd.grad(sums.nll, head.weight)
    assert relative_error(value, reference) < TOLERANCE


# ---- bf16 ----


def bf16_errors(num_tokens: int, *, weights: Tensor | None = None, scale: float = 1.0) -> list[float]:
    """Relative errors of the gradients by hidden states and weight, against fp64 on the same bf16 values."""
    generator = torch.Generator().manual_seed(4)
    width, vocabulary = 64, 300
    head = nn.Linear(width, vocabulary, bias=False)
    with torch.no_grad():
        head.weight.normal_(generator=generator).mul_(0.05)
    head = head.bfloat16()
    hidden = torch.randn(num_tokens, width, generator=generator).bfloat16().requires_grad_()
    labels = torch.randint(vocabulary, (num_tokens,), generator=generator)
    weights = torch.ones(num_tokens) if weights is None else weights
    sums = sums_of(
        LossHead(head, softcap=None, num_conditions=1),
        [hidden, labels, weights, torch.zeros(num_tokens, dtype=torch.int32)],
    )
    exact, exact_hidden = copy.deepcopy(head).double(), hidden.detach().double().requires_grad_()
    nll = F.cross_entropy(exact(exact_hidden), labels, reduction="none")
    references = torch.autograd.grad(scale * (nll * weights.double()).sum(), [exact_hidden, exact.weight])
    values = torch.autograd.grad(scale * sums.nll, [hidden, head.weight])
    assert all(value.dtype == torch.bfloat16 for value in values)
    return [relative_error(value, reference) for value, reference in zip(values, references, strict=True)]


# A rounding to bf16 is 0.17 % in the mean square. The gradient by the hidden states is rounded as a product and when it
# is scaled: 0.24 %. That by the weight is rounded once, from hidden states that were rounded with their loss weights,
# which averages over tokens. Logits and their gradient are rounded too: 0.1 %. In all 0.26 and 0.2 %.
BF16 = 0.003, 0.0022


@pytest.mark.parametrize("scale", [1.0, 3 / 7, 7e-12, 3e9])
def test_bf16_gradients_are_as_near_as_their_roundings_allow(scale: float) -> None:
    tenths = torch.where(torch.arange(64) % 3 == 0, 0.1, 1.0)
    for weights in (None, tenths):
        errors = bf16_errors(64, weights=weights, scale=scale)
        assert errors[0] < BF16[0] and errors[1] < BF16[1], errors


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_get_bf16_gradients_in_rows_of_whole_cache_lines(
    dtype: torch.dtype, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    strides = []
    add = loss._Gradients.add

    def watched(gradients: Any, chunk: slice, by_logits: Tensor, *others: Any) -> None:
        strides.append(by_logits.stride())
        add(gradients, chunk, by_logits, *others)

    monkeypatch.setattr(loss._Gradients, "add", watched)
    head = make_head(dtype=dtype)
    LossHead(head, softcap=softcap, num_conditions=CONDITIONS)(*make_inputs(20, 20, dtype), torch.arange(20))
    assert strides == [(VOCABULARY if dtype == torch.float32 else 192, 1)] * 3


def test_many_chunks_lose_nothing_in_bf16() -> None:
    """Sums that were bf16 after each of 128 chunks would be off by 1 %."""
    assert bf16_errors(128 * CHUNK)[1] < BF16[1]


def test_weights_of_a_tenth_stay_a_tenth_in_bf16_gradients() -> None:
    """bf16 has 0.10009765625: gradients would be longer by 1e-3."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(200, 64, generator=generator).bfloat16().requires_grad_()
    head = nn.Linear(64, 300, bias=False)
    with torch.no_grad():
        head.weight.normal_(generator=generator)
    head = head.bfloat16()
    labels, conditions = torch.randint(300, (200,), generator=generator), torch.zeros(200, dtype=torch.int32)
    of_tenths, of_ones = (
        gradients(loss_sums(head, [hidden, labels, torch.full((200,), weight), conditions]).nll, head, hidden)
        for weight in (0.1, 1.0)
    )
    for tenths, ones in zip(of_tenths, of_ones, strict=True):
        length = float((tenths.double() * ones).sum() / ones.double().square().sum())
        # Roundings of 0.3 % in 12,800 elements and more, of either sign: 2.6e-5.
        assert length == pytest.approx(0.1, rel=1e-4)


# ---- What the device is not asked, and what it need not hold ----


@pytest.mark.parametrize(
    "ask",
    [
        lambda values: values.sum().item(),
        lambda values: values.nonzero(),
        lambda values: values[values > 1],
        lambda values: torch.equal(values, values),
        lambda values: bool(values.any()),
        lambda values: values.unique(),
        lambda values: F.one_hot(values.long()),
        lambda values: values.tolist(),
        lambda values: values.cpu(),
    ],
)
def test_what_a_host_would_wait_for_is_seen(ask: Callable[[Tensor], object]) -> None:
    with host_waits() as waits:
        ask(torch.arange(4.0))
    assert waits


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("num_weighted", [0, 50])
@pytest.mark.parametrize("softcap", [None, 0.5])
def test_no_host_waits_for_the_head(softcap: float | None, num_weighted: int, training: bool) -> None:
    head, inputs = with_rows(bias=True, is_frozen=False), make_inputs(60, num_weighted)
    positions = inputs[2].nonzero().squeeze(1)
    loss_head = LossHead(head, softcap=softcap, num_conditions=CONDITIONS).train(training)
    with host_waits() as waits:
        sums = loss_head(*inputs, positions)
        (0.5 * sums.nll).backward()
    assert waits == []
    # Without values nobody can ask for one, and there are no copies on the CPU.
    meta = LossHead(copy.deepcopy(head).to("meta"), softcap=softcap, num_conditions=CONDITIONS).train(training)
    hidden, *others = (part.detach().to("meta") for part in (*inputs, positions))
    meta(hidden.requires_grad_(), *others).nll.backward()
    assert hidden.grad is not None


@pytest.mark.parametrize(("dtype", "num_bytes"), [(torch.float32, 8), (torch.bfloat16, 8)])
def test_a_chunk_takes_its_logits_twice_in_fp32(dtype: torch.dtype, num_bytes: int) -> None:
    width, vocabulary, num_tokens = 4, 5000, 6 * CHUNK
    head = nn.Linear(width, vocabulary, bias=False, dtype=dtype)
    hidden = torch.randn(num_tokens, width, dtype=dtype, requires_grad=True)
    labels, conditions = torch.zeros(num_tokens, dtype=torch.int64), torch.zeros(num_tokens, dtype=torch.int32)
    inputs = [hidden, labels, torch.ones(num_tokens), conditions]
    loss_head, positions = LossHead(head, softcap=None, num_conditions=1), torch.arange(num_tokens)
    with live_bytes([*inputs, head.weight, positions]) as live:
        loss_head(*inputs, positions)
    by_weight = 4 * vocabulary * width
    # 3 % for the [S, C] and [S] parts. All tokens would take six times as much.
    assert live.peak == pytest.approx(num_bytes * CHUNK * vocabulary + by_weight, rel=0.03)


# ---- torch.compile ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 0.5])
def test_a_compiled_chunk_gives_the_same_and_is_compiled_once(softcap: float | None, dtype: torch.dtype) -> None:
    head = make_head(dtype=dtype)
    plain, compiled = (LossHead(head, softcap=softcap, num_conditions=CONDITIONS) for _ in range(2))
    compiled.compile_chunk()
    sums_of(compiled, make_inputs(60, 13, dtype)).nll.backward()  # chunks of 8 and 5
    with torch.compiler.set_stance("fail_on_recompile"):
        for num_weighted in (16, 31, 50):
            inputs = make_inputs(60, num_weighted, dtype)
            values, references = (sums_of(loss_head, inputs) for loss_head in (compiled, plain))
            # fp32 sums of 131 exponentials in another order.
            assert relative_error(values.nll, references.nll) < TOLERANCE
            assert relative_error(values.by_condition.table, references.by_condition.table) < TOLERANCE
            pairs = zip(*(gradients(sums.nll, head, inputs[0]) for sums in (values, references)), strict=True)
            for value, reference in pairs:
                # In bf16 a last bit of fp32 now and then decides how an element is rounded.
                assert relative_error(value, reference) < (TOLERANCE if dtype == torch.float32 else 2e-4)


def test_the_whole_head_may_be_compiled() -> None:
    head, inputs = make_head(bias=True), make_inputs(60, 21)
    loss_head = LossHead(head, softcap=None, num_conditions=CONDITIONS)
    values, references = (sums_of(way, inputs) for way in (torch.compile(loss_head), loss_head))
    assert relative_error(values.nll, references.nll) < TOLERANCE
    pairs = zip(*(gradients(sums.nll, head, inputs[0]) for sums in (values, references)), strict=True)
    assert all(relative_error(value, reference) < TOLERANCE for value, reference in pairs)


# ---- The benchmark ----


def test_every_way_that_is_measured_gives_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "RECOMPUTED_CHUNK", 16)
    monkeypatch.setattr(benchmark, "USUAL_CHUNK", CHUNK)
    ways = benchmark.make_ways(WIDTH, VOCABULARY, 60, [CHUNK, 16, 100])
    names = ["products", "full logits", "recomputed", "head 8", "head 16", "head 60", "compiled"]
    assert list(ways) == names
    references = ways["full logits"]()
    for name in names[2:]:
        for value, reference in zip(ways[name](), references, strict=True):
            assert relative_error(value, reference) < TOLERANCE, name


def test_the_head_is_shared_not_copied() -> None:
    head = make_head(bias=True)
    loss_head = LossHead(head, softcap=None, num_conditions=1)
    assert loss_head.weight is head.weight and loss_head.bias is head.bias


class WidestLogits(TorchDispatchMode):
    """Most rows that any tensor over the vocabulary has, of all results of all operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of torch
        self.rows = 0
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor) and value.dim() and VOCABULARY in value.shape:
                self.rows = max(self.rows, value.numel() // VOCABULARY)
                self.seen += 1
        return out


@pytest.mark.parametrize("softcap", [None, 0.5])
def test_the_logits_of_all_tokens_never_exist(softcap: float | None) -> None:
    # The weight's own transpose and gradient have 6 rows over the vocabulary, fewer than a chunk has.
    head, inputs = make_head(), make_inputs(60, 50)
    with WidestLogits() as whole:
        (naive_nll(head, inputs[0], inputs[1], softcap) * inputs[2]).sum().backward()
    assert whole.rows == 60  # the measurement sees them where they are
    with WidestLogits() as forward:
        sums = loss_sums(head, inputs, softcap=softcap)
    with WidestLogits() as backward:
        sums.nll.backward()
    assert forward.seen and backward.seen
    assert max(forward.rows, backward.rows) == CHUNK


def test_no_logits_are_kept_for_the_backward_pass() -> None:
    head, inputs = make_head(), make_inputs(60, 50)
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.shape[-1:] == (VOCABULARY,):
            kept.append(tensor.numel() // VOCABULARY)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_sums(head, inputs)
    assert kept == []
