"""The frozen base of adapters in 4 bits, by bitsandbytes: nf4 in blocks of 64 weights, whose scales have 8 bits."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ochat_train.files import require_packages

# Of transformers' BitsAndBytesConfig, by which others load the base as it was in training.
SETTING = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
_ROUTERS = {"gate", "router", "shared_expert_gate"}  # names of layers that choose experts


def require_quantising(device: torch.device) -> None:
    """Raise ValueError, with the remedy, when bitsandbytes is not installed or has no kernels for `device`."""
    require_packages("model.lora.base_bits", "bitsandbytes", extra="qlora")
    try:
        _dequantise(*_quantise(torch.ones(64), device))
    except Exception as error:  # of many kinds: a library that was not built for this CUDA, a device it does not know
        remedy = "install a bitsandbytes for this device, or set model.lora.base_bits: null"
        raise ValueError(f"bitsandbytes quantises nothing on {device} ({error!r}); {remedy}") from error


def quantise(lm: PreTrainedModel, device: torch.device) -> None:
    """Replace each layer of `layers_to_quantise` by bitsandbytes' own on `device`, one after the other.

    The device never has more than one unquantised weight. Products are computed in the dtype that the weight had.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit  # an extra: present once `require_quantising` has passed

    for name, layer in layers_to_quantise(lm).items():
        packed, state = _quantise(layer.weight.data, device)
        new = Linear4bit(layer.in_features, layer.out_features, False, layer.weight.dtype, device="meta")
        new.weight = Params4bit(packed, False, state, quant_type="nf4", bnb_quantized=True, module=new)
        new.quant_state, new.bias = state, layer.bias
        new.support_avx512bf16_for_cpu = False  # it would pack the weight for inference alone, and gradients would end
        # The state of a model is what is trained: without bitsandbytes' own entries.
        new._save_to_state_dict = nn.Linear._save_to_state_dict.__get__(new)
        lm.set_submodule(name, new.train(layer.training))


def layers_to_quantise(lm: PreTrainedModel) -> dict[str, nn.Linear]:
    """Every plain linear layer by its name, but the head and those that choose experts.

    Raises ValueError when most weights are in other modules, such as experts in one tensor.
    """
    modules: dict[str, Any] = dict(lm.named_modules())
    tables = (lm.get_input_embeddings(), lm.get_output_embeddings())
    found = {
        name: layer
        for name, layer in modules.items()
        if type(layer) is nn.Linear and layer not in tables and not _ROUTERS & set(name.split("."))
    }
    apart = {id(weight) for table in tables for weight in table.parameters()}
    others = sum(weight.numel() for weight in lm.parameters() if id(weight) not in apart)
    if 2 * (in_them := sum(layer.weight.numel() for layer in found.values())) < others:
        raise ValueError(
            f"model.lora.base_bits quantises linear layers, which hold {in_them:,} of the {others:,} weights between "
            f"embedding and head of {type(lm).__name__}; set it to null"
        )
    return found


def round_to_4_bits(lm: PreTrainedModel, device: torch.device) -> None:
    """Give the weights that `quantise` quantises the values that they have after it, in their own dtype and place."""
    for layer in layers_to_quantise(lm).values():
        layer.weight.data = _dequantise(*_quantise(layer.weight.data, device)).to(layer.weight.device)


def plain_weight(parameter: Tensor) -> Tensor:
    """The parameter itself; of a quantised one its values, in the dtype that it had before."""
    state = getattr(parameter, "quant_state", None)
    return parameter.detach() if state is None else _dequantise(parameter.detach(), state)


def bytes_of(lm: PreTrainedModel) -> tuple[int, int]:
    """How many weights of a model are quantised, and the bytes that these take with their scales and tables."""
    num_weights, storages = 0, {}
    for parameter in lm.parameters():
        if (state := getattr(parameter, "quant_state", None)) is not None:
            num_weights += state.shape.numel()
            for tensor in (parameter, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code):
                storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
    return num_weights, sum(storages.values())


def _quantise(weight: Tensor, device: torch.device) -> tuple[Tensor, Any]:
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight.to(device), blocksize=64, compress_statistics=True, quant_type="nf4")
    return packed, state


def _dequantise(packed: Tensor, state: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    weight: Tensor = dequantize_4bit(packed, state)
    return weight
