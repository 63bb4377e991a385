"""Duplicates, leaks and the held-out split: one decision over the keys of all conversations.

It depends on the conversations alone: not on their order, their batches or the number of workers. Only among records
equal to the last byte, ids included, the earlier one counts as the better.

Keys are sorted in memory by numpy, the bands of the signatures one after another. docs/data.md says how much memory and
time that takes.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from ochat_train.conversations.text_keys import NUM_HASHES, U64, Indices, Signatures, TextKeys, mix, text_keys

Flags = npt.NDArray[np.bool_]

KEEP, EXACT, PREFIX, NEAR, LEAK = range(5)  # Decisions.status
DROP_REASONS = {
    EXACT: "exact_duplicate",
    PREFIX: "earlier_snapshot",
    NEAR: "near_duplicate",
    LEAK: "in_eval_source",
}

GROUP_NEAR = 0.8  # the similarity that puts conversations into one group of the split, where `near` names none
BAND_RECALL = 0.98  # of the pairs exactly at the threshold; more of those above it
MAX_LEADERS = 64  # conversations of one run of equal band keys that are compared with all others of the run
BLOCK_SIZE = 1 << 16  # signatures that are copied at once


@dataclass(frozen=True, slots=True)
class Decisions:
    """Which of N conversations stay and which are held out, in the order in which they came.

    status: u8[N], KEEP, EXACT, PREFIX, NEAR or LEAK. of: i64[N], the position of the conversation for which this one is
    dropped, -1 where it stays. For EXACT and PREFIX that one is dropped by neither of the two rules; it, or a NEAR's,
    may itself be NEAR to a third. A LEAK's is held out, and may be dropped for another that is. held_out: bool[N],
    never true of a dropped one.
    """

    status: npt.NDArray[np.uint8]
    of: Indices
    held_out: Flags


def needs_minhash(near: float | None, eval_fraction: float) -> bool:
    """Whether `find_duplicates` reads signatures: for near-duplicates, and for a held-out split without leaks."""
    return near is not None or eval_fraction > 0


def find_duplicates(
    shards: Iterable[TextKeys],
    *,
    exact: bool,
    prefix: bool,
    near: float | None,
    eval_fraction: float,
    work_dir: Path | None = None,
) -> Decisions:
    """Which of the conversations of `shards` stay, and which of those are held out of training.

    `shards` is iterated once. Their keys are mapped from files in `work_dir` (None: the system's folder for temporary
    files), which are removed at the end. The rules, in their order:

    Those whose source is held out, by `keys.held_out`, are. What they have in common with the others is LEAK, as
    `_drop_leaks` says; by the rules below none of either side is a duplicate of the other.
    `prefix`: a conversation that another one begins with, up to one of its answers, is PREFIX of the one with most
    answers that begins so, the best of these by priority. Sources and conditions play no part, and of the weights only
    which are above 0: it begins so only if it has a loss on the same messages.
    `exact`: of conversations with the same own key, so with a loss on the same messages, all but the best are EXACT,
    also across sources and conditions. So what these two rules drop is trained in the one that stays.
    `near`: conversations of one condition are compared, best first, in each of several bands of their signatures;
    one that shares the band with a better one, and is estimated to be similar to it by at least `near`, is NEAR. The
    similarity is Jaccard's: shared shingles / all shingles of the two. A pair exactly at `near` shares a band with a
    chance of at least 0.98 (at 0.8, a pair at 0.9: 0.99999). Conversations of one record are no copies. Among more
    than 64 that share a band, and are not similar to one another, only the best 64 are compared with all the others;
    the rest stay.
    `eval_fraction` above 0: the others that stay are grouped over all conditions, where they are of one record, or
    the first question is the same (below 5 words: it and its answer), whatever the system text and the rest, or the
    estimated similarity is at least `near`, or 0.8 where that is None, and on from one to the next; where more than 64
    share a band, the rest are in one group. A group is held out if a hash of its smallest own key says so, which it
    does for a share `eval_fraction` of all keys.

    Raises ValueError for a threshold outside (0, 1] and a fraction outside [0, 1). Worked example, all rules on: of
    A "Hi" / "Hello", a longer B "Hi" / "Hello" / "Bye" / "Bye!", and C as B with weight 0.1, in this order, status
    is PREFIX, KEEP, EXACT and of is 1, -1, 1.
    """
    threshold = GROUP_NEAR if near is None else near
    if not 0 < threshold <= 1:
        raise ValueError(f"the near-duplicate threshold {threshold} is not above 0 and at most 1; 0.8 is usual")
    if not 0 <= eval_fraction < 1:
        raise ValueError(f"eval_fraction {eval_fraction} is not at least 0 and below 1; 0.01 holds out a hundredth")

    with TemporaryDirectory(prefix="duplicates-", dir=work_dir) as folder:
        keys = _collect(shards, Path(folder))
        size = len(keys.own)
        decisions = Decisions(np.zeros(size, np.uint8), np.full(size, -1), np.zeros(size, np.bool_))
        if needs_minhash(near, eval_fraction):
            assert keys.signatures.size == size * NUM_HASHES, "the keys were made without MinHash"
        if keys.held_out.any():
            _drop_leaks(keys, decisions, near)
            keys = _set_apart(keys, decisions)
        if prefix:
            _drop_prefixes(keys, decisions)
        if exact:
            _drop_copies(keys, decisions)
        if near is not None:
            _drop_near(keys, decisions, threshold)
        _hold_out(keys, decisions, threshold, eval_fraction)
    return decisions


def _collect(shards: Iterable[TextKeys], folder: Path) -> TextKeys:
    """The keys of all shards, one after another, in mapped files."""
    # Appended to files, since how many there are shows only at the end.
    names = [field.name for field in fields(TextKeys)]
    with ExitStack() as stack:
        files = {name: stack.enter_context((folder / name).open("wb")) for name in names}
        last = text_keys((), minhash=False)
        for last in shards:
            for name in names:
                np.ascontiguousarray(getattr(last, name)).tofile(files[name])
    return TextKeys(*(_map(folder / name, getattr(last, name)) for name in names))


def _map(path: Path, like: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The file as an array of rows like those of `like`."""
    if not path.stat().st_size:  # an empty file cannot be mapped
        return like[:0]
    return np.asarray(np.memmap(path, like.dtype, "r")).reshape(-1, *like.shape[1:])


def _drop_leaks(keys: TextKeys, decisions: Decisions, near: float | None) -> None:
    """Drop each conversation that leaks one that is held out.

    It leaks the one whose turns are its own, or begin with its own up to an answer, or begin its own, whatever the
    system texts, conditions and weights; or, where `near` is not None, one that shares a band with it and is estimated
    to be similar to it by at least that. Of those that share a band the best 64 are compared.
    """
    ends = np.cumsum(keys.num_prefixes + 1)
    assert len(keys.said) == ends[-1], "the keys were made without what is said"
    is_eval = np.repeat(keys.held_out, keys.num_prefixes + 1)
    is_whole = np.zeros(len(keys.said), np.bool_)
    is_whole[ends - 1] = True
    # What is whole on one side is looked for among all beginnings on the other, the whole ones among them.
    for trained, held_out in ((~is_eval & is_whole, is_eval), (~is_eval, is_eval & is_whole)):
        looked_for, table = np.flatnonzero(trained), np.flatnonzero(held_out)
        table = table[np.argsort(keys.said[table], kind="stable")]
        is_there, places = _look_up(keys.said[looked_for], keys.said[table])
        leaks = np.searchsorted(ends, looked_for[is_there], "right")
        decisions.status[leaks] = LEAK
        decisions.of[leaks] = np.searchsorted(ends, table[places[is_there]], "right")
    if near is not None:
        _drop_near_leaks(keys, decisions, near)


def _drop_near_leaks(keys: TextKeys, decisions: Decisions, near: float) -> None:
    for band_keys, positions in _bands(keys, decisions, near):
        is_eval = keys.held_out[positions]
        order = np.lexsort((*_best_first(keys.priority, positions[is_eval]), band_keys[is_eval]))
        held_out, table = positions[is_eval][order], band_keys[is_eval][order]
        first, end = (np.searchsorted(table, band_keys[~is_eval], side) for side in ("left", "right"))
        trained = positions[~is_eval]
        for place in range(MAX_LEADERS):
            left = (first + place < end) & (decisions.status[trained] == KEEP)
            trained, first, end = trained[left], first[left], end[left]
            similar = _are_similar(keys.signatures, held_out[first + place], trained, near)
            decisions.status[trained[similar]] = LEAK
            decisions.of[trained[similar]] = held_out[first[similar] + place]


def _set_apart(keys: TextKeys, decisions: Decisions) -> TextKeys:
    """Keys by which a conversation and a held-out one are no duplicates, and a leak is none of any."""
    side = keys.held_out * np.uint64(0x9E3779B97F4A7C15)
    side ^= (decisions.status == LEAK) * mix(np.arange(1, len(side) + 1, dtype=np.uint64))
    return replace(
        keys,
        own=keys.own ^ side,
        prefixes=keys.prefixes ^ np.repeat(side, keys.num_prefixes),
        condition=keys.condition ^ side,
    )


def _drop_prefixes(keys: TextKeys, decisions: Decisions) -> None:
    order = np.argsort(keys.prefixes)
    begins = keys.prefixes[order]
    is_own, _ = _look_up(begins, np.sort(keys.own))
    begins, order = begins[is_own], order[is_own]
    holders = np.searchsorted(np.cumsum(keys.num_prefixes), order, "right")
    # The holder with most answers begins no other conversation, or that one would have more; and the best of those is
    # no worse copy of another. So the one that stands for a prefix stays, by this rule and by that of copies.
    order = np.lexsort((*_best_first(keys.priority, holders), -keys.num_prefixes[holders], begins))
    order = order[_is_first(begins[order])]
    begins, holders = begins[order], holders[order]
    positions = np.argsort(keys.own)
    is_prefix, places = _look_up(keys.own[positions], begins)
    decisions.status[positions[is_prefix]] = PREFIX
    decisions.of[positions[is_prefix]] = holders[places[is_prefix]]


def _look_up(keys: U64, table: U64) -> tuple[Flags, Indices]:
    """Whether each key is in the table, and where; both are sorted, which makes this fast."""
    places = np.searchsorted(table, keys)
    is_there = places < len(table)
    is_there[is_there] = table[places[is_there]] == keys[is_there]
    return is_there, places


def _drop_copies(keys: TextKeys, decisions: Decisions) -> None:
    kept = np.flatnonzero(decisions.status == KEEP)
    own, positions = _sort_shared(keys.own[kept], kept, keys.priority)
    leaders = _leaders(own, positions)
    copies = positions != leaders
    decisions.status[positions[copies]] = EXACT
    decisions.of[positions[copies]] = leaders[copies]


def _best_first(priority: U64, positions: Indices) -> tuple[Indices, U64, U64]:
    """What `np.lexsort` is to sort by for the best priority first and, where it is equal, the earlier position."""
    first, second = priority[positions].T
    return positions, ~second, ~first


def _sort_shared(keys: U64, positions: Indices, priority: U64) -> tuple[U64, Indices]:
    """The pairs whose key occurs more than once, by key, and best first among equal keys."""
    order = np.argsort(keys)
    keys, positions = keys[order], positions[order]
    shared = _is_shared(keys)
    keys, positions = keys[shared], positions[shared]
    order = np.lexsort((*_best_first(priority, positions), keys))
    return keys[order], positions[order]


def _is_shared(keys: U64) -> Flags:
    """Whether a neighbour's key is equal; `keys` are sorted."""
    first = _is_first(keys)
    is_alone: Flags = first & np.append(first[1:], True)
    return ~is_alone


def _is_first(keys: U64) -> Flags:
    """Whether the key is the first of its kind; `keys` are sorted."""
    first = np.ones(len(keys), np.bool_)
    first[1:] = keys[1:] != keys[:-1]
    return first


def _leaders(keys: U64, positions: Indices) -> Indices:
    """For each pair the position of the first one with its key; `keys` are sorted."""
    starts = np.flatnonzero(_is_first(keys))
    return np.repeat(positions[starts], np.diff(starts, append=len(keys)))


def _bands(keys: TextKeys, decisions: Decisions, threshold: float) -> Iterator[tuple[U64, Indices]]:
    """For each band, the conversations that stay at that moment: a hash of their values in it, and their positions."""
    rows = _rows_per_band(threshold)
    factors = mix(np.arange(1, NUM_HASHES + 1, dtype=np.uint64)) | 1
    for band in range(NUM_HASHES // rows):
        part = slice(band * rows, (band + 1) * rows)
        positions = np.flatnonzero(decisions.status == KEEP)
        band_keys = np.empty(len(positions), np.uint64)
        for start in range(0, len(positions), BLOCK_SIZE):
            block = slice(start, start + BLOCK_SIZE)
            band_keys[block] = keys.signatures[positions[block], part].astype(np.uint64) @ factors[part]
        yield mix(band_keys), positions


def _rows_per_band(threshold: float) -> int:
    """The most values a band may have, so that a pair at `threshold` shares a band with a chance of BAND_RECALL.

    A pair of similarity s agrees in all r values of a band with a chance of s^r, and in one of 128 // r bands with
    1 - (1 - s^r)^(128 // r). At 0.8: 7 values and 18 bands, 0.986; a pair at 0.9 0.99999, one at 0.5 0.13.
    """
    rows = range(1, NUM_HASHES + 1)
    return max((r for r in rows if 1 - (1 - threshold**r) ** (NUM_HASHES // r) >= BAND_RECALL), default=1)


def _drop_near(keys: TextKeys, decisions: Decisions, threshold: float) -> None:
    # Each band has only what the bands before it left, so their order counts.
    for band_keys, positions in _bands(keys, decisions, threshold):
        band_keys = mix(band_keys ^ keys.condition[positions])
        for leaders, copies in _similar_pairs(keys, band_keys, positions, threshold, drop=True):
            decisions.status[copies] = NEAR
            decisions.of[copies] = leaders


def _similar_pairs(
    keys: TextKeys, band_keys: U64, positions: Indices, threshold: float, *, drop: bool
) -> Iterator[tuple[Indices, Indices]]:
    """(leaders, others), aligned: the best of each run of equal band keys, and those of the run that are similar to it.

    Then the same without the leaders, MAX_LEADERS times in all. With `drop` a conversation that was similar to a
    leader is out. Without it the last pairs are those that were not compared, as if they were similar.
    """
    band_keys, positions = _sort_shared(band_keys, positions, keys.priority)
    for _ in range(MAX_LEADERS):
        if not len(band_keys):
            return
        follows = ~_is_first(band_keys)
        leaders = _leaders(band_keys, positions)[follows]
        band_keys, positions = band_keys[follows], positions[follows]
        similar = _are_similar(keys.signatures, leaders, positions, threshold)
        if drop:  # answers to one question are no copies
            similar &= (keys.record[leaders] != keys.record[positions]) | (keys.record[positions] == 0)
        yield leaders[similar], positions[similar]
        if drop:
            band_keys, positions, leaders = band_keys[~similar], positions[~similar], leaders[~similar]
        shared = _is_shared(band_keys)
        band_keys, positions, leaders = band_keys[shared], positions[shared], leaders[shared]
    if not drop:
        yield leaders, positions


def _are_similar(signatures: Signatures, left: Indices, right: Indices, threshold: float) -> Flags:
    similar = np.zeros(len(left), np.bool_)
    for start in range(0, len(left), BLOCK_SIZE):
        block = slice(start, start + BLOCK_SIZE)
        equal = signatures[left[block]] == signatures[right[block]]
        similar[block] = np.count_nonzero(equal, axis=1) >= math.ceil(threshold * NUM_HASHES)
    return similar


def _hold_out(keys: TextKeys, decisions: Decisions, threshold: float, eval_fraction: float) -> None:
    decisions.held_out[keys.held_out & (decisions.status == KEEP)] = True
    if not eval_fraction:
        return
    decisions = replace(decisions, status=np.where(keys.held_out, LEAK, decisions.status))
    parents = np.arange(len(keys.own))
    kept = np.flatnonzero(decisions.status == KEEP)
    questions, positions = _sort_shared(keys.question[kept], kept, keys.priority)
    _unite(parents, _leaders(questions, positions), positions)
    several = kept[keys.record[kept] != 0]
    records, positions = _sort_shared(keys.record[several], several, keys.priority)
    _unite(parents, _leaders(records, positions), positions)
    for band_keys, positions in _bands(keys, decisions, threshold):
        for leaders, others in _similar_pairs(keys, band_keys, positions, threshold, drop=False):
            _unite(parents, leaders, others)

    roots = _find_roots(parents, kept)
    smallest = np.full(len(parents), np.iinfo(np.uint64).max)
    np.minimum.at(smallest, roots, keys.own[kept])
    decisions.held_out[kept] = mix(smallest[roots]) < int(eval_fraction * 2**64)


def _unite(parents: Indices, left: Indices, right: Indices) -> None:
    """Make one group of the groups of `left[i]` and `right[i]`, for every i. The root of a group is its smallest."""
    while len(left):
        left, right = _find_roots(parents, left), _find_roots(parents, right)
        apart = left != right
        left, right = left[apart], right[apart]
        # A root that is paired with several others goes below the smallest; the next round has the rest.
        np.minimum.at(parents, np.maximum(left, right), np.minimum(left, right))


def _find_roots(parents: Indices, positions: Indices) -> Indices:
    roots = parents[positions]
    while not np.array_equal(above := parents[roots], roots):
        roots = above
    parents[positions] = roots  # so that the next search is short
    return roots
