"""Functions compiled to machine code by numba, for loops over examples that no array operation expresses."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar, cast

from numba import njit

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """The function, compiled at its first call, and then run without holding up other threads.

    The result is kept beside the module or in the user's cache folder for later processes; where neither can be
    written, or has no room, each process compiles for itself.
    """
    try:
        dispatcher = njit(cache=True, nogil=True)(function)
    except RuntimeError:  # no place for a cache
        return cast(F, njit(nogil=True)(function))
    if cache := getattr(dispatcher, "_cache", None):  # None where numba is switched off
        save = cache.save_overload

        def save_if_possible(*result: Any) -> None:
            with suppress(OSError):
                save(*result)

        cache.save_overload = save_if_possible
    return cast(F, dispatcher)
