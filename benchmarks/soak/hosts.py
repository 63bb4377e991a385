"""Where the ranks run: on this host, or on two. The second is a network namespace at the other end of a cable."""

import ctypes
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_INSIDE = "OCHAT_SOAK_INSIDE"
# Addresses of a test network that no real one uses (RFC 5737).
_ADDRESSES = ("192.0.2.1", "192.0.2.2")
_CABLE = "cable"
_CLONE_NEWUTS = 0x04000000


def enter_namespaces() -> bool:
    """Run the command again in namespaces of its own, where it may mount file systems and lay cables.

    All processes and mounts end with it. Returns whether it is inside; False where the kernel does not allow it.
    """
    if _INSIDE in os.environ:
        _ip("link", "set", "lo", "up")
        return True
    unshare = ["unshare", "--map-root-user", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if not all(map(shutil.which, ("unshare", "ip", "nsenter", "mount"))):
        return False
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        return False
    os.execvpe(unshare[0], [*unshare, sys.executable, *sys.argv], os.environ | {_INSIDE: "1"})


def mount_memory(folder: Path, size: str) -> None:
    """A file system of that size, as of mount, at the folder."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)


def unmount(folder: Path) -> None:
    """Take the file system away again, with all that is in it."""
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


class OneHost:
    """All ranks on this host."""

    def __init__(self, size: int = 2) -> None:
        self.size = size

    def enter(self, rank: int) -> dict[str, str]:
        """The environment of a rank."""
        return {"LOCAL_RANK": str(rank), "LOCAL_SIZE": str(self.size), "MASTER_ADDR": "127.0.0.1"}


class TwoHosts:
    """A rank on each of two hosts, which share the file system. pid: a process on the second."""

    size = 2

    def __init__(self, pid: int) -> None:
        self._pid = pid

    def enter(self, rank: int) -> dict[str, str]:
        """Move this process to the host of the rank; its environment there."""
        libc = ctypes.CDLL(None, use_errno=True)
        if rank == 1:
            with open(f"/proc/{self._pid}/ns/net") as namespace:
                assert libc.setns(namespace.fileno(), 0) == 0, os.strerror(ctypes.get_errno())
        assert libc.unshare(_CLONE_NEWUTS) == 0, os.strerror(ctypes.get_errno())
        socket.sethostname(f"host-{rank}")
        # gloo would take the network of the host's name, which is not the cable.
        return {"LOCAL_RANK": "0", "LOCAL_SIZE": "1", "MASTER_ADDR": _ADDRESSES[0], "GLOO_SOCKET_IFNAME": _CABLE}

    def set_cable(self, state: str) -> None:
        """`down` cuts the cable, `up` mends it; no connection is closed by either."""
        _ip("link", "set", _CABLE, state)


@contextmanager
def two_hosts() -> Iterator[TwoHosts]:
    """The hosts, with a cable between them and nothing else; inside the namespaces of `enter_namespaces`."""
    with subprocess.Popen(
        ["unshare", "--net", "sh", "-c", "echo; exec sleep infinity"], stdout=subprocess.PIPE
    ) as holder:
        try:
            assert holder.stdout is not None
            holder.stdout.readline()  # its namespace is there
            there = ["nsenter", "--target", str(holder.pid), "--net"]
            _ip(*f"link add {_CABLE} type veth peer name {_CABLE} netns {holder.pid}".split())
            for address, before in zip(_ADDRESSES, ([], there), strict=True):
                _ip(*f"address add {address}/24 dev {_CABLE}".split(), before=before)
                for link in ("lo", _CABLE):
                    _ip("link", "set", link, "up", before=before)
            yield TwoHosts(holder.pid)
        finally:
            _ip("link", "delete", _CABLE)
            holder.kill()


def _ip(*arguments: str, before: list[str] | None = None) -> None:
    subprocess.run([*(before or []), "ip", *arguments], check=True)
