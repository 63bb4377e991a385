"""Text in another encoding than UTF-8: recognised and refused, or decoded where a recipe names the encoding."""

import codecs
import re
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice

from ochat_train.conversations.containers import ByteStream, unreadable

_PIECE_BYTES = 1 << 20
_ENOUGH = 64  # characters beyond ASCII that decide whether a text is UTF-8
_FEW = 4  # fewer that are not UTF-8 are a damaged record rather than another encoding
_SAMPLE_BYTES = 1 << 16
_WITHOUT = "give the file a source of its own without encoding"

# The encodings in which dumps are saved, the commonest first: of those that fit equally well it is named first.
_EAST_ASIAN = ("gb18030", "cp932", "big5", "cp949", "euc_jis_2004")
_USUAL = ("gb18030", "cp1252", "cp932", "cp1251", "big5", "cp949", "iso8859_15", "euc_jis_2004", "koi8_r", "cp1250")
_BEYOND_ASCII = re.compile(r"[^\x00-\x7f]")
_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # as "surrogateescape" decodes it

# Byte order marks, and the beginnings of JSON and pages without one.
_WIDE = re.compile(
    rb"(?P<utf_32>\xff\xfe\0\0|\0\0\xfe\xff)|(?P<utf_16>\xff\xfe|\xfe\xff)|(?P<utf_32_le>[\[{<\s]\0\0\0)"
    rb"|(?P<utf_32_be>\0\0\0[\[{<\s])|(?P<utf_16_le>[\[{<\s]\0)|(?P<utf_16_be>\0[\[{<\s])"
)


def refuse_wide(stream: ByteStream) -> None:
    """Raise ValueError for a text in UTF-16 or UTF-32."""
    if wide := _WIDE.match(stream.peek(4)):
        raise _refused(stream, 0, [str(wide.lastgroup)], b"")


def check_utf8(stream: ByteStream) -> ByteStream:
    """The same bytes. Raises ValueError, while they are read, for a text in another encoding.

    That is a text whose first 64 characters beyond ASCII are mostly not UTF-8; its likely encodings are named. A few
    that are not, in a text that otherwise is UTF-8, are left to the reader of the records.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    are_utf8: list[bool] = []  # of the first 64
    offset, first, sample = stream.offset, 0, b""

    def read(num_bytes: int) -> bytes:
        nonlocal offset, first, sample
        piece = stream.read(num_bytes)
        if len(are_utf8) >= _ENOUGH:
            return piece
        if piece and piece.isascii() and not decoder.getstate()[0]:
            offset += len(piece)
            return piece
        text = decoder.decode(piece, final=not piece)
        are_utf8.extend(_are_utf8(text, _ENOUGH - len(are_utf8)))
        if not sample and (bad := _NOT_UTF8.search(text)):
            first = offset + len(_encode(text[: bad.start()]))
            sample = _encode(text[bad.start() :])[:_SAMPLE_BYTES]
        offset += len(_encode(text))
        num_bad = are_utf8.count(False)
        if (len(are_utf8) == _ENOUGH or not piece) and num_bad >= _FEW and 2 * num_bad > len(are_utf8):
            raise _refused(stream, first, _guess(sample), sample)
        return piece

    return stream.through(read)


def decode(stream: ByteStream, encoding: str) -> ByteStream:
    """The text of `stream`, which is in `encoding`, as UTF-8. Raises ValueError, while it is read, if it is not.

    It also raises for a text that is UTF-8: nearly every other encoding would read that too, as something else.
    """
    decoder = codecs.getincrementaldecoder(encoding)()
    is_wide = codecs.lookup(encoding).name.startswith(("utf-16", "utf-32"))
    may_be_utf8 = codecs.lookup(encoding).name.startswith("utf-8")
    are_utf8: list[bool] = []  # of the first 64 characters beyond ASCII
    waiting = b""
    is_done = False

    def is_utf8() -> ValueError:
        return unreadable(stream.name, 0, f"the source says encoding: {encoding}, but this is UTF-8", _WITHOUT)

    def read(num_bytes: int) -> bytes:
        nonlocal waiting, is_done
        while not waiting and not is_done:
            offset = stream.offset
            piece = stream.read(_PIECE_BYTES)
            is_done = not piece
            if not is_wide and not may_be_utf8 and len(are_utf8) < _ENOUGH:
                are_utf8.extend(_are_utf8(piece.decode("utf-8", "surrogateescape"), _ENOUGH - len(are_utf8)))
                is_mostly = are_utf8.count(True) >= max(_FEW, len(are_utf8) / 2)
                if (len(are_utf8) == _ENOUGH or is_done) and are_utf8 and (is_mostly or all(are_utf8)):
                    raise is_utf8()
            try:
                waiting = decoder.decode(piece, is_done).encode()
            except UnicodeError as error:
                if all(are_utf8) and (are_utf8 or is_wide):
                    raise is_utf8() from None
                at = offset + getattr(error, "start", 0)
                found = f"this is not {encoding} ({error.reason if isinstance(error, UnicodeDecodeError) else error})"
                raise unreadable(stream.name, at, found, "name the file's encoding in the source") from None
        given, waiting = waiting[:num_bytes], waiting[num_bytes:]
        return given

    return stream.through(read)


def _are_utf8(text: str, most: int) -> Iterator[bool]:
    """For each of the first `most` characters beyond ASCII whether it is UTF-8 and not a byte that was escaped."""
    return (_NOT_UTF8.match(sign[0]) is None for sign in islice(_BEYOND_ASCII.finditer(text), most))


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _guess(sample: bytes) -> list[str]:
    """Python's names of the encodings that the bytes may be in, the likeliest first; at most 4."""
    from charset_normalizer import from_bytes  # here, since most dumps are UTF-8

    matches = from_bytes(sample, cp_isolation=list(_USUAL))
    likeliest = sorted(matches, key=lambda match: (match.chaos, -match.coherence, _USUAL.index(match.encoding)))
    names = [match.encoding for match in likeliest]
    if not {"cp1252", "cp1251", "koi8_r", *_EAST_ASIAN} & set(names):  # too short to tell from other Latin ones
        with suppress(UnicodeDecodeError):
            sample.decode("cp1252")
            names.insert(0, "cp1252")
    return names[:4]


def _refused(stream: ByteStream, offset: int, guesses: list[str], sample: bytes) -> ValueError:
    shown = []
    for name in guesses:
        excerpt = re.search(r"[^\x00-\x7f][^\"\n]{0,19}", sample.decode(name, "replace"))
        shown.append(f"{name} (in which it reads {excerpt[0]!r})" if excerpt else name)
    if not shown:
        remedy = "save it as UTF-8, or name its encoding in the source, as in encoding: cp1252"
        return unreadable(stream.name, offset, "this is not UTF-8, nor any known encoding", remedy)
    found = f"this is not UTF-8; it is likely {' or '.join(shown)}"
    return unreadable(stream.name, offset, found, f"name it in the source, as in encoding: {guesses[0]}")
