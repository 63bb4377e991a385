"""Work done ahead by a background thread, so that the training loop finds its batches ready."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")
R = TypeVar("R")
_NUM_AHEAD = 4  # items made before they are asked for


class Ready(NamedTuple, Generic[T, R]):
    """An item and what was made of it. waited_s: how long the loop waited for it."""

    item: T
    made: R
    waited_s: float


@contextmanager
def prefetch(items: Iterable[T], make: Callable[[T], R]) -> Iterator[Iterator[Ready[T, R]]]:
    """Every item with `make(item)`, in order, made ahead of whoever iterates.

    One thread draws the items and makes, and at most four are made before they are asked for. What `items` or
    `make` raises is raised at its place in the order. At the end of the with-block nothing is drawn any more. A thread
    suffices where the work is numpy, copying and reading of mapped files, which let other threads run.
    """
    pairs = ((item, make(item)) for item in items)
    pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    ahead = deque(pool.submit(next, pairs, None) for _ in range(_NUM_AHEAD))

    def drain() -> Iterator[Ready[T, R]]:
        while True:
            started = time.perf_counter()
            pair = ahead.popleft().result()
            if pair is None:
                return
            ahead.append(pool.submit(next, pairs, None))
            yield Ready(*pair, time.perf_counter() - started)

    try:
        yield drain()
    finally:
        pool.shutdown(cancel_futures=True)
