"""The text part of a multimodal model, which is trained: its language model and head. All else stays as it is.

A training process has the text part alone. The other weights are in host memory of the process that writes exports.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, VIDEO_PROCESSOR_NAME
from transformers.utils.hub import cached_file


class Untrained:
    """What a multimodal model has beside its text part.

    weights: by their names in the whole model; none where the process got its model from another one. modules: names of
    what holds them. checksum: of the weights, see `checksum_of`. files: of the base's processors, by name. conversions:
    of names, with which transformers loaded the base; written with them, a model has the names of its base's files.
    """

    def __init__(self, weights: dict[str, Tensor], modules: list[str], checksum: int) -> None:
        self.weights, self.modules, self.checksum = weights, modules, checksum
        self.files: dict[str, bytes] = {}
        self.conversions: Any = None

    def __reduce__(self) -> tuple[type["Untrained"], tuple[dict[str, Tensor], list[str], int]]:
        return Untrained, ({}, self.modules, self.checksum)


def is_multimodal(config: Any) -> bool:
    """Whether a transformers configuration is of a model of text and more: by the class that it names, if any."""
    if type(config) not in MODEL_FOR_MULTIMODAL_LM_MAPPING or config.get_text_config() is config:
        return False
    known: Any = MODEL_FOR_MULTIMODAL_LM_MAPPING[type(config)]
    return known.__name__ in (config.architectures or [known.__name__])


def auto_class(config: Any) -> Any:
    """The class of transformers that makes and loads whole models of this configuration."""
    return AutoModelForMultimodalLM if is_multimodal(config) else AutoModelForCausalLM


def base_of(lm: PreTrainedModel) -> PreTrainedModel:
    """The model without its head; of a multimodal one the language model."""
    if is_multimodal(lm.config):
        lm = lm.get_decoder()
        if lm.get_output_embeddings() is None:
            return lm
    base: Any = lm.base_model
    if base is not lm:
        return base  # type: ignore[no-any-return]
    parts = (part for part in lm.children() if isinstance(part, PreTrainedModel))  # Llama 4 names another
    return next(parts, lm)


def set_attention(lm: PreTrainedModel, name: str) -> None:
    """Let the language model use an attention of transformers, in place; of encoders that are gone it would warn."""
    (base_of(lm) if is_multimodal(lm.config) else lm).set_attn_implementation(name)


def keep_text_part(lm: PreTrainedModel) -> PreTrainedModel:
    """The model, of which, if it is multimodal, all weights but those of the text part go to `lm.untrained`, in place.

    The modules that hold them become None, so that the names of what is left are those of the whole. Raises ValueError
    for a model that has no language model and head apart.
    """
    if not is_multimodal(lm.config):
        return lm
    head: Any = lm.get_output_embeddings()
    decoder = lm.get_decoder()
    if head is None or decoder is lm or not any(isinstance(part, PreTrainedModel) for part in decoder.modules()):
        raise ValueError(f"{type(lm).__name__} has no language model with a head that could be trained alone")
    weights: dict[str, Tensor] = {}
    modules: list[str] = []
    for place, name, path in list(_others(lm, {base_of(lm), head}, "")):
        part = getattr(place, name)
        setattr(place, name, None)
        modules.append(name)
        weights |= (
            {f"{path}.{inner}": weight for inner, weight in part.state_dict().items()}
            if isinstance(part, nn.Module)
            else {path: part.detach()}
        )
    untrained = vars(lm)["untrained"] = Untrained(weights, modules, checksum_of(weights.values()))
    untrained.conversions = getattr(lm, "_weight_conversions", None)
    return lm


def untrained_of(lm: PreTrainedModel) -> Untrained | None:
    """What `keep_text_part` took from the model; None where it is not multimodal."""
    return vars(lm).get("untrained")


def _others(module: nn.Module, kept: set[nn.Module], prefix: str) -> Iterator[tuple[nn.Module, str, str]]:
    """What has weights and is neither in `kept` nor around it: the module around it, its name there, its whole name."""
    for name, _ in module.named_parameters(recurse=False):
        yield module, name, prefix + name
    for name, child in module.named_children():
        if child in kept:
            continue
        if any(part in kept for part in child.modules()):
            yield from _others(child, kept, f"{prefix}{name}.")
        elif child.state_dict():
            yield module, name, prefix + name


def with_untrained(weights: Mapping[str, Tensor], untrained: Untrained | None) -> dict[str, Tensor]:
    """The weights of the whole model, from those of what was trained."""
    return {**weights, **(untrained.weights if untrained else {})}


def processor_files(base: str) -> dict[str, bytes]:
    """The files of a base's processors of pictures, video and sound, by name. base: a folder, or an id of the hub."""
    found = {
        name: cached_file(base, name, _raise_exceptions_for_missing_entries=False)
        for name in (IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, VIDEO_PROCESSOR_NAME)
    }
    return {name: Path(file).read_bytes() for name, file in found.items() if file is not None}


def checksum_of(weights: Iterable[Tensor], total: int = 0) -> int:
    """A number below 2^24 that differs between weights of other values, and is the same on every machine.

    total: of what comes before them. Below 2^24, because DeepSpeed's reader of ZeRO-3 checkpoints makes every buffer
    fp32. Weights without values count nothing.
    """
    for weight in weights:
        if not weight.is_meta:
            words = weight.detach().contiguous().flatten().view(torch.uint8 if weight.itemsize == 1 else torch.int16)
            total = (31 * total + int(words.sum(dtype=torch.int64))) % 2**24
    return total


def text_part_of(config: Any) -> str | None:
    """What of a multimodal configuration's model is trained, in words; None for others."""
    if not is_multimodal(config):
        return None
    with torch.device("meta"):
        whole: PreTrainedModel = auto_class(config).from_config(config)
    untrained = untrained_of(keep_text_part(whole))
    assert untrained is not None
    num_weights = sum(weight.numel() for weight in untrained.weights.values())
    return (
        f"the text part of {type(whole).__name__} is trained; the {num_weights:,} weights of "
        f"{', '.join(untrained.modules)} stay as they are"
    )
