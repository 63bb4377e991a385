"""The order of the data: which examples an epoch has, and which of them stands where.

An epoch is a pseudo-random permutation that can be read from any place: example k is computed from k, nothing is
stored. So a position is one number, seeking costs nothing, and the memory is that of what is read at once.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from hashlib import sha256

import numpy as np
import numpy.typing as npt

from ochat_train.tokens.compiled import compiled

Indices = npt.NDArray[np.int64]
_Keys = npt.NDArray[np.uint64]

_NUM_ROUNDS = 16  # fewer leave orders of a handful of examples unevenly likely
_VERSION = 1  # count up when the same arguments give another order than before
_OF_EPOCH, _OF_SOURCE = 0, 1  # what a key is of: no two permutations of a run share one


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
        """The epoch that holds the example behind the first `consumed` of the run, and its place there."""
        if not self.total(1) and not self.total(10**9):
            return 0, 0
        epoch = 1
        while self.total(epoch) <= consumed:
            epoch *= 2
        epoch = bisect_right(range(epoch), consumed, key=self.total) - 1
        return epoch, consumed - self.total(epoch)

    def examples(self, epoch: int, start: int, stop: int) -> Indices:
        """i64[stop - start]: the positions in the store of the epoch's examples from `start` to `stop`."""
        draws = np.arange(start, stop, dtype=np.int64)
        if self._seed is not None:
            draws = _permute(draws, self.num_examples(epoch), _keys(self._seed, _OF_EPOCH, epoch))
        if not self._shares:
            return draws
        found = np.empty_like(draws)
        first = 0  # the sources' draws lie one behind the other
        for number, share in enumerate(self._shares):
            before = share.num_drawn(epoch)
            is_here = (draws >= first) & (draws < first + share.num_drawn(epoch + 1) - before)
            places = (draws[is_here] - first + before) % max(len(share.members), 1)
            if self._seed is not None:
                places = _permute(places, len(share.members), _keys(self._seed, _OF_SOURCE, number))
            found[is_here] = share.members[places]
            first += share.num_drawn(epoch + 1) - before
        return found

    @property
    def digest(self) -> str:
        """SHA-256 of everything that the order is a function of: where it is equal, a position means the same."""
        digest = sha256(repr((_VERSION, self._num_stored, self._seed)).encode())
        for share in self._shares:
            digest.update(repr((share.epochs, len(share.members))).encode())
            digest.update(np.ascontiguousarray(share.members, dtype="<i8").data)
        return digest.hexdigest()


@cache
def _keys(seed: int, kind: int, number: int) -> _Keys:
    """The round keys of one permutation. numpy promises that a SeedSequence gives the same state in every version."""
    return np.random.SeedSequence([seed, kind, number]).generate_state(_NUM_ROUNDS, np.uint64).astype(np.uint64)


@compiled
def _permute(places: Indices, size: int, keys: _Keys) -> Indices:
    """Where a pseudo-random permutation of range(size) takes each of the places.

    A Feistel network over pairs (left, right) of about sqrt(size) values each: a round adds to one half a hash of the
    other. A result that is no place of range(size), which is rare, goes through the network again. For some sizes all
    such permutations are even; so half of the keys let the places 0 and 1 change places before.

    Source: J. Black and P. Rogaway, Ciphers with Arbitrary Finite Domains, 2002 (generalised Feistel, cycle walking).
    The hash is the finaliser of SplitMix64 (G. Steele, D. Lea and C. Flood, 2014).
    """
    num_left = np.uint64(max(1, np.ceil(np.sqrt(size))))
    num_right = (np.uint64(size) + num_left - np.uint64(1)) // num_left
    half_word = np.uint64(32)
    permuted = np.empty_like(places)
    for index in range(len(places)):
        value = np.uint64(places[index])
        if value < np.uint64(2) and size > 1:
            value ^= keys[0] & np.uint64(1)
        while True:
            left, right = value % num_left, value // num_left
            for number in range(len(keys)):
                is_left = number % 2 == 0
                mixed = (right if is_left else left) ^ keys[number]
                mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
                mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
                mixed ^= mixed >> np.uint64(31)
                if is_left:
                    left += ((mixed >> half_word) * num_left) >> half_word
                    left -= num_left if left >= num_left else np.uint64(0)
                else:
                    right += ((mixed >> half_word) * num_right) >> half_word
                    right -= num_right if right >= num_right else np.uint64(0)
            value = right * num_left + left
            if value < np.uint64(size):
                break
        permuted[index] = np.int64(value)
    return permuted
