"""The keys of conversations by which duplicates and the held-out split are decided.

Keys are 64-bit hashes, and equal keys count as equal text. Among 100 million conversations of three answers each, the
chance that any two different texts are taken for equal is below 0.2 %.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, fields
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

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
    held_out: bool[N], whether its source is. said: u64[N + sum of num_prefixes], hashes like prefixes and own, one
    conversation after another, but of the turns' roles and texts alone; u64[0] if it was not requested.
    """

    own: U64
    num_prefixes: npt.NDArray[np.int32]
    prefixes: U64
    priority: U64
    condition: U64
    question: U64
    record: U64
    signatures: Signatures
    held_out: npt.NDArray[np.bool_]
    said: U64

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


def text_keys(conversations: Sequence[Conversation], *, minhash: bool, said: bool = False) -> TextKeys:
    """The keys of `conversations`, whose weights are numbers as `assign_source` leaves them; with `said`, that too.

    With `minhash`, also signatures: MinHash over the shingles of 5 words in a row, of the messages in their order,
    lower case, without the system text, which would make all conversations of one long system text alike. A word is
    a run of ASCII letters and digits and of other characters that are not ASCII, but each Chinese, Japanese or Korean
    character is one. A conversation of fewer words is one shingle; one without any word is like no other.

    Worked example: "Hi" / "Hello, you." / "Bye" / "Bye!" has the own key of " Hi\\n" / "Hello,  you." / "Bye" / "Bye!",
    if the same answers have a loss; its one prefix is then the own key of "Hi" / "Hello, you."; its words are hi,
    hello, you, bye, bye; its question, of one word, is that of all that begin with "Hi" / "Hello, you.".
    """
    num_prefixes, own, prefixes, largest, supervised = [], [], [], [], []
    exact, conditions, questions, records, turns = [], [], [], [], []
    said_by_turn: list[bytes] = []
    for conversation in conversations:
        texts = [_normalise(message.all_text) for message in conversation.messages]
        chain = _hash_chain(conversation, _normalise(conversation.system + conversation.tools), texts)
        own.append(chain[-1])
        prefixes += chain[:-1]
        num_prefixes.append(len(chain) - 1)
        weighted = [(message.weight, len(message.all_text)) for message in conversation.messages if message.weight]
        largest.append(max((weight for weight, _ in weighted), default=0.0))
        supervised.append(min(sum(length for _, length in weighted), _LARGEST_U32))
        exact.append(_hash_exactly(conversation))
        conditions.append(_digest(_encode(conversation.condition)))
        questions.append(_hash_question(conversation, texts))
        records.append(_digest(_encode(conversation.record)) if conversation.record else bytes(8))
        turns.append(" ".join(texts))
        if said:
            said_by_turn += _hash_chain(conversation, "", texts, with_loss=False)
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
        held_out=np.array([conversation.held_out for conversation in conversations], np.bool_),
        said=_to_u64(said_by_turn),
    )


_LARGEST_U32 = 2**32 - 1


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=8).digest()


def _to_u64(digests: Sequence[bytes]) -> U64:
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)


def _normalise(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).split())


def _hash_chain(
    conversation: Conversation, system: str, texts: Sequence[str], *, with_loss: bool = True
) -> list[bytes]:
    """The hash up to each answer, and last the hash of all."""
    state = blake2b(_frame(system), digest_size=8)
    chain = []
    for message, text in zip(conversation.messages, texts, strict=True):
        # With the loss, so that what goes as a copy trains nothing that the one that stays does not.
        state.update(b"%b %d %b" % (message.role.encode(), with_loss and bool(message.weight), _frame(text)))
        if message.role == "assistant":
            chain.append(state.digest())
    if not conversation.messages or conversation.messages[-1].role != "assistant":
        chain.append(state.digest())
    return chain


def _hash_question(conversation: Conversation, texts: Sequence[str]) -> bytes:
    """What `TextKeys.question` holds; `texts` are the messages'."""
    roles = [message.role for message in conversation.messages]
    asked = roles.index("user") if "user" in roles else -1
    question = texts[asked] if asked >= 0 else ""
    data = _frame(question)
    if len(list(islice(_WORD.finditer(_encode(question)), MIN_QUESTION_WORDS))) < MIN_QUESTION_WORDS:
        has_answer = "assistant" in roles[asked + 1 :]
        data += _frame(texts[roles.index("assistant", asked + 1)] if has_answer else "")
    return _digest(data)


# A word as `text_keys` says. Chinese, Japanese and Korean characters are those of three bytes from E3 to ED.
_WORD = re.compile(rb"[\xe3-\xed]..|[A-Za-z0-9\x80-\xe2\xee-\xff]+", re.DOTALL)


def _hash_exactly(conversation: Conversation) -> bytes:
    pieces = [conversation.source, conversation.condition, conversation.id, conversation.system + conversation.tools]
    for message in conversation.messages:
        pieces += (message.role, str(message.weight), message.all_text)
    return _digest(_encode("".join([f"{len(piece)}:{piece}" for piece in pieces])))


def _frame(text: str) -> bytes:
    # The length before it keeps "ab", "c" and "a", "bc" apart.
    data = _encode(text)
    return b"%d:%b" % (len(data), data)


_SEED = 20230911
_FACTORS = np.array([pow(0x9E3779B97F4A7C15, power, 2**64) for power in range(SHINGLE_WORDS)], np.uint64)


def mix(values: U64) -> U64:
    """The finaliser of splitmix64: a bijection whose every output bit depends on every input bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _sign(texts: Sequence[str], own: U64) -> Signatures:
    """u16[N, 128]: MinHash of the shingles of each text; of its own key where it has no word."""
    import rensa  # needed only here, and only by workers

    shingles = []
    for text, key in zip(texts, own, strict=True):
        words = list(map(xxh3_64_intdigest, _WORD.findall(_encode(text.lower()))))
        filled = np.array(words + [0] * (SHINGLE_WORDS - len(words)), np.uint64)
        # A shingle's hash is the polynomial of its words': rensa would need each shingle as a Python object.
        shingles.append(np.convolve(filled, _FACTORS, "valid") if words else np.array([key]))
    rows = np.cumsum([0, *map(len, shingles)])
    hashes = mix(np.concatenate([np.empty(0, np.uint64), *shingles]))
    digests = rensa.RMinHash.digest_matrix_from_flat_token_hashes(hashes, rows, NUM_HASHES, _SEED).to_rows()
    # 16 of the 32 bits: half the space, and different values are taken for equal once in 65,536 times.
    return (np.array(digests, np.uint32) & 0xFFFF).astype(np.uint16).reshape(len(texts), NUM_HASHES)
