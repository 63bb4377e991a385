"""Causal attention over packed sequences by interchangeable backends, and the choice among the backends.

Registered with transformers under names of our own, so that any of its models runs on packed batches: models pass
`cu_seqlens`, `max_seqlen` and `exchange` through to us as keyword arguments.
"""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.nn.attention import activate_flash_attention_impl, current_flash_attention_impl, restore_flash_attention_impl
from transformers import AttentionInterface, AttentionMaskInterface

from ochat_train.model.masks import PackedMask, packed_mask
from ochat_train.model.sdpa import AttentionOptions, repeat_heads, sdpa_attention
from ochat_train.model.sinks import attend_with_sinks
from ochat_train.model.ulysses import Exchange, attend_in_group

Backend = Literal["flash_attn_4", "flash_attn_3", "flash_attn", "torch", "torch_fa3", "sdpa", "alone"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)

# What we pass by name beside q, k and v; the order of the other arguments differs between the versions.
PASSED = {
    *("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"),
    *("softmax_scale", "causal", "window_size", "softcap"),
}


@dataclass(frozen=True, slots=True)
class Support:
    """What a backend supports, forward and backward, on packed sequences on a range of GPUs: a row of TABLE.

    module: what must be importable; None: torch alone is enough. install: what to do when it is not. majors: the first
    and the last major number of compute capability; None: any device. head_dims: the largest head size, and what it
    must be a multiple of; None: any. is_automatic: whether `auto` may choose it; backends that their makers call a
    prototype, or whose backward pass they do not describe, must be asked for. All are for bfloat16 and float16, sdpa
    for any dtype. All take grouped heads, windows, int32 `cu_seqlens`, and sequences as long as memory allows.
    """

    backend: Backend
    module: str | None
    install: str
    majors: tuple[int, int] | None
    head_dims: tuple[int, int] | None
    has_softcap: bool
    has_sinks: bool
    is_automatic: bool

    @property
    def capabilities(self) -> str:
        """The range of compute capabilities in words."""
        if self.majors is None:
            return "any device"
        first, last = self.majors
        return f"{last}.x" if first == last else f"{first}.0 to {last}.x"


_FA4 = ("flash_attn.cute", "pip install flash-attn-4")
_FA3 = ("flash_attn_interface", "flash-attn-3 from PyTorch's own package index")
_FA2 = ("flash_attn", "pip install --no-build-isolation flash-attn")
_TORCH = (None, "part of torch")
_ALONE = (None, "part of transformers")

# In the order in which `auto` tries them: the fastest by its makers' figures first (docs/design.md, Decisions).
TABLE: tuple[Support, ...] = (
    # Read in 4.0.0b36. Its backward pass takes 9.x to 12.x, on 12.x without saying which sizes. On 10.x head size 256
    # has kernels of its own, which returned wrong gradients in 4.0.0b11 (NVIDIA/TransformerEngine issue 3216).
    # A softcap goes backward through its general score functions. On 9.x it is no faster than flash_attn_3.
    Support(
        "flash_attn_4",
        *_FA4,
        majors=(10, 10),
        head_dims=(128, 8),
        has_softcap=False,
        has_sinks=False,
        is_automatic=True,
    ),
    # Read in 3.0.0b1.
    Support(
        "flash_attn_3", *_FA3, majors=(9, 9), head_dims=(256, 8), has_softcap=True, has_sinks=False, is_automatic=True
    ),
    # Read in 2.8.3, which is built for 8.0, 9.0, 10.0 and 12.0, and pads head sizes to multiples of 8 itself.
    Support(
        "flash_attn", *_FA2, majors=(8, 12), head_dims=(256, 1), has_softcap=True, has_sinks=False, is_automatic=True
    ),
    # Read in 2.13: the kernels of FlashAttention 2, without their softcap and without the padding.
    Support("torch", *_TORCH, majors=(8, 12), head_dims=(256, 8), has_softcap=False, has_sinks=True, is_automatic=True),
    Support(
        "flash_attn_4", *_FA4, majors=(9, 11), head_dims=(128, 8), has_softcap=True, has_sinks=False, is_automatic=False
    ),
    # torch's call with the kernels of flash_attn_3; torch 2.13 calls it a prototype. Its way to FlashAttention 4 reads
    # two results where that has returned four or five since 4.0.0b24, so it is not offered.
    Support(
        "torch_fa3", *_FA3, majors=(9, 9), head_dims=(256, 8), has_softcap=False, has_sinks=False, is_automatic=False
    ),
    Support("sdpa", *_TORCH, majors=None, head_dims=None, has_softcap=True, has_sinks=True, is_automatic=True),
    # The model on each sequence alone, with attention of transformers' own: chosen by probe.py where no other is exact.
    Support("alone", *_ALONE, majors=None, head_dims=None, has_softcap=True, has_sinks=True, is_automatic=False),
)


@dataclass(frozen=True, slots=True)
class AttentionNeeds:
    """What a model needs of attention on a device. capability: of the CUDA device; None: it is another device."""

    capability: tuple[int, int] | None
    dtype: torch.dtype
    head_dim: int
    has_softcap: bool
    has_sinks: bool = False


@dataclass(frozen=True, slots=True)
class BackendChoice:
    """The backend, and why: one line for the log."""

    backend: Backend
    reason: str


def choose_backend(wanted: Literal["auto"] | Backend, needs: AttentionNeeds) -> BackendChoice:
    """The wanted backend, or for `auto` the first automatic row of TABLE that is present and supports `needs`.

    Raises ValueError when the wanted one cannot do it, with the reason and the remedy.
    """
    if wanted != "auto":
        obstacles = [_obstacle(row, needs) for row in TABLE if row.backend == wanted]
        if None not in obstacles:  # the last row of a backend is its widest
            raise ValueError(
                f"model.attention {wanted} cannot be used here: {obstacles[-1]}; set model.attention: auto"
            )
        return BackendChoice(wanted, "asked for by the recipe")
    passed_over: dict[str, list[str]] = {}
    for row in TABLE:
        if not row.is_automatic:
            continue
        if (obstacle := _obstacle(row, needs)) is None:
            reasons = [f"{', '.join(others)}: {why}" for why, others in passed_over.items()]
            return BackendChoice(row.backend, "; ".join(reasons) or "the first choice is present")
        passed_over.setdefault(obstacle, []).append(row.backend)
    raise AssertionError("sdpa takes everything")


def _obstacle(row: Support, needs: AttentionNeeds) -> str | None:
    """Why the row does not support these needs; None when it does."""
    if row.majors is not None:
        if needs.capability is None:
            return "needs a CUDA device"
        if not row.majors[0] <= needs.capability[0] <= row.majors[1]:
            has = ".".join(map(str, needs.capability))
            return f"needs a GPU of compute capability {row.capabilities}, this one has {has}"
        if needs.dtype not in (torch.bfloat16, torch.float16):
            return f"needs bfloat16 or float16, not {str(needs.dtype).removeprefix('torch.')}"
    if row.head_dims is not None:
        largest, multiple = row.head_dims
        if needs.head_dim > largest:
            return f"head size {needs.head_dim} is above {largest}"
        if needs.head_dim % multiple:
            return f"head size {needs.head_dim} is no multiple of {multiple}"
    if needs.has_softcap and not row.has_softcap:
        return "no softcap"
    if needs.has_sinks and not row.has_sinks:
        return "no attention sinks"
    return None if row.module is None else _import_obstacle(row.module, row.install)


def _import_obstacle(module: str, install: str) -> str | None:
    """Why the varlen function of a FlashAttention package cannot be called; None when it can."""
    try:
        function = importlib.import_module(module).flash_attn_varlen_func
    except ModuleNotFoundError as error:
        # flash-attn-4 alone leaves a package flash_attn without FlashAttention 2; its own dependencies may be missing.
        if error.name in (module, module.partition(".")[0]):
            return f"{module} is not installed ({install})"
        return f"{module} cannot be imported: {error}"
    except AttributeError:
        return f"{module} has no flash_attn_varlen_func: not installed, or another version is needed ({install})"
    except ImportError as error:  # mostly a build for another version of torch
        return f"{module} cannot be imported: {error}"
    # The first versions of flash-attn-4 found the longest sequence by themselves, by a synchronisation.
    if missing := sorted(PASSED - inspect.signature(function).parameters.keys()):
        return (
            f"flash_attn_varlen_func of {module} takes no {', '.join(missing)}: another version is needed ({install})"
        )
    return None


# ----------------------------------------------------------------------------------------------- the kernels


# q [T, Hq, D], k and v [T, Hkv, D], options -> [T, Hq, D]
Kernel = Callable[[Tensor, Tensor, Tensor, AttentionOptions], Tensor]


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions, *, backend: Backend) -> Tensor:
    """Causal attention inside each sequence: [T, Hq, D] from q [T, Hq, D] and k, v [T, Hkv, D].

    For each sequence, with K and V repeated to Hq heads:

        scores = q @ k.T * scale;  if softcap: scores = softcap * tanh(scores / softcap)
        scores[i, j] = -inf where j > i, or where window is given and i - j >= window
        out = softmax(scores) @ v;  with sinks, exp(sink) is added to the sum of exponentials

    A window of W lets a token see itself and W - 1 tokens before it, as in transformers.
    """
    return _load_kernel(backend)(q, k, v, options)


def _load_kernel(backend: Backend) -> Kernel:
    """What a backend runs, loaded once for a model, so that a compiled layer holds no imports."""
    if backend == "sdpa":
        return sdpa_attention
    if backend in ("torch", "torch_fa3"):
        # torch keeps this for the whole process: what an earlier model took must not stay.
        if backend == "torch_fa3":
            activate_flash_attention_impl("FA3")
        elif current_flash_attention_impl() is not None:
            restore_flash_attention_impl()
        return _torch_kernel()
    return _flash_kernel(_package(backend).flash_attn_varlen_func)


def _package(backend: Backend) -> Any:
    return importlib.import_module(next(row.module for row in TABLE if row.backend == backend and row.module))


def _is_traceable(backend: Backend) -> bool:
    """Whether torch.compile can keep a backend's kernels in its graph, because they are operators of torch.

    Those of FlashAttention 2 are, and those of newer builds of 3. Those of 4 are compiled when they are called. The
    loop of sdpa would be compiled again for every batch.
    """
    if backend == "flash_attn_3":
        return isinstance(getattr(_package(backend), "_flash_attn_forward", None), CustomOpDef)
    return backend in ("flash_attn", "torch", "torch_fa3")


def _flash_kernel(function: Callable[..., Any]) -> Kernel:
    """The call that FlashAttention 2, 3 and 4 have in common."""

    def attend(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
        out = function(
            q,
            k,
            v,
            cu_seqlens_q=options.cu_seqlens,
            cu_seqlens_k=options.cu_seqlens,
            max_seqlen_q=options.max_seqlen,
            max_seqlen_k=options.max_seqlen,
            softmax_scale=options.scale,
            causal=True,
            softcap=options.softcap or 0.0,
            # Without a window the default stays, which 4 writes in another way: (None, None), not (-1, -1).
            **({} if options.window is None else {"window_size": (options.window - 1, 0)}),
        )
        # 4 also returns the log of the sums of exponentials, and so did 3 until 2025.
        tensor: Tensor = out[0] if isinstance(out, tuple) else out
        return tensor

    return attend


def _torch_kernel() -> Kernel:
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    # torch 2.11 takes no groups of heads.
    groups: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}

    def attend(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
        assert options.softcap is None  # choose_backend
        if not groups:
            k, v = repeat_heads(k, v, q.shape[1])
        if options.sinks is not None:
            return attend_with_sinks(q, k, v, options, forward=call, backward=torch_backward)
        out, _ = call(q, k, v, options)
        return out

    def call(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> tuple[Tensor, Tensor]:
        out: Any = varlen_attn(
            q,
            k,
            v,
            options.cu_seqlens,
            options.cu_seqlens,
            options.max_seqlen,
            options.max_seqlen,
            return_aux=AuxRequest(lse=True),
            scale=options.scale,
            window_size=_window_of(options),
            **groups,
        )
        return out[0], out[1]

    return attend


def torch_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor, options: AttentionOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward pass of torch's `varlen_attn`, which has no public name."""
    window = _window_of(options)
    gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.torch_attn._varlen_attn_backward(
        gradient,
        q,
        k,
        v,
        out,
        log_sums,
        options.cu_seqlens,
        options.cu_seqlens,
        options.max_seqlen,
        options.max_seqlen,
        window == (-1, 0),  # whether it is causal; a window with its right end at 0 is anyway
        torch.zeros(2, dtype=torch.uint64, device=q.device),  # the state of random numbers, without dropout
        options.scale,
        list(window),
    )
    return gradients


def _window_of(options: AttentionOptions) -> tuple[int, int]:
    return (-1 if options.window is None else options.window - 1, 0)


# --------------------------------------------------------------------------------------------- in transformers

# What some models of transformers add to their attention scores, beside one sink for each head.
_UNSUPPORTED = ("sinks", "position_bias")


_PREFIX = "ochat_train_varlen_"


def is_ours(name: str) -> bool:
    """Whether an `attn_implementation` is of `register`."""
    return name.startswith(_PREFIX)


def register(backend: Backend) -> str:
    """Register varlen attention and its masks with transformers; returns the name for `attn_implementation`."""
    # transformers takes names with sdpa or flash in them for its own and asks whether the model has those.
    name = f"{_PREFIX}{BACKENDS.index(backend)}"
    kernel = _load_kernel(backend)
    has_sinks = any(row.has_sinks for row in TABLE if row.backend == backend)

    def attend(
        module: torch.nn.Module,
        query: Tensor,  # [1, Hq, T, D]
        key: Tensor,  # [1, Hkv, T, D]
        value: Tensor,
        attention_mask: PackedMask | None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        cu_seqlens, max_seqlen = options.get("cu_seqlens"), options.get("max_seqlen")
        # Each of these would mix sequences or change the result without a word.
        if cu_seqlens is None or max_seqlen is None:
            raise ValueError("packed attention was called without cu_seqlens; run the model through PackedCausalLM")
        mask = PackedMask(options.get("sliding_window")) if attention_mask is None else attention_mask
        if not isinstance(mask, PackedMask) or query.shape[0] != 1 or query.shape[2] != key.shape[2]:
            raise ValueError("packed attention takes one row, no mask of the model's own and no cache")
        if mask.chunk is not None and max_seqlen > mask.chunk:
            raise ValueError(f"sequences of more than its chunk of {mask.chunk:,} tokens are not supported yet")
        if dropout := options.get("dropout", 0.0):
            raise ValueError(f"attention dropout of {dropout} is not supported; set it to 0 in the model's config")
        if getattr(module, "is_causal", True) is False:
            raise ValueError(f"{type(module).__name__} attends in both directions; a causal model is needed")
        for unsupported in _UNSUPPORTED:
            if options.get(unsupported) is not None:
                kind = type(module).__name__
                raise ValueError(f"{kind} needs {unsupported} in its attention, which is not supported yet")
        if options.get("s_aux") is not None and not has_sinks:
            raise ValueError(f"{type(module).__name__} has attention sinks, which {backend} does not have")
        scale = options.get("scaling")
        q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))
        kernel_options = AttentionOptions(
            cu_seqlens,
            max_seqlen,
            scale=query.shape[-1] ** -0.5 if scale is None else scale,
            window=mask.window,
            softcap=options.get("softcap"),
            sinks=options.get("s_aux"),
        )
        exchange: Exchange | None = options.get("exchange")
        if exchange is None:
            out = kernel(q, k, v, kernel_options)
        else:
            out = attend_in_group(kernel, q, k, v, kernel_options, exchange)
        return out[None], None  # [1, T, Hq, D]

    attend_function: Callable[..., tuple[Tensor, None]] = attend
    # Else one break in the graph of a layer, and nothing of a backend compiled that cannot be.
    AttentionInterface.register(name, attend_function if _is_traceable(backend) else torch.compiler.disable(attend))
    AttentionMaskInterface.register(name, packed_mask)
    return name
