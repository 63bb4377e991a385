"""Weights into files of transformers' own, and back by its own loading: of the export, and of a small copy before."""

import copy
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging

from ochat_train.model.lora import add_adapters, merge_adapters
from ochat_train.model.packed_lm import PackedCausalLM
from ochat_train.model.pretrained import add_token_rows
from ochat_train.model.small import FIRST_ID, one_line, small_model
from ochat_train.model.text_part import Untrained, auto_class, keep_text_part, untrained_of, with_untrained
from ochat_train.tokens.batch import collate
from ochat_train.tokens.encode import Example

_LENGTHS = (37, 5, 20)
# In float32, as between packed sequences and each alone: some hundred operations in a row, each of 6e-8.
_TOLERANCE = 2e-5
_NUM_ADDED, _RANK = 3, 2


def empty_model(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a configuration without memory for its weights, for their names and sizes."""
    with torch.device("meta"):
        # transformers makes a dtype torch's default, for all threads: a save in the background would change training.
        model: Any = auto_class(config).from_config(config, dtype=torch.float32, attn_implementation="eager")
    empty: PreTrainedModel = model.to(dtype)
    return empty


def save_weights(
    folder: Path, weights: Mapping[str, Tensor], config: Any, dtype: torch.dtype, untrained: Untrained | None = None
) -> None:
    """Write weights by transformers' names, and what is untrained, as a model of this configuration, in `dtype`."""
    model, weights = empty_model(config, dtype), with_untrained(weights, untrained)
    if untrained and untrained.conversions is not None:
        vars(model)["_weight_conversions"] = untrained.conversions
    # One after the other: read lazily, a weight is put together here.
    cast = {name: tensor.contiguous() for name, tensor in weights.items()}
    cast = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in cast.items()}
    missing, unexpected = model.load_state_dict(cast, strict=False, assign=True)
    model.tie_weights()
    assert not unexpected, unexpected
    assert not [name for name, parameter in model.named_parameters() if parameter.is_meta], missing
    model.save_pretrained(folder)


def compare_weights(folder: Path, weights: Mapping[str, Tensor], dtype: torch.dtype) -> int:
    """Load the model in `folder` as others do; returns how many tensors it has, all equal to `weights`, bit for bit.

    The weights of training may be its fp32 copies: rounded once to `dtype` they are those of its forward pass, and so
    are the file's. Nothing further is rounded, therefore no difference is allowed, and with equal weights and
    configuration the logits are those of `check_round_trip`'s small copy. Raises ValueError with the differences.
    """
    with _quiet():
        loads = auto_class(AutoConfig.from_pretrained(folder))
        loaded = loads.from_pretrained(folder, dtype=dtype).state_dict()
    different = []
    for name, weight in weights.items():
        expected = weight.contiguous().to(dtype).float()
        if name not in loaded:
            different.append(f"{name} is missing")
        elif not torch.equal(found := loaded[name].to(dtype).float(), expected):
            size = float((found - expected).norm() / expected.norm()) if found.shape == expected.shape else float("inf")
            different.append(f"{name} by {size:.1e}")
    if different:
        more = f", and {len(different) - 3} more" if len(different) > 3 else ""
        raise ValueError(
            f"loaded by transformers, the exported model has other weights than the checkpoint: "
            f"{', '.join(different[:3])}{more} (relative to their norm), of {len(weights)}"
        )
    return len(weights)


def check_round_trip(
    config: Any,
    *,
    longest: int,
    is_alone: bool,
    is_extended: bool,
    lora_targets: str | Sequence[str] | None = None,
) -> float:
    """How far logits of packed sequences are from those of the exported model, on a small copy, relative to their norm.

    The copy gets added tokens where the run's model is_extended by some and, with `lora_targets`, adapters, which are
    merged; it is written as exports are, and loaded by transformers. config, longest: see `probe`. Raises ValueError
    with one line when it cannot be written or loaded, or when the logits differ.
    """
    name = config.model_type
    # Adapters of a layer whose weight is used without its forward (LongCat's router) train nothing, and are merged.
    remedy = "take another model" if lora_targets is None else "take other model.lora.targets, such as [q_proj, v_proj]"
    with torch.random.fork_rng([]), _quiet():
        torch.manual_seed(0)
        try:
            lm = keep_text_part(small_model(config, longest=longest))
            plain = _add_parts(lm, lora_targets, is_extended=is_extended)
            error = _round_trip(lm, plain, is_alone=is_alone)
        except Exception as problem:  # of any kind: whatever a model's code says about its files
            reason = str(problem) if type(problem) is ValueError else one_line(problem)
            raise ValueError(f"{name} cannot be exported: {reason.splitlines()[0]}; {remedy}") from problem
    if not error <= _TOLERANCE:
        raise ValueError(
            f"{name} cannot be exported: loaded by transformers, its logits differ by {error:.0e}; {remedy}"
        )
    return error


def _add_parts(lm: PreTrainedModel, targets: str | Sequence[str] | None, *, is_extended: bool) -> Any:
    """Add tokens and adapters with weights of any values to a small model; returns its configuration without those."""
    num_ids = lm.config.get_text_config().vocab_size + (_NUM_ADDED if is_extended else 0)
    added = list(range(num_ids - _NUM_ADDED, num_ids))
    if is_extended:
        add_token_rows(lm, num_ids, added)
    plain = copy.deepcopy(lm.config)
    if targets is not None:
        tables = type(lm.get_input_embeddings()), type(lm.get_output_embeddings())
        row_ids = added if tables == (nn.Embedding, nn.Linear) else ()  # rows of others cannot be trained
        add_adapters(lm, rank=_RANK, alpha=_RANK, targets=targets, row_ids=row_ids, seed=0)
        with torch.no_grad():
            for weight in (weight for weight in lm.parameters() if weight.requires_grad):
                weight.add_(0.1 * torch.randn_like(weight))  # adapters begin with a product of 0
    return plain


def _round_trip(lm: PreTrainedModel, plain: Any, *, is_alone: bool) -> float:
    """The largest difference of a token's logits; plain: the configuration of `lm` without adapters."""
    attention = "alone" if is_alone else "sdpa"
    packed = PackedCausalLM(lm, attention=attention, device_type="cpu", checkpointing="none", num_conditions=1).eval()
    num_ids = plain.get_text_config().vocab_size
    random = np.random.default_rng(0)
    drawn = [random.integers(FIRST_ID, num_ids, length) for length in _LENGTHS]
    examples = [Example(ids.astype(np.int32), np.ones(len(ids), np.float32)) for ids in drawn]
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        logits = packed.logits(collate(examples, [0] * len(examples))).split(_LENGTHS)
        weights = merge_adapters(lm.state_dict(), scaling=1)
        save_weights(Path(folder), weights, plain, lm.dtype, untrained_of(lm))
        stock = auto_class(plain).from_pretrained(folder, dtype=lm.dtype, attn_implementation="eager").eval()
        theirs = [stock(torch.from_numpy(ids)[None], use_cache=False).logits[0].float() for ids in drawn]
    pairs = zip(logits, theirs, strict=True)
    return max(float(((mine - other).norm(dim=-1) / other.norm(dim=-1)).max()) for mine, other in pairs)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bars of loading and writing."""
    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()
