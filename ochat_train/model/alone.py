"""A model on each packed sequence alone: for models that cannot keep packed sequences apart."""

import torch
import torch.distributed
from torch import Tensor, nn
from transformers import PreTrainedModel

from ochat_train.model.sdpa import read_lengths
from ochat_train.model.text_part import set_attention
from ochat_train.tokens.batch import PackedBatch

COST = "a forward and a backward pass for each sequence, of smaller products; short sequences leave a GPU partly idle"


def use_own_attention(lm: PreTrainedModel) -> None:
    """Let `lm` use an attention of transformers' own, in place: torch's fused one where it can."""
    try:
        set_attention(lm, "sdpa")
    except ValueError:
        set_attention(lm, "eager")


def run_each(base: nn.Module, batch: PackedBatch, **options: bool) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """The last hidden states of each sequence alone, joined, [T, C].

    With output_router_logits also those of each layer, [T, E], else None. The model, without its head, gets a sequence
    as generation would give it: no mask, no positions, no cache. Where ZeRO splits the parameters, each forward of a
    module is a collective, so that every rank runs as many sequences as the rank with the most; what is beyond its own
    is one token, whose states are cut off and get a gradient of 0.
    """
    lengths, num_tokens = read_lengths(batch.cu_seqlens), len(batch.input_ids)
    sequences = list(batch.input_ids.split(lengths))
    if any(hasattr(parameter, "ds_id") for parameter in base.parameters()):
        most = torch.tensor(len(lengths), device=batch.input_ids.device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        sequences += [batch.input_ids[:1]] * (int(most) - len(lengths))
    outputs = [base(input_ids=ids[None], use_cache=False, **options) for ids in sequences]
    hidden = torch.cat([output.last_hidden_state[0] for output in outputs])[:num_tokens]
    if not options.get("output_router_logits"):
        return hidden, None
    layers = zip(*(output.router_logits for output in outputs), strict=True)
    return hidden, tuple(torch.cat([part.flatten(0, -2) for part in layer])[:num_tokens] for layer in layers)
