"""Functions compiled to machine code by numba, for loops over examples that no array operation expresses."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

from numba import njit

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """The function, compiled at its first call, and then run without holding up other threads.

    The result is kept beside the module or in the user's cache folder for later processes; where neither can be
    written, each process compiles for itself.
    """
    try:
        return cast(F, njit(cache=True, nogil=True)(function))
    except RuntimeError:  # no place for a cache
        return cast(F, njit(nogil=True)(function))
