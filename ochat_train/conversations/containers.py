"""Files on disk as streams of bytes: gzip and zstd are decompressed, zip and tar give their members one by one.

Nothing is written to disk, so the names inside an archive cannot point anywhere, and no more of a file is held than
the reader asks for.
"""

import io
import os
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

_TEXT_SUFFIXES = (".html", ".htm", ".json", ".jsonl", ".ndjson")
SUFFIXES = (
    *_TEXT_SUFFIXES,
    *(".parquet", ".arrow", ".zip", ".tar", ".tgz"),
    *(text + packed for text in (*_TEXT_SUFFIXES, ".tar") for packed in (".gz", ".zst")),
)

# Above both, what comes out of a file is taken for a bomb: chats in JSON or HTML compress 3 to 20 times.
BOMB_BYTES = 256 << 20
BOMB_RATIO = 200

_PIECE_BYTES = 1 << 20  # asked of a library at once
_FETCH_AGAIN = "the file is damaged: fetch it again"


class Unreadable(ValueError):
    """An input that cannot be read: its name, the place in it, what is wrong and the remedy."""


def unreadable(name: str, offset: int, found: str, remedy: str, *, unit: str = "byte") -> Unreadable:
    """The error that says so in the one form of all readers: `NAME, byte OFFSET: FOUND; REMEDY`."""
    return Unreadable(f"{name}, {unit} {offset}: {found}; {remedy}")


def explain(error: Exception) -> str:
    """What a library's exception says, on one line; some say nothing but their name."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def escape_name(name: str) -> str:
    """The name as text that can be written anywhere: each byte of it that is not UTF-8 becomes its escape.

    Worked example: `"d\\udce9"`, Python's name for the file b"d\\xe9", gives `r"d\\xe9"`. A name that is UTF-8 is given
    as it is.
    """
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def has_known_suffix(name: str) -> bool:
    """Whether a file of a folder or an archive is meant to be read: of a known suffix, and not hidden.

    Saved pages come with folders of scripts and pictures, archives with READMEs, and a Mac adds `.DS_Store` and `._x`.
    """
    is_hidden = any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))
    return name.lower().endswith(SUFFIXES) and not is_hidden


class DiskFile(io.FileIO):
    """A file on disk that knows how much of it was read."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path
        self.size = os.fstat(self.fileno()).st_size
        self._num_read = 0

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size) or b""
        self._num_read += len(data)
        return data

    @property
    def num_read(self) -> int:
        """Bytes of it that were read so far, at most its size."""
        return min(self._num_read, self.size)  # an archive's index is read twice

    @num_read.setter
    def num_read(self, num_bytes: int) -> None:
        self._num_read = num_bytes


class _Swelling:
    """How much came out of a file on disk, in one layer of its packing."""

    def __init__(self, disk: DiskFile) -> None:
        self.disk = disk
        self.num_out = 0

    def is_bomb(self) -> bool:
        return self.num_out > BOMB_BYTES and self.num_out > BOMB_RATIO * self.disk.num_read


class ByteStream:
    """The bytes of a file or of an archive's member, once from front to back.

    `name` is the path of the file on disk, with a member's name behind it: "dump.zip/pages/a.html", both as
    `escape_name` gives them. `packing` says how it is packed, such as ", gzip in zip". `offset` counts the bytes that
    were given out.

    Reading raises ValueError, with name and byte, for whatever a library says of a damaged file, and for a file out of
    which comes more than BOMB_BYTES and more than BOMB_RATIO times what was read of it.
    """

    closed = False  # Arrow asks for it

    def __init__(self, name: str, packing: str, read: Callable[[int], bytes], swelling: _Swelling) -> None:
        self.name = name
        self.packing = packing
        self.offset = 0
        self.disk = swelling.disk
        self._read = read
        self._swelling = swelling
        self._ahead = b""

    def through(self, read: Callable[[int], bytes]) -> "ByteStream":
        """A stream of what `read` makes of the bytes that are left of this one."""
        stream = ByteStream(self.name, self.packing, read, _Swelling(self.disk))
        stream.offset = self.offset
        return stream

    def close(self) -> None:
        """Arrow asks for it; the file on disk is closed by `open_streams`."""

    def peek(self, num_bytes: int) -> bytes:
        """The next `num_bytes`, fewer only at the end; they are not given out yet."""
        while len(self._ahead) < num_bytes and (piece := self._pull(num_bytes - len(self._ahead))):
            self._ahead += piece
        return self._ahead[:num_bytes]

    def read(self, num_bytes: int) -> bytes:
        """The next `num_bytes`, fewer only at the end."""
        pieces = [self._ahead[:num_bytes]]
        self._ahead = self._ahead[num_bytes:]
        num_missing = num_bytes - len(pieces[0])
        while num_missing and (piece := self._pull(num_missing)):
            pieces.append(piece)
            num_missing -= len(piece)
        data = b"".join(pieces)
        self.offset += len(data)
        return data

    def _pull(self, num_bytes: int) -> bytes:
        try:
            piece = self._read(min(num_bytes, _PIECE_BYTES))
        except Unreadable:
            raise
        except Exception as error:  # what a library makes of a damaged file is in no list
            raise unreadable(self.name, self.offset, f"reading stops here ({explain(error)})", _FETCH_AGAIN) from error
        self._swelling.num_out += len(piece)
        if self._swelling.is_bomb():
            found = f"{self._swelling.num_out:,} bytes came out of {self.disk.num_read:,}"
            limit = f"more than {BOMB_BYTES:,} and than {BOMB_RATIO} times as many are taken for a bomb"
            raise unreadable(self.name, self.offset, f"{found}; {limit}", "decompress it yourself if you trust it")
        return piece


def open_streams(path: str) -> Iterator[ByteStream]:
    """The file at `path`, decompressed, or each member of the archive that it is, decompressed too.

    What a file is, its first bytes tell, not its name. Of an archive the members of a known suffix are given, in the
    archive's order; each is to be read before the next is asked for. An archive in an archive is given as it is.

    Raises ValueError while iterating: for a file that cannot be opened, an archive that is broken or holds no member to
    read, a zip inside gzip or zstd, and a member that is encrypted or packed by another method than deflate.
    """
    name = escape_name(path)
    try:
        disk = DiskFile(path)
    except OSError as error:
        raise Unreadable(f"{name} cannot be read: {error.strerror}; mend that, or leave it out") from None
    with disk:
        stream = _decompress(ByteStream(name, "", disk.read, _Swelling(disk)), _Swelling(disk))
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
        outer, inner = _Swelling(disk), _Swelling(disk)
        num_members = 0
        for member, read in members:
            num_members += 1
            yield _decompress(ByteStream(f"{name}/{member}", f" in {kind}{stream.packing}", read, outer), inner)
        if not num_members:
            remedy = f"known suffixes are {' '.join(SUFFIXES)}"
            raise unreadable(name, 0, "the archive holds no file with a known suffix", remedy)


def _decompress(stream: ByteStream, swelling: _Swelling) -> ByteStream:
    head = stream.peek(4)
    if head.startswith(b"\x1f\x8b"):
        codec = "gzip"
    elif head == b"\x28\xb5\x2f\xfd" or (head[1:] == b"\x2a\x4d\x18" and head[0] >> 4 == 5):  # a skippable frame
        codec = "zstd"
    else:
        return stream
    # here, since most workers never need Arrow; it reads on behind the end of a gzip member and of a zstd frame
    import pyarrow

    source = pyarrow.CompressedInputStream(pyarrow.PythonFile(stream, mode="r"), codec)
    return ByteStream(stream.name, f", {codec}{stream.packing}", source.read, swelling)


def _open_zip(disk: DiskFile, path: str) -> Iterator[tuple[str, Callable[[int], bytes]]]:
    try:
        archive = zipfile.ZipFile(disk)
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


def _open_tar(stream: ByteStream) -> Iterator[tuple[str, Callable[[int], bytes]]]:
    source: Any = _TarSource(stream)
    try:
        # not tarfile's own streaming mode, which would read a header's long name of any size
        archive: Any = tarfile.TarFile(fileobj=source, encoding="utf-8")
        while (info := archive.next()) is not None:
            archive.members.clear()  # tarfile would keep them all
            if info.isreg() and has_known_suffix(info.name):
                yield escape_name(info.name), archive.extractfile(info).read
    except Unreadable:
        raise
    except Exception as error:  # as in ByteStream
        found = f"the archive breaks here ({explain(error)})"
        raise unreadable(stream.name, stream.offset, found, _FETCH_AGAIN) from error
    # tarfile takes a broken header for the end
    if source.last.strip(b"\0"):
        raise unreadable(stream.name, stream.offset, "the archive breaks here (no valid header)", _FETCH_AGAIN)
    while padding := stream.read(_PIECE_BYTES):
        if padding.strip(b"\0"):
            raise unreadable(stream.name, stream.offset, "something follows the archive's end", "unpack it with tar -i")


class _TarSource:
    """What tarfile asks of a file, on a stream that only goes forward. `last` is what was read last."""

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream
        self.last = b""

    def tell(self) -> int:
        return self._stream.offset

    def read(self, num_bytes: int) -> bytes:
        if num_bytes > _PIECE_BYTES:
            raise tarfile.ReadError(f"a header of {num_bytes:,} bytes, above {_PIECE_BYTES:,}")
        self.last = self._stream.read(num_bytes)
        return self.last

    def seek(self, offset: int) -> None:
        assert offset >= self.tell()
        while self.tell() < offset and self._stream.read(min(offset - self.tell(), _PIECE_BYTES)):
            pass
