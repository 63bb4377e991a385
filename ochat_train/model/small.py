"""Small copies of models: the same kinds of layers with random weights, in sizes that a CPU runs in a second."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ochat_train.model.text_part import auto_class, base_of, is_multimodal

FIRST_ID = 3  # in small copies ids below may have a meaning, such as padding
BORDER = 8  # of windows and chunks in a small copy
LENGTH_BORDER = 24  # of the lengths up to which RoPE has other factors
_VOCABULARY = 128
_HEADS = 4
_WIDTH = 64
_LINEAR_HEAD_DIM = 32
_MOST_LAYERS = 8
_MOST_WEIGHTS = 60_000_000  # of a small copy: some seconds on two cores

# Sizes are recognised by what transformers calls them in all of its families.
_BORDERS = ("window", "chunk_size", "chunk_length", "index_topk", "floor_scale")
_WIDTHS = ("intermediate", "ffn", "mlp_hidden", "lora_rank")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# What families call the number of experts that a token chooses; all but a few by the first name.
CHOSEN = ("num_experts_per_tok", "moe_topk", "moe_top_k", "top_k_experts")


def small_model(config: Any, *, longest: int, has_dropout: bool = False) -> PreTrainedModel:
    """A small model of the configuration's kind, in float32 on the CPU, whose eager attention has been tried.

    It has layers of all kinds, and few of them; windows, chunks and lengths at which RoPE changes are scaled down
    where sequences of up to `longest` tokens would cross them. Weights are random, and large enough that attention
    is not uniform. has_dropout: whether dropout is as configured; else it is off. Raises ValueError when no small
    model works.
    """
    config = copy.deepcopy(config) if has_dropout else without_dropout(config)
    shallow = _shallow(config, longest)
    reason = ""  # of the copy that is nearest to the configuration
    for small in (_narrow(shallow, has_free_width=True), _narrow(shallow, has_free_width=False), shallow):
        try:
            return _try(small)
        except Exception as error:  # of any kind: what a model's code says about sizes that it does not expect
            reason = reason if reason and isinstance(error, _TooLarge) else one_line(error)
    raise ValueError(f"no small copy of it works ({reason})")


class _TooLarge(ValueError):
    pass


def _try(small: Any) -> PreTrainedModel:
    with torch.device("meta"):
        size = sum(weight.numel() for weight in auto_class(small).from_config(small).parameters())
    if size > _MOST_WEIGHTS:
        raise _TooLarge(f"it has {size:,} weights, too many to try")
    model: PreTrainedModel = auto_class(small).from_config(small, dtype=torch.float32, attn_implementation="eager")
    randomise(model, seed=0)
    # A copy, because some models keep a state.
    copy.deepcopy(model)(input_ids=torch.full((1, 2 * BORDER), FIRST_ID), use_cache=False)
    return model


def without_dropout(config: Any) -> Any:
    """A copy of the configuration in which nothing is dropped at random, and no noise is added."""
    changed = copy.deepcopy(config)
    for part in _parts(changed):
        for name, value in vars(part).items():
            if ("drop" in name or "noise" in name) and isinstance(value, float):
                vars(part)[name] = 0.0
    return changed


def one_line(error: Exception) -> str:
    """The class of an error and the first line of its message."""
    message = str(error).strip()
    return f"{type(error).__name__}: {message.splitlines()[0]}" if message else type(error).__name__


def _shallow(config: Any, longest: int) -> Any:
    """A copy with few layers of all kinds, a small vocabulary, and borders that short sequences cross."""
    small = copy.deepcopy(config)
    for part in _parts(small):
        for settings in _settings(part):
            for name, value in settings.items():
                if "vocab" in name and _is_int(value):
                    settings[name] = min(value, _VOCABULARY)
                elif name.endswith("_token_id"):
                    settings[name] = _each_int(value, lambda id: id if id < FIRST_ID else FIRST_ID - 1)
                elif any(word in name for word in _BORDERS) and "layer" not in name:
                    settings[name] = _each_int(value, lambda size: BORDER if BORDER < size < longest else size)
        _scale_lengths(part, longest)
    text = small.get_text_config()
    if _counts_layers(text):
        _keep_layers(text, _kinds_of_layers(config))
    else:  # BLT has layers in each of its parts
        for part in filter(_counts_layers, _parts(small)):
            _keep_layers(part, list(range(min(2, part.num_hidden_layers))))
    if is_multimodal(config):
        of_text = set(map(id, _parts(text)))
        for part in _parts(small):
            if part is not small and id(part) not in of_text:
                _thin(part)
    return small


def _counts_layers(part: Any) -> bool:
    """Whether a configuration has a number of layers that can be set."""
    try:
        part.num_hidden_layers = part.num_hidden_layers
    except (AttributeError, NotImplementedError):  # of BLT, of ProphetNet
        return False
    return True


def _thin(part: Any) -> None:
    """Make the configuration of an encoder beside the text part small, in place: two layers. Text does not pass it."""
    counts = {name: value for name, value in vars(part).items() if _is_int(value) and _is_layer_count(name)}
    for name, value in vars(part).items():
        if name in counts:
            vars(part)[name] = min(value, 2)
        elif isinstance(value, list | tuple) and len(value) in counts.values():
            vars(part)[name] = value[:2]
    if "num_heads" in vars(part):
        part.num_heads = _HEADS
        vars(part).update(dict.fromkeys({"hidden_size", "embed_dim"} & vars(part).keys(), _WIDTH))


def _is_layer_count(name: str) -> bool:
    return name.endswith(("layers", "depth", "blocks"))


def _narrow(shallow: Any, *, has_free_width: bool) -> Any:
    """A copy with narrow layers and few experts. has_free_width: whether heads may be wider than their share of it."""
    small = copy.deepcopy(shallow)
    widths: dict[Any, Any] = {}  # as configured, and of the copy
    for part in _parts(small):
        own, real_name = vars(part), getattr(part, "attribute_map", {})
        heads, of_keys, width = (
            real_name.get(name, name) for name in ("num_attention_heads", "num_key_value_heads", "hidden_size")
        )
        old, old_width = own.get(heads), own.get(width)
        has_head_dim = _is_int(own.get(real_name.get("head_dim", "head_dim"))) and has_free_width
        for settings in _settings(part):
            if _is_int(old) and old > _HEADS:
                for name in {heads, of_keys, width} & settings.keys():
                    if _is_int(settings[name]):
                        settings[name] = max(1, settings[name] * _HEADS // old)
                if _is_int(settings.get(of_keys)) and _HEADS % settings[of_keys]:
                    settings[of_keys] = 1
            if has_head_dim and _is_int(settings.get(width)):
                settings[width] = min(settings[width], 2 * _WIDTH)
            elif _is_int(settings.get(width)) and not _is_int(own.get("head_dim")) and _is_int(old):
                settings[width] = -(-settings[width] // (8 * _HEADS)) * 8 * _HEADS  # what grouped products can take
            if old is None and _is_int(settings.get(width)):  # no attention: recurrent layers, or those of another part
                for name in settings.keys() & {width, "attention_hidden_size", "embedding_dim"}:
                    settings[name] = widths.get(settings[name], min(settings[name], 2 * _WIDTH))
            if _is_int(old_width):
                widths.setdefault(old_width, own[width])
                for name in (name for name in settings if "hidden_size" in name and name != width):
                    if _is_int(settings[name]) and settings[name] % old_width == 0:  # twice as wide in Zamba
                        settings[name] = settings[name] // old_width * own[width]
            _narrow_more(settings, most_experts(part))
            _fit_state_heads(settings, width)
    return small


def _narrow_more(settings: dict[str, Any], num_experts: int) -> None:
    """Make the inner widths of layers small, and experts and heads of linear attention few, in place."""
    most_linear = max((value for name, value in settings.items() if _counts_linear_heads(name, value)), default=1)
    for name, value in settings.items():
        if not _is_int(value):
            continue
        if _counts_linear_heads(name, value):
            settings[name] = max(1, value * _HEADS // most_linear)
        elif name.startswith("linear_") and name.endswith("head_dim"):
            settings[name] = min(value, _LINEAR_HEAD_DIM)
        if any(word in name for word in _WIDTHS):
            settings[name] = min(value, _WIDTH)
        elif name in EXPERTS:
            settings[name] = min(value, num_experts)


def most_experts(config: Any) -> int:
    """How many experts a small copy has at most: more than a token chooses, and some in each group."""
    chosen: list[Any] = [getattr(config, name, None) for name in CHOSEN]
    most: int = max(8, 4 * (getattr(config, "n_group", None) or 1), *(2 * each for each in chosen if _is_int(each)))
    return most


def _fit_state_heads(settings: dict[str, Any], width: str) -> None:
    """Give state-space layers as many heads, or as wide ones, as their width has, in place."""
    names = (
        ("mamba_expand", "expand"),
        ("mamba_n_heads", "n_mamba_heads", "num_heads"),
        ("mamba_d_head", "mamba_headdim", "head_dim"),
        ("mamba_n_groups", "mamba_ngroups", "n_groups"),
    )
    expand, number, size, groups = (next((name for name in each if name in settings), "") for each in names)
    if not all(_is_int(settings.get(name)) for name in (expand, number, size)):
        return
    inner = settings[expand] * settings[width]
    if inner >= 2 * settings[size]:
        settings[number] = inner // settings[size]
    else:
        settings[size] = inner // settings[number]
    if _is_int(settings.get(groups)):
        settings[groups] = min(settings[groups], settings[number])


def _counts_linear_heads(name: str, value: Any) -> bool:
    return name.startswith("linear_num_") and name.endswith("heads") and _is_int(value)


def _parts(config: Any) -> Iterator[Any]:
    """The configuration and all those in it."""
    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PreTrainedConfig):
            yield from _parts(value)


def _settings(part: Any) -> list[dict[str, Any]]:
    """The settings of a configuration, and those in which single layers differ from it."""
    different = vars(part).get("_heterogeneity_spec")
    return [vars(part), *(different.per_layer_overrides.values() if different else ())]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _each_int(value: Any, change: Callable[[int], int]) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_each_int(item, change) for item in value)
    return change(value) if _is_int(value) else value


def _scale_lengths(part: Any, longest: int) -> None:
    """Let RoPE that changes with the length of a sequence change at LENGTH_BORDER, where `longest` is beyond it."""
    rope = vars(part).get("rope_parameters") or {}
    kinds = [kind for kind in (rope, *rope.values()) if isinstance(kind, dict) and "rope_type" in kind]
    most = vars(part).get("max_position_embeddings")
    borders = [kind.get("original_max_position_embeddings") for kind in kinds]
    if any("dynamic" in kind["rope_type"] for kind in kinds):
        borders.append(most)
    border = min((border for border in borders if border), default=longest)
    if border >= longest or not most:
        return
    part.max_position_embeddings = max(LENGTH_BORDER, most * LENGTH_BORDER // border)
    for settings in (vars(part), *kinds):
        if settings.get("original_max_position_embeddings"):
            settings["original_max_position_embeddings"] = LENGTH_BORDER


# ------------------------------------------------------------------------------------------------------- layers


def _kinds_of_layers(config: Any) -> list[int]:
    """The first layer of each kind, by number; all up to the last of these if they are few.

    Kinds differ in layer_types, in the classes of modules, in settings that are no floats (a window, no RoPE), or in
    whether weights are those of an earlier layer.
    """
    text = config.get_text_config()
    count = text.num_hidden_layers
    try:
        with torch.device("meta"):
            model = auto_class(config).from_config(config)
    except Exception:  # of any kind: the small copy, which is tried as well, says why
        return list(range(min(2, count)))
    stacks = [part for part in base_of(model).modules() if isinstance(part, nn.ModuleList) and len(part) == count]
    if not stacks:
        return list(range(min(_MOST_LAYERS, count)))
    types = vars(text).get("layer_types") or [None] * count
    first: dict[Any, int] = {}
    seen: set[nn.Parameter] = set()
    for number, layer in enumerate(stacks[0]):
        weights = set(layer.parameters())
        first.setdefault((types[number], _signature(layer), weights.isdisjoint(seen)), number)
        seen |= weights
    needed = max(2, max(first.values()) + 1)
    return list(range(min(needed, count))) if needed <= _MOST_LAYERS else sorted(first.values())[:_MOST_LAYERS]


def _signature(layer: nn.Module) -> frozenset[Any]:
    values: set[Any] = set()
    for path, module in layer.named_modules():
        settings = tuple(
            (name, value)
            for name, value in sorted(vars(module).items())
            if isinstance(value, bool | int | str) and not any(word in name for word in ("idx", "index", "layer_id"))
        )
        values.add((path, type(module).__name__, settings))
    return frozenset(values)


def _keep_layers(text: Any, kept: list[int]) -> None:
    """Leave only these layers in a text configuration, in place: in their number, and in lists of one item a layer."""
    old = text.num_hidden_layers
    for name, value in vars(text).items():
        if isinstance(value, list | tuple) and len(value) == old and "moe_layers" not in name:
            vars(text)[name] = type(value)(value[number] for number in kept)
        elif isinstance(value, list | tuple) and ("layers" in name or "layer_ids" in name):
            vars(text)[name] = [new for new, number in enumerate(kept) if number in value]
        elif name == "num_blocks" and value == old:  # of xLSTM, beside num_hidden_layers
            vars(text)[name] = len(kept)
        elif "layers" in name and _is_int(value) and value >= len(kept):
            vars(text)[name] = min(len(kept), max(1, value * len(kept) // old))
    text.num_hidden_layers = len(kept)
    if different := vars(text).get("_heterogeneity_spec"):
        of_layers = different.per_layer_overrides
        different.per_layer_overrides = {
            new: of_layers[number] for new, number in enumerate(kept) if number in of_layers
        }


# ------------------------------------------------------------------------------------------------------ weights


def randomise(model: PreTrainedModel, *, seed: int) -> None:
    """Random weights of a size that keeps activations about as large as they were; biases and norms are moved too."""
    model.train(not is_multimodal(model.config))  # some want to know in training which tokens are pictures
    random = torch.Generator().manual_seed(seed)

    def noise(weight: Tensor) -> Tensor:
        return torch.randn(weight.shape, generator=random)

    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.copy_(noise(weight) * (1.2 / max(weight.shape[-2:]) ** 0.5))
            else:
                weight.mul_(0.5).add_(0.1 * noise(weight))  # of norms: queries of size 1 would make attention one-hot
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
