"""Low-rank adapters beside the frozen weights of a base, through the peft library; and back to plain weights.

The weights of a model with adapters, by name, where X is a linear layer, and E the embedding or the head:

    X.base_layer.weight [out, in]                                                   frozen
    X.lora_A.default.weight [rank, in], X.lora_B.default.weight [out, rank]         trained
    E.weight [V, C]                                                                 frozen
    E.rows [n, C], E.row_ids i64[n]     of the template's tokens, see rows.py       trained
    frozen_checksum                                                                 see `checksum`
"""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ochat_train.model.rows import EmbeddingWithRows, HeadWithRows

CHECKSUM = "frozen_checksum"
_BASE, _A, _B = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"
_ROWS, _ROW_IDS = ".rows", ".row_ids"
TRAINED = (_A, _B, _ROWS)  # how the names of what is trained end


def require_peft() -> None:
    """Raise ValueError, with the remedy, when the package peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise ValueError("model.lora needs the package peft: pip install 'ochat_train[lora]'")


def add_adapters(
    lm: PreTrainedModel, *, rank: int, alpha: float, targets: str | Sequence[str], row_ids: Sequence[int], seed: int
) -> None:
    """Freeze `lm` and put adapters into it: y = W x + alpha / rank * B A x, where B begins as 0, and A is of `seed`.

    targets: all-linear, which is every linear layer but the head, or ends of names. row_ids: tokens whose rows of the
    embedding and the head are trained as well. All is of the dtype of `lm`. Raises ValueError for a target that is no
    linear layer, and for an embedding that does more than look up.
    """
    from peft import LoraConfig, inject_adapter_in_model  # an extra, which runs without adapters do not need

    names = _find_targets(lm, targets)
    dtype = lm.dtype
    lm.register_buffer(CHECKSUM, checksum(lm))
    torch.manual_seed(seed)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=names), lm)  # type: ignore[arg-type]  # alpha may be a fraction
    for parameter in lm.parameters():
        if parameter.requires_grad:  # peft makes them fp32, and DeepSpeed keeps an fp32 copy of its own
            parameter.data = parameter.data.to(dtype)
    if row_ids:
        _train_rows(lm, torch.tensor(sorted(row_ids)))


def _find_targets(lm: PreTrainedModel, targets: str | Sequence[str]) -> list[str]:
    """The whole names of the layers that get an adapter."""
    head = lm.get_output_embeddings()
    linear = [name for name, module in lm.named_modules() if isinstance(module, nn.Linear) and module is not head]
    if not linear:
        raise ValueError(f"{type(lm).__name__} has no linear layers besides its head, so model.lora cannot adapt any")
    if isinstance(targets, str):
        return linear
    found: set[str] = set()
    for target in targets:
        matching = [name for name in linear if f".{name}".endswith(f".{target}")]
        if not matching:
            ends = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise ValueError(f"model.lora.targets {target!r}: no linear layer's name ends so; name some of {ends}")
        found.update(matching)
    return sorted(found)


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
    """A number, i64 scalar below 2^24, that tells one base's weights from another's, whatever machine computes it.

    Embedding and head do not count: the rows of added tokens are means, which another number of threads may round
    differently. Below 2^24, because DeepSpeed's reader of ZeRO-3 checkpoints makes every buffer fp32.
    """
    modules: list[Any] = [lm.get_input_embeddings(), lm.get_output_embeddings()]
    apart = {id(module.weight) for module in modules}
    total = 0
    if lm.device.type == "meta":  # there are no values
        return torch.tensor(total)
    for parameter in lm.parameters():
        if id(parameter) not in apart:
            words = parameter.detach().flatten().view(torch.int16)
            total = (31 * total + int(words.sum(dtype=torch.int64))) % 2**24
    return torch.tensor(total)


def merge_adapters(weights: Mapping[str, Tensor], *, scaling: float) -> dict[str, Tensor]:
    """The weights by transformers' names, of the dtype of the frozen ones, with adapters and rows in them.

    weights: all of a model with adapters. Frozen ones may also go by transformers' names, as in the base.
    scaling: alpha / rank. Merged in fp32 and rounded once.
    """
    ours = (*TRAINED, _ROW_IDS, CHECKSUM)
    merged = {name.replace(_BASE, "."): weight for name, weight in weights.items() if not name.endswith(ours)}
    for name, weight in weights.items():
        target = f"{name.removesuffix(_A).removesuffix(_ROWS)}.weight"
        if name.endswith(_A):
            change = scaling * (weights[name.replace(_A, _B)].float() @ weight.float())
            merged[target] = (merged[target].float() + change).to(merged[target].dtype)
        elif name.endswith(_ROWS):
            row_ids = weights[name.replace(_ROWS, _ROW_IDS)].long()
            merged[target] = merged[target].index_copy(0, row_ids, weight.to(merged[target].dtype))
    return merged


def row_ids_of(weights: Mapping[str, Tensor]) -> list[int]:
    """The tokens whose rows are trained, of the weights of a model with adapters."""
    return next((ids.long().tolist() for name, ids in weights.items() if name.endswith(_ROW_IDS)), [])


def save_adapter(
    folder: Path, weights: Mapping[str, Tensor], plain: PreTrainedModel, *, base: str, rank: int, alpha: float
) -> None:
    """Write adapters and rows as peft reads them: adapter_config.json, adapter_model.safetensors.

    weights: the trained ones of a model with adapters. plain: that model without adapters, for its names. Raises
    ValueError for rows of a head with biases, since peft would leave those out.
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
        lora_alpha=alpha,  # type: ignore[arg-type]  # may be a fraction
        target_modules=_shortest(layers, plain),
        trainable_token_indices={table: row_ids_of(weights) for table in tables} or None,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    theirs = {f"{layer}.lora_A.weight": weights[layer + _A] for layer in layers}
    theirs |= {f"{layer}.lora_B.weight": weights[layer + _B] for layer in layers}
    theirs |= {f"{table}.token_adapter.trainable_tokens_delta": weights[table + _ROWS] for table in tables}
    prefixed = {f"base_model.model.{name}": weight.contiguous() for name, weight in theirs.items()}
    save_file(prefixed, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _shortest(layers: list[str], plain: PreTrainedModel) -> list[str]:
    """The last parts of the layers' names, or the whole names where the last parts would take in other layers."""
    ends = {layer.rpartition(".")[2] for layer in layers}
    alike = [name for name, _ in plain.named_modules() if name.rpartition(".")[2] in ends]
    return sorted(ends) if set(alike) == set(layers) else sorted(layers)
