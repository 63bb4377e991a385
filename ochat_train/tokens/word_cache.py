"""The ids of texts by their words: each word is encoded once, and then looked up.

A text is cut where no token crosses and nothing on one side decides what is on the other, so that the ids of the text
are those of its pieces, one after another. Where such cuts are depends on the tokenizer. `find_cuts` proves it from the
tokenizer's own description, and gives None where there is no proof:

- SentencePiece's BPE writes a space as the mark U+2581, which begins words. Tokens come only from merges, and merges
  join neighbours. Where no merge joins a mark to another character before it, nothing crosses from a character to the
  spaces after it. Where no merge has a line feed, the same is true on both sides of one.
- Byte-level BPE joins only within what the tokenizer's own pattern matches. `_PATTERNS` lists the patterns of which we
  know where a match ends whatever comes next.

A word that did not come before, such as `self.rows[index]`, is mostly made of parts that did: it is cut once more.
"""

import re
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, filterfalse
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, normalizers

MAX_WORDS = 200_000  # that are remembered, which takes about 40 MB
MAX_CHARS = 4 << 20  # of all of them; a character has at most 4 ids
MAX_WORD_CHARS = 64  # a longer word, such as a line of base64, hardly comes again

# ---- Where a text may be cut ----

_MARK = "\u2581"
_AT_SPACES = r" *+[^ ]++|\ ++"
_AT_SPACES_AND_LINES = r" *+[^ \n]++|\n++|\ ++"
_CLASSES = "[A-Za-z]", "[0-9]", "[^ A-Za-z0-9]"
_AT_CLASSES = re.compile("|".join(f" *+{kind}++" for kind in _CLASSES) + r"|\ ++")

# White space as the tokenizers library's patterns have it: Python's without four control characters.
_SPACE, _OTHER = r"[^\S\x1c-\x1f]", r"[\S\x1c-\x1f]"
_AT_WHITE_SPACE = rf"{_SPACE}*+{_OTHER}++|{_SPACE}++"
# A word with the white space up to the last line end after it, which may belong to punctuation; and with a slash after
# that, which some patterns let follow the line ends of punctuation.
_AFTER_LINES = rf"{_SPACE}*+{_OTHER}++(?:{_SPACE}*[\r\n](?=/){_OTHER}++)*+(?:{_SPACE}*[\r\n])?+|{_SPACE}++"

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BETWEEN = r"[^\r\n\p{L}\p{N}]?"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"

# In all of these a match has white space only at its beginning, where the character before it is none, except for line
# ends after punctuation. GPT-2's may begin before the last line end of a run and end after it; the others begin there
# anew.
_PATTERNS = {
    # GPT-2; the library has it built in
    (): _AT_WHITE_SPACE,
    # Llama 3; Qwen 2 and 3
    (rf"{_CONTRACTIONS}|{_BETWEEN}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}",): _AFTER_LINES,
    (rf"{_CONTRACTIONS}|{_BETWEEN}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}",): _AFTER_LINES,
    # GPT-4o and gpt-oss; Mistral Nemo
    (
        rf"{_BETWEEN}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_BETWEEN}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
        rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}",
    ): _AFTER_LINES,
    (
        rf"{_BETWEEN}{_UPPER}*{_LOWER}+|{_BETWEEN}{_UPPER}+{_LOWER}*"
        rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}",
    ): _AFTER_LINES,
    # DeepSeek V3; the matches of one are cut by the next
    (
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
        rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_REST}",
    ): _AFTER_LINES,
}


# In all of them a match that reaches the end of a run of letters, or of digits, ends there, unless an apostrophe
# follows letters. This is said of ASCII alone: elsewhere accents follow letters.
_AFTER_LETTERS_AND_DIGITS = re.compile(
    r"[^A-Za-z0-9]*+(?:[A-Za-z]++(?:'[^A-Za-z0-9]*+[A-Za-z]*+)*+|[0-9]++)|[^A-Za-z0-9]++"
)
_EACH_DIGIT = {"type": "Digits", "individual_digits": True}
_MAX_CROSSING = 8  # merges that join a mark to another character before it: Gemma 3 has one


@dataclass(frozen=True, slots=True)
class Cuts:
    """Where a tokenizer's texts may be cut.

    words: what it finds in a text, one after another, is all of the text. parts: what it finds in a word of ASCII, in
    the same way, or None. lead: what stands before every text, where the tokenizer puts it there. whole: a text that
    has one of these in it is not cut.
    """

    words: re.Pattern[str]
    parts: re.Pattern[str] | None
    lead: str = ""
    whole: tuple[str, ...] = ()

    def find_words(self, text: str) -> list[str]:
        """The words of a text with the lead; none of an empty text."""
        if not text:
            return []
        text = self.lead + text
        for part in self.whole:
            if part in text:
                return [text]
        words: list[str] = self.words.findall(text)
        return words

    def find_parts(self, word: str) -> list[str]:
        """The parts of a word."""
        if self.parts is None or not word.isascii():
            return [word]
        for part in self.whole:
            if part in word:
                return [word]
        parts: list[str] = self.parts.findall(word)
        return parts


def find_cuts(description: Mapping[str, Any]) -> Cuts | None:
    """Where texts may be cut for the tokenizer of a tokenizer.json that does not look for special tokens in them.

    None where nothing is proved.
    """
    model, added = description["model"], description["added_tokens"]
    if model.get("type") != "BPE" or any(
        model.get(part) for part in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    ):
        return None
    cuts = _cuts_at_marks(description) or _cuts_of_pattern(description)
    if cuts is None or all(token["special"] for token in added):
        return cuts
    # Tokens that are found in text, before anything else: each must be within a piece, and not look beyond it.
    looks_around = any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in added)
    is_normalized = any(token["normalized"] and not token["special"] for token in added)
    if cuts.lead or looks_around or (is_normalized and _steps(description["normalizer"], "normalizers")):
        return None
    contents = [token["content"] for token in added]
    if any(cuts.find_words(content) != [content] for content in contents):
        return None
    has_parts = all(cuts.find_parts(content) == [content] for content in contents)
    return cuts if has_parts else replace(cuts, parts=None)


def _cuts_at_marks(description: Mapping[str, Any]) -> Cuts | None:
    """Cuts for SentencePiece's BPE, in which spaces are marks."""
    model = description["model"]
    steps = _steps(description["normalizer"], "normalizers")
    has_lead = steps[:1] == [{"type": "Prepend", "prepend": _MARK}]
    if steps[has_lead:] != [{"type": "Replace", "pattern": {"String": " "}, "content": _MARK}]:
        return None
    splits = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    if _steps(description["pre_tokenizer"], "pretokenizers") not in ([], [splits]):  # no space is left to split at
        return None
    # A character without a token becomes bytes, and never one unknown token together with its neighbours.
    vocabulary, of_bytes = model["vocab"], {f"<0x{byte:02X}>": chr(byte) for byte in range(256)}
    if not model.get("byte_fallback") or model.get("ignore_merges") or _MARK not in vocabulary:
        return None
    if not all(token in vocabulary or (own.isascii() and own in vocabulary) for token, own in of_bytes.items()):
        return None
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    if any(left in of_bytes or right in of_bytes for left, right in merges):
        return None
    crossing = [left + right for left, right in merges if right.startswith(_MARK) and not left.endswith(_MARK)]
    if len(crossing) > _MAX_CROSSING:
        return None
    pattern = _AT_SPACES if any("\n" in left + right for left, right in merges) else _AT_SPACES_AND_LINES
    whole = (_MARK, *(token.replace(_MARK, " ") for token in crossing))
    return Cuts(re.compile(pattern), _cuts_at_classes(merges), " " if has_lead else "", whole)


def _cuts_at_classes(merges: Sequence[tuple[str, str]]) -> re.Pattern[str] | None:
    """The pattern of parts where no merge joins two of ASCII's letters, digits and other characters."""
    for left, right in merges:
        before, after = left[-1], right[0]
        are_alike = before.isalpha() == after.isalpha() and before.isdigit() == after.isdigit()
        if before.isascii() and after.isascii() and not are_alike:
            return None
    return _AT_CLASSES


def _cuts_of_pattern(description: Mapping[str, Any]) -> Cuts | None:
    """Cuts for byte-level BPE, in which a pattern finds what is joined."""
    # No character joins a space or a line end before or after it to one character.
    if _steps(description["normalizer"], "normalizers") not in ([], [{"type": "NFC"}]):
        return None
    *splits, last = _steps(description["pre_tokenizer"], "pretokenizers") or [{}]
    if last.get("type") != "ByteLevel" or last["add_prefix_space"]:
        return None
    regexes = tuple((split.get("pattern") or {}).get("Regex", "") for split in splits)
    regexes = tuple(regex.replace("\r", r"\r").replace("\n", r"\n") for regex in regexes)
    if splits == [_EACH_DIGIT]:  # between which GPT-2's pattern is searched
        regexes, splits = (), []
    # Matches are isolated. Where all of a text is matched, that is to remove what is between them.
    ways = [(split["type"], split["behavior"], split["invert"]) for split in splits if split["type"] == "Split"]
    if ways != [("Split", "Isolated", False)] * len(splits) and ways != [("Split", "Removed", True)]:
        return None
    if last.get("use_regex", True) != (not splits) or regexes not in _PATTERNS:
        return None
    return Cuts(re.compile(_PATTERNS[regexes]), _AFTER_LETTERS_AND_DIGITS)


def _steps(part: Mapping[str, Any] | None, name: str) -> list[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, which may be a sequence of them, or none."""
    if part is None:
        return []
    return [step for inner in part[name] for step in _steps(inner, name)] if part["type"] == "Sequence" else [part]


# ---- The cache ----


class WordCache:
    """The ids of words and parts that came before, within MAX_WORDS and MAX_CHARS; when it is full, it begins anew."""

    def __init__(self, tokenizer: Tokenizer, cuts: Cuts) -> None:
        self._tokenizer = tokenizer
        self._cuts = cuts
        if cuts.lead:  # each text gets it here
            self._tokenizer.normalizer = normalizers.Replace(" ", _MARK)
        self._ids: dict[str, bytes] = {}
        self._num_chars = 0

    def encode_texts(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        """The ids of each text, read-only."""
        if len(self._ids) > MAX_WORDS or self._num_chars > MAX_CHARS:
            self._ids.clear()
            self._num_chars = 0
        return [np.frombuffer(self._encode(text), np.int32) for text in texts]  # one by one: its words are at hand

    def _encode(self, text: str) -> bytes:
        words = self._cuts.find_words(text)
        look_up = self._ids.__getitem__
        try:
            return b"".join(map(look_up, words))
        except KeyError:
            learned = self._learn(words)
        ids = b"".join(map(look_up, words))
        self._num_chars += sum(map(len, learned))
        for piece in learned:
            if len(piece) > MAX_WORD_CHARS:
                self._num_chars -= len(piece)
                del self._ids[piece]
        return ids

    def _learn(self, words: Sequence[str]) -> list[str]:
        """Find the ids of the words that are not known; the words and parts that are known now."""
        new = self._find_new(words)
        parts = [self._cuts.find_parts(word) for word in new]
        unknown = self._find_new(chain.from_iterable(parts))
        encodings = self._tokenizer.encode_batch_fast(unknown, add_special_tokens=False)
        self._ids.update(zip(unknown, (array("i", encoding.ids).tobytes() for encoding in encodings), strict=True))
        look_up = self._ids.__getitem__
        self._ids.update((word, b"".join(map(look_up, own))) for word, own in zip(new, parts, strict=True))
        return list(dict.fromkeys([*new, *unknown]))

    def _find_new(self, pieces: Iterable[str]) -> list[str]:
        """Each of the pieces that are not known yet, once."""
        return list(dict.fromkeys(filterfalse(self._ids.__contains__, pieces)))
