"""What is made ahead comes in order, is never more than asked for, and stops when nobody wants it any more."""

import itertools
import threading
import time
from collections.abc import Iterator

import pytest

import ochat_train.tokens.prefetch
from ochat_train.tokens.prefetch import prefetch
from tests.waiting import HANG_S


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


class Clock:
    """The time of the prefetching, which passes only where a test says so. was_read: released at each look at it."""

    def __init__(self) -> None:
        self.now, self.was_read = 0.0, threading.Semaphore(0)

    def perf_counter(self) -> float:
        now = self.now
        self.was_read.release()
        return now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(ochat_train.tokens.prefetch, "time", made)
    return made


@pytest.mark.parametrize("num_ahead", [1, 3, 100])
def test_everything_comes_once_and_in_order(num_ahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ochat_train.tokens.prefetch, "_NUM_AHEAD", num_ahead)

    def make(number: int) -> int:
        time.sleep(0.001 * (number * 7 % 3))
        return number * number

    with prefetch(range(40), make) as ready:
        assert [(item, made) for item, made, _ in ready] == [(number, number * number) for number in range(40)]


def test_nothing_to_make_is_nothing_to_get() -> None:
    with prefetch([], str) as ready:
        assert list(ready) == []


def test_work_is_done_while_the_loop_is_busy_and_then_it_does_not_wait(clock: Clock) -> None:
    made = threading.Semaphore(0)

    def make(number: int) -> int:
        clock.now += 10
        made.release()
        return number

    with prefetch(range(3), make) as ready:
        for _ in range(3):
            assert made.acquire(timeout=HANG_S)  # before the loop asked for anything
        assert [waited for _, _, waited in ready] == [0, 0, 0]


def test_the_time_that_the_loop_waits_is_reported(clock: Clock) -> None:
    def make(number: int) -> int:
        for _ in range(2 if number else 1):  # until the loop has taken the item before, and asked for this one
            assert clock.was_read.acquire(timeout=HANG_S)
        clock.now += 10
        return number

    with prefetch(range(3), make) as ready:
        assert [waited for _, _, waited in ready] == [10, 10, 10]


def test_only_so_much_is_made_ahead() -> None:
    drawn, made = itertools.count(), threading.Semaphore(0)
    with prefetch(drawn, lambda _: made.release()) as ready:
        for _ in range(4):
            assert made.acquire(timeout=HANG_S)
        assert not made.acquire(timeout=0.1)
        assert next(drawn) == 4
        assert next(ready).item == 0


@pytest.mark.parametrize("place", ["items", "make"])
def test_a_mistake_is_raised_at_its_place(place: str) -> None:
    def items() -> Iterator[int]:
        for number in range(10):
            if place == "items" and number == 4:
                raise ValueError("item 4")
            yield number

    def make(number: int) -> int:
        if place == "make" and number == 4:
            raise ValueError("item 4")
        return number

    got = []
    with pytest.raises(ValueError, match="item 4"), prefetch(items(), make) as ready:
        for item, _, _ in ready:
            got.append(item)
    assert got == [0, 1, 2, 3]


def test_a_loop_that_ends_early_stops_all_of_it() -> None:
    drawn = itertools.count()
    with prefetch(drawn, str) as ready:
        assert [next(ready).item for _ in range(3)] == [0, 1, 2]
    after = next(drawn)
    time.sleep(0.2)
    assert next(drawn) == after + 1  # ours alone


def test_an_error_in_the_loop_is_not_hidden() -> None:
    with pytest.raises(KeyError), prefetch(itertools.count(), str) as ready:
        next(ready)
        raise KeyError
