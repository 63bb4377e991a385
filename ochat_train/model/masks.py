"""The masks of transformers' models on packed batches: a few numbers for our attention.

A model asks transformers for the mask of each kind of its layers, and transformers asks the function that is registered
for the attention. So the mask that a layer gets is the one that it would have in eager attention, also where the layer
does not pass its window on by itself.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from transformers import masking_utils

_CHANGES_IT = "its attention changes its mask by itself, which packed attention cannot do"


@dataclass(frozen=True)
class PackedMask:
    """A causal mask inside each sequence. window: how many tokens a token sees, itself among them; None: all before it.

    chunk: tokens see those of the same chunk of this many positions of their sequence; None: of all.
    """

    window: int | None = None
    chunk: int | None = None

    def __getitem__(self, _: object) -> NoReturn:
        raise ValueError(_CHANGES_IT)

    @property
    def dtype(self) -> NoReturn:
        """A model asks for it before it adds something to its mask."""
        raise ValueError(_CHANGES_IT)


def packed_mask(*, mask_function: Callable[..., Any], **_: Any) -> PackedMask:
    """What transformers makes the mask of, as a PackedMask: the mask function of `AttentionMaskInterface`.

    Raises ValueError for a mask with other parts than causal, a window, and chunks.
    """
    parts = _parts(mask_function)
    windows, chunks = ([value for kind, value in parts if kind == name] for name in ("sliding_window", "chunk_size"))
    return PackedMask(min(windows, default=None), min(chunks, default=None))


def _parts(mask_function: Callable[..., Any]) -> list[tuple[str, int]]:
    """The windows and chunks of a mask, which is made of functions that were made by transformers' factories."""
    if mask_function is masking_utils.causal_mask_function:
        return []
    made_by = mask_function.__qualname__.partition(".")[0]
    values = inspect.getclosurevars(mask_function).nonlocals
    if made_by == masking_utils.and_masks.__name__:
        return [part for inner in values["mask_functions"] for part in _parts(inner)]
    if made_by == masking_utils.sliding_window_overlay.__name__:
        return [("sliding_window", int(values["sliding_window"]))]
    if made_by == masking_utils.chunked_overlay.__name__:
        return [("chunk_size", int(values["chunk_size"]))]
    raise ValueError(f"its attention has a mask of {mask_function.__qualname__}, which packed attention does not have")
