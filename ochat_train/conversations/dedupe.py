"""Duplicates and the held-out split: small keys of each conversation, then one decision over the keys of all.

A worker makes `TextKeys` of whatever batch it has; `find_duplicates` decides over all batches. What it decides depends
on the conversations alone: not on their order, their batches or the number of workers. Only among records equal to the
last byte, ids included, the earlier one counts as the better.

Keys are 64-bit hashes, and equal keys count as equal text. Among 100 million conversations of three answers each, the
chance that any two different texts are taken for equal is below 0.2 %.

Bytes for a million conversations of three answers each:

    TextKeys of all shards                 60 MB, with MinHash 316 MB
    scratch files, neither near nor eval  120 MB
    scratch files at a threshold of 0.8   690 MB: of these, signatures 256 MB and 18 bands 288 MB
    memory                                0.5 GB at most, however many conversations

The memory is for one bucket of about BUCKET_SIZE keys (more where more copies than that share one key) and one block of
BLOCK_SIZE conversations. The scratch files are mapped: the system keeps of them in memory what it has room for.
"""

import math
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from hashlib import blake2b
from itertools import islice, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self, TypeVar

import numpy as np
import numpy.typing as npt

from ochat_train.conversations.schema import Conversation

U64 = npt.NDArray[np.uint64]
Indices = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
Signatures = npt.NDArray[np.uint16]
Scalar = TypeVar("Scalar", bound=np.generic)

KEEP, EXACT, PREFIX, NEAR = range(4)  # Decisions.status
DROP_REASONS = {EXACT: "exact_duplicate", PREFIX: "earlier_snapshot", NEAR: "near_duplicate"}

NUM_HASHES = 128  # MinHash values of a signature: an estimate is off by 0.035 at a similarity of 0.8
SHINGLE_WORDS = 5
MIN_QUESTION_WORDS = 5  # a shorter first question alone does not make conversations one group
BAND_RECALL = 0.98  # of the pairs exactly at the threshold; more of those above it
MAX_LEADERS = 64  # entries of one run of equal band keys that are compared with all others of the run
BUCKET_SIZE = 1 << 22  # keys sorted at once
BLOCK_SIZE = 1 << 16  # conversations, or pairs of them, looked at at once


@dataclass(frozen=True, slots=True)
class TextKeys:
    """What is remembered of N conversations to tell duplicates.

    own: u64[N], a hash of the whole conversation: its system text and each message's role, text and whether it has a
    loss, which is a weight above 0. The texts are in NFKC and with every run of white space as one space.
    num_prefixes: i32[N]. prefixes: u64[sum of num_prefixes], the same hash of the conversation up to each of its
    answers but the last message, in order.
    priority: u64[N, 2], larger is better, the second decides where the first is equal: (largest loss weight as float32
    bits << 32 | characters with a loss), and a hash of source, condition, id, weights and exact texts.
    condition: u64[N], a hash of the condition.
    question: u64[N], a hash of the first user message's text, so normalised, and nothing else; where it has fewer than
    5 words, or there is none, of that text and the first answer behind it, so that not all that begin with "Hi" are
    one group.
    signatures: u16[N, 128], MinHash of the words; u16[N, 0] if it was not asked for.
    """

    own: U64
    num_prefixes: npt.NDArray[np.int32]
    prefixes: U64
    priority: U64
    condition: U64
    question: U64
    signatures: Signatures

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """The keys of all conversations of `parts`, of which there is at least one, in order."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in _FIELDS))

    def save(self, path: Path) -> None:
        """Write the arrays into one file, `.npy` files in a zip; equal keys make equal bytes."""
        with path.open("wb") as file:
            np.savez(file, **{name: getattr(self, name) for name in _FIELDS})

    @classmethod
    def load(cls, path: Path) -> Self:
        """The keys that `save` wrote."""
        with np.load(path) as arrays:
            return cls(*(arrays[name] for name in _FIELDS))


_FIELDS = tuple(field.name for field in fields(TextKeys))


@dataclass(frozen=True, slots=True)
class Decisions:
    """What becomes of N conversations, in the order in which they came.

    status: u8[N], KEEP, EXACT, PREFIX or NEAR. of: i64[N], the position of the conversation for which this one is
    dropped, -1 where it stays. For EXACT and PREFIX that one is dropped by neither of the two rules; it, or a NEAR's,
    may itself be NEAR to a third. held_out: bool[N], never true of a dropped one.

    The arrays may be mapped files without a name, whose space on disk is free once they are gone.
    """

    status: npt.NDArray[np.uint8]
    of: Indices
    held_out: Flags


def needs_minhash(near: float | None, eval_fraction: float) -> bool:
    """Whether `find_duplicates` reads signatures: for near-duplicates, and for a held-out split without leaks."""
    return near is not None or eval_fraction > 0


def text_keys(conversations: Sequence[Conversation], *, minhash: bool) -> TextKeys:
    """The keys of `conversations`, whose weights are numbers as `assign_source` leaves them.

    With `minhash`, also signatures: MinHash over the shingles of 5 words in a row, of the messages in their order,
    lower case, without the system text, which would make all conversations of one long system text alike. A word is
    a run of ASCII letters and digits and of other characters that are not ASCII, but each Chinese, Japanese or Korean
    character is one. A conversation of fewer words is one shingle; one without any word is like no other.

    Worked example: "Hi" / "Hello, you." / "Bye" / "Bye!" has the own key of " Hi\\n" / "Hello,  you." / "Bye" / "Bye!",
    if the same answers have a loss; its one prefix is then the own key of "Hi" / "Hello, you."; its words are hi,
    hello, you, bye, bye; its question, of one word, is that of all that begin with "Hi" / "Hello, you.".
    """
    normalised = _normalise(
        [
            text
            for conversation in conversations
            for text in (conversation.system, *(message.text for message in conversation.messages))
        ]
    )
    num_prefixes, own, prefixes, largest, supervised = [], [], [], [], []
    exact, conditions, questions, turns = [], [], [], []
    start = 0
    for conversation in conversations:
        end = start + 1 + len(conversation.messages)
        chain = _hash_chain(conversation, normalised[start:end])
        own.append(chain[-1])
        prefixes += chain[:-1]
        num_prefixes.append(len(chain) - 1)
        weighted = [(message.weight, len(message.text)) for message in conversation.messages if message.weight]
        largest.append(max((weight for weight, _ in weighted), default=0.0))
        supervised.append(min(sum(length for _, length in weighted), _LARGEST_U32))
        exact.append(_hash_exactly(conversation))
        conditions.append(blake2b(_encode(conversation.condition), digest_size=8).digest())
        questions.append(_hash_question(conversation, normalised[start + 1 : end]))
        turns.append(_lower(b" ".join(normalised[start + 1 : end])) if minhash else b"")
        start = end
    # The bits of a float32 that is not negative are in the order of its values.
    first = np.array(largest, np.float32).view(np.uint32).astype(np.uint64) << 32 | np.array(supervised, np.uint64)
    keys = _to_u64(own)
    return TextKeys(
        own=keys,
        num_prefixes=np.array(num_prefixes, np.int32),
        prefixes=_to_u64(prefixes),
        priority=np.stack([first, _to_u64(exact)], axis=1),
        condition=_to_u64(conditions),
        question=_to_u64(questions),
        signatures=_sign(turns, keys) if minhash else np.zeros((len(keys), 0), np.uint16),
    )


_LARGEST_U32 = 2**32 - 1
_BLANKS = bytes.maketrans(b"\t\n\v\f\r\x1c\x1d\x1e\x1f", b" " * 9)


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _to_u64(digests: Sequence[bytes]) -> U64:
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)


def _normalise(texts: Sequence[str]) -> list[bytes]:
    """`" ".join(normalize("NFKC", text).split())` of each text as UTF-8, in one pass of numpy over all of them."""
    encoded = [_encode(_compose(text)) for text in texts]
    # Each text has a blank behind it. A space behind a space goes, so that one is left behind what is no space.
    joined = np.frombuffer(b" ".join([b"", *encoded, b""]).translate(_BLANKS), np.uint8)
    is_space = joined == ord(" ")
    removed = np.flatnonzero(is_space[1:] & is_space[:-1])
    bounds = np.cumsum([0] + [len(text) + 1 for text in encoded])
    bounds -= np.searchsorted(removed, bounds)
    squeezed = np.delete(joined[1:], removed).tobytes()
    return [squeezed[start : max(start, end - 1)] for start, end in pairwise(bounds.tolist())]


def _compose(text: str) -> str:
    if text.isascii():
        return text
    text = unicodedata.normalize("NFKC", text)
    for space in "\x85\u1680\u2028\u2029":  # the white space that NFKC leaves and that is not ASCII
        text = text.replace(space, " ")
    return text


def _hash_chain(conversation: Conversation, texts: Sequence[bytes]) -> list[bytes]:
    """The hash up to each answer, and last the hash of all; `texts` are the system text's and the messages'."""
    state = blake2b(_frame(texts[0]), digest_size=8)
    chain = []
    for message, text in zip(conversation.messages, texts[1:], strict=True):
        # With the loss, so that what goes as a copy trains nothing that the one that stays does not.
        state.update(b"%b %d %b" % (message.role.encode(), bool(message.weight), _frame(text)))
        if message.role == "assistant":
            chain.append(state.digest())
    if not conversation.messages or conversation.messages[-1].role != "assistant":
        chain.append(state.digest())
    return chain


def _hash_question(conversation: Conversation, texts: Sequence[bytes]) -> bytes:
    """What `TextKeys.question` holds; `texts` are the messages'."""
    roles = [message.role for message in conversation.messages]
    asked = roles.index("user") if "user" in roles else -1
    question = texts[asked] if asked >= 0 else b""
    data = _frame(question)
    if len(list(islice(_WORD.finditer(question), MIN_QUESTION_WORDS))) < MIN_QUESTION_WORDS:
        data += _frame(texts[roles.index("assistant", asked + 1)] if "assistant" in roles[asked + 1 :] else b"")
    return blake2b(data, digest_size=8).digest()


# A word as `text_keys` says. Chinese, Japanese and Korean characters are those of three bytes from E3 to ED.
_WORD = re.compile(rb"[\xe3-\xed]..|[A-Za-z0-9\x80-\xe2\xee-\xff]+", re.DOTALL)


def _hash_exactly(conversation: Conversation) -> bytes:
    pieces = [conversation.source, conversation.condition, conversation.id, conversation.system]
    for message in conversation.messages:
        pieces += (message.role, str(message.weight), message.text)
    return blake2b(_encode("".join([f"{len(piece)}:{piece}" for piece in pieces])), digest_size=8).digest()


def _frame(data: bytes) -> bytes:
    # The length in front keeps "ab", "c" and "a", "bc" apart.
    return b"%d:%b" % (len(data), data)


def _lower(text: bytes) -> bytes:
    """`text` in lower case, except that text of only ASCII is left to `_WORD_BYTES`."""
    return text if text.isascii() else _encode(text.decode("utf-8", "surrogatepass").lower())


# A byte of a word as itself, in lower case; 0 for a byte between words.
_WORD_BYTES = bytes(
    byte if byte >= 0x80 else ord(chr(byte).lower()) if chr(byte).isalnum() else 0 for byte in range(256)
)
_LONGEST_WORD = 1 << 12  # bytes; what is longer counts as several words
_HASHED_AT_ONCE = 1 << 16  # bytes
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
_POWERS = np.cumprod(np.full(_HASHED_AT_ONCE, _BASE, np.uint64))
_INVERSES = np.cumprod(np.full(_HASHED_AT_ONCE, pow(_BASE, -1, 2**64), np.uint64))
_SHINGLE_POWERS = _POWERS[:SHINGLE_WORDS]
_SEED = 20230911


def _mix(values: U64) -> U64:
    """The finaliser of splitmix64: a bijection whose every output bit depends on every input bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _sign(texts: Sequence[bytes], own: U64) -> Signatures:
    """u16[N, 128]: MinHash of the shingles of each text; of its own key where it has no word."""
    import rensa  # needed only here, and only by workers

    word_starts, words = _hash_words(b" ".join([*texts, b""]))
    text_ends = np.cumsum([len(text) + 1 for text in texts])
    bounds = np.concatenate([[0], np.searchsorted(word_starts, text_ends)])
    num_words = np.diff(bounds)
    num_shingles = np.maximum(num_words - SHINGLE_WORDS + 1, 1)
    rows = np.concatenate([[0], np.cumsum(num_shingles)])

    padded = np.concatenate([words, np.zeros(SHINGLE_WORDS, np.uint64)])
    hashes = np.zeros(len(words) + 1, np.uint64)
    for place, power in enumerate(_SHINGLE_POWERS):
        hashes += padded[place : place + len(hashes)] * power
    shingles = hashes[np.arange(rows[-1]) + np.repeat(bounds[:-1] - rows[:-1], num_shingles)]

    short = np.flatnonzero(num_words < SHINGLE_WORDS)
    places = np.arange(SHINGLE_WORDS)
    few_words = np.where(places < num_words[short, None], padded[bounds[short, None] + places], 0)
    shingles[rows[short]] = (few_words * _SHINGLE_POWERS).sum(axis=1)
    empty = np.flatnonzero(num_words == 0)
    shingles[rows[empty]] = own[empty]

    digests = rensa.RMinHash.digest_matrix_from_flat_token_hashes(_mix(shingles), rows, NUM_HASHES, _SEED).to_rows()
    # 16 of the 32 bits: half the space, and different values are taken for equal once in 65,536 times.
    return (np.array(digests, np.uint32) & 0xFFFF).astype(np.uint16).reshape(len(texts), NUM_HASHES)


def _hash_words(text: bytes) -> tuple[Indices, U64]:
    """(where each word of `text` begins, its hash); `text` is UTF-8 and ends with a byte that is in no word."""
    letters = np.frombuffer(text.translate(_WORD_BYTES), np.uint8)
    is_word = letters != 0
    # Chinese, Japanese and Korean characters are three bytes; a word begins at each and behind each.
    is_cut = (letters >= 0xE3) & (letters <= 0xED)
    is_cut[3:] |= is_cut[:-3].copy()
    goes_on = is_word[1:] & is_word[:-1] & ~is_cut[1:]
    starts = np.flatnonzero(is_word & np.concatenate([[True], ~goes_on]))
    ends = np.flatnonzero(is_word[:-1] & ~goes_on) + 1
    long = np.flatnonzero(ends - starts > _LONGEST_WORD)
    if len(long):
        inner = np.concatenate([np.arange(starts[i] + _LONGEST_WORD, ends[i], _LONGEST_WORD) for i in long])
        starts = np.sort(np.concatenate([starts, inner]), kind="stable")  # fast where almost all is sorted
        ends = np.sort(np.concatenate([ends, inner]), kind="stable")

    hashes = np.empty(len(starts), np.uint64)
    sums = np.zeros(_HASHED_AT_ONCE + 1, np.uint64)
    first = 0
    while first < len(starts):
        # A word's hash is its polynomial in _BASE: the difference of two prefix sums, moved to power 1.
        origin = starts[first]
        last = np.searchsorted(ends, origin + _HASHED_AT_ONCE, "right")
        part = letters[origin : ends[last - 1]]
        np.cumsum(part * _POWERS[: len(part)], out=sums[1 : len(part) + 1])
        begin, end = starts[first:last] - origin, ends[first:last] - origin
        hashes[first:last] = (sums[end] - sums[begin]) * _INVERSES[begin]
        first = last
    return starts, _mix(hashes)


def find_duplicates(
    shards: Iterable[TextKeys],
    *,
    exact: bool,
    prefix: bool,
    near: float | None,
    eval_fraction: float,
    group_near: float = 0.8,
    work_dir: Path | None = None,
) -> Decisions:
    """Which of the conversations of `shards` stay, and which of those are held out of training.

    `shards` is gone through once. Scratch files are made in `work_dir` (None: the system's place for such files) and
    removed. The rules, in their order:

    `prefix`: a conversation that another one begins with, up to one of its answers, is PREFIX of the one with most
    answers that begins so, the best of these by priority. Sources and conditions play no part, and of the weights only
    which are above 0: it begins so only if it has a loss on the same messages.
    `exact`: of conversations with the same own key, so with a loss on the same messages, all but the best are EXACT,
    also across sources and conditions. So what these two rules drop is trained in the one that stays.
    `near`: conversations of one condition are looked through best first in each of several bands of their signatures;
    one that shares the band with a better one, and is estimated to be similar to it by at least `near`, is NEAR. The
    similarity is Jaccard's: shared shingles / all shingles of the two. A pair exactly at `near` shares a band with a
    chance of at least 0.98 (at 0.8, a pair at 0.9: 0.99999). Among more than 64 that share a band, and are not similar
    to one another, only the best 64 are compared with all the others; the rest stay.
    `eval_fraction` above 0: conversations that stay are grouped over all conditions, where the first question is the
    same (below 5 words: it and its answer), whatever the system text and the rest, or the estimated similarity is at
    least `near`, or `group_near` where that is None, and on from one to the next; where more than 64 share a band, the
    rest are in one group. A group is held out if a hash of its smallest own key says so, which it does for a share
    `eval_fraction` of all keys.

    Raises ValueError for a threshold outside (0, 1] and a fraction outside [0, 1). Worked example, all rules on: of
    A "Hi" / "Hello", a longer B "Hi" / "Hello" / "Bye" / "Bye!", and C as B with weight 0.1, in this order, status
    is PREFIX, KEEP, EXACT and of is 1, -1, 1.
    """
    threshold = group_near if near is None else near
    if not 0 < threshold <= 1:
        raise ValueError(f"the near-duplicate threshold {threshold} is not above 0 and at most 1; 0.8 is usual")
    if not 0 <= eval_fraction < 1:
        raise ValueError(f"eval_fraction {eval_fraction} is not at least 0 and below 1; 0.01 holds out a hundredth")

    with TemporaryDirectory(prefix="duplicates-", dir=work_dir) as name:
        folder = Path(name)
        keys = _collect(shards, folder)
        num_conversations = len(keys.own)
        decisions = Decisions(
            status=_zeros(folder / "status", num_conversations, np.uint8),
            of=_zeros(folder / "of", num_conversations, np.int64),
            held_out=_zeros(folder / "held_out", num_conversations, np.bool_),
        )
        decisions.of[:] = -1
        if exact or prefix:
            _drop_copies(keys, decisions, folder, exact=exact, prefix=prefix)
        if needs_minhash(near, eval_fraction):
            assert keys.signatures.size == num_conversations * NUM_HASHES, "the keys were made without MinHash"
            bands = _split_into_bands(keys, decisions, folder, threshold)
            least_equal = math.ceil(threshold * NUM_HASHES)
            if near is not None:
                _drop_near(keys, decisions, bands, least_equal)
            if eval_fraction:
                _hold_out(keys, decisions, bands, least_equal, folder, eval_fraction)
    return decisions


def _collect(shards: Iterable[TextKeys], folder: Path) -> TextKeys:
    """The keys of all shards, one after another, in mapped files."""
    # Appended to files, since how many there are shows only at the end.
    with ExitStack() as stack:
        files = {name: stack.enter_context((folder / name).open("wb")) for name in _FIELDS}
        last = text_keys((), minhash=False)
        for last in shards:
            for name in _FIELDS:
                np.ascontiguousarray(getattr(last, name)).tofile(files[name])
    return TextKeys(*(_map(folder / name, getattr(last, name)) for name in _FIELDS))


def _map(path: Path, like: npt.NDArray[Scalar]) -> npt.NDArray[Scalar]:
    """The file as an array of rows like those of `like`."""
    if not path.stat().st_size:  # an empty file cannot be mapped
        return np.zeros((0, *like.shape[1:]), like.dtype)
    return np.asarray(np.memmap(path, like.dtype, "r")).reshape(-1, *like.shape[1:])


def _zeros(path: Path, length: int, dtype: type[Scalar]) -> npt.NDArray[Scalar]:
    """A new mapped file."""
    return np.asarray(np.memmap(path, dtype, "w+", shape=length)) if length else np.zeros(0, dtype)


class _Buckets:
    """Pairs of a key and the position of a conversation, on disk by the top bits of the key."""

    def __init__(self, folder: Path, num_pairs: int) -> None:
        folder.mkdir()
        self._folder = folder
        self._num_bits = (num_pairs // BUCKET_SIZE).bit_length()

    def add(self, keys: U64, positions: Indices) -> None:
        """Put `keys[i]`, `positions[i]` into their buckets."""
        pairs = np.stack([keys, positions.astype(np.uint64)], axis=1)
        if self._num_bits:
            top = keys >> (64 - self._num_bits)
            order = np.argsort(top, kind="stable")
            pairs, top = pairs[order], top[order]
            parts = np.split(pairs, np.searchsorted(top, np.arange(1, 1 << self._num_bits, dtype=np.uint64)))
        else:
            parts = [pairs]
        for bucket, part in enumerate(parts):
            if len(part):
                with (self._folder / str(bucket)).open("ab") as file:
                    part.tofile(file)

    def __iter__(self) -> Iterator[tuple[U64, Indices]]:
        """(keys, positions) of each bucket in turn, a bucket without any included."""
        for bucket in range(1 << self._num_bits):
            path = self._folder / str(bucket)
            pairs = np.fromfile(path, np.uint64).reshape(-1, 2) if path.exists() else np.zeros((0, 2), np.uint64)
            yield pairs[:, 0].copy(), pairs[:, 1].astype(np.int64)


def _blocks(keys: TextKeys) -> Iterator[tuple[slice, slice]]:
    """(a block of the conversations, where their prefixes are), one block after another."""
    end_prefix = 0
    for start in range(0, len(keys.own), BLOCK_SIZE):
        block = slice(start, min(start + BLOCK_SIZE, len(keys.own)))
        start_prefix = end_prefix
        end_prefix += int(keys.num_prefixes[block].sum(dtype=np.int64))
        yield block, slice(start_prefix, end_prefix)


def _drop_copies(keys: TextKeys, decisions: Decisions, folder: Path, *, exact: bool, prefix: bool) -> None:
    num_pairs = max(len(keys.own), len(keys.prefixes))
    own_buckets = _Buckets(folder / "own_buckets", num_pairs)
    prefix_buckets = _Buckets(folder / "prefix_buckets", num_pairs)
    for block, prefixes in _blocks(keys):
        positions = np.arange(block.start, block.stop)
        own_buckets.add(keys.own[block], positions)
        if prefix:
            prefix_buckets.add(keys.prefixes[prefixes], np.repeat(positions, keys.num_prefixes[block]))

    for (own, positions), (begins, holders) in zip(own_buckets, prefix_buckets, strict=True):
        # The holder with most answers begins no other conversation, or that one would have more; and the best of
        # those is no worse copy of another. So the one that stands for a prefix stays, by these two rules.
        wanted = np.isin(begins, own)
        begins, holders = begins[wanted], holders[wanted]
        order = np.lexsort((*_best_first(keys.priority, holders), -keys.num_prefixes[holders], begins))
        begins, first = np.unique(begins[order], return_index=True)
        is_prefix = np.isin(own, begins)
        dropped = positions[is_prefix]
        decisions.status[dropped] = PREFIX
        decisions.of[dropped] = holders[order][first][np.searchsorted(begins, own[is_prefix])]
        if exact:
            own, positions = _sort_shared(own[~is_prefix], positions[~is_prefix], keys.priority)
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


def _split_into_bands(keys: TextKeys, decisions: Decisions, folder: Path, threshold: float) -> list[_Buckets]:
    """For each band a key of its part of the signature, of every conversation that stays so far."""
    rows = _rows_per_band(threshold)
    num_bands = NUM_HASHES // rows
    bands = [_Buckets(folder / f"band_{band}", len(keys.own)) for band in range(num_bands)]
    factors = _mix(np.arange(1, NUM_HASHES + 1, dtype=np.uint64)) | 1
    for block, _ in _blocks(keys):
        positions = np.flatnonzero(decisions.status[block] == KEEP) + block.start
        signatures = keys.signatures[positions].astype(np.uint64)
        for band, buckets in enumerate(bands):
            part = slice(band * rows, (band + 1) * rows)
            buckets.add(_mix(signatures[:, part] @ factors[part]), positions)
    return bands


def _rows_per_band(threshold: float) -> int:
    """The most values a band may have, so that a pair at `threshold` shares a band with a chance of BAND_RECALL.

    A pair of similarity s agrees in all r values of a band with a chance of s^r, and in one of 128 // r bands with
    1 - (1 - s^r)^(128 // r). At 0.8: 7 values and 18 bands, 0.986; a pair at 0.9 0.99999, one at 0.5 0.13.
    """
    rows = range(1, NUM_HASHES + 1)
    return max((r for r in rows if 1 - (1 - threshold**r) ** (NUM_HASHES // r) >= BAND_RECALL), default=1)


def _drop_near(keys: TextKeys, decisions: Decisions, bands: Sequence[_Buckets], least_equal: int) -> None:
    # Each band sees only what the bands before it left, so their order counts; that of the buckets does not.
    for band in bands:
        for band_keys, positions in band:
            stays = decisions.status[positions] == KEEP
            positions = positions[stays]
            band_keys = _mix(band_keys[stays] ^ keys.condition[positions])
            pairs = _sort_shared(band_keys, positions, keys.priority)
            for leaders, copies in _similar_pairs(*pairs, keys.signatures, least_equal, drop=True):
                decisions.status[copies] = NEAR
                decisions.of[copies] = leaders


def _similar_pairs(
    keys: U64, positions: Indices, signatures: Signatures, least_equal: int, *, drop: bool
) -> Iterator[tuple[Indices, Indices]]:
    """(leaders, others), aligned: the first of each run of equal keys, and those of its run that are similar to it.

    Then the same without the leaders, MAX_LEADERS times in all. With `drop` a conversation that was similar to a
    leader is out. Without it the last to come are what has not been compared, as if it were similar to its leader.
    """
    for _ in range(MAX_LEADERS):
        if not len(keys):
            return
        follows = ~_is_first(keys)
        leaders = _leaders(keys, positions)[follows]
        keys, positions = keys[follows], positions[follows]
        similar = _are_similar(signatures, leaders, positions, least_equal)
        yield leaders[similar], positions[similar]
        if drop:
            keys, positions, leaders = keys[~similar], positions[~similar], leaders[~similar]
        shared = _is_shared(keys)
        keys, positions, leaders = keys[shared], positions[shared], leaders[shared]
    if not drop:
        yield leaders, positions


def _are_similar(signatures: Signatures, left: Indices, right: Indices, least_equal: int) -> Flags:
    similar = np.zeros(len(left), np.bool_)
    for start in range(0, len(left), BLOCK_SIZE):
        block = slice(start, start + BLOCK_SIZE)
        equal = signatures[left[block]] == signatures[right[block]]
        similar[block] = np.count_nonzero(equal, axis=1) >= least_equal
    return similar


def _hold_out(
    keys: TextKeys,
    decisions: Decisions,
    bands: Sequence[_Buckets],
    least_equal: int,
    folder: Path,
    eval_fraction: float,
) -> None:
    num_conversations = len(keys.own)
    parents = _zeros(folder / "parents", num_conversations, np.int64)
    smallest = _zeros(folder / "smallest", num_conversations, np.uint64)
    questions = _Buckets(folder / "question_buckets", num_conversations)
    for block, _ in _blocks(keys):
        parents[block] = np.arange(block.start, block.stop)
        smallest[block] = np.iinfo(np.uint64).max
        stays = decisions.status[block] == KEEP
        questions.add(keys.question[block][stays], parents[block][stays])

    for question_keys, positions in questions:
        question_keys, positions = _sort_shared(question_keys, positions, keys.priority)
        _unite(parents, _leaders(question_keys, positions), positions)
    for band in bands:
        for band_keys, positions in band:
            stays = decisions.status[positions] == KEEP
            pairs = _sort_shared(band_keys[stays], positions[stays], keys.priority)
            for leaders, others in _similar_pairs(*pairs, keys.signatures, least_equal, drop=False):
                _unite(parents, leaders, others)

    for block, _ in _blocks(keys):
        kept = np.flatnonzero(decisions.status[block] == KEEP) + block.start
        np.minimum.at(smallest, _find_roots(parents, kept), keys.own[kept])
    for block, _ in _blocks(keys):
        kept = np.flatnonzero(decisions.status[block] == KEEP) + block.start
        decisions.held_out[kept] = _mix(smallest[_find_roots(parents, kept)]) < int(eval_fraction * 2**64)


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
