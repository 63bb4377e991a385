"""Files that lie elsewhere, at URLs such as s3://, gs:// and https://: listed, identified and read through fsspec."""

import io
import time
from collections.abc import Callable
from typing import Any, TypeVar

from ochat_train.conversations.hub import Unreachable, is_at_commit, is_data_set, list_data_set
from ochat_train.files import require_packages

_T = TypeVar("_T")
_BLOCK_BYTES = 4 << 20  # requested at once; what is lost when a connection breaks
_WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before each further try
_PACKAGES = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}
# What says that a file is the same one, the surest first; without any, its size and times are compared.
_TAGS = ("blob_id", "ETag", "etag", "md5Hash", "Content-MD5", "Last-Modified", "LastModified", "mtime", "created")
# What the listing or the last question said of a file that was not opened since, so that it is not asked for again.
_known: dict[str, tuple[int, str]] = {}


def is_remote(path: str) -> bool:
    """Whether a path is a URL: PROTOCOL://..."""
    return "://" in path


def list_remote(url: str) -> tuple[list[str], str | None]:
    """The URLs of the files at `url`, and the folder that they were found below, None for a file or a glob.

    A query of https:// may hold signs of globs, so there it is always one file. Raises ValueError if nothing is found.
    """
    if is_data_set(url):
        sizes = list_data_set(url, _try)
        _known.update((file, (size, "commit")) for file, size in sizes.items() if is_at_commit(file))
        return list(sizes), None
    fs, path = _open_system(url)
    fs.invalidate_cache()
    found: dict[str, dict[str, Any]]
    folder = None
    if url.startswith(("http://", "https://")):
        found = {path: {}}
    elif any(sign in path for sign in "*?["):
        found = _try(url, lambda: fs.glob(path, detail=True))
    elif _try(url, lambda: fs.isdir(path)):
        found, folder = _try(url, lambda: fs.find(path, detail=True)), url
    else:
        found = {path: {}}
    files = {str(fs.unstrip_protocol(file)): info for file, info in sorted(found.items())}
    files = {file: info for file, info in files.items() if info.get("type", "file") == "file"}
    if not files:
        raise ValueError(f"no file matches {url!r}; check its spelling")
    for file, info in files.items():
        _known.pop(file, None)
        if (identity := _identity(info))[1]:
            _known[file] = identity
    return list(files), folder


def read_remote(url: str) -> bytes:
    """The bytes of a small file."""
    fs, path = _open_system(url)
    return bytes(_try(url, lambda: fs.cat_file(path)))


def identify(url: str) -> tuple[int, str]:
    """Size in bytes, -1 where the server does not say it, and what changes when the file does.

    Asks the server, unless it has said it since the file was listed, and the file was not opened since then.
    """
    if url not in _known:
        _known[url] = _ask(url)
    return _known[url]


def _ask(url: str) -> tuple[int, str]:
    fs, path = _open_system(url)
    if not is_at_commit(url):
        fs.invalidate_cache()
    size, tag = _identity(_try(url, lambda: fs.info(path)))
    return size, "commit" if is_at_commit(url) else tag


def _identity(info: dict[str, Any]) -> tuple[int, str]:
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
        if not is_at_commit(url):
            del _known[url]
        self.size = max(0, self._identity[0])
        self.num_read = self.num_out = self._at = 0
        self._file: Any = None
        self._block_bytes = _BLOCK_BYTES  # 0: one answer from front to back

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
            if self._file is None or (not self._block_bytes and self._file.tell() > self._at):
                # without the size the server is asked once more
                known = {"size": self.size, "cache_type": "readahead"} if self.size and self._block_bytes else {}
                self._file = self._fs.open(self._name, "rb", block_size=self._block_bytes, **known)
            if self._block_bytes and self._file.tell() != self._at:
                self._file.seek(self._at)
            while (at := self._file.tell()) < self._at and self._file.read(min(_BLOCK_BYTES, self._at - at)):
                pass
            data: bytes = self._file.read(size)
        except Exception as error:
            self._file = None
            if isinstance(error, ValueError) and self._block_bytes:  # the server gives no ranges
                self._block_bytes = 0
                return self._read_once(size)
            if not is_at_commit(self.path) and _ask(self.path) != self._identity:
                found = f"{self.path} was changed while it was read"
                raise Unreachable(f"{found}; run again when it is complete") from None
            raise
        if size > 0 and not data and self._at < self.size:
            self._file = None
            raise ConnectionError(f"the file ends at byte {self._at:,} of {self.size:,}")
        return data


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
            # fsspec calls whatever a web server says "not found"
            error = (raised.__cause__ or raised) if type(raised) is FileNotFoundError else raised
            response = getattr(error, "response", None)
            if isinstance(response, dict):  # of s3
                status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            else:
                status = getattr(error, "status", None) or getattr(response, "status_code", None)
            if isinstance(error, FileNotFoundError) or status == 404:
                raise Unreachable(f"{url} is not there; check its spelling, and whether you may see it") from error
            if isinstance(error, PermissionError) or status in (401, 403):
                remedy = "set the token or key that its library reads from the environment (HF_TOKEN, AWS_PROFILE, ...)"
                raise Unreachable(f"{url}: no permission to read it; {remedy}") from error
            if wait is None:
                shown = " ".join(f"{type(error).__name__}: {error}".split())
                found = f"{url} cannot be reached ({shown}), after {len(_WAITS)} further tries"
                raise Unreachable(f"{found}; check the network, or fetch the files yourself") from None
            time.sleep(wait)
    raise AssertionError
