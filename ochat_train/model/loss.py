"""The head and the weighted negative log-likelihood, in chunks; the forward pass computes gradients too."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ochat_train.model.lora import HeadWithRows
from ochat_train.model.router import RouterSums

# Tokens whose logits exist at one time, in two fp32 copies: 2 x 2048 x 32,000 x 4 bytes are 524 MB. Every chunk reads
# and writes the fp32 gradient of the weight once, 8 bytes an element beside the 6 flop a token of all three products.
# With an H100's 989 TFLOP/s and 3.35 TB/s that is 28 % of all time at 1024 tokens and 16 % at 2048 where it does not
# overlap; this is arithmetic, not measured. On a CPU chunks of 512 to 2048 take equally long.
CHUNK_TOKENS = 2048
_ROW_MULTIPLE = 64  # elements


class TokenSums(NamedTuple):
    """Sums over the tokens with a loss, each [..., K] for K conditions.

    nll: of the negative log-likelihood. weight: the number of tokens. correct: the number whose label is the likeliest
    token, in eval mode only (0 in training). In weighted sums each token counts with its loss weight.
    """

    nll: Tensor
    weight: Tensor
    correct: Tensor

    @property
    def loss(self) -> Tensor:
        """nll / weight."""
        return self.nll / self.weight

    @property
    def accuracy(self) -> Tensor:
        """correct / weight."""
        return self.correct / self.weight

    def with_total(self) -> "TokenSums":
        """[..., 1 + K]: the sums over all conditions, then those of each."""
        return TokenSums(*(torch.cat([part.sum(-1, keepdim=True), part], dim=-1) for part in self))


class ConditionSums(NamedTuple):
    """Weighted and unweighted TokenSums in one tensor [2, 3, K], which micro-batches and ranks add up."""

    table: Tensor

    @property
    def weighted(self) -> TokenSums:
        """The sums of weight * x."""
        return TokenSums(*self.table[0])

    @property
    def unweighted(self) -> TokenSums:
        """The sums of x over the tokens with weight != 0."""
        return TokenSums(*self.table[1])

    def add(self, other: "ConditionSums") -> None:
        """Add other's sums to these, in their dtype."""
        self.table.add_(other.table)


def zero_sums(num_conditions: int, device: torch.device) -> ConditionSums:
    """Zeros in f64, to accumulate into."""
    return ConditionSums(torch.zeros(2, 3, num_conditions, dtype=torch.float64, device=device))


class LossSums(NamedTuple):
    """Sums over one micro-batch, never means: ranks and micro-batches add up.

    Named tuples, because DeepSpeed's ZeRO-3 hooks look for tensors in tuples, not in dataclasses.

    nll: scalar f32 with gradient, sum of weight * nll. by_condition: f32[2, 3, K] without gradient. router: of a
    mixture in training; its loss has a gradient where its coefficient is not 0.
    """

    nll: Tensor
    by_condition: ConditionSums
    router: RouterSums | None = None


class Scores(NamedTuple):
    """Per-token results of the logits of t tokens.

    nll: f32[t], of each label. gradient: its gradient with respect to the logits, [t, V]. is_correct: f32[t], whether
    the label is the likeliest token. None where it was not asked for.
    """

    nll: Tensor
    gradient: Tensor | None
    is_correct: Tensor | None


class LossHead(nn.Module):
    """The language model's head and the loss in one module, so that [T, vocab] never exists.

    It shares the head's parameters (a Parameter may belong to two modules): under ZeRO-3 DeepSpeed then gathers them
    around this module's forward and backward.
    """

    row_ids: Tensor | None

    def __init__(self, head: nn.Linear, *, softcap: float | None, num_conditions: int, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = head.weight  # [V, C]
        self.bias = head.bias
        self.rows = head.rows if isinstance(head, HeadWithRows) else None  # [n, C]
        self.register_buffer("row_ids", head.row_ids if isinstance(head, HeadWithRows) else None, persistent=False)
        self.softcap = softcap
        self.scale = scale
        self.num_conditions = num_conditions
        self._score: Callable[..., Scores] = score

    def compile_chunk(self) -> None:
        """Compile `score`: few passes over the logits in place of many. A new chunk size does not recompile it."""
        self._score = torch.compile(score, dynamic=True)

    def forward(
        self, hidden: Tensor, labels: Tensor, loss_weights: Tensor, condition_ids: Tensor, loss_positions: Tensor
    ) -> LossSums:
        """The sums for hidden [T, C], labels i64[T], loss_weights f32[T], condition_ids i32[T].

        loss_positions: where loss_weights is not 0, i64[S]; only these go through the head. Equal to, with
        logits = softcapped(scale * (hidden @ weight.T + bias)), in fp32:

            nll = cross_entropy(logits, labels, reduction="none");  sum(loss_weights * nll)

        Matrix products take inputs in the weights' dtype. In bf16 their results are fp32 on CUDA, and elsewhere the
        logits are rounded to it. Nothing here waits for the device.
        """
        labels, loss_weights = labels[loss_positions], loss_weights[loss_positions]  # [S]
        options = _Options(self._score, self.softcap, self.scale, torch.is_grad_enabled(), not self.training)
        nll_sum, nll, is_correct = _HeadLoss.apply(  # type: ignore[no-untyped-call]  # of torch
            hidden, self.weight, self.bias, self.rows, self.row_ids, labels, loss_weights, loss_positions, options
        )
        values = torch.stack([nll, torch.ones_like(nll), is_correct])  # [3, S]
        values = torch.stack([values * loss_weights, values]).double()
        # index_add adds one by one: in f32 the sum of 32,768 weights of 0.1 is too large by a factor of 1 + 2.6e-4.
        zeros = zero_sums(self.num_conditions, hidden.device).table
        sums = zeros.index_add(2, condition_ids[loss_positions].long(), values).float()
        return LossSums(nll_sum, ConditionSums(sums))


def score(
    logits: Tensor, labels: Tensor, softcap: float | None, gradient_dtype: torch.dtype | None, is_judged: bool
) -> Scores:
    """The scores of logits f32[t, V] for labels i64[t]; with a gradient of the dtype if there is one, rounded once.

    The caller must keep no reference to the logits, so that their memory is free when the gradient is made. Rows of a
    16-bit gradient begin at multiples of 64 elements, whatever V is: tensor cores read 16 bytes at a time, and matrix
    products whose rows of an odd length begin elsewhere are slower.
    """
    is_correct = (logits.argmax(dim=-1) == labels).float() if is_judged else None
    slope = None
    if softcap is not None:
        tanh = torch.tanh(logits / softcap)
        logits, slope = softcap * tanh, 1 - tanh.square()
    log_p = logits.log_softmax(dim=-1)
    del logits
    at_labels = labels[:, None]
    log_p_label = log_p.gather(1, at_labels)
    nll = -log_p_label.squeeze(1)
    if gradient_dtype is None:
        return Scores(nll, None, is_correct)
    at_label = torch.expm1(log_p_label)  # p - 1; in bf16 the p of a likely label would be 1
    gradient = log_p
    if gradient_dtype != torch.float32:
        num_tokens, vocabulary = log_p.shape
        row = -(-vocabulary // _ROW_MULTIPLE) * _ROW_MULTIPLE
        gradient = log_p.new_empty(num_tokens, row, dtype=gradient_dtype)[:, :vocabulary]
    if slope is None:
        torch.exp(log_p, out=gradient)
    else:
        torch.mul(log_p.exp_(), slope, out=gradient)
        at_label = at_label * slope.gather(1, at_labels)
    return Scores(nll, gradient.scatter_(1, at_labels, at_label.to(gradient_dtype)), is_correct)


class _Options(NamedTuple):
    """scale: of the logits. has_gradients: whether to compute gradients. is_judged: whether Scores.is_correct is."""

    score: Callable[..., Scores]
    softcap: float | None
    scale: float
    has_gradients: bool
    is_judged: bool


class _Head(NamedTuple):
    """The parameters: weight [V, C], bias [V], rows [n, C] that stand in place of its rows row_ids i64[n]."""

    weight: Tensor
    bias: Tensor | None
    rows: Tensor | None
    row_ids: Tensor | None


class _HeadLoss(torch.autograd.Function):
    """Head and loss. The forward pass computes the gradients too, the backward pass scales them.

    So there are three products of [S, V, C]: the logits, and the gradients of hidden states and weight. Logits that the
    backward pass computes again are a fourth. Liger's fused linear cross-entropy does it so too, and Apple's
    ml-cross-entropy computes them again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Tensor | None,
        row_ids: Tensor | None,
        labels: Tensor,
        loss_weights: Tensor,
        loss_positions: Tensor,
        options: _Options,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """f32 scalar, the sum of weights * nll; f32[S] nll; f32[S] whether the label is the likeliest token."""
        head, num_supervised = _Head(weight, bias, rows, row_ids), len(loss_positions)
        needed = [options.has_gradients and is_needed for is_needed in ctx.needs_input_grad[:4]]
        gradients = _Gradients(needed, hidden, num_supervised) if any(needed) else None
        nll = torch.zeros(num_supervised, dtype=torch.float32, device=hidden.device)
        is_correct = torch.zeros_like(nll)
        factors = loss_weights * options.scale  # of the gradients by what the head returns
        # Without a weighted token there is one empty chunk: the sum is 0, and gradients of 0 still reach every rank's
        # reduction.
        for start in range(0, max(1, num_supervised), CHUNK_TOKENS):
            chunk = slice(start, start + CHUNK_TOKENS)
            states = hidden[loss_positions[chunk]]  # [t, C]
            scores = options.score(
                _logits(states, head, options.scale),
                labels[chunk],
                options.softcap,
                gradients and hidden.dtype,
                options.is_judged,
            )
            nll[chunk] = scores.nll
            if scores.is_correct is not None:
                is_correct[chunk] = scores.is_correct
            if gradients is not None and scores.gradient is not None:
                gradients.add(chunk, scores.gradient, states, factors[chunk], head)
            del scores
        ctx.hidden_shape, ctx.dtype = hidden.shape, hidden.dtype
        ctx.save_for_backward(factors, loss_positions, *(gradients.all if gradients is not None else ()))
        ctx.mark_non_differentiable(nll, is_correct)
        return (nll * loss_weights).sum(), nll, is_correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        """The saved gradients times the incoming one, each rounded once to the dtype of the hidden states."""
        factors, loss_positions, of_hidden, *of_parameters = ctx.saved_tensors
        if of_hidden is not None:
            scaled = _scaled(of_hidden, (scale * factors)[:, None], ctx.dtype)
            of_hidden = scaled.new_zeros(ctx.hidden_shape).index_copy_(0, loss_positions, scaled)
        of_parameters = [None if part is None else _scaled(part, scale, ctx.dtype) for part in of_parameters]
        return of_hidden, *of_parameters, None, None, None, None, None


class _Gradients:
    """Gradients of hidden states, weight, bias and rows over the chunks so far; None where none is needed.

    A token's factor, its loss weight times the scale of the logits, is not in the gradient of the logits [t, V]: it
    multiplies the hidden states [t, C] that go into the weight's gradient here, and the gradient of the hidden states
    [S, C] in the backward pass, together with the incoming gradient. The sums over tokens are fp32.
    """

    def __init__(self, needed: list[bool], hidden: Tensor, num_supervised: int) -> None:
        self.needed = needed
        self.hidden = hidden.new_empty(num_supervised, hidden.shape[1]) if needed[0] else None
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self.rows: Tensor | None = None

    @property
    def all(self) -> tuple[Tensor | None, ...]:
        return self.hidden, self.weight, self.bias, self.rows

    def add(self, chunk: slice, by_logits: Tensor, states: Tensor, factors: Tensor, head: _Head) -> None:
        """Add a chunk's: by_logits [t, V], which is overwritten, states [t, C], factors f32[t]."""
        _, of_weight, of_bias, of_rows = self.needed
        if of_bias:
            by_bias = factors @ by_logits.float()
            self.bias = by_bias if self.bias is None else self.bias + by_bias
        by_row_logits = None
        if head.row_ids is not None:
            by_row_logits = by_logits.index_select(1, head.row_ids)  # [t, n]
            by_logits.index_fill_(1, head.row_ids, 0)  # `rows` replaced these, so they get no gradient
        if self.hidden is not None:
            torch.mm(by_logits, head.weight, out=self.hidden[chunk])
            if by_row_logits is not None and head.rows is not None:
                self.hidden[chunk].addmm_(by_row_logits, head.rows)
        weighted = (factors[:, None] * states).to(states.dtype)
        if of_weight:
            self.weight = _add_product(self.weight, by_logits, weighted)
        if of_rows and by_row_logits is not None:
            self.rows = _add_product(self.rows, by_row_logits, weighted)


def _logits(states: Tensor, head: _Head, scale: float) -> Tensor:
    """f32[t, V] of hidden states [t, C]."""
    logits = _product(states, head.weight.T)
    if head.rows is not None and head.row_ids is not None:
        logits.index_copy_(1, head.row_ids, _product(states, head.rows.T))
    if head.bias is not None:
        logits += head.bias
    return logits if scale == 1 else logits.mul_(scale)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in f32, which for bf16 only CUDA gives; elsewhere its elements are rounded to bf16."""
    if a.dtype != torch.float32 and a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


def _add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """f32[m, n]: total + a.T @ b, written into total, for a [k, m] and b [k, n] of one dtype.

    A sum in bf16 would be rounded at every chunk, and lose more the more chunks there are.
    """
    if a.device.type != "cuda":
        a, b = a.float(), b.float()
    if total is None:
        return _product(a.T, b)
    if a.dtype == torch.float32:
        return torch.addmm(total, a.T, b, out=total)
    return torch.addmm(total, a.T, b, out_dtype=torch.float32, out=total)


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * factor, in fp32 and rounded to dtype; on a GPU without an fp32 copy."""
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))
