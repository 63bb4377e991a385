"""Text in another encoding than UTF-8: recognised and refused, or read where a recipe names the encoding."""

import codecs
import re
from itertools import islice

from ochat_train.conversations.containers import ByteStream, unreadable

_PIECE_BYTES = 1 << 20
_ENOUGH = 64  # signs beyond ASCII that decide whether a text is UTF-8
_FEW = 4  # below so many that are no UTF-8, it is a damaged record rather than another encoding
_SAMPLE_BYTES = 1 << 16
_WITHOUT = "give the file a source of its own without encoding"

# What dumps are saved in, the commonest first. They are named before others, and of those that fit equally well the
# first is named first.
_EAST_ASIAN = ("gb18030", "cp932", "big5", "cp949", "euc_jis_2004")
_USUAL = ("gb18030", "cp1252", "cp932", "cp1251", "big5", "cp949", "iso8859_15", "euc_jis_2004", "koi8_r", "cp1250")
_BEYOND_ASCII = re.compile(r"[^\x00-\x7f]")

# Byte order marks, and how JSON and pages begin where there is none.
_WIDE = re.compile(
    rb"(?P<utf_32>\xff\xfe\0\0|\0\0\xfe\xff)|(?P<utf_16>\xff\xfe|\xfe\xff)|(?P<utf_32_le>[\[{<\s]\0\0\0)"
    rb"|(?P<utf_32_be>\0\0\0[\[{<\s])|(?P<utf_16_le>[\[{<\s]\0)|(?P<utf_16_be>\0[\[{<\s])"
)


def refuse_wide(stream: ByteStream) -> None:
    """Raise ValueError for a text in UTF-16 or UTF-32."""
    if wide := _WIDE.match(stream.peek(4)):
        raise _refused(stream, 0, [str(wide.lastgroup)], b"")


def check_utf8(stream: ByteStream) -> ByteStream:
    """The same bytes. Raises ValueError, while they are read, for a text that is in another encoding.

    That is one whose first 64 signs beyond ASCII are mostly no UTF-8; its likely encodings are named. Single ones that
    are none, in a text that is UTF-8 otherwise, are left to whoever reads the records.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    signs: list[bool] = []  # whether each of the first 64 is UTF-8
    offset, first, sample = stream.offset, 0, b""

    def read(num_bytes: int) -> bytes:
        nonlocal offset, first, sample
        piece = stream.read(num_bytes)
        if len(signs) >= _ENOUGH:
            return piece
        if piece and piece.isascii() and not decoder.getstate()[0]:
            offset += len(piece)
            return piece
        text = decoder.decode(piece, final=not piece)
        for sign in islice(_BEYOND_ASCII.finditer(text), _ENOUGH - len(signs)):
            signs.append(not "\udc80" <= sign[0] <= "\udcff")
            if not signs[-1] and not sample:
                first = offset + len(text[: sign.start()].encode("utf-8", "surrogateescape"))
                sample = text[sign.start() :].encode("utf-8", "surrogateescape")[:_SAMPLE_BYTES]
        offset += len(text.encode("utf-8", "surrogateescape"))
        num_invalid = signs.count(False)
        if (len(signs) == _ENOUGH or not piece) and num_invalid >= _FEW and 2 * num_invalid > len(signs):
            raise _refused(stream, first, _guess(sample), sample)
        return piece

    return stream.through(read)


def decode(stream: ByteStream, encoding: str) -> ByteStream:
    """The text of `stream`, which is in `encoding`, as UTF-8. Raises ValueError, while it is read, if it is not.

    Neither is a text that is UTF-8: nearly every other encoding would read it too, as something else.
    """
    decoder = codecs.getincrementaldecoder(encoding)()
    signs: list[bool] = []
    is_utf8 = f"the source says encoding: {encoding}, but this is UTF-8"
    is_wide = codecs.lookup(encoding).name.startswith(("utf-16", "utf-32", "utf-8"))
    waiting = b""
    is_done = False

    def read(num_bytes: int) -> bytes:
        nonlocal waiting, is_done
        while not waiting and not is_done:
            offset = stream.offset
            piece = stream.read(_PIECE_BYTES)
            is_done = not piece
            if not is_wide and len(signs) < _ENOUGH:
                text = piece.decode("utf-8", "surrogateescape")
                found_signs = islice(_BEYOND_ASCII.finditer(text), _ENOUGH - len(signs))
                signs.extend(not "\udc80" <= sign[0] <= "\udcff" for sign in found_signs)
                is_mostly = signs.count(True) >= max(_FEW, len(signs) / 2)
                if (len(signs) == _ENOUGH or is_done) and signs and (is_mostly or all(signs)):
                    raise unreadable(stream.name, 0, is_utf8, _WITHOUT)
            try:
                waiting = decoder.decode(piece, is_done).encode()
            except UnicodeError as error:
                if all(signs) and (signs or is_wide):
                    raise unreadable(stream.name, 0, is_utf8, _WITHOUT) from None
                at = offset + getattr(error, "start", 0)
                found = f"this is not {encoding} ({error.reason if isinstance(error, UnicodeDecodeError) else error})"
                raise unreadable(stream.name, at, found, "name the file's encoding in the source") from None
        given, waiting = waiting[:num_bytes], waiting[num_bytes:]
        return given

    return stream.through(read)


def _guess(sample: bytes) -> list[str]:
    """Python's names of the encodings that the bytes may be in, the likeliest first; at most 4."""
    from charset_normalizer import from_bytes  # here, since most dumps are UTF-8

    matches = [match for match in from_bytes(sample) if match.encoding not in ("utf_8", "ascii")]
    usual = sorted(
        (match for match in matches if match.encoding in _USUAL),
        key=lambda match: (match.chaos, -match.coherence, _USUAL.index(match.encoding)),
    )
    names = [match.encoding for match in [*usual, *(match for match in matches if match not in usual)]]
    if not {"cp1252", "cp1251", "koi8_r", *_EAST_ASIAN} & set(names):  # too short to tell from other Latin ones
        try:
            sample.decode("cp1252")
            names.insert(0, "cp1252")
        except UnicodeDecodeError:
            pass
    return names[:4]


def _refused(stream: ByteStream, offset: int, guesses: list[str], sample: bytes) -> ValueError:
    shown = []
    for name in guesses:
        excerpt = re.search(r"[^\x00-\x7f][^\"\n]{0,19}", sample.decode(name, "replace"))
        shown.append(f"{name} (in which it reads {excerpt[0]!r})" if excerpt else name)
    if not shown:
        remedy = "save it as UTF-8, or name its encoding in the source, as in encoding: cp1252"
        return unreadable(stream.name, offset, "this is not UTF-8, nor any encoding that we know", remedy)
    found = f"this is not UTF-8; it is likely {' or '.join(shown)}"
    return unreadable(stream.name, offset, found, f"name it in the source, as in encoding: {guesses[0]}")
