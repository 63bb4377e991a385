"""Files on disk as streams of bytes: gzip and zstd are decompressed, zip and tar give their members one by one.

Nothing is written to disk, so the names inside an archive cannot point anywhere, and no more of a file is held in
memory than the reader requests.
"""

import io
import os
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, Self, cast

from ochat_train.conversations.hub import Unreachable, cached_copy
from ochat_train.conversations.remote import RemoteFile, is_remote

_TEXT_SUFFIXES = (".html", ".htm", ".json", ".jsonl", ".ndjson", ".csv", ".tsv")
SUFFIXES = (
    *_TEXT_SUFFIXES,
    *(".parquet", ".arrow", ".zip", ".tar", ".tgz"),
    *(text + packed for text in (*_TEXT_SUFFIXES, ".tar") for packed in (".gz", ".zst")),
)

# A file out of which come more bytes, and so many times more than were read of it, is taken for a bomb: chats compress
# 3 to 20 times.
BOMB_BYTES = 256 << 20
BOMB_RATIO = 200

_PIECE_BYTES = 1 << 20  # requested from a library at once
_FETCH_AGAIN = "the file is damaged: fetch it again"


class Unreadable(ValueError):
    """An input that cannot be read: its name, the place in it, what is wrong and the remedy."""


def unreadable(name: str, offset: int, found: str, remedy: str, *, unit: str = "byte") -> Unreadable:
    """The error `NAME, byte OFFSET: FOUND; REMEDY`, the form that all readers share."""
    return Unreadable(f"{name}, {unit} {offset}: {found}; {remedy}")


def explain(error: Exception) -> str:
    """The type and message of a library's exception, on one line; some have no message."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def escape_name(name: str) -> str:
    """The name as text that can be written anywhere: each byte that is not UTF-8 becomes its escape.

    Worked example: `"d\\udce9"`, Python's name for the file b"d\\xe9", gives `r"d\\xe9"`. A name that is UTF-8 is given
    as it is.
    """
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def has_known_suffix(name: str) -> bool:
    """Whether a file of a folder or an archive is to be read: it has a known suffix and is not hidden.

    Saved pages come with folders of scripts and pictures, archives with READMEs, and a Mac adds `.DS_Store` and `._x`.
    """
    is_hidden = any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))
    return name.lower().endswith(SUFFIXES) and not is_hidden


class DiskFile(io.FileIO):
    """A file on disk that counts the bytes that were read of it, and those that came out of it decompressed."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path
        self.size = os.fstat(self.fileno()).st_size
        self.num_read = 0
        self.num_out = 0

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size) or b""
        self.num_read = min(self.num_read + len(data), self.size)  # the index of an archive is read twice
        return data


class ByteStream:
    """The bytes of a file or of an archive's member, once from front to back.

    `name` is the path of the file on disk, followed by a member's name: "dump.zip/pages/a.html", both as `escape_name`
    gives them. `packing` says how it is packed, such as ", gzip in zip". `offset` counts the bytes that were given out.

    Reading raises ValueError, with name and byte, for whatever a library says of a damaged file, and for a bomb.
    """

    closed = False  # Arrow reads it

    def __init__(self, name: str, packing: str, read: Callable[[int], bytes], disk: DiskFile | RemoteFile) -> None:
        self.name = name
        self.packing = packing
        self.offset = 0
        self.disk = disk
        self._read = read
        self._is_counted = True
        self._ahead = b""

    def through(self, read: Callable[[int], bytes]) -> "ByteStream":
        """A stream of what `read` makes of the bytes that are left of this one."""
        stream = ByteStream(self.name, self.packing, read, self.disk)
        stream.offset = self.offset
        stream._is_counted = False  # its bytes came out of the file before
        return stream

    def close(self) -> None:
        """Arrow calls it; the file on disk is closed by `open_streams`."""

    def peek(self, num_bytes: int) -> bytes:
        """The next `num_bytes`, fewer only at the end; they are not given out yet."""
        pieces = [self._ahead]
        num_missing = num_bytes - len(self._ahead)
        while num_missing > 0 and (piece := self._pull(num_missing)):
            pieces.append(piece)
            num_missing -= len(piece)
        self._ahead = b"".join(pieces)
        return self._ahead[:num_bytes]

    def read(self, num_bytes: int) -> bytes:
        """The next `num_bytes`, fewer only at the end."""
        data = self.peek(num_bytes)
        self._ahead = self._ahead[len(data) :]
        self.offset += len(data)
        return data

    def _pull(self, num_bytes: int) -> bytes:
        try:
            piece = self._read(min(num_bytes, _PIECE_BYTES))
        except (Unreadable, Unreachable):
            raise
        except Exception as error:  # what a library makes of a damaged file is in no list
            raise unreadable(self.name, self.offset, f"reading stops here ({explain(error)})", _FETCH_AGAIN) from error
        if self._is_counted:
            self.disk.num_out += len(piece)
            self.refuse_bomb(self.disk.num_out, self.disk.num_read, "decompress it yourself if you trust it")
        return piece

    def refuse_bomb(self, num_out: int, num_read: int, remedy: str, *, unit: str = "byte") -> None:
        """Raise ValueError if `num_out` bytes are more than may come out of `num_read`."""
        if num_out > BOMB_BYTES and num_out > BOMB_RATIO * num_read:
            found = f"{num_out:,} bytes came out of {num_read:,}"
            limit = f"more than {BOMB_BYTES:,} and than {BOMB_RATIO} times as many are taken for a bomb"
            raise unreadable(self.name, self.offset, f"{found}; {limit}", remedy, unit=unit)


def open_streams(path: str) -> Iterator[ByteStream]:
    """The file at `path`, decompressed, or each member of an archive, decompressed too.

    A file's first bytes decide what it is, not its name. Members of a known suffix are given in the archive's order;
    each must be read before the next is requested. An archive in an archive is given as it is.

    Raises ValueError while iterating: for a file that cannot be opened, an archive that is broken or holds no member to
    read, a zip inside gzip or zstd, and a member that is encrypted or packed by another method than deflate.
    """
    name = escape_name(path)
    try:
        place = cached_copy(path) or path
        disk = RemoteFile(place) if is_remote(place) else DiskFile(place)
    except OSError as error:
        raise Unreadable(f"{name} cannot be read: {error.strerror}; fix that, or leave it out") from None
    with disk:
        stream = _decompress(ByteStream(name, "", disk.read, disk))
        head = stream.peek(tarfile.BLOCKSIZE)
        if head.startswith((b"PK\3\4", b"PK\5\6")):
            if stream.packing:
                raise unreadable(name, 0, f"a zip file{stream.packing}", "decompress it to the zip file first")
            kind, members = "zip", _open_zip(disk, name)
        elif _is_tar(head):
            kind, members = "tar", _open_tar(stream)
        else:
            yield stream
            return
        num_members = 0
        for member, read in members:
            num_members += 1
            yield _decompress(ByteStream(f"{name}/{member}", f" in {kind}{stream.packing}", read, disk))
        if not num_members:
            remedy = f"known suffixes are {' '.join(SUFFIXES)}"
            raise unreadable(name, 0, "the archive holds no file with a known suffix", remedy)


def _decompress(stream: ByteStream) -> ByteStream:
    head = stream.peek(4)
    if head.startswith(b"\x1f\x8b"):
        codec = "gzip"
    elif head == b"\x28\xb5\x2f\xfd" or (head[1:] == b"\x2a\x4d\x18" and head[0] >> 4 == 5):  # a skippable frame
        codec = "zstd"
    else:
        return stream
    # here, since most workers never need Arrow; it reads on after the end of a gzip member and of a zstd frame
    import pyarrow

    source = pyarrow.CompressedInputStream(pyarrow.PythonFile(stream, mode="r"), codec)
    return ByteStream(stream.name, f", {codec}{stream.packing}", source.read, stream.disk)


def _open_zip(disk: DiskFile | RemoteFile, path: str) -> Iterator[tuple[str, Callable[[int], bytes]]]:
    try:
        archive = zipfile.ZipFile(cast(Any, disk))
    except Unreachable:
        raise
    except Exception as error:  # as in ByteStream
        raise unreadable(path, 0, f"not a whole zip file ({explain(error)})", _FETCH_AGAIN) from error
    for info in archive.infolist():
        if not has_known_suffix(info.filename):
            continue
        name = f"{path}/{info.filename}"
        if info.flag_bits & 1:
            raise unreadable(name, 0, "the member is encrypted", "unpack the archive with its password")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            # bzip2 and LZMA would also decompress without a bound
            found = f"the member is packed by method {info.compress_type}, neither stored (0) nor deflated (8)"
            raise unreadable(name, 0, found, "unpack the archive, or zip it again with deflate")
        try:
            member = archive.open(info)
        except Unreachable:
            raise
        except Exception as error:  # as in ByteStream
            raise unreadable(name, 0, f"the member cannot be opened ({explain(error)})", _FETCH_AGAIN) from error
        with member:
            yield info.filename, member.read


def _is_tar(head: bytes) -> bool:
    if head == bytes(tarfile.BLOCKSIZE):  # the end mark: a tar file without members
        return True
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")  # checks the header's checksum
    except tarfile.TarError:
        return False
    return True


# Headers whose content is the name of the member after them, or more about it.
_NAME_HEADERS = (
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
)


class _TarHeader(tarfile.TarInfo):
    """A header of a tar file; a broken one and a very large one are errors, which tarfile would accept."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if not buf.strip(b"\0"):  # the end mark
                raise
            raise tarfile.ReadError(f"no valid header: {error}") from None
        if header.type in _NAME_HEADERS and header.size > _PIECE_BYTES:
            raise tarfile.ReadError(f"a header of {header.size:,} bytes, above {_PIECE_BYTES:,}")
        return header


def _open_tar(stream: ByteStream) -> Iterator[tuple[str, Callable[[int], bytes]]]:
    try:
        with tarfile.open(fileobj=cast(Any, stream), mode="r|", encoding="utf-8", tarinfo=_TarHeader) as archive:
            while (info := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all
                if info.isreg() and has_known_suffix(info.name):
                    member = archive.extractfile(info)
                    assert member is not None
                    yield escape_name(info.name), member.read
            while padding := archive.fileobj.read(_PIECE_BYTES):
                if padding.strip(b"\0"):
                    found = "something follows the archive's end"
                    raise unreadable(stream.name, stream.offset, found, "unpack it with tar -i")
    except (Unreadable, Unreachable):
        raise
    except Exception as error:  # as in ByteStream
        found = f"the archive breaks here ({explain(error)})"
        raise unreadable(stream.name, stream.offset, found, _FETCH_AGAIN) from error
