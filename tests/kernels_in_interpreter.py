"""Liger's kernels on a CPU, in Triton's interpreter: prints what it finds, a JSON object a line.

TRITON_INTERPRET=1 python -m tests.kernels_in_interpreter
"""

import copy
import sys
from typing import Any

import numpy as np
import orjson
import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.models.llama import modeling_llama

from ochat_train.model.kernels import measure_kernel_errors, use_kernels
from ochat_train.model.lora import add_adapters
from tests.test_packed_lm import MODELS, SIZE, make_batch, make_examples, make_model, make_packed

CPU = torch.device("cpu")
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3")


def config_of(model_type: str, **changes: Any) -> Any:
    """That of a small model of tests/test_packed_lm.py."""
    return AutoConfig.for_model(model_type, **{**SIZE, **MODELS.get(model_type, {}), **changes})


def adapted(lm: PreTrainedModel) -> PreTrainedModel:
    """The model with adapters that have learned something."""
    add_adapters(lm, rank=3, alpha=4.5, targets="all-linear", row_ids=[5], seed=1)
    for parameter in lm.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return lm


def tell(case: str, found: Any) -> None:
    """Print it."""
    sys.stdout.buffer.write(orjson.dumps([case, found]) + b"\n")


def tell_parity(case: str, config: Any, dtype: torch.dtype = torch.float32) -> None:
    """Print the errors and limits of the check. The interpreter has float16, and no bfloat16."""
    tell(case, [[found.error, found.limit] for found in measure_kernel_errors(config, dtype=dtype, device=CPU)])


def tell_packed(case: str, lm: PreTrainedModel, *, is_empty: bool = False) -> None:
    """Print how far a packed, checkpointed model with kernels is from the one without: the sum, the worst gradient."""
    stock = make_packed(copy.deepcopy(lm), checkpointing="full").train()
    use_kernels(lm, "liger")
    packed = make_packed(lm, checkpointing="full").train()
    batch = make_batch([] if is_empty else make_examples())
    sums = []
    for model in (packed, stock):
        out = model(batch)
        out.nll.backward()
        sums.append(float(out.nll.detach()))
    gradients = {name: parameter.grad for name, parameter in stock.lm.named_parameters()}
    worst = 0.0
    for name, parameter in packed.lm.named_parameters():
        expected = gradients[name]
        assert (parameter.grad is None) == (expected is None), name
        if parameter.grad is not None and expected is not None:
            worst = max(worst, float((parameter.grad - expected).norm()) / (float(expected.norm()) or 1))
    tell(case, [abs(sums[0] - sums[1]) / (sums[1] or 1), worst])


def tell_places() -> None:
    """Print where what a model with kernels runs is from, and what of transformers' module has been replaced."""
    before = dict(vars(modeling_llama))
    lm = make_model("llama")
    use_kernels(lm, "liger")
    layer = lm.get_submodule("model.layers.1")
    rotate = layer.self_attn.forward.__func__.__globals__["apply_rotary_pos_emb"]  # type: ignore[operator, union-attr]
    norm, mlp = layer.input_layernorm.forward, layer.mlp.forward  # type: ignore[union-attr]
    tell("kernels are from", [part.__module__.partition(".")[0] for part in (rotate, norm, mlp)])
    tell("replaced", [name for name, value in vars(modeling_llama).items() if value is not before[name]])


def complete_interpreter() -> None:
    """Give Triton's interpreter what the kernels use and it lacks: float arguments with a type, CUDA's functions."""
    from liger_kernel.ops import geglu, rms_norm
    from triton import language as tl
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def convert_too(argument: Any) -> Any:
        if isinstance(argument, float):  # a launch on a GPU makes it f32
            handle = interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32)
            return tl.tensor(handle, tl.float32)
        return convert(argument)

    interpreter._implicit_cvt = convert_too
    rms_norm.rsqrt = lambda x: tl.rsqrt(x)  # the interpreter gives tl other functions while a kernel runs
    geglu.tanh = lambda x: 2 * tl.sigmoid(2 * x) - 1


def main() -> None:
    """All cases."""
    complete_interpreter()
    for model_type in ARCHITECTURES:
        tell_parity(model_type, config_of(model_type))
    tell_parity("rounded", config_of("llama"), torch.float16)
    tell_parity("another activation", config_of("llama", hidden_act="gelu"))
    tell_parity("part of a head rotated", config_of("phi3", partial_rotary_factor=0.5))
    tell_packed("packed", make_model("llama"))
    tell_packed("adapters", adapted(make_model("llama")))
    tell_packed("no examples", make_model("llama"), is_empty=True)
    tell_places()


if __name__ == "__main__":
    main()
