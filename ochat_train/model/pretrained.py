"""The model that training starts from: pretrained or from a config, with the template's special tokens in it."""

import copy
import json
import sys
from collections.abc import Iterable
from typing import Any

import torch
import xxhash
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig, PreTrainedModel

from ochat_train.model.small import CHOSEN, EXPERTS, most_experts
from ochat_train.model.text_part import auto_class, is_multimodal, keep_text_part, processor_files, untrained_of
from ochat_train.tokens.plan import quadratic_length
from ochat_train.tokens.tokenizer import ChatTokenizer, locate_base

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def load_config(base: str | None, config: dict[str, Any] | None, num_ids: int) -> Any:
    """The transformers configuration of the recipe's model as it is trained, with at least `num_ids` ids.

    A config from the recipe gets `num_ids` as vocabulary, and so does a base that has fewer; see `add_token_rows`.
    Raises ValueError when the base cannot be loaded, or when the recipe's config has fewer than `num_ids` ids.
    """
    if base is not None:
        made = _base_config(base)
        made.get_text_config().vocab_size = max(num_ids, made.get_text_config().vocab_size)
        return made
    assert config is not None
    try:
        made = AutoConfig.for_model(**{"vocab_size": num_ids, **config})
    except Exception as error:  # of many kinds: whatever the configuration's own checks raise
        raise ValueError(f"model.config is no configuration of transformers: {_all_of(error)}") from error
    if (vocab_size := made.get_text_config().vocab_size) < num_ids:
        raise ValueError(
            f"model.config.vocab_size {vocab_size:,} is below the tokenizer's {num_ids:,} ids; leave vocab_size out"
        )
    return made


def _base_config(base: str) -> Any:
    files = locate_base(base)
    files.require("model", ("config.json",))
    try:
        config: Any = AutoConfig.from_pretrained(files.name, **files.options)
    except (OSError, ValueError) as error:
        raise ValueError(f"model.base {base}: {files.why_not(error)}") from error
    except Exception as error:  # of many kinds: whatever the configuration's own checks raise
        raise ValueError(f"model.base {base}: config.json is no configuration: {_all_of(error)}") from error
    for part in (config, config.get_text_config()):
        if quantization := getattr(part, "quantization_config", None):
            method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
            raise ValueError(
                f"model.base {base} has quantized weights ({method}), which cannot be trained; "
                "take its unquantized base"
            )
    return config


def _all_of(error: Exception) -> str:
    """The message in one line: the checks of transformers give their reason in the last of several."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def meta_model(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a transformers configuration on the meta device, where tensors have sizes and take no memory.

    Of a multimodal one the text part. Raises ValueError when no model can be made of it.
    """
    config = config if is_multimodal(config) else config.get_text_config()
    try:
        with torch.device("meta"):
            model = keep_text_part(auto_class(config).from_config(config, dtype=dtype))
    except Exception as error:  # of many kinds: whatever a model's code says about values that it does not expect
        raise ValueError(f"no {config.model_type} can be made of this model's configuration: {error!r}") from error
    return model


def shrink_config(config: Any, *, num_heads: int | None = None, vocab_size: int | None = None) -> Any:
    """A copy of the configuration with at most two layers, of the same kinds.

    num_heads: if given, the copy is narrower in proportion, with heads of the same size and few experts. vocab_size:
    the largest vocabulary.
    """
    whole = copy.deepcopy(config)
    small, config = whole.get_text_config(), config.get_text_config()
    small.num_hidden_layers = min(2, config.num_hidden_layers)
    if getattr(config, "layer_types", None) is not None:
        small.layer_types = config.layer_types[: small.num_hidden_layers]
    small.pad_token_id = small.bos_token_id = small.eos_token_id = None  # they may be above a small vocabulary
    if vocab_size is not None:
        small.vocab_size = min(vocab_size, config.vocab_size)
    if num_heads is not None:
        old = config.num_attention_heads
        most_of_keys = max(1, (getattr(config, "num_key_value_heads", None) or old) * num_heads // old)
        small.num_attention_heads = num_heads
        small.num_key_value_heads = next(number for number in range(most_of_keys, 0, -1) if num_heads % number == 0)
        small.hidden_size = config.hidden_size * num_heads // old
        for name, value in vars(config).items():  # GPT-2 has no inner width: it follows from hidden_size
            if name.endswith("intermediate_size") and isinstance(value, int):
                setattr(small, name, value * num_heads // old)
            elif name in EXPERTS and isinstance(value, int):
                setattr(small, name, min(value, most_experts(config)))
    return whole


def matrix_weights_of(config: Any) -> int:
    """Entries of all matrices that a token passes, over all layers and the head, in a model of this configuration.

    config: of transformers. Of the experts of a mixture those count that a token chooses.
    """
    model = meta_model(config, torch.bfloat16)
    num_weights: int = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() >= 2)
    modules: list[Any] = list(model.modules())
    for module in modules:
        if of_experts := expert_weights(module):
            chosen = experts_of_a_token(model.config.get_text_config())
            num_weights -= of_experts - of_experts * chosen // module.num_experts
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    if head is None or head.weight is not embedding.weight:  # else it is passed as the head
        num_weights -= embedding.weight.numel()
    return num_weights


def expert_weights(module: Any) -> int:
    """Entries of the matrices of all experts in the module itself, which transformers keeps as [experts, ., .]."""
    num_experts = getattr(module, "num_experts", None)
    matrices = module.parameters(recurse=False)
    return sum(matrix.numel() for matrix in matrices if matrix.dim() == 3 and len(matrix) == num_experts)


def experts_of_a_token(config: Any) -> int:
    """How many experts of a layer a token chooses; at most, where layers differ."""
    places = [place for place in (config, getattr(config, "ffn_config", None)) if place is not None]
    found = [getattr(place, name, None) for place in places for name in CHOSEN]
    chosen: Any = next(value for value in found if value)
    return max(chosen) if isinstance(chosen, list) else int(chosen)


def quadratic_length_of(config: Any, *, max_tokens: int) -> int:
    """The quadratic length (see plan.py) of a model of this configuration, on sequences of up to `max_tokens`."""
    text = config.get_text_config()
    # Without heads there is no attention that we could run; PackedCausalLM says so.
    num_heads = getattr(text, "num_attention_heads", 0)
    head_dim = head_dim_of(text) if num_heads else 0
    num_full = sum(window is None or window >= max_tokens for window in _attention_windows(text))
    return quadratic_length(num_weights=matrix_weights_of(config), attention_width=num_full * num_heads * head_dim)


def head_dim_of(config: Any) -> int:
    """The size of a head of a text configuration's attention; the largest, where layers differ (Gemma 4)."""
    if vars(config).get("_heterogeneity_spec"):
        return max(head_dim_of(layer) for layer in config.per_layer_config)
    width = getattr(config, "hidden_size", 0)  # BLT has one in each of its parts
    return int(getattr(config, "head_dim", None) or width // getattr(config, "num_attention_heads", 1))


def max_positions_of(config: Any) -> int:
    """How many positions a model of this configuration has; sys.maxsize if the configuration does not say."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize)


def _attention_windows(config: Any) -> list[int | None]:
    """How many tokens the attention of each layer sees; None: all earlier ones."""
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def load_model(
    base: str | None, config: dict[str, Any] | None, *, dtype: str, num_ids: int, added_ids: Iterable[int], seed: int
) -> PreTrainedModel:
    """The model in `dtype` on the CPU, with an embedding for each of `num_ids` token ids.

    base: see `locate_base`; or config: a model with random weights from `seed`. The rows of `added_ids` in embedding
    and head are the mean of all known rows. Of a multimodal model it is the text part, see `keep_text_part`. Raises
    ValueError when the base cannot be loaded.
    """
    if base is None:
        torch.manual_seed(seed)
        made = load_config(None, config, num_ids)
        model = keep_text_part(auto_class(made).from_config(made, dtype=DTYPES[dtype]))
        _forget_padding(model)
        return model
    files = locate_base(base)
    options: dict[str, Any] = dict(files.options)
    if files.gguf_file is None:
        _base_config(base)  # refuses quantized weights, which may take long to load
    else:
        # With the package kernels installed transformers would keep the weights quantized, which cannot be trained.
        options["quantization_config"] = GgufConfig(dequantize=True)
    try:
        is_text = files.gguf_file is not None  # such a file has the language model alone
        loads = AutoModelForCausalLM if is_text else auto_class(AutoConfig.from_pretrained(files.name))
        model = keep_text_part(loads.from_pretrained(files.name, dtype=DTYPES[dtype], **options))
        if untrained := untrained_of(model):
            untrained.files = processor_files(files.name)
    except OSError as error:
        raise ValueError(f"model.base {base}: {files.why_not(error)}") from error
    _forget_padding(model)
    add_token_rows(model, num_ids, sorted(added_ids))
    return model


def add_token_rows(model: PreTrainedModel, num_ids: int, added_ids: list[int]) -> None:
    """Give the model embeddings for `num_ids` ids; those of `added_ids`, and new ones, become the mean of all others.

    Works for tied and untied embeddings, and for a base whose vocabulary is padded beyond its tokenizer.
    """
    embedding: Any = model.get_input_embeddings()
    old = len(embedding.weight)
    if num_ids > old:
        model.resize_token_embeddings(num_ids, mean_resizing=False)
    new = new_rows(old, num_ids, added_ids)
    if not new:
        return
    known = [row for row in range(min(old, num_ids)) if row not in set(added_ids)]
    embeddings: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    for weight in {id(module.weight): module.weight for module in embeddings}.values():
        with torch.no_grad():
            weight[new] = weight[known].float().mean(dim=0).to(weight.dtype)


def fixed_to_buffers(model: PreTrainedModel) -> None:
    """Turn parameters that transformers itself never trains into buffers of the same names, in place.

    Such are the biases by which ERNIE 4.5 and AFMoE choose experts. Checkpoints leave frozen parameters out, because
    beside adapters they are the base's; without adapters there is no base to take them from.
    """
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.requires_grad:
                delattr(module, name)
                module.register_buffer(name, parameter.detach())


def digest_base(model: PreTrainedModel, num_rows: int) -> str:
    """XXH3 of what a base holds, its configuration and weights: the same wherever it lies, and in whatever files.

    num_rows: how many rows of embedding and head are the base's own; the means after them may round differently.
    """
    own = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}  # of files and libraries
    config = {key: value for key, value in model.config.to_diff_dict().items() if key not in own}
    digest = xxhash.xxh3_128(json.dumps(config, sort_keys=True, default=str).encode())
    embeddings: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    tables = {id(module.weight) for module in embeddings}
    untrained = untrained_of(model)
    for parameter in (*model.parameters(), *(untrained.weights.values() if untrained else ())):
        known = parameter.detach()[:num_rows] if id(parameter) in tables else parameter.detach()
        digest.update(known.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def new_rows(num_rows: int, num_ids: int, added_ids: Iterable[int]) -> list[int]:
    """The rows that a base with `num_rows` embeddings has not learned, in order."""
    return sorted({*added_ids, *range(num_rows, num_ids)})


def rows_to_train(base: str, tokenizer: ChatTokenizer, *, with_template: bool) -> list[int]:
    """The rows of embedding and head that are trained beside adapters of the base, in order.

    These are `new_rows` and, with_template, those of `template_ids`, which the base may have without having been
    trained on them.
    """
    num_rows = _base_config(base).get_text_config().vocab_size
    rows = new_rows(num_rows, tokenizer.num_ids, tokenizer.added.values())
    return sorted({*rows, *(template_ids(tokenizer).values() if with_template else ())})


def template_ids(tokenizer: ChatTokenizer) -> dict[str, int]:
    """The ids of the special tokens that a template's turns are made of: its end token and those of its headers.

    The template's beginning is none of them: every base was trained on it, before each document, and a few adapters'
    data should not move what all sequences begin with.
    """
    return {token: tokenizer.special_ids[token] for token in tokenizer.template.turn_tokens}


def _forget_padding(model: PreTrainedModel) -> None:
    """Let the embedding of the padding token learn: packed batches have no padding, and pad may be the end token."""
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    embedding.padding_idx = None
