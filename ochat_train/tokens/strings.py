"""Rendered strings to ids, as `apply_chat_template` encodes them; what a text spells is not control."""

import re
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

_FIRST_PLACEHOLDER = 0xF0000  # of Unicode's private use: the character for the first special token
Positions = npt.NDArray[np.int64]


class Refused(NamedTuple):
    """Why a conversation has no ids: a name to count by, and words for a person."""

    reason: str
    detail: str


class Tokens(NamedTuple):
    """ids: i32[L]. starts, ends: i64[L], the characters of the string that each token stands for."""

    ids: npt.NDArray[np.int32]
    starts: Positions
    ends: Positions

    def between(self, first: int, stop: int) -> "Tokens":
        """The tokens [first, stop)."""
        return Tokens(self.ids[first:stop], self.starts[first:stop], self.ends[first:stop])


class StringEncoder:
    """Encodes rendered strings: special tokens in them are control, but for those that `hide` has hidden."""

    def __init__(self, control: Tokenizer, text: Tokenizer) -> None:
        """control: the tokenizer as it reads strings. text: the same, to which a special token is text."""
        self._control, self._text = control, text
        decoder = control.get_added_tokens_decoder()
        self.special = {id_: token.content for id_, token in decoder.items() if token.special and token.content}
        self._tokens = sorted(self.special.values(), key=len, reverse=True)
        self._numbers = {token: number for number, token in enumerate(self._tokens)}
        self._lengths = sorted({len(token) for token in self._tokens}, reverse=True)
        firsts = "".join(sorted({token[0] for token in self._tokens}))
        self._first = re.compile(f"[{re.escape(firsts)}]" if firsts else r"(?!)")

    def hide(self, text: str) -> str:
        """The text with a placeholder for each special token that it spells."""
        parts: list[str] = []
        place = 0
        for found in self._first.finditer(text):  # a pattern of thousands of tokens would be slow
            start = found.start()
            lengths = self._lengths if start >= place else ()
            spelled = next((text[start : start + n] for n in lengths if text[start : start + n] in self._numbers), None)
            if spelled is not None:
                parts += (text[place:start], chr(_FIRST_PLACEHOLDER + self._numbers[spelled]))
                place = start + len(spelled)
        return "".join([*parts, text[place:]])

    def has_placeholder(self, text: str) -> bool:
        """Whether a text has a character that `hide` would use."""
        return self._placeholders.search(text) is not None

    @cached_property
    def _placeholders(self) -> re.Pattern[str]:
        last = chr(_FIRST_PLACEHOLDER + max(len(self._tokens) - 1, 0))
        return re.compile(f"[{chr(_FIRST_PLACEHOLDER)}-{last}]")

    def encode(self, strings: Sequence[str], *, is_hidden: Sequence[bool]) -> list[Tokens | Refused]:
        """The tokens of each string. is_hidden: whether it has placeholders, which become the texts they stand for."""
        encodings = self._control.encode_batch(list(strings), add_special_tokens=False)
        made: list[Tokens | Refused] = []
        for string, hidden, encoding in zip(strings, is_hidden, encodings, strict=True):
            offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
            tokens = Tokens(np.array(encoding.ids, np.int32), offsets[:, 0], offsets[:, 1])
            for position in np.flatnonzero(np.isin(tokens.ids, self._special_ids)).tolist():
                # Some tokens take white space beside them; what they stand for is the token itself.
                token = self.special[int(tokens.ids[position])]
                start = string.find(token, int(tokens.starts[position]))
                tokens.starts[position], tokens.ends[position] = start, start + len(token)
            made.append(self._restore(string, tokens) if hidden else tokens)
        return made

    @cached_property
    def _special_ids(self) -> npt.NDArray[np.int32]:
        return np.array(sorted(self.special), np.int32)

    def _restore(self, string: str, tokens: Tokens) -> Tokens | Refused:
        """The tokens, with those of runs between special tokens that have placeholders made anew, as text alone."""
        special = np.flatnonzero(np.isin(tokens.ids, self._special_ids)).tolist()
        parts: list[Tokens] = []
        for before, after in zip([-1, *special], [*special, len(tokens.ids)], strict=True):
            run = tokens.between(before + 1, after)
            start = int(tokens.ends[before]) if before >= 0 else 0
            text = string[start : int(tokens.starts[after]) if after < len(tokens.ids) else len(string)]
            if self.has_placeholder(text):
                if self._text.encode(text, add_special_tokens=False).ids != run.ids.tolist():
                    return Refused("spells_control", "a text spells a special token, and cannot be encoded alone")
                run = self._restore_run(text, start)
            parts += [run, tokens.between(after, after + 1)]
        return Tokens(
            np.concatenate([part.ids for part in parts]),
            np.concatenate([part.starts for part in parts]),
            np.concatenate([part.ends for part in parts]),
        )

    def _restore_run(self, text: str, start: int) -> Tokens:
        """The tokens of a text with its placeholders as what they stand for; offsets are those of `text` as it is."""
        texts: list[str] = []
        places: list[int] = []
        for place, sign in enumerate(text):
            shown = self._tokens[ord(sign) - _FIRST_PLACEHOLDER] if self._placeholders.match(sign) else sign
            texts.append(shown)
            places += [start + place] * len(shown)
        encoding = self._text.encode("".join(texts), add_special_tokens=False)
        starts = np.array([*places, start + len(text)], np.int64)
        ends = np.array([start, *(place + 1 for place in places)], np.int64)
        offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        return Tokens(np.array(encoding.ids, np.int32), starts[offsets[:, 0]], ends[offsets[:, 1]])
