"""Any transformers causal language model, run on packed batches."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ochat_train.model.attention import AttentionNeeds, BackendChoice, choose_backend, register
from ochat_train.model.checkpointing import enable_checkpointing
from ochat_train.model.kernels import compile_layers
from ochat_train.model.lora import CHECKSUM
from ochat_train.model.loss import LossHead, LossSums
from ochat_train.tokens.batch import PackedBatch


class PackedCausalLM(nn.Module):
    """A causal LM whose forward takes a PackedBatch and returns LossSums.

    `lm` is the transformers model; it is changed to use our attention. `attention` is the backend or auto, for the
    device the model will run on. `checkpointing`: full, none or every_N, see `enable_checkpointing`. Raises ValueError
    for models whose logits we would compute wrongly, or in which sequences of a batch would see each other.

    The state of the module leaves frozen parameters out: they are the base's. Loading raises for a state with other
    names, and beside another base.
    """

    def __init__(
        self, lm: PreTrainedModel, *, attention: Any, device_type: str, checkpointing: str, num_conditions: int
    ) -> None:
        super().__init__()
        config = lm.config.get_text_config()
        _refuse_leaking_layers(lm, config)
        _refuse_unknown_logits(config)
        self.lm = lm
        self.attention: BackendChoice = choose_backend(attention, attention_needs(config, lm.dtype, device_type))
        lm.set_attn_implementation(register(self.attention.backend))
        self.checkpointing = checkpointing
        enable_checkpointing(lm, checkpointing)
        head = lm.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise ValueError(f"{type(lm).__name__} has no linear language-model head")
        _refuse_layers_before_head(lm, head)
        self.loss_head = LossHead(
            head, softcap=getattr(config, "final_logit_softcapping", None), num_conditions=num_conditions
        )
        self.register_state_dict_post_hook(_leave_frozen_out)  # type: ignore[no-untyped-call]  # of torch
        self.register_load_state_dict_pre_hook(_refuse_another_base)  # type: ignore[no-untyped-call]  # of torch
        self.register_load_state_dict_post_hook(_expect_no_frozen)  # type: ignore[no-untyped-call]  # of torch

    def compile_parts(self) -> None:
        """Compile the layers, and the head without its products; see `compile_layers` and `compile_chunk`."""
        compile_layers(self.lm)
        self.loss_head.compile_chunk()

    def forward(self, batch: PackedBatch) -> LossSums:
        """The loss sums of one micro-batch."""
        sums: LossSums = self.loss_head(
            self.hidden(batch), batch.labels, batch.loss_weights, batch.condition_ids, batch.loss_positions
        )
        return sums

    def hidden(self, batch: PackedBatch) -> Tensor:
        """The last hidden states, [T, C]."""
        output = self.lm.base_model(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            use_cache=False,
            cu_seqlens=batch.cu_seqlens,
            max_seqlen=batch.max_seqlen,
        )
        states: Tensor = output.last_hidden_state
        return states[0]

    def logits(self, batch: PackedBatch) -> Tensor:
        """f32[T, V], all at once: for tests and small batches."""
        logits = self.lm.get_output_embeddings()(self.hidden(batch)).float()
        softcap = self.loss_head.softcap
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _frozen_names(module: nn.Module) -> set[str]:
    """All names of all frozen parameters; the head's has two."""
    return {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}


def _leave_frozen_out(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name in _frozen_names(module):
        del state[prefix + name]


def _expect_no_frozen(module: nn.Module, keys: Any) -> None:
    """keys: the missing and the unexpected; load_state_dict refuses those that stay in them."""
    frozen = _frozen_names(module)
    keys.missing_keys[:] = [name for name in keys.missing_keys if name not in frozen]


def _refuse_another_base(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    name = f"lm.{CHECKSUM}"
    mine, theirs = dict(module.named_buffers()).get(name), state.get(prefix + name)
    if mine is not None and theirs is not None and int(mine) != int(theirs):
        raise ValueError("the checkpoint's adapters were trained beside other weights than those of model.base now")


def attention_needs(config: Any, dtype: torch.dtype, device_type: str) -> AttentionNeeds:
    """What a model of this text configuration needs of its attention; models without heads are refused elsewhere."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // getattr(config, "num_attention_heads", 1)
    return AttentionNeeds(
        capability=torch.cuda.get_device_capability() if device_type == "cuda" else None,
        dtype=dtype,
        head_dim=head_dim,
        has_softcap=getattr(config, "attn_logit_softcapping", None) is not None,
    )


def _refuse_leaking_layers(lm: PreTrainedModel, config: Any) -> None:
    """Refuse attention that is not ours, recurrences and convolutions: they cross the borders of packed sequences."""
    if not lm.is_backend_compatible():
        raise ValueError(f"{type(lm).__name__} does not take its attention from us, so packed sequences would mix")
    # Older configurations call it layers_block_type, and their attention just attention.
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or []
    other = set(kinds) - {"full_attention", "sliding_attention", "attention"}
    if other:
        raise ValueError(
            f"{type(lm).__name__} has layers of type {', '.join(sorted(other))}, which are not supported yet: "
            "packed sequences might mix"
        )


def _refuse_layers_before_head(lm: PreTrainedModel, head: nn.Module) -> None:
    """Refuse models like BERT, which transform hidden states again before the head; the loss head would not."""
    known = {id(parameter) for module in (lm.base_model, head) for parameter in module.parameters()}
    if between := [name for name, parameter in lm.named_parameters() if id(parameter) not in known]:
        raise ValueError(f"{type(lm).__name__} has layers between its model and its head ({between[0]}): not supported")


def _refuse_unknown_logits(config: Any) -> None:
    """Refuse models that scale their logits after the head; the loss head would leave that out."""
    for name in ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise ValueError(f"models with {name} ({config.model_type}) are not supported yet")
    if getattr(config, "attention_dropout", 0):
        raise ValueError(f"attention_dropout {config.attention_dropout} is not supported; set it to 0 in the config")
