"""Any transformers causal language model, run on packed batches."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ochat_train.model.alone import run_each, use_own_attention
from ochat_train.model.attention import AttentionNeeds, BackendChoice, choose_backend, register
from ochat_train.model.checkpointing import enable_checkpointing
from ochat_train.model.kernels import compile_layers
from ochat_train.model.logits import before_head, has_parts_before_head, measure_logits
from ochat_train.model.lora import CHECKSUM
from ochat_train.model.loss import LossHead, LossSums
from ochat_train.model.pretrained import head_dim_of
from ochat_train.model.rope import rotate_each_alone
from ochat_train.model.router import RouterSums, balance_of, sum_router_loss
from ochat_train.model.text_part import base_of, set_attention
from ochat_train.model.ulysses import Exchange
from ochat_train.tokens.batch import PackedBatch


class PackedCausalLM(nn.Module):
    """A causal LM whose forward takes a PackedBatch and returns LossSums.

    `lm` is the transformers model; it is changed to use our attention. `attention` is the backend or auto, for the
    device the model will run on. `checkpointing`: full, none or every_N, see `enable_checkpointing`.
    `router_coefficient`: of a mixture's balancing loss, which `train_step` adds, and which has a gradient only if this
    is not 0. `exchange`: of the ranks that have shares of each batch, see `PackedBatch.share`; None: this one has all.
    Whether logits and gradients are those of the model is for `probe` to say.

    base_digest: of `digest_base` where the model has a base and this is the first rank of its node.

    The state of the module leaves frozen parameters out: they are the base's. Loading raises for a state with other
    names, and beside another base.
    """

    base_digest: str | None = None

    def __init__(
        self,
        lm: PreTrainedModel,
        *,
        attention: Any,
        device_type: str,
        checkpointing: str,
        num_conditions: int,
        router_coefficient: float = 0.0,
        exchange: Exchange | None = None,
    ) -> None:
        super().__init__()
        config = lm.config.get_text_config()
        self.lm, self.exchange = lm, exchange
        self.attention: BackendChoice = choose_backend(attention, attention_needs(config, lm.dtype, device_type))
        if self.attention.backend == "alone":
            use_own_attention(lm)
        else:
            set_attention(lm, register(self.attention.backend))
        rotate_each_alone(lm, exchange)
        self.checkpointing = checkpointing
        enable_checkpointing(lm, checkpointing)
        head = lm.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise ValueError(f"{type(lm).__name__} has no linear language-model head")
        self.balance, self.router_coefficient = balance_of(lm), router_coefficient
        self.logits_form = measure_logits(lm)
        self.has_parts_before_head = has_parts_before_head(lm)
        self.loss_head = LossHead(
            head, softcap=self.logits_form.softcap, scale=self.logits_form.scale, num_conditions=num_conditions
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
        hidden, router = self.run_layers(batch)
        sums: LossSums = self.loss_head(
            hidden, batch.labels, batch.loss_weights, batch.condition_ids, batch.loss_positions
        )
        return sums._replace(router=router)

    def hidden(self, batch: PackedBatch) -> Tensor:
        """The hidden states that the head gets, [T, C]."""
        return self.run_layers(batch)[0]

    def run_layers(self, batch: PackedBatch) -> tuple[Tensor, RouterSums | None]:
        """The hidden states that the head gets, [T, C], and in training what the routers of a mixture chose."""
        is_balanced = self.balance is not None and self.training
        # Recorded in the forward pass alone, and parts of its graph: what is recomputed is not recorded again.
        options = {"output_router_logits": True} if is_balanced else {}
        router_logits: tuple[Tensor, ...] | None
        if self.attention.backend == "alone":
            hidden, router_logits = run_each(base_of(self.lm), batch, **options)
        else:
            position_ids = batch.position_ids[None]
            output = base_of(self.lm)(
                input_ids=batch.input_ids[None],
                position_ids=position_ids,
                # Without it transformers looks for sequences in the positions, and waits for the device.
                attention_mask=torch.ones_like(position_ids, dtype=torch.bool),
                use_cache=False,
                cu_seqlens=batch.cu_seqlens,
                max_seqlen=batch.max_seqlen,
                exchange=self.exchange,
                **options,
            )
            hidden, router_logits = output.last_hidden_state[0], output.router_logits if is_balanced else None
        if self.has_parts_before_head:
            hidden = before_head(self.lm, hidden)
        if self.balance is None or router_logits is None:
            return hidden, None
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.router_coefficient != 0):
            return hidden, sum_router_loss(router_logits, self.balance.num_chosen, batch.num_tokens, self.exchange)

    def logits(self, batch: PackedBatch) -> Tensor:
        """f32[T, V], all at once: for tests and small batches."""
        return self.logits_form(self.lm.get_output_embeddings()(self.hidden(batch)).float())


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
        raise ValueError("the checkpoint was trained beside other weights than those of model.base now")


def attention_needs(config: Any, dtype: torch.dtype, device_type: str) -> AttentionNeeds:
    """What a model of this text configuration needs of its attention; models without heads are refused elsewhere."""
    return AttentionNeeds(
        capability=torch.cuda.get_device_capability() if device_type == "cuda" else None,
        dtype=dtype,
        head_dim=head_dim_of(config),
        has_softcap=getattr(config, "attn_logit_softcapping", None) is not None,
    )
