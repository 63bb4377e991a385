"""Low-rank adapters beside the frozen weights of a base, through the peft library; and back to plain weights.

The weights of a model with adapters, by name, where X is a linear layer, and E the embedding or the head:

    X.base_layer.weight [out, in]                                                   frozen
    X.lora_A.default.weight [rank, in], X.lora_B.default.weight [out, rank]         trained
    X.lora_magnitude_vector.default.weight [out]     with DoRA                      trained
    E.weight [V, C]                                                                 frozen
    E.rows [n, C], E.row_ids i64[n]     of the template's tokens                    trained
    frozen_checksum                                                                 see `checksum`
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ochat_train.files import require_packages
from ochat_train.model.quantised import quantise
from ochat_train.model.text_part import checksum_of, untrained_of

CHECKSUM = "frozen_checksum"
_BASE, _A, _B = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"
_M = ".lora_magnitude_vector.default.weight"
_ROWS, _ROW_IDS = ".rows", ".row_ids"
TRAINED = (_A, _B, _M, _ROWS)  # how the names of trained weights end


class Kind(NamedTuple):
    """Which adapters. dora: the rows of W + s B A have trained norms, s as in `add_adapters`. rslora: alpha is divided
    by the root of rank. quantise_on: the device of quantised frozen weights, see `quantise`; None: they are not
    quantised. targets: where the planner counts adapters, see `target_layers`.
    """

    dora: bool = False
    rslora: bool = False
    quantise_on: torch.device | None = None
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"


PLAIN = Kind()


class EmbeddingWithRows(nn.Embedding):
    """The embedding `base`, in which `rows` [n, C] stand in place of the rows `row_ids` of the weight.

    The weight stays the Parameter of `base`, under the same name, so that it can be frozen while the rows learn. The
    rows start as those of the weight. row_ids: distinct, i64[n].
    """

    row_ids: Tensor

    def __init__(self, base: nn.Embedding, row_ids: Tensor) -> None:
        super().__init__(base.num_embeddings, base.embedding_dim, base.padding_idx, device="meta")
        self.weight = base.weight  # [V, C]
        self.rows = nn.Parameter(base.weight.detach()[row_ids])
        self.register_buffer("row_ids", row_ids)

    def forward(self, input: Tensor) -> Tensor:
        """Equal to F.embedding(input, weight with the rows in it), without a copy of the weight."""
        is_row = torch.eq(input[..., None], self.row_ids)  # [..., n]: tokens that a template adds are few
        embedded = F.embedding(is_row.int().argmax(dim=-1), self.rows)
        return torch.where(is_row.any(dim=-1)[..., None], embedded, super().forward(input))


class HeadWithRows(nn.Linear):
    """The head `base` with `rows` as in EmbeddingWithRows. Head and embedding share one Parameter if they are tied."""

    row_ids: Tensor

    def __init__(self, base: nn.Linear, row_ids: Tensor, tied: EmbeddingWithRows | None) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias  # [V, C], [V]
        self.rows = nn.Parameter(base.weight.detach()[row_ids]) if tied is None else tied.rows
        self.register_buffer("row_ids", row_ids)

    def forward(self, input: Tensor) -> Tensor:
        """Equal to F.linear(input, weight with the rows in it, bias)."""
        row_logits = F.linear(input, self.rows, None if self.bias is None else self.bias[self.row_ids])
        return super().forward(input).index_copy(-1, self.row_ids, row_logits)


def require_peft() -> None:
    """Raise ValueError, with the remedy, when the package peft is not installed."""
    require_packages("model.lora", "peft", extra="lora")


def add_adapters(
    lm: PreTrainedModel,
    *,
    rank: int,
    alpha: float,
    targets: str | Sequence[str],
    row_ids: Sequence[int],
    seed: int,
    kind: Kind = PLAIN,
) -> None:
    """Freeze `lm` and put adapters into it: y = W x + alpha / rank * B A x, where B is 0 and A is drawn from `seed`.

    targets: see `target_layers`. row_ids: tokens whose rows of the embedding and the head are trained as well. All new
    weights have the dtype of `lm`. Raises ValueError for a target that is no linear layer, and for an embedding that
    does more than look up.
    """
    from peft import LoraConfig, inject_adapter_in_model  # an extra, which runs without adapters do not need

    names = list(target_layers(lm, targets))
    dtype = lm.dtype
    lm.register_buffer(CHECKSUM, checksum(lm))
    if kind.quantise_on is not None:
        quantise(lm, kind.quantise_on)
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, use_dora=kind.dora, use_rslora=kind.rslora)
    # In a list, where peft sees no configuration: else it would adapt a mixture's experts in place of the shared ones.
    inject_adapter_in_model(config, nn.ModuleList([lm]))
    for parameter in lm.parameters():
        if parameter.requires_grad:  # peft makes them fp32, and DeepSpeed keeps an fp32 copy of its own
            parameter.data = parameter.data.to(dtype)
    if row_ids:
        _train_rows(lm, torch.tensor(sorted(row_ids)))


def target_layers(lm: PreTrainedModel, targets: str | Sequence[str]) -> dict[str, nn.Linear]:
    """The layers that get an adapter, by their whole names.

    targets: all-linear, which is every linear layer but the head, or ends of names, of whole parts: `q_proj` or
    `layers.0.self_attn.q_proj`, but not `proj`. Raises ValueError for a target that no linear layer has.
    """
    head = lm.get_output_embeddings()
    linear = {name: layer for name, layer in lm.named_modules() if isinstance(layer, nn.Linear) and layer is not head}
    if not linear:
        raise ValueError(f"{type(lm).__name__} has no linear layers besides its head, so model.lora cannot adapt any")
    if isinstance(targets, str):
        return linear
    found: dict[str, nn.Linear] = {}
    for target in targets:
        matching = {name: layer for name, layer in linear.items() if f".{name}".endswith(f".{target}")}
        if not matching:
            ends = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise ValueError(f"model.lora.targets {target!r}: no linear layer has this name; take some of {ends}")
        found |= matching
    return found


def _train_rows(lm: PreTrainedModel, row_ids: Tensor) -> None:
    """Train these rows of embedding and head in place of those of the frozen weights."""
    embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    if type(embedding) is not nn.Embedding or type(head) is not nn.Linear:
        raise ValueError(
            f"model.lora cannot train the template's tokens in {type(lm).__name__}, whose embedding or head does more "
            "than its table; take a template whose special tokens the base has, with model.lora.train_template_tokens="
            "false, or model.lora=null"
        )
    with_rows = EmbeddingWithRows(embedding, row_ids)
    lm.set_input_embeddings(with_rows)
    lm.set_output_embeddings(HeadWithRows(head, row_ids, with_rows if head.weight is embedding.weight else None))


def checksum(lm: PreTrainedModel) -> Tensor:
    """An i64 scalar below 2^24 that differs between the weights of two bases, and is the same on every machine.

    Embedding and head are left out: the rows of added tokens are means, which another number of threads may round
    differently. Below 2^24, because DeepSpeed's reader of ZeRO-3 checkpoints makes every buffer fp32.
    """
    modules: list[Any] = [lm.get_input_embeddings(), lm.get_output_embeddings()]
    apart = {id(module.weight) for module in modules}
    untrained = untrained_of(lm)
    weights = (parameter for parameter in lm.parameters() if id(parameter) not in apart)
    return torch.tensor(checksum_of(weights, total=untrained.checksum if untrained else 0))


def merge_adapters(weights: Mapping[str, Tensor], *, scaling: float) -> dict[str, Tensor]:
    """The weights by transformers' names, in the dtype of the frozen ones, with adapters and rows merged into them.

    weights: all of a model with adapters. Frozen ones may also have transformers' names, as in the base.
    scaling: of the product B A, `LoraSection.scaling`. Merged in fp32 and rounded once.
    """
    ours = (*TRAINED, _ROW_IDS, CHECKSUM)
    merged = {name.replace(_BASE, "."): weight for name, weight in weights.items() if not name.endswith(ours)}
    for name, weight in weights.items():
        target = f"{name.removesuffix(_A).removesuffix(_ROWS)}.weight"
        if name.endswith(_A):
            change = scaling * (weights[name.replace(_A, _B)].float() @ weight.float())
            whole = merged[target].float() + change
            if (norms := weights.get(name.replace(_A, _M))) is not None:
                whole *= (norms.float() / torch.linalg.norm(whole, dim=1))[:, None]
            merged[target] = whole.to(merged[target].dtype)
        elif name.endswith(_ROWS):
            row_ids = weights[name.replace(_ROWS, _ROW_IDS)].long()
            merged[target] = merged[target].index_copy(0, row_ids, weight.to(merged[target].dtype))
    return merged


def row_ids_of(weights: Mapping[str, Tensor]) -> list[int]:
    """The tokens whose rows are trained, from the weights of a model with adapters."""
    return next((ids.long().tolist() for name, ids in weights.items() if name.endswith(_ROW_IDS)), [])


def save_adapter(
    folder: Path,
    weights: Mapping[str, Tensor],
    plain: PreTrainedModel,
    *,
    base: str,
    rank: int,
    alpha: float,
    rslora: bool = False,
) -> None:
    """Write adapters and rows as peft reads them: adapter_config.json and adapter_model.safetensors.

    weights: the trained ones of a model with adapters. plain: that model without adapters, for its names. Raises
    ValueError for rows of a head with biases, since peft would leave the biases out.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file  # peft brings it

    layers = [name.removesuffix(_A) for name in weights if name.endswith(_A)]
    tables = [name.removesuffix(_ROWS) for name in weights if name.endswith(_ROWS)]
    embedding, head = plain.get_input_embeddings(), plain.get_output_embeddings()
    assert isinstance(embedding, nn.Embedding) and isinstance(head, nn.Linear)
    if tables and head.bias is not None:
        raise ValueError(
            f"peft would leave out the biases of the head of {type(plain).__name__}, since rows of it were trained; "
            "export the merged model, without --adapter"
        )
    if head.weight is embedding.weight:  # peft ties the head's rows to the embedding's
        tables = [table for table in tables if plain.get_submodule(table) is embedding]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=_shortest(layers, plain),
        trainable_token_indices={table: row_ids_of(weights) for table in tables} or None,
        use_dora=any(name.endswith(_M) for name in weights),
        use_rslora=rslora,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    theirs = {f"{layer}.lora_A.weight": weights[layer + _A] for layer in layers}
    theirs |= {f"{layer}.lora_B.weight": weights[layer + _B] for layer in layers}
    theirs |= {name.replace(".default", ""): weight for name, weight in weights.items() if name.endswith(_M)}
    theirs |= {f"{table}.token_adapter.trainable_tokens_delta": weights[table + _ROWS] for table in tables}
    prefixed = {f"base_model.model.{name}": weight.contiguous() for name, weight in theirs.items()}
    save_file(prefixed, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _shortest(layers: list[str], plain: PreTrainedModel) -> list[str]:
    """The last parts of the layers' names, or the whole names where the last parts would match other layers too."""
    ends = {layer.rpartition(".")[2] for layer in layers}
    alike = [name for name, _ in plain.named_modules() if name.rpartition(".")[2] in ends]
    return sorted(ends) if set(alike) == set(layers) else sorted(layers)
