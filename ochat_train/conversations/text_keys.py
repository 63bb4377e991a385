"""The keys of conversations by which duplicates and the held-out split are decided.

Keys are 64-bit hashes, and equal keys count as equal text. Among 100 million conversations of three answers each, the
chance that any two different texts are taken for equal is below 0.2 %.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, fields
from hashlib import blake2b
from itertools import islice, pairwise
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from ochat_train.conversations.schema import Conversation

U64 = npt.NDArray[np.uint64]
Indices = npt.NDArray[np.int64]
Signatures = npt.NDArray[np.uint16]

NUM_HASHES = 128  # MinHash values of a signature: an estimate is off by 0.035 at a similarity of 0.8
SHINGLE_WORDS = 5
MIN_QUESTION_WORDS = 5  # a shorter first question alone does not make conversations one group


@dataclass(frozen=True, slots=True)
class TextKeys:
    """The keys of N conversations by which duplicates are found.

    own: u64[N], a hash of the whole conversation: its system text and each message's role, text and whether it has a
    loss, which is a weight above 0. The texts are in NFKC and with every run of white space as one space.
    num_prefixes: i32[N]. prefixes: u64[sum of num_prefixes], the same hash of the conversation up to each of its
    answers but the last message, in order.
    priority: u64[N, 2], larger is better, the second decides where the first is equal: (largest loss weight as float32
    bits << 32 | characters with a loss), and a hash of source, condition, id, weights and exact texts.
    condition: u64[N], a hash of the condition.
    question: u64[N], a hash of the first user message's text, so normalised, and nothing else; where it has fewer than
    5 words, or there is none, of that text and the first answer after it, so that not all that begin with "Hi" are
    one group.
    record: u64[N], a hash of the record that it shares with other conversations; 0 where it is its record's only one.
    signatures: u16[N, 128], MinHash of the words; u16[N, 0] if it was not requested.
    """

    own: U64
    num_prefixes: npt.NDArray[np.int32]
    prefixes: U64
    priority: U64
    condition: U64
    question: U64
    record: U64
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
            for text in (
                conversation.system + conversation.tools,
                *(message.all_text for message in conversation.messages),
            )
        ]
    )
    num_prefixes, own, prefixes, largest, supervised = [], [], [], [], []
    exact, conditions, questions, records, turns = [], [], [], [], []
    start = 0
    for conversation in conversations:
        end = start + 1 + len(conversation.messages)
        chain = _hash_chain(conversation, normalised[start:end])
        own.append(chain[-1])
        prefixes += chain[:-1]
        num_prefixes.append(len(chain) - 1)
        weighted = [(message.weight, len(message.all_text)) for message in conversation.messages if message.weight]
        largest.append(max((weight for weight, _ in weighted), default=0.0))
        supervised.append(min(sum(length for _, length in weighted), _LARGEST_U32))
        exact.append(_hash_exactly(conversation))
        conditions.append(_digest(_encode(conversation.condition)))
        questions.append(_hash_question(conversation, normalised[start + 1 : end]))
        records.append(_digest(_encode(conversation.record)) if conversation.record else bytes(8))
        turns.append(b" ".join(normalised[start + 1 : end]))
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
        record=_to_u64(records),
        signatures=_sign(turns, keys) if minhash else np.zeros((len(keys), 0), np.uint16),
    )


_LARGEST_U32 = 2**32 - 1
_BLANKS = bytes.maketrans(b"\t\n\v\f\r\x1c\x1d\x1e\x1f", b" " * 9)


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=8).digest()


def _to_u64(digests: Sequence[bytes]) -> U64:
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)


def _normalise(texts: Sequence[str]) -> list[bytes]:
    """`" ".join(normalize("NFKC", text).split())` of each text as UTF-8, in one pass of numpy over all of them."""
    encoded = [_encode(_compose(text)) for text in texts]
    # A blank follows each text. A space that follows a space goes, so that one is left after what is no space.
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
        has_answer = "assistant" in roles[asked + 1 :]
        data += _frame(texts[roles.index("assistant", asked + 1)] if has_answer else b"")
    return _digest(data)


# A word as `text_keys` says. Chinese, Japanese and Korean characters are those of three bytes from E3 to ED.
_WORD = re.compile(rb"[\xe3-\xed]..|[A-Za-z0-9\x80-\xe2\xee-\xff]+", re.DOTALL)


def _hash_exactly(conversation: Conversation) -> bytes:
    pieces = [conversation.source, conversation.condition, conversation.id, conversation.system + conversation.tools]
    for message in conversation.messages:
        pieces += (message.role, str(message.weight), message.all_text)
    return _digest(_encode("".join([f"{len(piece)}:{piece}" for piece in pieces])))


def _frame(data: bytes) -> bytes:
    # The length before it keeps "ab", "c" and "a", "bc" apart.
    return b"%d:%b" % (len(data), data)


# A byte of a word as itself, in lower case; 0 for a byte between words.
_WORD_BYTES = bytes(
    byte if byte >= 0x80 else ord(chr(byte).lower()) if chr(byte).isalnum() else 0 for byte in range(256)
)
_FILLER = b" \xff" * (SHINGLE_WORDS - 1) + b" "  # words that no text has, since UTF-8 has no such byte
_HASHED_AT_ONCE = 1 << 16  # bytes
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
_POWERS = np.cumprod(np.full(_HASHED_AT_ONCE, _BASE, np.uint64))
_INVERSES = np.cumprod(np.full(_HASHED_AT_ONCE, pow(_BASE, -1, 2**64), np.uint64))
_SEED = 20230911


def mix(values: U64) -> U64:
    """The finaliser of splitmix64: a bijection whose every output bit depends on every input bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _sign(texts: Sequence[bytes], own: U64) -> Signatures:
    """u16[N, 128]: MinHash of the shingles of each text; of its own key where it has no word.

    Words are hashed here and not by rensa, which takes shingles as Python objects: 9 instead of 29 ms for a megabyte of
    text, of about 200 that the whole of preprocessing takes.
    """
    import rensa  # needed only here, and only by workers

    # Lower case of ASCII is left to `_WORD_BYTES`. With the filler, a text of fewer than 5 words is one shingle too.
    lowered = (text if text.isascii() else _encode(text.decode("utf-8", "surrogatepass").lower()) for text in texts)
    padded = [text + _FILLER for text in lowered]
    word_starts, words = _hash_words(b"".join([*padded, _FILLER]))
    bounds = np.searchsorted(word_starts, np.cumsum([0, *map(len, padded)]))
    num_words = np.diff(bounds) - (SHINGLE_WORDS - 1)
    num_shingles = np.maximum(num_words - (SHINGLE_WORDS - 1), 1)
    rows = np.concatenate([[0], np.cumsum(num_shingles)])

    windows = np.convolve(words, _POWERS[:SHINGLE_WORDS][::-1], "valid")
    shingles = windows[np.arange(rows[-1]) + np.repeat(bounds[:-1] - rows[:-1], num_shingles)]
    is_empty = num_words == 0
    shingles[rows[:-1][is_empty]] = own[is_empty]

    digests = rensa.RMinHash.digest_matrix_from_flat_token_hashes(mix(shingles), rows, NUM_HASHES, _SEED).to_rows()
    # 16 of the 32 bits: half the space, and different values are taken for equal once in 65,536 times.
    return (np.array(digests, np.uint32) & 0xFFFF).astype(np.uint16).reshape(len(texts), NUM_HASHES)


def _hash_words(text: bytes) -> tuple[Indices, U64]:
    """(where each word of `text` begins, its hash); `text` is UTF-8 and ends with a byte that is in no word.

    Of a word above 65,536 bytes only those count.
    """
    letters = np.frombuffer(text.translate(_WORD_BYTES), np.uint8)
    is_word = letters != 0
    # Chinese, Japanese and Korean characters are three bytes; a word begins at each and after each.
    is_cut = (letters >= 0xE3) & (letters <= 0xED)
    is_cut[3:] |= is_cut[:-3].copy()
    goes_on = is_word[1:] & is_word[:-1] & ~is_cut[1:]
    starts = np.flatnonzero(is_word & np.concatenate([[True], ~goes_on]))
    ends = np.flatnonzero(is_word[:-1] & ~goes_on) + 1

    hashes = np.empty(len(starts), np.uint64)
    sums = np.zeros(_HASHED_AT_ONCE + 1, np.uint64)
    first = 0
    while first < len(starts):
        # A word's hash is its polynomial in _BASE: the difference of two prefix sums, moved to power 1.
        origin = starts[first]
        last = max(first + 1, int(np.searchsorted(ends, origin + _HASHED_AT_ONCE, "right")))
        part = letters[origin : min(ends[last - 1], origin + _HASHED_AT_ONCE)]
        np.cumsum(part * _POWERS[: len(part)], out=sums[1 : len(part) + 1])
        begin, end = starts[first:last] - origin, np.minimum(ends[first:last] - origin, _HASHED_AT_ONCE)
        hashes[first:last] = (sums[end] - sums[begin]) * _INVERSES[begin]
        first = last
    return starts, mix(hashes)
