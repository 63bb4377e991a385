"""Files that lie elsewhere, at URLs such as s3://, gs:// and https://: listed, identified and read through fsspec."""

import io
import time
from collections.abc import Callable
from typing import Any, TypeVar

from ochat_train.files import require_packages

_T = TypeVar("_T")
_BLOCK_BYTES = 4 << 20  # requested at once; what is lost when a connection breaks
_WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before each further try
_PACKAGES = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}
# What says that a file is the same one, the surest first; without any, its size and times are compared.
_TAGS = ("blob_id", "ETag", "etag", "md5Hash", "Content-MD5", "Last-Modified", "LastModified", "mtime", "created")


def is_remote(path: str) -> bool:
    """Whether a path is a URL: PROTOCOL://..."""
    return "://" in path


def list_remote(url: str) -> tuple[list[str], str | None]:
    """The URLs of the files at `url`, and the folder that they were found below, None for a file or a glob.

    A query of https:// may hold signs of globs, so there it is always one file. Raises ValueError if nothing is found.
    """
    if url.startswith("hf://") and not url.startswith("hf://datasets/"):
        remedy = f"name its files, as in hf://datasets/{url.removeprefix('hf://')}/data/train-*.parquet"
        raise ValueError(f"{url}: which files of the repository are meant is not looked up; {remedy}")
    fs, path = _open_system(url)
    if url.startswith(("http://", "https://")):
        found, folder = [path], None
    elif any(sign in path for sign in "*?["):
        found, folder = sorted(_try(url, lambda: fs.glob(path))), None
    elif _try(url, lambda: fs.isdir(path)):
        found, folder = sorted(_try(url, lambda: fs.find(path))), url
    else:
        found, folder = [path], None
    if not found:
        raise ValueError(f"no file matches {url!r}; check its spelling")
    return [str(fs.unstrip_protocol(file)) for file in found], folder


def identify(url: str) -> tuple[int, str]:
    """Size in bytes, -1 where the server does not say it, and what changes when the file does. Asks the server."""
    fs, path = _open_system(url)
    fs.invalidate_cache()
    info = _try(url, lambda: fs.info(path))
    tag = next((f"{name} {info[name]}" for name in _TAGS if info.get(name) is not None), "")
    size = info.get("size")
    return -1 if size is None else int(size), tag


class RemoteFile(io.RawIOBase):
    """A remote file that counts as `DiskFile` does. A broken connection is made anew, at the byte where it broke.

    Raises ValueError when that fails, or when the file is another one by then.
    """

    def __init__(self, url: str) -> None:
        super().__init__()
        self.path = url
        self._fs, self._name = _open_system(url)
        self._identity = identify(url)
        self.size = max(0, self._identity[0])
        self.num_read = self.num_out = self._at = 0
        self._file: Any = None

    def read(self, size: int | None = -1, /) -> bytes:
        """The next bytes, fewer only at the end."""
        wanted = -1 if size is None else size
        data = _try(self.path, lambda: self._read_once(wanted))
        self._at += len(data)
        self.num_read = max(self.num_read, min(self._at, self.size or self._at))
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """As of every file."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        return self._at

    def tell(self) -> int:
        """As of every file."""
        return self._at

    def seekable(self) -> bool:
        """Always: a server that gives no ranges is read from the beginning again."""
        return True

    def readable(self) -> bool:
        """Always."""
        return True

    def _read_once(self, size: int) -> bytes:
        try:
            if self._file is None:
                self._file = self._fs.open(self._name, "rb", block_size=_BLOCK_BYTES, cache_type="readahead")
            if self._file.tell() != self._at:
                self._go_to(self._at)
            data: bytes = self._file.read(size)
        except Exception:
            self._file = None
            if identify(self.path) != self._identity:
                raise ValueError(f"{self.path} was changed while it was read; run again when it is complete") from None
            raise
        if size > 0 and not data and self._at < self.size:
            self._file = None
            raise ConnectionError(f"the file ends at byte {self._at:,} of {self.size:,}")
        return data

    def _go_to(self, offset: int) -> None:
        try:
            self._file.seek(offset)
        except ValueError:  # the server gives no ranges
            self._file = self._fs.open(self._name, "rb", block_size=0)
            while (at := self._file.tell()) < offset:
                if not self._file.read(min(_BLOCK_BYTES, offset - at)):
                    break


def _open_system(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it."""
    import fsspec  # here, since most data lies on disk

    protocol = url.partition("://")[0]
    if package := _PACKAGES.get(protocol):
        require_packages(f"{protocol}://", package, extra="remote", remedy="fetch the files yourself")
    try:
        system, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{url} cannot be read: {error}; fetch the files yourself") from None
    return system, str(path)


def _try(url: str, action: Callable[[], _T]) -> _T:
    """What `action` gives, tried again after a broken connection. Raises ValueError, in one line, if it fails."""
    for wait in (*_WAITS, None):
        try:
            return action()
        except ValueError:
            raise
        except Exception as raised:  # each server's library has its own
            error = raised.__cause__ or raised  # fsspec calls whatever a web server says "not found"
            status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
            if isinstance(error, FileNotFoundError) or status == 404:
                raise ValueError(f"{url} is not there; check its spelling, and whether you may see it") from None
            if isinstance(error, PermissionError) or status in (401, 403):
                remedy = "set the token or key that its library reads from the environment (HF_TOKEN, AWS_PROFILE, ...)"
                raise ValueError(f"{url}: no permission to read it; {remedy}") from None
            if wait is None:
                shown = " ".join(f"{type(error).__name__}: {error}".split())
                found = f"{url} cannot be reached ({shown}), after {len(_WAITS)} further tries"
                raise ValueError(f"{found}; check the network, or fetch the files yourself") from None
            time.sleep(wait)
    raise AssertionError
