"""The order of the data: which examples an epoch has, and which of them stands where."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from hashlib import sha256
from typing import Any

import numpy as np
import numpy.typing as npt

from ochat_train.tokens.compiled import compiled

Indices = npt.NDArray[np.int64]
EpochOrder = npt.NDArray[np.signedinteger[Any]]

_VERSION = 2  # count up when the same arguments give another order than before
_DRAWN = 2**16  # raw numbers at once
_OF_EPOCH, _OF_SOURCE = 0, 1  # what a shuffle is of: no two of a run share their random numbers


@dataclass(frozen=True, slots=True)
class SourceShare:
    """How often an epoch of the run passes over one source.

    members: i64[n], the source's positions in the store, ascending. epochs: passes over it in an epoch of the run, such
    as 2 or 0.25, a positive decimal number.
    """

    name: str
    members: Indices
    epochs: float

    def num_drawn(self, num_epochs: int) -> int:
        """Draws from the source in so many epochs of the run, in exact arithmetic."""
        return int(Fraction(str(self.epochs)) * len(self.members) * num_epochs)


class DataOrder:
    """The examples of every epoch, in the order in which they are trained.

    num_examples: of the store. seed: of the shuffles; None: the order of the store, every epoch. shares: of all
    sources; none: every example once an epoch.

    With shares the run goes through each source round and round, in a fixed shuffled order of its own, and an epoch
    takes the next `epochs` times n examples of it. So a quarter of a source an epoch is all of it in four, and at the
    end of every epoch no example of a source was drawn more than once more often than another. The draws of an epoch
    are then shuffled together.
    """

    def __init__(self, num_examples: int, seed: int | None, shares: Sequence[SourceShare] = ()) -> None:
        self._num_stored = num_examples
        self._seed = seed
        self._shares = tuple(shares)

    def num_examples(self, epoch: int) -> int:
        """Examples of one epoch."""
        return self.total(epoch + 1) - self.total(epoch)

    def total(self, num_epochs: int) -> int:
        """Examples of the first `num_epochs` epochs."""
        if not self._shares:
            return self._num_stored * num_epochs
        return sum(share.num_drawn(num_epochs) for share in self._shares)

    def seek(self, consumed: int) -> tuple[int, int]:
        """The epoch that holds the next example after the first `consumed` of the run, and its place there."""
        if not self.total(1) and not self.total(10**9):
            return 0, 0
        epoch = 1
        while self.total(epoch) <= consumed:
            epoch *= 2
        epoch = bisect_right(range(epoch), consumed, key=self.total) - 1
        return epoch, consumed - self.total(epoch)

    def examples(self, epoch: int) -> EpochOrder:
        """i32[num_examples(epoch)]: the positions in the store of the epoch's examples; i64 for a store above 2^31.

        Takes 4 bytes and about 0.03 us an example, and as much again with shares.
        """
        dtype = np.int32 if self._num_stored < 2**31 else np.int64
        if not self._shares:
            return self._shuffled(np.arange(self._num_stored, dtype=dtype), _OF_EPOCH, epoch)
        passes = [np.empty(0, dtype)]
        for number, share in enumerate(self._shares):
            members = self._shuffled(np.array(share.members, dtype), _OF_SOURCE, number)
            start, stop, size = share.num_drawn(epoch), share.num_drawn(epoch + 1), max(len(members), 1)
            for begin in range(start - start % size, stop, size):
                passes.append(members[max(start - begin, 0) : stop - begin])
        return self._shuffled(np.concatenate(passes), _OF_EPOCH, epoch)

    def _shuffled(self, values: EpochOrder, kind: int, number: int) -> EpochOrder:
        """The values, shuffled in place, as by RandomState(PCG64(SeedSequence([seed, kind, number]))).shuffle(values).

        numpy promises the same raw numbers of a bit generator in every version. Its own shuffle holds up other threads,
        for 7 s at 100 M, and takes three times as long.
        """
        if self._seed is not None:
            bits = np.random.PCG64(np.random.SeedSequence([self._seed, kind, number]))
            last = len(values) - 1
            while last > 0:
                last = _shuffle_back(values, bits.random_raw(min(last, _DRAWN)).view(np.uint32), last)
        return values

    @property
    def digest(self) -> str:
        """SHA-256 of everything that the order is a function of: where it is equal, a position means the same."""
        digest = sha256(repr((_VERSION, self._num_stored, self._seed)).encode())
        for share in self._shares:
            digest.update(repr((share.epochs, len(share.members))).encode())
            digest.update(np.ascontiguousarray(share.members, dtype="<i8").data)
        return digest.hexdigest()


@compiled
def _shuffle_back(values: EpochOrder, numbers: npt.NDArray[np.uint32], last: int) -> int:
    """Exchange each of values[last], values[last - 1], ... with one at or before it, while there are numbers.

    Returns the place at which to go on. A number whose lowest bits are above the place is passed over, so that all
    places are equally likely.

    Source: R. Durstenfeld, Algorithm 235: Random permutation, 1964.
    """
    mask = np.uint32(2**32 - 1)  # the lowest bits that the place needs
    for number in numbers:
        if last < 1:
            break
        while mask >> np.uint32(1) >= last:
            mask >>= np.uint32(1)
        other = np.int64(number & mask)
        if other <= last:
            values[last], values[other] = values[other], values[last]
            last -= 1
    return last
