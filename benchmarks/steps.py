"""One training step, made in the ways that are compared: ours and those of others, on the same weights and tokens.

Each way takes the same conversations and comes to the mean negative log-likelihood of their supervised tokens, and adds
its gradients to those of the same parameters:

    ours                PackedCausalLM, as training runs it
    padded              batches padded to their longest conversation, sdpa, full logits: transformers as it is
    transformers        one row of all conversations, as its DataCollatorWithFlattening makes it, with attention by the
                        collator's cu_seqlens through the backend that ours has, so that no mask is made
    transformers+liger  the same with Liger's kernels and its fused linear cross entropy
    upstream            Llama written out over the packed tokens, full logits, loss, weights and sums in the model's
                        dtype, as OpenChat trained
"""

import copy
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    LlamaConfig,
    PreTrainedModel,
)
from transformers.models.llama import modeling_llama

from ochat_train.model.attention import AttentionOptions, Backend, varlen_attention
from ochat_train.model.kernels import choose_kernels, require_compiler, use_kernels
from ochat_train.model.packed_lm import PackedCausalLM
from ochat_train.tokens.batch import CUDA_MULTIPLE, collate
from ochat_train.tokens.encode import Example

_IGNORED = -100  # transformers' label of a token without a loss
# What Liger replaces in the module of Llama for all models at once, ours and the other baselines included.
_REPLACED_FOR_ALL = ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP")


@dataclass(frozen=True, slots=True)
class Way:
    """A way to make a step.

    prepare: the conversations of one packed micro-batch -> what `loss` takes, on the device, and in how many parts.
    loss: of a part, so that those of all parts add up to the mean over the supervised tokens. rotary: the function for
    rotary positions that the model runs with. note: which of several paths it took.
    """

    name: str
    num_layers: int
    prepare: Callable[[Sequence[Example]], list[Any]]
    loss: Callable[[Any], Tensor]
    rotary: Callable[..., Any] = modeling_llama.apply_rotary_pos_emb
    note: str = ""

    def step(self, parts: Sequence[Any]) -> Tensor:
        """The mean loss; gradients are added to what the parameters have."""
        losses = []
        with _rotary(self.rotary):
            for part in parts:
                loss = self.loss(part)
                loss.backward()
                losses.append(loss.detach())
        return torch.stack(losses).sum()


def count_supervised(examples: Sequence[Example]) -> int:
    """Tokens with a loss; the first token of a conversation is predicted by nothing."""
    return sum(int(np.count_nonzero(example.loss_weights[1:])) for example in examples)


# ---------------------------------------------------------------------------------------------------- the weights


def make_lm(config: LlamaConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A Llama with random weights of one seed, and gradients of zeros, which stay, as an engine's buffers do."""
    torch.manual_seed(0)
    with device:
        lm: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for parameter in lm.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return lm.train()


def twin(lm: PreTrainedModel, *, num_layers: int | None = None, attention: str = "sdpa") -> PreTrainedModel:
    """Another model of the same Parameters, which may have fewer layers, its own attention and checkpointing."""
    config = copy.deepcopy(lm.config)
    config.num_hidden_layers = num_layers or config.num_hidden_layers
    with torch.device("meta"):
        other = AutoModelForCausalLM.from_config(config, dtype=lm.dtype, attn_implementation=attention)
    names = other.state_dict().keys()
    other.load_state_dict({n: p for n, p in lm.state_dict(keep_vars=True).items() if n in names}, assign=True)
    other.model.rotary_emb = lm.model.rotary_emb  # its frequencies are not in the state
    assert other.lm_head.weight is lm.lm_head.weight
    return other.train()


# ---------------------------------------------------------------------------------------------------------- ours


def ours(lm: PreTrainedModel, *, num_layers: int, attention: str, policy: str, kernels: str, is_compiled: bool) -> Way:
    """The way that training goes, with the kernels none or liger, layers compiled or not. Raises ValueError."""
    device = lm.device
    model = twin(lm, num_layers=num_layers)
    if is_compiled:
        require_compiler(device.type)
    if kernels != "none":
        chosen = choose_kernels(kernels, model.config, device=device, dtype=model.dtype, is_compiled=is_compiled)
        use_kernels(model, chosen.kernels)
    packed = PackedCausalLM(
        model,
        attention=attention,
        device_type=device.type,
        checkpointing=policy,
        num_conditions=1,
    ).train()
    if is_compiled:
        packed.compile_parts()

    def prepare(examples: Sequence[Example]) -> list[Any]:
        multiple = CUDA_MULTIPLE if device.type == "cuda" else 1  # as in training
        batch = collate(examples, [0] * len(examples), multiple=multiple)
        return [(batch.to(device), count_supervised(examples))]

    def loss(part: Any) -> Tensor:
        batch, num_supervised = part
        nll: Tensor = packed(batch).nll
        return nll / num_supervised

    words = [word for word, there in ((kernels, kernels != "none"), ("compiled", is_compiled)) if there]
    name = "+".join(["ours", *words])
    note = f"attention {packed.attention.backend}"
    return Way(name, num_layers, prepare, loss, note=note)


@contextmanager
def _replacements_undone() -> Iterator[list[Any]]:
    """Undo what is replaced in the module of Llama meanwhile; yields a list that then has the rotary function."""
    before = {name: getattr(modeling_llama, name) for name in _REPLACED_FOR_ALL}
    rotary: list[Any] = []
    try:
        yield rotary
    finally:
        rotary.append(modeling_llama.apply_rotary_pos_emb)
        for name, value in before.items():
            setattr(modeling_llama, name, value)


@contextmanager
def _rotary(function: Callable[..., Any]) -> Iterator[None]:
    """Rotary positions by this function, in the backward pass of checkpointed layers, too."""
    before = modeling_llama.apply_rotary_pos_emb
    modeling_llama.apply_rotary_pos_emb = function
    try:
        yield
    finally:
        modeling_llama.apply_rotary_pos_emb = before


# ------------------------------------------------------------------------------------------------------ baselines


def padded(lm: PreTrainedModel, *, policy: str, batch_size: int) -> Way:
    """Batches of `batch_size` conversations in their order, each padded to its longest; gradients are added up."""
    model = _checkpointed(twin(lm), policy)

    def prepare(examples: Sequence[Example]) -> list[Any]:
        num_supervised = count_supervised(examples)
        groups = (examples[start : start + batch_size] for start in range(0, len(examples), batch_size))
        return [_pad(group, lm.device) | {"num_items_in_batch": num_supervised} for group in groups]

    return Way("padded", lm.config.num_hidden_layers, prepare, _loss_of(model), note="attention sdpa")


def count_padded(examples: Sequence[Example], batch_size: int) -> int:
    """Tokens of these batches with their padding."""
    lengths = [len(example.input_ids) for example in examples]
    groups = [lengths[start : start + batch_size] for start in range(0, len(lengths), batch_size)]
    return sum(len(group) * max(group) for group in groups)


def _pad(examples: Sequence[Example], device: torch.device) -> dict[str, Any]:
    longest = max(len(example.input_ids) for example in examples)
    ids, labels, mask = (torch.zeros(len(examples), longest, dtype=torch.int64) for _ in range(3))
    labels.fill_(_IGNORED)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        ids[row, :length] = torch.from_numpy(example.input_ids)
        labels[row, :length] = torch.tensor(_labels(example))
        mask[row, :length] = 1
    tensors = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def _labels(example: Example) -> list[int]:
    """As transformers takes them, not shifted."""
    labels: list[int] = np.where(example.loss_weights > 0, example.input_ids, _IGNORED).tolist()
    return labels


def flattened(lm: PreTrainedModel, *, policy: str, with_liger: bool, attention: str) -> Way:
    """transformers' own packed path, attention by our backend. Raises ValueError where Liger's kernels cannot run."""
    backend = _backend_of(lm, attention)
    model = twin(lm, attention=_register_flattened(backend))
    with _replacements_undone() as rotary:
        if with_liger:
            if lm.device.type != "cuda" or importlib.util.find_spec("liger_kernel") is None:
                raise ValueError("Liger's kernels need CUDA and the package liger-kernel")
            from liger_kernel.transformers import apply_liger_kernel_to_llama

            apply_liger_kernel_to_llama(model=model)
    model = _checkpointed(model, policy)
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_tensors="pt")

    def prepare(examples: Sequence[Example]) -> list[Any]:
        features = [{"input_ids": example.input_ids.tolist(), "labels": _labels(example)} for example in examples]
        inputs = {
            name: value.to(lm.device) if isinstance(value, Tensor) else value
            for name, value in collator(features).items()
        }
        return [inputs | {"num_items_in_batch": count_supervised(examples)}]

    name = "transformers+liger" if with_liger else "transformers"
    return Way(name, lm.config.num_hidden_layers, prepare, _loss_of(model), rotary[0], f"attention {backend}")


def _register_flattened(backend: Backend) -> str:
    """Attention over what the collator says of the row, for transformers; returns the name of it."""

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, **options: Any) -> Any:
        borders = options["cu_seq_lens_q"], options["max_length_q"]
        q, k, v = (heads[0].transpose(0, 1) for heads in (query, key, value))  # [T, H, D] of [1, H, T, D]
        mixed = varlen_attention(q, k, v, AttentionOptions(*borders, scale=options["scaling"]), backend=backend)
        return mixed[None], None

    name = f"varlen_by_collator_{backend}".replace("sdpa", "loop").replace("flash", "f")  # names that it does not know
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, lambda *_, **__: None)
    return name


def _backend_of(lm: PreTrainedModel, attention: str) -> Backend:
    """What PackedCausalLM chooses."""
    packed = PackedCausalLM(
        twin(lm),
        attention=attention,
        device_type=lm.device.type,
        checkpointing="none",
        num_conditions=1,
    )
    return packed.attention.backend


def _checkpointed(model: PreTrainedModel, policy: str) -> PreTrainedModel:
    """With transformers' own checkpointing, which knows full and none."""
    if policy not in ("full", "none"):
        raise ValueError(f"transformers has no checkpointing {policy}")
    if policy == "full":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _loss_of(model: PreTrainedModel) -> Callable[[Any], Tensor]:
    def loss(part: Any) -> Tensor:
        mean: Tensor = model(**part, use_cache=False).loss
        return mean

    return loss


def upstream(lm: PreTrainedModel, *, policy: str, attention: str) -> Way:
    """A plain re-creation of upstream's step, with the backend of varlen attention that ours has, too."""
    if policy not in ("full", "none"):
        raise ValueError(f"upstream has no checkpointing {policy}")
    device = lm.device
    backend = _backend_of(lm, attention)

    def prepare(examples: Sequence[Example]) -> list[Any]:
        return [collate(examples, [0] * len(examples)).to(device)]

    def loss(batch: Any) -> Tensor:
        hidden = F.embedding(batch.input_ids, lm.model.embed_tokens.weight)
        angles = batch.position_ids[:, None].float() * lm.model.rotary_emb.inv_freq
        angles = torch.cat([angles, angles], dim=1)[:, None]  # [T, 1, D]
        turns = angles.cos().to(hidden.dtype), angles.sin().to(hidden.dtype)
        borders = batch.cu_seqlens, batch.max_seqlen
        for layer in lm.model.layers:
            if policy == "full":
                hidden = checkpoint(_plain_layer, layer, hidden, turns, borders, backend, use_reentrant=False)
            else:
                hidden = _plain_layer(layer, hidden, turns, borders, backend)
        logits = F.linear(_plain_norm(lm.model.norm, hidden), lm.lm_head.weight)  # [T, V]
        nll = F.cross_entropy(logits, batch.labels, reduction="none")
        weights = batch.loss_weights.to(nll.dtype)
        return (nll * weights).sum() / weights.sum()

    return Way("upstream", lm.config.num_hidden_layers, prepare, loss, note=f"attention {backend}")


def _plain_layer(layer: Any, hidden: Tensor, turns: Any, borders: Any, backend: Any) -> Tensor:
    """hidden [T, C] through one layer of Llama."""
    attention, mlp = layer.self_attn, layer.mlp
    normed = _plain_norm(layer.input_layernorm, hidden)
    q, k, v = (
        F.linear(normed, projection.weight).unflatten(1, (-1, attention.head_dim))
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    options = AttentionOptions(*borders, scale=attention.head_dim**-0.5)
    mixed = varlen_attention(_turn(q, *turns), _turn(k, *turns), v, options, backend=backend)
    hidden = hidden + F.linear(mixed.flatten(1), attention.o_proj.weight)
    normed = _plain_norm(layer.post_attention_layernorm, hidden)
    gate, up = F.linear(normed, mlp.gate_proj.weight), F.linear(normed, mlp.up_proj.weight)
    return hidden + F.linear(F.silu(gate) * up, mlp.down_proj.weight)


def _plain_norm(norm: Any, hidden: Tensor) -> Tensor:
    values = hidden.float()
    values = values * torch.rsqrt(values.square().mean(dim=-1, keepdim=True) + norm.variance_epsilon)
    return norm.weight * values.to(hidden.dtype)


def _turn(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair of halves of a head, [T, H, D], turned by the angles of its position."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat([-second, first], dim=-1) * sin
