"""What a host would wait for if the tensors were on a GPU, seen on a CPU."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operations that give a value to Python, or whose result has a size that depends on values.
OPERATIONS = {
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "one_hot",
    "repeat_interleave",
    "unique_consecutive",
    "unique_dim",
}
# Methods that read a tensor's memory, which on a CPU is no operation.
READS = (Tensor.cpu, Tensor.numpy, Tensor.tolist)


@dataclass(frozen=True, slots=True)
class Wait:
    """What was asked, and the file of whoever asked, outside of torch."""

    name: str
    file: str


@contextmanager
def host_waits() -> Iterator[list[Wait]]:
    """Fills up with what a host would wait for."""
    waits: list[Wait] = []
    with _Operations(waits), _Reads(waits):
        yield waits


class _Operations(TorchDispatchMode):
    def __init__(self, waits: list[Wait]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of torch
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").partition(".")[0]
        masks = [leaf for leaf in tree_leaves(args[1:]) if isinstance(leaf, Tensor) and leaf.dtype == torch.bool]
        if name in OPERATIONS or (name.startswith("index") and masks):
            self.waits.append(Wait(name, _asking_file()))
        return func(*args, **(kwargs or {}))


class _Reads(TorchFunctionMode):
    def __init__(self, waits: list[Wait]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            self.waits.append(Wait(func.__name__, _asking_file()))
        return func(*args, **(kwargs or {}))


def _asking_file() -> str:
    frame = sys._getframe(2)
    while frame.f_back is not None and (file := frame.f_code.co_filename) and ("/torch/" in file or file == __file__):
        frame = frame.f_back
    return frame.f_code.co_filename
