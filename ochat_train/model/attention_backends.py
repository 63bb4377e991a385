"""The attention backends: a table of what each supports, and the choice among them."""

import importlib
import inspect
from dataclasses import dataclass
from typing import Literal, get_args

import torch

Backend = Literal["flash_attn_4", "flash_attn_3", "flash_attn", "torch", "torch_fa3", "sdpa"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)

# What we pass by name beside q, k and v; the order of the other arguments differs between the versions.
PASSED = {
    *("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"),
    *("softmax_scale", "causal", "window_size", "softcap"),
}


@dataclass(frozen=True, slots=True)
class Support:
    """What a backend does, forward and backward, on packed sequences on a range of GPUs: a row of TABLE.

    module: what must be importable; None: torch alone does it. install: what to do when it is not. majors: the compute
    capabilities, as the first and the last major number; None: any device. head_dims: the largest head size, and what
    it must be a multiple of; None: any. is_automatic: whether `auto` takes it; where its makers speak of a prototype,
    or say nothing of the backward pass, it is left to those who ask. All are for bfloat16 and float16, sdpa for any
    dtype. All take grouped heads, windows, int32 `cu_seqlens`, and sequences as long as memory holds.
    """

    backend: Backend
    module: str | None
    install: str
    majors: tuple[int, int] | None
    head_dims: tuple[int, int] | None
    has_softcap: bool
    is_automatic: bool

    @property
    def capabilities(self) -> str:
        """The range of compute capabilities, for people."""
        if self.majors is None:
            return "any device"
        first, last = self.majors
        return f"{last}.x" if first == last else f"{first}.0 to {last}.x"


_FA4 = ("flash_attn.cute", "pip install flash-attn-4")
_FA3 = ("flash_attn_interface", "build folder hopper of github.com/Dao-AILab/flash-attention")
_FA2 = ("flash_attn", "pip install 'ochat_train[gpu]'")
_TORCH = (None, "part of torch")

# In the order in which `auto` tries them: the fastest by its makers' figures first (docs/design.md, Decisions).
TABLE: tuple[Support, ...] = (
    # Read in 4.0.0b36. Its backward pass takes 9.x to 12.x, on 12.x without saying which sizes. On 10.x head size 256
    # has kernels of its own, which returned wrong gradients in 4.0.0b11 (NVIDIA/TransformerEngine issue 3216).
    # A softcap goes backward through its general score functions. On 9.x it is no faster than flash_attn_3.
    Support("flash_attn_4", *_FA4, majors=(10, 10), head_dims=(128, 8), has_softcap=False, is_automatic=True),
    # Read in 3.0.0b1.
    Support("flash_attn_3", *_FA3, majors=(9, 9), head_dims=(256, 8), has_softcap=True, is_automatic=True),
    # Read in 2.8.3, which is built for 8.0, 9.0, 10.0 and 12.0, and pads head sizes to multiples of 8 itself.
    Support("flash_attn", *_FA2, majors=(8, 12), head_dims=(256, 1), has_softcap=True, is_automatic=True),
    # Read in 2.13: the kernels of FlashAttention 2, without their softcap and without the padding.
    Support("torch", *_TORCH, majors=(8, 12), head_dims=(256, 8), has_softcap=False, is_automatic=True),
    Support("flash_attn_4", *_FA4, majors=(9, 11), head_dims=(128, 8), has_softcap=True, is_automatic=False),
    # torch's call with the kernels of flash_attn_3; torch 2.13 calls it a prototype. Its way to FlashAttention 4 reads
    # two results where that has returned four or five since 4.0.0b24, so it is not offered.
    Support("torch_fa3", *_FA3, majors=(9, 9), head_dims=(256, 8), has_softcap=False, is_automatic=False),
    Support("sdpa", *_TORCH, majors=None, head_dims=None, has_softcap=True, is_automatic=True),
)


@dataclass(frozen=True, slots=True)
class AttentionNeeds:
    """What a model asks of attention on a device. capability: of the CUDA device; None: it is another device."""

    capability: tuple[int, int] | None
    dtype: torch.dtype
    head_dim: int
    has_softcap: bool


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
    """Why the row cannot serve these needs; None when it can."""
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
