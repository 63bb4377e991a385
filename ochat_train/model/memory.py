"""The bytes that training a model takes: on a GPU, in host memory, and on disk.

What is kept of a model is counted on the model itself, made on the meta device, where tensors have sizes and no memory;
so it holds for any architecture. What DeepSpeed keeps beside it are formulas, each checked against a real engine.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel

from ochat_train.model.packed_lm import PackedCausalLM
from ochat_train.model.pretrained import DTYPES
from ochat_train.tokens.batch import PackedBatch

_FP32 = 4
_ADAM = 8  # two averages in fp32
_REDUCED_AT_ONCE = 500_000_000  # elements, where DeepSpeed reduces gradients outside of its ZeRO optimizers
_GATHERED = 1_000_000_000  # elements, stage3_max_live_parameters
_SUB_GROUP = 1_000_000_000  # elements, sub_group_size
_BUCKET = 500_000_000  # elements, reduce_bucket_size
_SMALL_FILES = 32 * 2**20  # configuration, tokenizer, random states, names and shapes


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Elements of a model's parameters, a shared one once.

    num_trained: of those that get a gradient, adapters included. largest: of the largest of them. vocab_size and
    hidden_size are those of the head.
    """

    num_weights: int
    num_trained: int
    largest: int
    vocab_size: int
    hidden_size: int


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes of one micro-batch, without parameters and their gradients.

    kept: what the forward pass leaves behind for the backward pass. layer: the most that the backward pass has on top
    of it, mostly one layer computed again and its gradients. logits: what the loss head has on top of `kept`.
    """

    kept: int
    layer: int
    logits: int

    @property
    def peak(self) -> int:
        """The most at any time: the loss head is done before the first layer's backward pass begins."""
        return self.kept + max(self.layer, self.logits)


@dataclass(frozen=True, slots=True)
class ZeroSetting:
    """How DeepSpeed spreads a run. bucket: elements of its reduce_bucket_size. has_adam: adamw, not sgd."""

    stage: int
    offload: bool
    num_processes: int
    dtype: Literal["bfloat16", "float32"]
    has_adam: bool = True
    bucket: int = _BUCKET


@dataclass(frozen=True, slots=True)
class MemoryNeeds:
    """Bytes of one process, by part; host: of its share of host memory with an offloaded optimizer.

    activations, layer and logits: see `Activations`. buffers: of communication, and weights that are gathered. step:
    what the optimizer's step takes while there are no activations. start: of the model, while the engine is made.
    """

    weights: int
    gradients: int
    master: int
    optimizer: int
    activations: int
    layer: int
    logits: int
    buffers: int
    step: int
    start: int
    host: int

    @property
    def states(self) -> int:
        """What is there all the time, and gradients, which are there when either peak comes."""
        return self.weights + self.gradients + self.master + self.optimizer

    @property
    def total(self) -> int:
        """The highest of three peaks: in the backward pass, in the optimizer's step, and at the start."""
        backward = self.activations + max(self.layer, self.logits) + self.buffers
        return max(self.states + max(backward, self.step), self.start)


# ---------------------------------------------------------------------------------------------------- the model


def measure_size(
    config: Any, *, lora_rank: int | None, lora_targets: Literal["all-linear"] | tuple[str, ...]
) -> ModelSize:
    """The size of a model of this transformers configuration, with adapters when `lora_rank` is given.

    An adapter of rank r beside a linear layer of shape [out, in] has r * (in + out) elements, and only adapters are
    trained. Raises ValueError when no model can be made of it, or no layer is a target.
    """
    model = meta_model(config, torch.bfloat16)
    head = model.get_output_embeddings()
    sizes = [parameter.numel() for parameter in model.parameters()]
    embedding: Any = model.get_input_embeddings()
    vocab_size, hidden_size = embedding.weight.shape if head is None else head.weight.shape
    if lora_rank is None:
        return ModelSize(sum(sizes), sum(sizes), max(sizes), vocab_size, hidden_size)
    linear = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head
    }
    if lora_targets != "all-linear":
        linear = {name: module for name, module in linear.items() if name.endswith(lora_targets)}
        if not linear:
            raise ValueError(f"model.lora.targets {', '.join(lora_targets)}: no linear layer has such a name")
    parts = [lora_rank * size for module in linear.values() for size in module.weight.shape]
    return ModelSize(sum(sizes) + sum(parts), sum(parts), max(parts), vocab_size, hidden_size)


def count_activations(
    config: Any, *, num_tokens: int, dtype: Literal["bfloat16", "float32"], checkpointing: bool
) -> Activations:
    """The activations of a micro-batch of `num_tokens` tokens, all with a loss, and with flash attention.

    A forward and a backward pass run on the meta device, and the bytes of all tensors that are alive are added up. With
    C, I, A, K the widths of the hidden state, the MLP, the queries and the keys, and H heads, a layer of Llama keeps in
    bfloat16, a token,

        norms       2 * (4 C + 2 C + 2 C + 4)   the input in fp32, its norm, the output; 1 / rms
        attention   2 A + 2 K + 2 K + 2 A + 4 H queries, keys, values, output; log of the sums of exponentials in fp32
        MLP         4 * 2 I                     gate, silu(gate), up, their product

    and with checkpointing only its input, 2 C. Of the `sdpa` backend on CPU there is one copy of the output more, 2 A.
    The loss head has, of a chunk of CHUNK_TOKENS tokens, twice the logits in fp32 (with their log-softmax), beside the
    gradients by its weight in fp32 and by the hidden states.

    Raises ValueError for a model that cannot be run without values, such as one that routes tokens to experts.
    """
    model = PackedCausalLM(
        meta_model(config, DTYPES[dtype]),
        attention="sdpa",  # replaced below
        device_type="meta",
        checkpointing=False,
        num_conditions=1,
    )
    if checkpointing:
        enable = getattr(model.lm, "activation_checkpointing_enable", None) or model.lm.gradient_checkpointing_enable
        enable({"use_reentrant": False, "preserve_rng_state": False})  # the meta device has no random numbers
    model.lm.set_attn_implementation(_register_counted())
    try:
        return _run_without_memory(model.train(), num_tokens)
    except Exception as error:  # of many kinds: whatever a model's code says about tensors without values
        raise ValueError(f"the activations of {config.model_type} cannot be counted: {error!r}") from error


def meta_model(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a transformers configuration, without memory. Raises ValueError when none can be made of it."""
    config = config.get_text_config()
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:  # of many kinds: whatever a model's code says about values that it does not expect
        raise ValueError(f"no {config.model_type} can be made of this model's configuration: {error!r}") from error
    return model


def _run_without_memory(model: PackedCausalLM, num_tokens: int) -> Activations:
    """The activations of a model on the meta device."""
    for parameter in model.parameters():  # gradients are counted where DeepSpeed keeps them
        parameter.register_post_accumulate_grad_hook(_forget_gradient)
    with torch.device("meta"):
        tokens = torch.zeros(num_tokens, dtype=torch.int64)
        batch = PackedBatch(
            input_ids=tokens,
            position_ids=tokens,
            labels=tokens,
            loss_weights=tokens.float(),
            loss_positions=tokens,
            cu_seqlens=torch.zeros(2, dtype=torch.int32),
            max_seqlen=num_tokens,
            condition_ids=tokens.int(),
        )
    with live_bytes([*model.parameters(), *model.buffers(), tokens]) as live:
        hidden = model.hidden(batch)
        kept = live.now
        at_hidden: list[int] = []
        hidden.register_hook(lambda _: at_hidden.append(live.restart()))
        sums = model.loss_head(hidden, batch.labels, batch.loss_weights, batch.condition_ids, batch.loss_positions)
        del hidden
        sums.nll.backward()
    return Activations(kept=kept, layer=live.peak - kept, logits=at_hidden[0] - kept)


def _forget_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _register_counted() -> str:
    """Register with transformers what keeps as much as flash attention does; returns its name."""

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        rows = (part[0].transpose(0, 1) for part in (query, key, value))  # [T, H, D]
        return _CountedAttention.apply(*rows)[None], None  # type: ignore[no-untyped-call]  # of torch

    AttentionInterface.register("ochat_train_counted", attend)
    return "ochat_train_counted"


class _CountedAttention(torch.autograd.Function):
    """Tensors of flash attention's sizes, without values: q [T, Hq, D], k and v [T, Hkv, D] -> [T, Hq, D]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        log_sums = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        ctx.save_for_backward(q, k, v, out, log_sums)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, _, _ = ctx.saved_tensors
        _sums = torch.empty(q.shape, dtype=torch.float32, device=q.device)  # in which the kernel adds up q's gradient
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class LiveBytes(TorchDispatchMode):
    """Adds up the storages of all tensors that are made while it is active, until they are gone: now, and at most."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of torch
        self.now = self.peak = 0
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def restart(self) -> int:
        """The most so far; from here on the peak is that of what follows."""
        peak, self.peak = self.peak, self.now
        return peak

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


@contextmanager
def live_bytes(known: list[Tensor]) -> Iterator[LiveBytes]:
    """Counts the bytes of tensors made inside; those of `known` tensors count 0."""
    with LiveBytes(known) as live:
        yield live


# ---------------------------------------------------------------------------------------------------- DeepSpeed


def memory_needs(size: ModelSize, activations: Activations, setting: ZeroSetting, *, on_gpu: bool) -> MemoryNeeds:
    """The bytes of each of n processes, in DeepSpeed 0.19 with gradients added up in fp32.

    With P weights, Q of them trained, w bytes each (2 or 4), and every 1/n where that part is split:

        stage            0        1, bf16       1, fp32       2            3
        weights          w P      w P           w P           w P          w P / n
        gradients        4 Q      4 Q + 2 Q     4 Q + 4 Q/n   4 Q / n      4 Q / n
        fp32 master      -        4 Q / n       4 Q / n       4 Q / n      4 Q / n     (also of fp32 weights)
        Adam             8 Q      8 Q / n       8 Q / n       8 Q / n      8 Q / n
        buffers          4 b      (4 + 2) b     4 B           w B          w B + w g

    B: reduce_bucket_size, made whole; two of them with overlap_comm. b: the least of Q and 5e8. g: gathered weights,
    the least of P and 1e9. In bfloat16, stage 1 is DeepSpeed's BF16_Optimizer: it keeps fp32 gradients of all weights
    for the whole run, and those in bf16 until the end of the backward pass. With stage 2 bf16 gradients go through the
    bucket into this rank's part in fp32; of fp32 weights the part is copied once in the step. An offloaded optimizer
    has in host memory 4 Q / n each for master, gradients and both averages, and the weights that it sends back; on the
    GPU stay the gradients, and room for the largest weight.

    The step of AdamW has one more average for a moment on a GPU, and two on a CPU. While the engine is made, stages 1
    and 2 have the weights twice; stage 3 has the whole model on each GPU.
    """
    n, stage, element = setting.num_processes, setting.stage, DTYPES[setting.dtype].itemsize
    all_weights, trained = element * size.num_weights, size.num_trained
    part = -(-trained // n)
    adam = _ADAM if setting.has_adam else 0
    is_bf16 = setting.dtype == "bfloat16"
    if stage == 0:
        gradients, buffers = _FP32 * trained, _FP32 * min(trained, _REDUCED_AT_ONCE)
        master, optimizer = 0, adam * trained
    else:
        gradients, buffers = _FP32 * part, element * setting.bucket
        master, optimizer = _FP32 * part, adam * part
        if stage == 1 and is_bf16 and not setting.offload:
            gradients, buffers = (_FP32 + element) * trained, (_FP32 + element) * min(trained, _REDUCED_AT_ONCE)
        elif stage == 1:
            gradients, buffers = _FP32 * (trained + part), _FP32 * setting.bucket
        elif stage == 3:
            buffers += element * min(size.num_weights, _GATHERED)
    averages = trained if stage == 0 else min(part, _SUB_GROUP) if stage == 3 else part
    step = _FP32 * averages * (1 if on_gpu else 2) if setting.has_adam else 0
    if stage in (1, 2) and not is_bf16:
        step += _FP32 * part
    host = 0
    if setting.offload:
        host = master + 2 * _FP32 * part + optimizer if stage == 3 else master + (_FP32 + element) * part + optimizer
        host += 0 if stage == 3 else element * size.largest
        buffers += 0 if stage == 3 else element * size.largest
        master = optimizer = step = 0
        gradients = 0 if stage == 3 else gradients
    return MemoryNeeds(
        weights=-(-all_weights // n) if stage == 3 else all_weights,
        gradients=gradients,
        master=master,
        optimizer=optimizer,
        activations=activations.kept,
        layer=activations.layer,
        logits=activations.logits,
        buffers=buffers,
        step=step,
        start=all_weights * (2 if stage in (1, 2) else 1),
        host=host,
    )


# ---------------------------------------------------------------------------------------------------------- disk


def checkpoint_bytes(
    num_trained: int, *, stage: int, dtype: Literal["bfloat16", "float32"], has_adam: bool = True
) -> int:
    """What one resumable checkpoint takes on disk, all processes together, whatever their number.

    Q trained weights of w bytes; frozen ones are not in it. Stage 0: (w + 8) Q; stages 1 and 2: (w + 4 + 8) Q, the fp32
    master and Adam's averages; stage 3 the latter alone. Without Adam, 8 Q less.
    """
    weights = 0 if stage == 3 else DTYPES[dtype].itemsize
    master, averages = 0 if stage == 0 else _FP32, _ADAM if has_adam else 0
    return (weights + master + averages) * num_trained + _SMALL_FILES


def run_bytes(checkpoint: int, model: int, light_model: int, *, keep: int, num_light: int) -> int:
    """What the folder of a run takes at most: bytes of checkpoints, of the exported model, and of light ones.

    A new checkpoint is complete before an old one goes, so there are keep + 1 of them; an export replaces one likewise.
    """
    return (keep + 1) * checkpoint + 2 * model + num_light * light_model
