"""Fused kernels of the package liger-kernel inside a transformers model, and its layers compiled by torch.compile.

Of Liger's kernels those of a layer are used: RMSNorm, rotary embedding, SwiGLU or GeGLU. Its losses are not, because
weights, conditions and sums are ours. Liger knows for each architecture how a kernel rounds, and whether a norm counts
its weight from 1; whether that is right for this configuration is measured (`measure_kernel_errors`).
"""

import copy
import importlib
import importlib.util
import os
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata
from types import FunctionType, MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ochat_train.model.attention import is_ours
from ochat_train.model.pretrained import shrink_config
from ochat_train.model.text_part import base_of

Kernels = Literal["liger", "none"]

# Two layers have some twenty operations in a row, each of 6e-8 in float32, and backwards as many again. tanh's
# approximation of GELU in place of the exact one is off by 3e-4, a norm without its offset by 1.
_SAME_FORMULA = 1e-5
# Kernels may round in other places than transformers does, but not more.
_ROUNDING = 2.0
_VOCABULARY = 97


@dataclass(frozen=True, slots=True)
class KernelChoice:
    """The kernels, and why: one line for the log."""

    kernels: Kernels
    reason: str


@dataclass(frozen=True, slots=True)
class KernelError:
    """How far a model with kernels is from transformers' own in float32, and how far it may be.

    error: the largest relative norm of a difference, over the logits and each parameter's gradient.
    """

    dtype: torch.dtype
    error: float
    limit: float

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {self.error:.1e} (at most {self.limit:.1e})"


def choose_kernels(
    wanted: Literal["auto", "liger", "none"],
    config: Any,
    *,
    device: torch.device,
    dtype: torch.dtype,
    is_compiled: bool,
) -> KernelChoice:
    """The wanted kernels, or for `auto` Liger's where they can be used and agree with transformers' own layers.

    config: of transformers. is_compiled: whether the layers will be compiled, which fuses the same operations.
    Raises ValueError when the wanted ones cannot be used, with the reason.
    """
    if wanted == "none":
        return KernelChoice("none", "asked for by the recipe")
    if wanted == "auto" and is_compiled:
        return KernelChoice("none", "model.compile fuses the same operations")
    found = _try_liger(config, device, dtype)
    if isinstance(found, str) and wanted == "liger":
        raise ValueError(f"model.kernels liger cannot be used here: {found}; set model.kernels: auto")
    if isinstance(found, str):
        return KernelChoice("none", f"liger: {found}")
    version = metadata.version("liger-kernel")
    return KernelChoice("liger", f"{version} against transformers' layers: {', '.join(map(str, found))}")


def _try_liger(config: Any, device: torch.device, dtype: torch.dtype) -> tuple[KernelError, ...] | str:
    """How well Liger's kernels agree with transformers' layers; or why they cannot be used."""
    if device.type != "cuda":
        return "needs a CUDA device"
    if importlib.util.find_spec("liger_kernel") is None:
        return "the package liger-kernel is not installed (pip install 'ochat_train[gpu]')"
    try:
        known = importlib.import_module("liger_kernel.transformers.monkey_patch").MODEL_TYPE_TO_APPLY_LIGER_FN
    except Exception as error:  # importing it can raise anything: it imports Triton and parts of transformers
        return f"the package liger-kernel cannot be imported: {error!r}"
    if config.model_type not in known:
        return f"it has no kernels for {config.model_type}"
    if config.get_text_config() is not config:
        return f"{config.model_type} is more than a language model"
    try:
        errors = measure_kernel_errors(config, dtype=dtype, device=device)
    except Exception as error:  # it can raise anything: Triton compiles for a GPU that it may not know
        return f"its kernels fail in a small {config.model_type}: {error!r}"
    if wrong := [found for found in errors if not found.error <= found.limit]:
        return f"it disagrees with transformers' {config.model_type}: {', '.join(map(str, wrong))}"
    return errors


def use_kernels(lm: PreTrainedModel, kernels: Kernels) -> None:
    """Put the kernels into the modules of `lm`, in place; other models of the process keep transformers' layers.

    Adapters may be in the model or come later: Liger calls the linear layers as modules. Raises ValueError when the
    rotary embedding of this architecture cannot be replaced.
    """
    if kernels == "none":
        return
    from liger_kernel.transformers import _apply_liger_kernel_to_instance  # an extra: present when it was chosen

    # Besides the instance, Liger replaces classes and functions of the architecture's module in transformers.
    module = sys.modules[type(lm).__module__]
    before = dict(vars(module))
    try:
        _apply_liger_kernel_to_instance(model=lm, cross_entropy=False, fused_linear_cross_entropy=False)
        after = dict(vars(module))
    finally:
        vars(module).update(before)
    functions = {
        name: after[name] for name, old in before.items() if isinstance(old, FunctionType) and after[name] is not old
    }
    _call_instead(lm, functions, vars(module))


def _call_instead(lm: PreTrainedModel, functions: dict[str, Any], of_module: dict[str, Any]) -> None:
    """Let the forwards of modules of `lm` call `functions` in place of globals of the same names in `of_module`."""
    forwards: dict[FunctionType, FunctionType] = {}
    missing = set(functions)
    for module in lm.modules():
        forward = type(module).forward
        if not isinstance(forward, FunctionType) or forward.__globals__ is not of_module:
            continue
        if used := functions.keys() & set(forward.__code__.co_names):
            if forward not in forwards:
                forwards[forward] = _with_globals(forward, functions)
            module.forward = MethodType(forwards[forward], module)
            missing -= used
    if missing:
        raise ValueError(f"no layer of {type(lm).__name__} calls {', '.join(sorted(missing))}")


def _with_globals(function: FunctionType, changed: dict[str, Any]) -> FunctionType:
    """A copy of the function in which the globals that are in `changed` have those values."""
    names = {**function.__globals__, **changed}
    # torch.compile watches the globals of a function that it inlines in the module of this name, and keeps what it
    # compiled with the code object.
    del names["__name__"]
    code = function.__code__.replace()
    made = FunctionType(code, names, function.__name__, function.__defaults__, function.__closure__)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


# -------------------------------------------------------------------------------------------------- the check


def measure_kernel_errors(config: Any, *, dtype: torch.dtype, device: torch.device) -> tuple[KernelError, ...]:
    """A small model of this configuration with kernels against transformers' own in float32, on packed positions.

    In float32, where a wrong formula shows, and in `dtype`, where wrong rounding shows. The limit is twice the error of
    transformers' own layers in `dtype`, plus 1e-5. The small model has the configuration's head size, activation and
    kinds of layers, and widths that are no powers of 2.
    """
    small = shrink_config(config, num_heads=3, vocab_size=_VOCABULARY)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        return tuple(_compare(small, each, device) for each in dict.fromkeys((torch.float32, dtype)))


def _compare(small: Any, dtype: torch.dtype, device: torch.device) -> KernelError:
    lm: PreTrainedModel = AutoModelForCausalLM.from_config(small, dtype=dtype, attn_implementation="eager").to(device)
    for parameter in lm.parameters():  # large enough to reach the nonlinear range; weights of norms that differ
        offset = float(parameter.data.flatten()[0]) if parameter.dim() == 1 else 0.0
        nn.init.normal_(parameter, mean=offset, std=0.1)
    reference = _run(copy.deepcopy(lm).float())
    rounded = _distance(_run(lm), reference)
    use_kernels(lm, "liger")
    return KernelError(dtype, _distance(_run(lm), reference), _ROUNDING * rounded + _SAME_FORMULA)


def _run(lm: PreTrainedModel) -> dict[str, Tensor]:
    """f32: the logits of three packed sequences, and the gradient of each parameter under a fixed projection."""
    positions = torch.cat([torch.arange(length) for length in (5, 1, 4)])
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(lm.config.vocab_size, positions.shape, generator=random)
    lm.zero_grad()
    lm.train()
    ids, positions = ids.to(lm.device), positions.to(lm.device)
    logits = lm(input_ids=ids[None], position_ids=positions[None], use_cache=False).logits[0]
    projection = torch.randn(logits.shape, generator=random).to(lm.device)
    (logits.float() * projection).sum().backward()
    gradients = {name: p.grad.float() for name, p in lm.named_parameters() if p.grad is not None}
    return {"logits": logits.detach().float(), **gradients}


def _distance(values: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    assert values.keys() == reference.keys()
    return max(float((values[name] - of).norm() / of.norm()) for name, of in reference.items())


# --------------------------------------------------------------------------------------------------- compiling


def require_compiler(device_type: str) -> None:
    """Raise ValueError, with the remedy, when torch.compile could not make code for the device."""
    if device_type == "cpu":
        wanted = [os.environ.get("CXX", "g++")]
    else:
        wanted = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
        if importlib.util.find_spec("triton") is None:
            raise ValueError("model.compile needs the package triton, which torch for CUDA brings; install that torch")
    if not any(map(shutil.which, wanted)):
        raise ValueError(
            f"model.compile needs a C++ compiler, and there is no {' or '.join(wanted)}; install g++ (Debian's package "
            "build-essential), name another in CXX and CC, or set model.compile: false"
        )


def compile_layers(lm: PreTrainedModel) -> None:
    """Compile the forward of each layer, in place: once for each kind of layer, whatever the number of tokens.

    Our attention stays as it is, between two compiled parts; so do checkpointing and hooks, which are around a layer.
    To be called after the attention has been set. Raises ValueError for models without transformers' layers.
    """
    layers = [module for module in lm.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"model.compile: {type(lm).__name__} has no layers of transformers' kind; set it to false")
    name = base_of(lm).config._attn_implementation
    if is_ours(name):
        AttentionInterface.register(name, torch.compiler.disable(AttentionInterface()[name]))
    compiled: dict[type, Any] = {kind: _compiled_class(kind) for kind in {type(layer) for layer in layers}}
    for layer in layers:
        layer.__class__ = compiled[type(layer)]


def _compiled_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The class with its forward compiled. A class, because transformers checkpoints in the forward of the class."""
    run = torch.compile(kind.forward, dynamic=True)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return run(self, *args, **kwargs)

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
