"""The ids of texts by their pieces, without the tokenizers library.

A text is cut where no token crosses and nothing on one side decides what is on the other, so that the ids of the text
are those of its pieces, one after another. Where such cuts are depends on the tokenizer. `find_cuts` proves it from the
tokenizer's own description, and gives None where there is no proof:

- SentencePiece's BPE writes a space as the mark U+2581, which begins words. Tokens come only from merges, and merges
  join neighbours. Where no merge joins a mark to another character before it, nothing crosses from a character to the
  spaces after it. Where no merge has a line feed, the same is true on both sides of one.
- Byte-level BPE joins only within what the tokenizer's own pattern matches. `_PATTERNS` lists the patterns of which we
  know where words end whatever comes next. Within words of ASCII, Python's `re` finds the same matches.

Pieces are merged by `encode_pieces`. What it leaves out goes to the library: pieces that are long, that have characters
which the vocabulary lacks, or, in byte-level BPE, words beyond ASCII.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby, pairwise
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, normalizers

from ochat_train.tokens.merges import Ints, Longs, encode_pieces, make_pairs, make_recent

# ---- Where a text may be cut ----

_MARK = "\u2581"
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
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_EACH_DIGIT = {"type": "Digits", "individual_digits": True}
# What of ASCII the classes of these patterns hold, as within brackets.
_ASCII = {
    **{"L": "A-Za-z", "Lu": "A-Z", "Ll": "a-z", "Lt": "", "Lm": "", "Lo": "", "M": "", "N": "0-9"},
    **{"P": r"!-#%-*,-/:;?@\[-\]_{}", "S": "$+<=>^`|~"},
}
# The characters that stand for ASCII in the vocabulary of byte-level BPE.
_SIGNS = {chr(byte): chr(256 + byte) for byte in range(33)} | {chr(byte): chr(byte) for byte in range(33, 127)}
_SIGNS["\x7f"] = "\u0121"
# Of characters: letters of ASCII, digits, other signs; 0 is a space, and at the end what is beyond ASCII.
_KINDS = [0 if char == " " else 1 if char.isalpha() else 2 if char.isdigit() else 3 for char in map(chr, range(128))]
_KIND_OF = np.array([*_KINDS, 0], np.uint8)
_MAX_ADDED = 100  # tokens that are looked for in text one by one; Gemma 3 has 6,415
_MAX_CROSSING = 8  # merges that join a mark to another character before it: Gemma 3 has one


@dataclass(frozen=True, slots=True)
class Cuts:
    """Where a tokenizer's texts may be cut, and what is merged within the pieces.

    char_ids: i32[C], the id of each character below C, -1 for one without. merges: i32[M, 3] of (left, right, merged),
    by rank. words: what it finds in a text, one after another, is all of the text; None where spaces begin words.
    matches: the same for a word of ASCII, each in what the one before it found. has_lines, has_kinds: whether, where
    spaces begin words, line feeds are pieces, and letters, digits and other signs of ASCII are. lead: what stands
    before every text, where the tokenizer puts it there. whole: a text that has one of these in it is not cut. added:
    finds the tokens that are found before anything else; only those in a group are no text. unmerged: tokens that are
    found as whole pieces, and not made by merges.
    """

    char_ids: Ints
    merges: Ints
    words: re.Pattern[str] | None = None
    matches: tuple[re.Pattern[str], ...] = ()
    has_lines: bool = False
    has_kinds: bool = False
    lead: str = ""
    whole: tuple[str, ...] = ()
    added: re.Pattern[str] | None = None
    unmerged: frozenset[str] = frozenset()

    def find_parts(self, text: str) -> list[str]:
        """The parts of a text with the lead, of which each second one is not cut; none of an empty text."""
        if not text:
            return []
        text = self.lead + text
        for part in self.whole:
            if part in text:
                return ["", text]
        parts: list[str] = []
        place = 0
        for found in self.added.finditer(text) if self.added is not None else ():
            if found.lastindex:
                parts += (text[place : found.start()], found[0])
                place = found.end()
        return [*parts, text[place:]]

    def find_matches(self, text: str) -> list[str]:
        """The pieces of a part at the matches of a pattern; words beyond ASCII are whole."""
        assert self.words is not None
        found: list[str] = []
        for is_ascii, words in groupby([text] if text.isascii() else self.words.findall(text), str.isascii):
            pieces = list(words)
            pieces = ["".join(pieces)] if is_ascii else pieces
            for pattern in self.matches if is_ascii else ():
                pieces = [*chain.from_iterable(map(pattern.findall, pieces))]
            found += pieces
        return found


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
    # Tokens that are found in text, before anything else: what is between them is as if it stood alone. Those that are
    # searched after normalizing have a search of their own.
    looks_around = any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in added)
    is_normalized = {token["normalized"] for token in added if not token["special"]}
    may_change = True in is_normalized and _steps(description["normalizer"], "normalizers")
    if cuts.lead or looks_around or may_change or len(is_normalized) > 1:
        return None
    found = {token["content"]: token["special"] for token in added if token["normalized"] in is_normalized}
    if len(found) > _MAX_ADDED:
        return None
    longest_first = sorted(found, key=len, reverse=True)
    names = (re.escape(token) if found[token] else f"({re.escape(token)})" for token in longest_first)
    return replace(cuts, added=re.compile("|".join(names)))


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
    merges = _read_merges(model)
    if any(left in of_bytes or right in of_bytes for left, right in merges):
        return None
    crossing = [left + right for left, right in merges if right.startswith(_MARK) and not left.endswith(_MARK)]
    if len(crossing) > _MAX_CROSSING:
        return None
    joined = [(ord(left[-1]), ord(right[0])) for left, right in merges]
    ids = {own: vocabulary[token] for token, own in of_bytes.items() if own.isascii() and token in vocabulary}
    ids |= {token: id_ for token, id_ in vocabulary.items() if len(token) == 1} | {" ": vocabulary[_MARK]}
    return Cuts(
        *_to_arrays(ids, merges, vocabulary),
        has_lines=not any("\n" in left + right for left, right in merges),
        has_kinds=not _differ_in_kind(*np.array(joined, np.int64).reshape(-1, 2).T).any(),
        lead=" " if has_lead else "",
        whole=(_MARK, *(token.replace(_MARK, " ") for token in crossing)),
    )


def _differ_in_kind(before: npt.NDArray[Any], after: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Whether each character and the one after it are signs of ASCII, no spaces, and of different kinds."""
    kinds, next_kinds = _KIND_OF[np.minimum(before, 128)], _KIND_OF[np.minimum(after, 128)]
    differ: npt.NDArray[np.bool_] = (kinds != next_kinds) & (kinds > 0) & (next_kinds > 0)
    return differ


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
    matches = regexes or (_GPT2,)
    if splits == [_EACH_DIGIT]:  # between which GPT-2's pattern is searched
        regexes, splits, matches = (), [], (r"\p{N}", _GPT2)
    # Matches are isolated. Where all of a text is matched, that is to remove what is between them.
    ways = [(split["type"], split["behavior"], split["invert"]) for split in splits if split["type"] == "Split"]
    if ways != [("Split", "Isolated", False)] * len(splits) and ways != [("Split", "Removed", True)]:
        return None
    if last.get("use_regex", True) != (not splits) or regexes not in _PATTERNS:
        return None
    model = description["model"]
    ids = {char: model["vocab"].get(sign, -1) for char, sign in _SIGNS.items()}
    cuts = Cuts(
        *_to_arrays(ids, _read_merges(model), model["vocab"]),
        words=re.compile(_PATTERNS[regexes]),
        matches=tuple(map(_in_ascii, matches)),
    )
    return replace(cuts, unmerged=_find_unmerged(cuts, model["vocab"])) if model.get("ignore_merges") else cuts


def _in_ascii(regex: str) -> re.Pattern[str]:
    """What finds in ASCII the matches of the library's regex, and what is between them."""

    def show(kind: re.Match[str]) -> str:
        return _ASCII[kind[1]]

    regex = re.sub(r"\[(?:\\.|[^\]\\])*\]", lambda found: re.sub(r"\\p\{(\w+)\}", show, found[0]), regex)
    regex = re.sub(r"\\p\{(\w+)\}", lambda kind: f"[{show(kind)}]", regex)
    return re.compile(rf"{regex}|(?:(?!{regex})[\s\S])+", re.ASCII)


def _find_unmerged(cuts: Cuts, vocabulary: Mapping[str, int]) -> frozenset[str]:
    """The tokens of ASCII that merges do not make of their characters."""
    chars = str.maketrans({sign: char for char, sign in _SIGNS.items()})
    tokens = {token: id_ for sign, id_ in vocabulary.items() if (token := sign.translate(chars)).isascii()}
    codes = _to_codes("".join(tokens))
    ends = np.cumsum(np.fromiter(map(len, tokens), np.int64))
    ids, counts = encode_pieces(codes, ends, cuts.char_ids, make_pairs(cuts.merges), make_recent())
    lasts = ids[np.cumsum(np.maximum(counts, 0)) - 1]
    is_made = (counts < 0) | ((counts == 1) & (lasts == [*tokens.values()]))
    return frozenset(token for token, made in zip(tokens, is_made.tolist(), strict=True) if not made)


def _read_merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The merges, which are pairs, or strings with a space between."""
    return [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]


def _to_arrays(
    ids: Mapping[str, int], merges: Sequence[tuple[str, str]], vocabulary: Mapping[str, int]
) -> tuple[Ints, Ints]:
    """char_ids and merges of Cuts."""
    char_ids = np.full(max(map(ord, ids)) + 1, -1, np.int32)
    char_ids[[*map(ord, ids)]] = [*ids.values()]
    rows = [(vocabulary[left], vocabulary[right], vocabulary[left + right]) for left, right in merges]
    return char_ids, np.array(rows, np.int32).reshape(-1, 3)


def _steps(part: Mapping[str, Any] | None, name: str) -> list[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, which may be a sequence of them, or none."""
    if part is None:
        return []
    return [step for inner in part[name] for step in _steps(inner, name)] if part["type"] == "Sequence" else [part]


def _to_codes(text: str) -> npt.NDArray[np.uint32]:
    return np.frombuffer(bytearray(text, "utf-32-le"), np.uint32)


# ---- The ids ----

_LEFT_OUT = np.iinfo(np.uint32).max  # in place of a character, whose piece is left to the library


class WordCache:
    """Encodes texts by their pieces; those that came lately are looked up. Threads take turns."""

    def __init__(self, tokenizer: Tokenizer, cuts: Cuts) -> None:
        self._tokenizer, self._cuts, self._lock = tokenizer, cuts, Lock()
        if cuts.lead:  # each text gets it here
            self._tokenizer.normalizer = normalizers.Replace(" ", _MARK)
        self._pairs, self._recent = make_pairs(cuts.merges), make_recent()

    def encode_texts(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        """The ids of each text."""
        parts = [self._cuts.find_parts(text) for text in texts]
        is_whole = np.array([place % 2 for own in parts for place in range(len(own))], np.bool_)
        flat = list(chain.from_iterable(parts))
        string = "".join(flat)
        stops = np.cumsum([0, *map(len, flat)])
        codes = _to_codes(string)
        if self._cuts.words is None:
            ends = self._find_words(codes, stops, is_whole)
        else:
            find = self._cuts.find_matches
            pieces = [
                *chain.from_iterable([part] if own else find(part) for part, own in zip(flat, is_whole, strict=True))
            ]
            ends = np.cumsum(np.fromiter(map(len, pieces), np.int64))
            if not self._cuts.unmerged.isdisjoint(pieces):
                is_unmerged = np.fromiter(map(self._cuts.unmerged.__contains__, pieces), np.bool_)
                codes[ends[is_unmerged] - 1] = _LEFT_OUT
        codes[stops[:-1][is_whole]] = _LEFT_OUT
        with self._lock:
            ids, counts = encode_pieces(codes, ends, self._cuts.char_ids, self._pairs, self._recent)
        left_out = np.flatnonzero(counts < 0)
        if len(left_out):
            ids = self._add_others(string, ends, left_out, ids, counts)
        text_stops = stops[np.cumsum([0, *map(len, parts)])]
        num_ids = np.concatenate([[0], np.cumsum(counts)])
        bounds = num_ids[np.searchsorted(ends, text_stops, side="right")]
        return [ids[start:stop] for start, stop in pairwise(bounds.tolist())]

    def _find_words(self, codes: npt.NDArray[np.uint32], stops: Longs, is_whole: npt.NDArray[np.bool_]) -> Longs:
        """Where pieces end that begin with spaces or, where that is proved, are line feeds."""
        is_end, is_space, is_line = np.zeros(len(codes), np.bool_), codes == ord(" "), codes == ord("\n")
        is_end[:-1] = is_space[1:] > is_space[:-1]
        if self._cuts.has_lines:
            is_end[:-1] |= is_line[1:] != is_line[:-1]
        if self._cuts.has_kinds:
            is_end[:-1] |= _differ_in_kind(codes[:-1], codes[1:])
        for position in np.flatnonzero(is_whole).tolist():
            is_end[stops[position] : stops[position + 1]] = False
        is_end[stops[stops > 0] - 1] = True
        return np.flatnonzero(is_end) + 1

    def _add_others(self, string: str, ends: Longs, left_out: Longs, ids: Ints, counts: Ints) -> Ints:
        """The ids with those of the pieces that were left out, of which `counts` gets the numbers."""
        starts = np.concatenate([[0], ends])[left_out].tolist()
        pieces = [string[start:end] for start, end in zip(starts, ends[left_out].tolist(), strict=True)]
        new = list(dict.fromkeys(pieces))
        encodings = self._tokenizer.encode_batch_fast(new, add_special_tokens=False)
        ids_of = {piece: encoding.ids for piece, encoding in zip(new, encodings, strict=True)}
        counts[left_out] = 0
        places, found = np.cumsum(counts)[left_out], [ids_of[piece] for piece in pieces]
        counts[left_out] = lengths = [*map(len, found)]
        return np.insert(ids, np.repeat(places, lengths), list(chain.from_iterable(found)))
