"""The check of doctor that reads the base's weights: the rows of the template's tokens in embedding and head."""

from pathlib import Path

import orjson
import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils.hub import cached_file

from ochat_train.doctor.case import Case, Finding
from ochat_train.model.pretrained import DTYPES, load_config, meta_model, template_ids
from ochat_train.tokens.tokenizer import locate_base, require_model

# A row is the mean of all when it is nearer to it than this share of the median norm. Its norm is far off when it is
# beyond this factor of all norms but the outermost hundredth.
_AT_MEAN, _FAR = 0.02, 2.0


def check_rows(case: Case) -> Finding | None:
    """Which rows of the template's tokens look as if the base was never trained on them.

    They learn when all weights are trained, or these rows beside adapters; else the model may never end an answer.
    """
    recipe, tokenizer = case.recipe, case.tokenizer
    if recipe.model.base is None:
        return None
    lora = recipe.model.lora
    try:
        require_model(recipe.model.base)
        tables = _read_tables(case, recipe.model.base)
    except Exception as error:  # of many kinds: no files, or those of other formats
        return Finding("ok", f"not looked at: {str(error).splitlines()[0]}")
    odd: dict[str, str] = {}
    for token, row in template_ids(tokenizer).items():
        if token not in tokenizer.added:
            found = {name: why for name, table in tables.items() if (why := _oddity(table, row))}
            odd[f"{token} = {row}"] = ", ".join(f"{name} {why}" for name, why in found.items())
    shown = "; ".join(f"{token} ({why})" for token, why in odd.items() if why)
    if not shown:
        return Finding("ok", f"{', '.join(odd)} look trained" if odd else "all of the template's tokens are added")
    if lora is not None and not lora.train_template_tokens:
        detail = f"the base looks untrained on {shown}, and they stay so: the model may never end an answer"
        return Finding("warning", detail, "set model.lora.train_template_tokens: true")
    learns = "all weights are trained" if lora is None else "these rows are trained beside the adapters"
    return Finding("ok", f"the base looks untrained on {shown}; {learns}")


def _read_tables(case: Case, base: str) -> dict[str, Tensor]:
    """[V, C] of the base's embedding and, if it is not tied, its head, from local files of safetensors."""
    files = locate_base(base)
    if files.gguf_file is not None:
        raise ValueError("the base is a .gguf file")
    model = meta_model(load_config(base, None, case.tokenizer.num_ids), DTYPES[case.recipe.model.dtype])
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    embedding, head = (
        known[id(table.weight)] for table in (model.get_input_embeddings(), model.get_output_embeddings())
    )
    index = cached_file(
        files.name, "model.safetensors.index.json", local_files_only=True, _raise_exceptions_for_missing_entries=False
    )
    shards = {} if index is None else orjson.loads(Path(index).read_bytes())["weight_map"]
    tables = {}
    for name in dict.fromkeys((embedding, head)):
        end = ".".join(name.split(".")[-2:])  # multimodal models have other names before it in their files
        shard = next((file for stored, file in shards.items() if stored.endswith(end)), "model.safetensors")
        with safe_open(cached_file(files.name, shard, local_files_only=True), framework="pt") as weights:
            names = weights.keys()
            tables["embedding" if name == embedding else "head"] = weights.get_tensor(
                next(stored for stored in names if stored.endswith(end))
            )
    return tables


def _oddity(table: Tensor, row: int) -> str | None:
    """What makes row `row` of a table [V, C] look untrained; None if nothing does."""
    own = table[row].float()
    if not own.any():
        return "is all zeros"
    same = [other for other in (table == table[row]).all(dim=1).nonzero().flatten().tolist() if other != row]
    if same:
        return f"is equal to row {same[0]}" + (f" and {len(same) - 1:,} more" if len(same) > 1 else "")
    norms = torch.linalg.vector_norm(table, dim=1, dtype=torch.float32)
    norms = norms[norms > 0]
    mean = table.sum(dim=0, dtype=torch.float32) / len(norms)
    if (own - mean).norm() < _AT_MEAN * norms.median():
        return "is the mean of all"
    outermost = len(norms) // 100
    low, high = norms.kthvalue(1 + outermost).values, norms.kthvalue(len(norms) - outermost).values
    norm = float(own.norm())
    if not low / _FAR <= norm <= high * _FAR:
        return f"has the norm {norm:.2g}, where 98 % have {float(low):.2g} to {float(high):.2g}"
    return None
