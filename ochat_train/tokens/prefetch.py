"""Work done ahead by background threads, so that the training loop finds its batches ready."""

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from queue import Full, Queue
from threading import Event, Thread
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")
R = TypeVar("R")
_LOOK_S = 0.1  # how often a feeder that is ahead looks whether it is still wanted


class Ready(NamedTuple, Generic[T, R]):
    """An item and what was made of it. waited_s: how long the loop waited for it."""

    item: T
    made: R
    waited_s: float


@contextmanager
def prefetch(
    items: Iterable[T], make: Callable[[T], R], *, num_ahead: int = 4, num_workers: int = 2
) -> Iterator[Iterator[Ready[T, R]]]:
    """Every item with `make(item)`, in order, made ahead of whoever iterates.

    One thread draws the items, `num_workers` threads make, and about `num_ahead` are made or in the making. What
    `items` or `make` raises is raised at its place in the order. At the end of the with-block nothing is drawn any
    more. Threads suffice where the work is numpy, copying and reading of mapped files, which let other threads run.
    """
    queue: Queue[tuple[T, Future[R]] | BaseException | None] = Queue(num_ahead)
    is_over = Event()

    def put(entry: tuple[T, Future[R]] | BaseException | None) -> bool:
        while not is_over.is_set():
            try:
                queue.put(entry, timeout=_LOOK_S)
                return True
            except Full:
                continue
        return False

    def feed() -> None:
        try:
            for item in items:
                if is_over.is_set() or not put((item, pool.submit(make, item))):
                    return
            put(None)
        except BaseException as error:
            put(error)

    def drain() -> Iterator[Ready[T, R]]:
        while True:
            started = time.perf_counter()
            entry = queue.get()
            if entry is None:
                return
            if isinstance(entry, BaseException):
                raise entry
            item, future = entry
            made = future.result()
            yield Ready(item, made, time.perf_counter() - started)

    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="prefetch")
    feeder = Thread(target=feed, name="prefetch-feed", daemon=True)
    feeder.start()
    try:
        yield drain()
    finally:
        is_over.set()
        feeder.join()
        pool.shutdown(cancel_futures=True)
