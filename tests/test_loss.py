"""The loss over the head in chunks, against all logits at once."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ochat_train.model import loss
from ochat_train.model.loss import LossHead, LossSums

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
    return list(torch.autograd.grad(value, [hidden, *head.parameters()], retain_graph=True))


def loss_sums(
    head: nn.Linear, inputs: list[Tensor], *, softcap: float | None = None, training: bool = True
) -> LossSums:
    sums: LossSums = LossHead(head, softcap=softcap, num_conditions=CONDITIONS).train(training)(*inputs)
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
        weighted, unweighted = sums.by_condition[:, :, condition]
        assert relative_error(weighted[0], (nll * weights)[mine].sum()) < TOLERANCE
        assert relative_error(weighted[1], weights[mine].sum()) < TOLERANCE
        assert relative_error(weighted[2], weights[mine & correct].sum()) < TOLERANCE
        assert relative_error(unweighted[0], nll[mine].sum()) < TOLERANCE
        assert unweighted[1:].tolist() == [int(mine.sum()), int((mine & correct).sum())]
        assert 0 < unweighted[2] < unweighted[1]
    totals = sums.by_condition.sum(dim=2)
    assert relative_error(totals[0, 0], sums.nll) < TOLERANCE
    assert relative_error(totals[0, 1], weights.sum()) < TOLERANCE
    assert totals[1, 1] == 35


def test_in_training_nobody_asks_for_the_likeliest_token() -> None:
    """It takes another pass over the logits, and only evaluations report it."""
    head = make_head()
    inputs = half_right(head, make_inputs(60, 35))
    training, evaluation = (loss_sums(head, inputs, training=mode).by_condition for mode in (True, False))
    assert torch.count_nonzero(training[:, 2]) == 0 < torch.count_nonzero(evaluation[:, 2])
    assert torch.equal(training[:, :2], evaluation[:, :2])


def test_of_equal_logits_the_first_is_the_likeliest() -> None:
    """As argmax says; logits in bf16 are often equal."""
    hidden, _, weights, conditions = make_inputs(2, 2)
    head = make_head()
    with torch.no_grad():
        head.weight.copy_(head.weight[:1].expand_as(head.weight))
    sums = loss_sums(head, [hidden, torch.tensor([0, 1]), weights, conditions], training=False)
    assert sums.by_condition[1, 2].sum() == 1


def test_sums_by_condition_are_f32_without_gradient() -> None:
    sums = loss_sums(make_head(), make_inputs(20, 10))
    assert sums.nll.requires_grad and sums.nll.shape == ()
    values = sums.by_condition
    assert values.dtype == torch.float32 and values.shape == (2, 3, CONDITIONS) and not values.requires_grad


def test_a_condition_that_is_absent_has_sums_of_zero() -> None:
    hidden, labels, weights, _ = make_inputs(20, 10)
    values = loss_sums(make_head(), [hidden, labels, weights, torch.ones(20, dtype=torch.int32)]).by_condition
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
    for value, reference in zip(sums_changed, sums, strict=True):
        assert torch.equal(value, reference)
    for value, reference in zip(
        gradients(sums_changed.nll, head, other), gradients(sums.nll, head, hidden), strict=True
    ):
        assert torch.equal(value, reference)
    assert torch.count_nonzero(gradients(sums.nll, head, hidden)[0][silent]) == 0


@pytest.mark.parametrize("num_tokens", [1, 30])
def test_without_a_weighted_token_the_sum_is_zero_and_gradients_are_zeros(num_tokens: int) -> None:
    head, inputs = make_head(bias=True), make_inputs(num_tokens, 0)
    sums = loss_sums(head, inputs)
    assert sums.nll == 0 and torch.count_nonzero(sums.by_condition) == 0
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
    assert float(sums.by_condition[0, 1, 0]) == 64 * float(torch.tensor(0.1))
    assert sums.nll.dtype == sums.by_condition.dtype == torch.float32
    # The same bf16 logits on both sides; f32 from there on.
    expected = (naive_nll(head, hidden, labels, None) * weights).sum()
    assert relative_error(sums.nll, expected) < TOLERANCE
    assert relative_error(sums.by_condition[0, 0, 0], expected) < TOLERANCE


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
    assert relative_error(sums.by_condition[0, 1, 0], exact) < 1e-7
    # Every token's nll is log V; one more rounding for it, one for its product.
    log_v = torch.tensor(float(VOCABULARY)).double().log()
    assert relative_error(sums.by_condition[0, 0, 0], exact * log_v) < 3e-7
    assert relative_error(sums.nll, exact * log_v) < 1e-6  # torch's f32 sum, pairwise


def test_the_head_is_shared_not_copied() -> None:
    head = make_head(bias=True)
    loss_head = LossHead(head, softcap=None, num_conditions=1)
    assert loss_head.weight is head.weight and loss_head.bias is head.bias


class WidestLogits(TorchDispatchMode):
    """Most rows that any tensor over the vocabulary has, of all results of all operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
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
