"""Byte-pair encoding of short pieces of text, compiled: the merge of the lowest rank first, the leftmost of equal ones.

Pieces of ASCII that came lately are looked up. The table of them has a fixed size: a piece that comes again stays until
another needs its place.
"""

import numpy as np
import numpy.typing as npt

from ochat_train.tokens.compiled import compiled

_MAX_CHARS = 256  # of a piece: the time grows with the square of it
_NUM_RECENT = 1 << 15  # pieces in the table, which takes 2 MB
_RECENT_IDS = 9  # of each, at most
_RECENT_CHARS = 18  # of each, at most: 9 of 7 bits in a number
_FACTOR = 0x1E3779B97F4A7C15
_NONE = np.iinfo(np.int64).max

Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]


def make_pairs(merges: Ints) -> Longs:
    """The table i64[S, 2] of merges i32[M, 3], which are (left, right, merged) by rank.

    A row is the pair, and its rank with the merged id; -1 where a row is free.
    """
    pairs = np.full((1 << int(2 * len(merges) + 1).bit_length(), 2), -1, np.int64)
    _fill_pairs(pairs, merges)
    return pairs


def make_recent() -> Longs:
    """An empty table of pieces that came lately: a row is a piece in two numbers, how many ids it has, and its ids."""
    return np.zeros((_NUM_RECENT, 3 + _RECENT_IDS), np.int64)


@compiled
def _fill_pairs(pairs: Longs, merges: Ints) -> None:
    for rank in range(len(merges)):
        key = np.int64(merges[rank, 0]) << 32 | merges[rank, 1]
        row = _find(pairs, key)
        pairs[row, 0], pairs[row, 1] = key, rank << 32 | merges[rank, 2]


@compiled
def _find(pairs: Longs, key: int) -> int:
    """The row of a pair, or the free one that would be its own."""
    last = len(pairs) - 1
    row = (key * _FACTOR >> 24) & last
    while pairs[row, 0] != key and pairs[row, 0] != -1:
        row = (row + 1) & last
    return row


@compiled
def encode_pieces(
    codes: npt.NDArray[np.uint32], ends: Longs, char_ids: Ints, pairs: Longs, recent: Longs
) -> tuple[Ints, Ints]:
    """The ids of pieces, and how many each has: -1 for one that is left out, long or with a character of no id.

    codes: u32[N], the characters of the pieces one after another. ends: i64[P]. char_ids: i32[C], the id of each
    character below C, -1 for those without one. pairs, recent: as `make_pairs` and `make_recent` make them.
    """
    ids, counts = np.empty(len(codes), np.int32), np.empty(len(ends), np.int32)
    own, ranks = np.empty(_MAX_CHARS, np.int32), np.empty(_MAX_CHARS, np.int64)
    total, start = 0, 0
    for piece in range(len(ends)):
        chars = codes[start : ends[piece]]
        start = ends[piece]
        first, second = _pack(chars)
        row = ((first ^ second * 31) * _FACTOR >> 24) & (len(recent) - 1)
        if first > 0 and recent[row, 0] == first and recent[row, 1] == second:
            num = recent[row, 2]
            for place in range(num):
                ids[total + place] = recent[row, 3 + place]
        else:
            num = _merge(chars, char_ids, pairs, own, ranks)
            for place in range(num):
                ids[total + place] = own[place]
            if first > 0 and 0 < num <= _RECENT_IDS:
                recent[row, 0], recent[row, 1], recent[row, 2] = first, second, num
                for place in range(num):
                    recent[row, 3 + place] = own[place]
        counts[piece] = num
        total += max(num, 0)
    return ids[:total], counts


@compiled
def _pack(chars: npt.NDArray[np.uint32]) -> tuple[np.int64, np.int64]:
    """The characters in two numbers, which no other ones have; 0 for what has no place among the recent pieces."""
    first, second = np.int64(0), np.int64(0)
    for place in range(len(chars) if len(chars) <= _RECENT_CHARS else 0):
        code = np.int64(chars[place])
        if code == 0 or code > 127:
            return np.int64(0), np.int64(0)
        if place < 9:
            first = first << 7 | code
        else:
            second = second << 7 | code
    return first, second


@compiled
def _merge(chars: npt.NDArray[np.uint32], char_ids: Ints, pairs: Longs, ids: Ints, ranks: Longs) -> int:
    """Put the ids of a piece into `ids`; their number, or -1. ranks: room for what becomes of each with the next."""
    num = len(chars)
    if num > _MAX_CHARS:
        return -1
    for place in range(num):
        ids[place] = char_ids[chars[place]] if chars[place] < len(char_ids) else -1
        if ids[place] < 0:
            return -1
    for place in range(num - 1):
        ranks[place] = _rank(pairs, ids, place)
    while num > 1:
        best = int(np.argmin(ranks[: num - 1]))
        if ranks[best] == _NONE:
            break
        ids[best] = ranks[best] & 0xFFFFFFFF
        num -= 1
        for place in range(best + 1, num):
            ids[place], ranks[place - 1] = ids[place + 1], ranks[place]
        for place in range(max(best - 1, 0), min(best + 1, num - 1)):
            ranks[place] = _rank(pairs, ids, place)
    return num


@compiled
def _rank(pairs: Longs, ids: Ints, place: int) -> int:
    """The rank and the merged id of an id with the next; _NONE where they are not merged."""
    row = _find(pairs, np.int64(ids[place]) << 32 | ids[place + 1])
    return pairs[row, 1] if pairs[row, 0] >= 0 else _NONE
