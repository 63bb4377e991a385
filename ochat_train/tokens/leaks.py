"""Which questions of an evaluation are in the prompts of a store's examples."""

from collections import defaultdict
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from ochat_train.tokens.encode import TokenIds
from ochat_train.tokens.parity import prompts_of
from ochat_train.tokens.recondition import frame_of
from ochat_train.tokens.store import TokenStore
from ochat_train.tokens.tokenizer import ChatTokenizer

_MOST_HASHED = 12  # tokens of a question


def find_leaks(store: TokenStore, questions: Iterable[str], tokenizer: ChatTokenizer) -> dict[str, str]:
    """The questions that are a user's text in a prompt of the store, each with the name of one such example.

    Examples are searched for the questions' ids, by a hash of the first of them, and only those in which they are found
    are read back as messages.
    """
    texts = list(dict.fromkeys(questions))
    found: dict[str, str] = {}
    if not texts:
        return found
    # A template of the base may merge a text's first and last token with what is around it.
    inner = [ids[1:-1] if len(ids) > 4 else ids for ids in tokenizer.encode_texts(texts)]
    width = min(_MOST_HASHED, *map(len, inner))
    if not width:
        return found
    by_hash: dict[int, list[tuple[str, bytes]]] = defaultdict(list)
    for text, ids in zip(texts, inner, strict=True):
        by_hash[int(_hash_windows(ids[:width], width)[0])].append((text, ids.astype(np.int32).tobytes()))
    wanted = np.array(list(by_hash), np.uint64)
    frames = [frame_of(tokenizer, condition) for condition in store.manifest.conditions]
    for position in tqdm(range(len(store)), desc="questions in the training data", unit=" examples", delay=5):
        example = store[position]
        hashes = _hash_windows(example.input_ids, width)
        hits = hashes[np.isin(hashes, wanted)]
        whole = example.input_ids.astype(np.int32).tobytes() if len(hits) else b""
        near = {text for hit in set(hits.tolist()) for text, ids in by_hash[hit] if text not in found and ids in whole}
        if near:
            for messages, _ in prompts_of(example, frames[store.condition_ids[position]], tokenizer):
                asked = near.intersection(one.text for one in messages or () if one.role == "user")
                found |= dict.fromkeys(asked, store.name(position))
    return found


def _hash_windows(ids: TokenIds, width: int) -> npt.NDArray[np.uint64]:
    """u64[L - width + 1], a hash of each window of ids."""
    num = max(0, len(ids) - width + 1)
    hashes = np.zeros(num, np.uint64)
    for offset in range(width):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + ids[offset : offset + num].astype(np.uint64)
    return hashes
