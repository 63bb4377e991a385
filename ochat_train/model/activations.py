"""The bytes of activations, counted by running the model on the meta device, whatever its architecture."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface

from ochat_train.model.checkpointing import Tiled, tile_mlps
from ochat_train.model.lora import PLAIN, Kind, add_adapters, require_peft
from ochat_train.model.packed_lm import PackedCausalLM
from ochat_train.model.pretrained import DTYPES, meta_model
from ochat_train.model.sdpa import AttentionOptions
from ochat_train.model.text_part import base_of, set_attention
from ochat_train.model.ulysses import Exchange, Sized, attend_in_group
from ochat_train.tokens.batch import PackedBatch


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes of one micro-batch, without parameters and their gradients.

    kept: what the forward pass leaves for the backward pass. layer: the most that the backward pass has beside `kept`,
    mostly one recomputed layer and its gradients. logits: what the loss head has beside `kept`.
    """

    kept: int
    layer: int
    logits: int

    @property
    def peak(self) -> int:
        """The most at any time: the loss head ends before the backward pass of the layers begins."""
        return self.kept + max(self.layer, self.logits)


class Alone(NamedTuple):
    """A micro-batch whose sequences are run alone, all as long as the longest: tokens of it, and of a sequence.

    Where the model's attention makes scores, they are counted.
    """

    num_tokens: int
    longest: int


class Share(NamedTuple):
    """A share of a micro-batch: its tokens, and how many processes have one."""

    num_tokens: int
    num_shares: int


def count_activations(
    config: Any,
    *,
    num_tokens: int | Alone | Share,
    dtype: Literal["bfloat16", "float32"],
    checkpointing: str | Tiled,
    lora_rank: int | None = None,
    kind: Kind = PLAIN,
    num_rows: int = 0,
) -> Activations:
    """The activations of a micro-batch of `num_tokens` tokens, all with a loss, and with flash attention.

    checkpointing: full, none or every_N. lora_rank: of adapters beside frozen weights,
    which need not keep their inputs for a gradient, and with `num_rows` trained rows; None: all weights are trained.
    Quantised ones are dequantised one at a time.

    A forward and a backward pass run on the meta device, and the bytes of all live tensors are added up. With C, I, A,
    K the widths of the hidden state, the MLP, the queries and the keys, and H heads, a layer of Llama keeps in
    bfloat16, for each token,

        norms       2 * (4 C + 2 C + 2 C + 4)   the input in fp32, its norm, the output; 1 / rms
        attention   2 A + 2 K + 2 K + 2 A + 4 H queries, keys, values, output; log of the sums of exponentials in fp32
        MLP         4 * 2 I                     gate, silu(gate), up, their product

    and with checkpointing only its input, 2 C. The `sdpa` backend on CPU has one copy of the output more, 2 A. The loss
    head has, for a chunk of CHUNK_TOKENS tokens, twice the logits in fp32 (with their log-softmax), beside the
    gradients by its weight in fp32 and by the hidden states.

    Experts of a mixture run as grouped products over the tokens that choose them, as on a GPU. Raises ValueError for a
    model that cannot run without values, and for adapters without the package peft.
    """
    lm = meta_model(config, DTYPES[dtype])
    if lora_rank is not None:
        require_peft()
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            rows = range(num_rows)
            add_adapters(lm, rank=lora_rank, alpha=lora_rank, targets=kind.targets, row_ids=rows, seed=0, kind=kind)
    policy, mlp_tiles = (checkpointing, 1) if isinstance(checkpointing, str) else checkpointing
    tile_mlps(lm, mlp_tiles)
    model = PackedCausalLM(
        lm,
        attention="alone" if isinstance(num_tokens, Alone) else "sdpa",  # replaced below
        device_type="meta",
        checkpointing=policy,
        num_conditions=1,
        router_coefficient=float(lora_rank is None),
        exchange=Sized(num_tokens.num_shares) if isinstance(num_tokens, Share) else None,
    )
    if base_of(model.lm).config._attn_implementation != "eager":
        set_attention(model.lm, register_sized_attention())
    try:
        if isinstance(num_tokens, Alone):
            return _extrapolate(model.train(), num_tokens.num_tokens, min(num_tokens))
        length = num_tokens.num_tokens if isinstance(num_tokens, Share) else num_tokens
        return _run_without_memory(model.train(), length, times=1)
    except Exception as error:  # of many kinds: whatever a model's code says about tensors without values
        raise ValueError(f"the activations of {config.model_type} cannot be counted: {error!r}") from error


_SHORT = 64  # tokens: some layers work on chunks of as many, and others in a loop over all tokens, in Python


def _extrapolate(model: PackedCausalLM, num_tokens: int, length: int) -> Activations:
    """Of `num_tokens` tokens in sequences of `length`, run alone: from short ones, since bytes are quadratic in it."""
    all_times = [times * -(-num_tokens // (12 * _SHORT)) for times in (6, 4, 3)]  # as many tokens each
    counts = [_run_without_memory(model, n * _SHORT, times=times) for n, times in enumerate(all_times, start=2)]
    of_one = [count.kept / times for count, times in zip(counts, all_times, strict=True)]
    times, steps = -(-num_tokens // length), length / _SHORT - 2
    layers = [count.layer for count in counts]  # the highest of several peaks, so that it is no polynomial

    def at_length(first: float, second: float, third: float) -> int:
        return int(first + steps * (second - first) + steps * (steps - 1) / 2 * (third - 2 * second + first))

    return Activations(
        kept=times * at_length(*of_one),
        layer=max(at_length(*layers), layers[2], int(layers[2] + (steps - 2) * (layers[2] - layers[1]))),
        logits=counts[0].logits,
    )


def _run_without_memory(model: PackedCausalLM, length: int, *, times: int) -> Activations:
    """The activations of a model on the meta device: of a batch of `length` tokens, as often as `times`."""
    for parameter in model.parameters():  # gradients are counted in memory.py, where DeepSpeed keeps them
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    with torch.device("meta"):
        tokens, labels = (torch.zeros(number, dtype=torch.int64) for number in (length, times * length))
        batch = PackedBatch(
            input_ids=tokens,
            position_ids=tokens,
            labels=labels,
            loss_weights=labels.float(),
            loss_positions=labels,
            cu_seqlens=torch.tensor([0, length], dtype=torch.int32, device="cpu"),  # its values are read
            max_seqlen=length,
            condition_ids=labels.int(),
            num_tokens=length,
        )
    with live_bytes([*model.parameters(), *model.buffers(), tokens, labels]) as live:
        hidden, router = model.run_layers(batch)
        of_one = live.now
        hidden = hidden if times == 1 else hidden.repeat(times, 1)
        kept = live.now
        at_hidden: list[int] = []
        hidden.register_hook(lambda _: at_hidden.append(live.restart()))
        sums = model.loss_head(hidden, batch.labels, batch.loss_weights, batch.condition_ids, batch.loss_positions)
        del hidden
        (sums.nll if router is None or not router.loss.requires_grad else sums.nll + router.loss).backward()
    return Activations(kept=kept + (times - 1) * of_one, layer=live.peak - kept, logits=at_hidden[0] - kept)


def register_sized_attention() -> str:
    """Register attention with transformers that keeps as many bytes as flash attention, of zeros; returns its name."""

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **options: Any
    ) -> tuple[Tensor, None]:
        q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))  # [T, H, D]
        exchange: Exchange | None = options.get("exchange")
        if exchange is None:
            return run(q, k, v)[None], None
        sequences = AttentionOptions(options["cu_seqlens"], options["max_seqlen"], scale=1.0)
        return attend_in_group(run, q, k, v, sequences, exchange)[None], None

    def run(q: Tensor, k: Tensor, v: Tensor, _: Any = None) -> Tensor:
        out: Tensor = _SizedAttention.apply(q, k, v)  # type: ignore[no-untyped-call]  # of torch
        return out

    AttentionInterface.register("ochat_train_sized", attend)
    return "ochat_train_sized"


class _SizedAttention(torch.autograd.Function):
    """Tensors of flash attention's sizes: q [T, Hq, D], k [T, Hkv, D], v [T, Hkv, E] -> [T, Hq, E]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.zeros((*q.shape[:2], v.shape[2]), dtype=q.dtype, device=q.device)
        log_sums = torch.zeros(q.shape[:2], dtype=torch.float32, device=q.device)
        ctx.save_for_backward(q, k, v, out, log_sums)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, _, _ = ctx.saved_tensors
        _sums = torch.zeros(q.shape, dtype=torch.float32, device=q.device)  # the kernel adds up q's gradient in it
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages of all tensors made while it is active: those alive now, and at most."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of torch
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = _run_operation(func, args, kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        return result

    def restart(self) -> int:
        """The peak so far; after this call it is the peak of what follows."""
        peak, self.peak = self.peak, self.now
        return peak

    def add(self, tensor: Tensor, num_bytes: int | None = None) -> None:
        """Count the tensor's storage while it is alive, if it is not counted yet; num_bytes: in place of its size."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = size = storage.nbytes() if num_bytes is None else num_bytes
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def _run_operation(func: Any, args: Any, kwargs: Any) -> Any:
    """The operation's result; torch has grouped products on the meta device in bfloat16 alone."""
    if func is torch.ops.aten._grouped_mm.default and args[0].is_meta:
        products: Tensor = func(args[0].bfloat16(), args[1].bfloat16(), *args[2:], **kwargs)
        return products.to(args[0].dtype)
    return func(*args, **kwargs)


@contextmanager
def live_bytes(known: list[Tensor]) -> Iterator[LiveBytes]:
    """Count the bytes of tensors that are made inside the block; `known` tensors count 0."""
    with LiveBytes() as live:
        for tensor in known:
            live.add(tensor, 0)
        yield live
