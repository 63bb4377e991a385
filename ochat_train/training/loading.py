"""A model that one process of each node loads, and whose weights the node's other processes map into their memory."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ochat_train.training.engine import World, gather_objects, say, together

_ALIGNMENT = 64  # bytes


class _Weight(NamedTuple):
    """A parameter, and its first byte in the shared memory."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype
    requires_grad: bool


class _Shared(NamedTuple):
    """A model in shared memory, of `size` bytes of weights; after these, all else of it, pickled.

    path: of the memory, for processes of this machine.
    """

    path: str
    size: int
    weights: list[_Weight]


def load_once(load: Callable[[], PreTrainedModel], world: World) -> PreTrainedModel:
    """The model that `load` returns, on every rank. All call it together; only the first rank of each node loads.

    The ranks of a node share the memory of the weights, so that it holds the model once; a page is copied when a rank
    writes to it. A model that cannot be pickled is loaded by each rank. Raises Refused when `load` raises ValueError.
    """
    model = together(lambda: load() if world.local_rank == 0 else None)
    # No file system limits it, as the small /dev/shm of containers would.
    with open(os.memfd_create("weights"), "w+b") as memory:
        shared: _Shared | str | None = None
        if model is not None and world.local_size > 1:
            try:
                shared = _share(model, memory.fileno())
            except (pickle.PicklingError, TypeError, AttributeError) as error:
                shared = f"{type(model).__name__} cannot be pickled ({error})"
        of_ranks = gather_objects(shared)
        if reasons := [found for found in of_ranks if isinstance(found, str)]:
            say(world, f"each process loads the model for itself: {reasons[0]}")
            own = model
            return together(lambda: load() if own is None else own)
        if model is None:
            of_node = of_ranks[world.rank - world.local_rank]
            assert isinstance(of_node, _Shared)
            model = _map(of_node)
        gather_objects(None)  # all have mapped it; the memory lives as long as its mappings
    return model


class _Pickler(pickle.Pickler):
    """Pickles a model with numbers in place of its parameters."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self.parameters: dict[int, nn.Parameter] = {}

    def persistent_id(self, thing: Any) -> int | None:
        if not isinstance(thing, nn.Parameter):
            return None
        self.parameters[id(thing)] = thing
        return list(self.parameters).index(id(thing))


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, parameters: list[nn.Parameter]) -> None:
        super().__init__(file)
        self.parameters = parameters

    def persistent_load(self, number: int) -> nn.Parameter:
        return self.parameters[number]


def _share(model: PreTrainedModel, file: int) -> _Shared:
    """Move the weights of `model` into the file, and write the rest of it after them."""
    weights, size = [], 0
    for parameter in model.parameters():  # a tied one comes once
        weights.append(_Weight(size, parameter.shape, parameter.dtype, parameter.requires_grad))
        size += -(-parameter.nbytes // _ALIGNMENT) * _ALIGNMENT
    shared = _Shared(f"/proc/{os.getpid()}/fd/{file}", size, weights)
    os.ftruncate(file, size)
    with open(os.dup(file), "r+b") as rest:
        rest.seek(size)
        pickler = _Pickler(rest)
        pickler.parameters = {id(parameter): parameter for parameter in model.parameters()}
        pickler.dump(model)
        assert len(pickler.parameters) == len(weights)
    for parameter, view in zip(model.parameters(), _views(shared, is_private=False), strict=True):
        parameter.data = view.copy_(parameter.data)  # one after the other: the old one is freed
    for parameter, view in zip(model.parameters(), _views(shared, is_private=True), strict=True):
        parameter.data = view  # what this rank writes is from now on its own
    return shared


def _map(shared: _Shared) -> PreTrainedModel:
    """The model in the shared memory of another rank, in pages that are copied when they are written to."""
    views = zip(_views(shared, is_private=True), shared.weights, strict=True)
    parameters = [nn.Parameter(view, weight.requires_grad) for view, weight in views]
    with Path(shared.path).open("rb") as file:
        file.seek(shared.size)
        model: PreTrainedModel = _Unpickler(file, parameters).load()
    return model


def _views(shared: _Shared, *, is_private: bool) -> list[Tensor]:
    """The weights in the shared memory; is_private: a page is copied when it is written to."""
    memory = torch.from_file(shared.path, shared=not is_private, size=shared.size, dtype=torch.uint8)
    views = []
    for weight in shared.weights:
        num_bytes = weight.shape.numel() * weight.dtype.itemsize
        views.append(memory[weight.offset : weight.offset + num_bytes].view(weight.dtype).view(weight.shape))
    return views
