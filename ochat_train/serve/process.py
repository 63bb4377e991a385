"""The server as a process: when it listens, how long it waits, and when it ends."""

import asyncio
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `evaluate` imports this module without the extra
    from starlette.types import ASGIApp

DRAIN_S = 20  # for answers that are under way when a signal comes
HEADER_TIMEOUT_S = 30.0
PARENT_VARIABLE = "OCHAT_TRAIN_PARENT"  # the process with which a server ends


def watch_parent(stop: Callable[[], None]) -> None:
    """Call `stop` when the process that PARENT_VARIABLE names has ended, however it did."""
    parent = os.environ.get(PARENT_VARIABLE)

    def watch() -> None:
        while str(os.getppid()) == parent:
            time.sleep(0.5)
        stop()

    if parent:
        threading.Thread(target=watch, daemon=True).start()


def allow_origins(app: "ASGIApp", origins: Sequence[str]) -> "ASGIApp":
    """The application, which lets the scripts of pages from these origins ask; "*" is all."""
    from starlette.middleware.cors import CORSMiddleware

    if not origins:
        return app
    return CORSMiddleware(
        app, allow_origins=origins, allow_methods=["*"], allow_headers=["*"], expose_headers=["x-request-id"]
    )


def end_by_signal() -> None:
    """End this process as SIGTERM does."""
    os.kill(os.getpid(), signal.SIGTERM)


def listen(app: "ASGIApp", sockets: list[socket.socket], ready: Callable[[], None]) -> None:
    """Serve on bound sockets until a signal comes. ready: is called once they listen.

    Answers that are under way then have DRAIN_S seconds to end; the gate cuts the others. Raises ValueError when
    another server listens there first.
    """
    import uvicorn

    class Server(uvicorn.Server):  # type: ignore[misc]
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready()

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            await super().shutdown(sockets)
            if tasks := set(self.server_state.tasks):  # cancelled, and uvicorn would end before they know it
                await asyncio.wait(tasks, timeout=5)

    config = uvicorn.Config(
        app,
        http=with_header_timeout(),
        log_level="critical",
        access_log=False,
        server_header=False,
        lifespan="off",
        timeout_graceful_shutdown=DRAIN_S,
    )
    try:
        Server(config).run(sockets=sockets)
    except OSError as error:
        port = sockets[0].getsockname()[1]
        raise ValueError(f"port {port} cannot be used ({error.strerror}); name another --port") from error


def with_header_timeout() -> Any:
    """uvicorn's HTTP protocol, which closes a connection whose next request's headers do not come.

    By itself it waits without a limit for the rest of headers that have begun.
    """
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    parent: Any = AutoHTTPProtocol

    class Protocol(parent):  # type: ignore[misc]
        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
            super().connection_lost(exc)

        def _watch(self) -> None:
            is_waiting = self.cycle is None or self.cycle.response_complete
            if not is_waiting and self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None
            elif is_waiting and self._deadline is None:
                self._deadline = asyncio.get_running_loop().call_later(HEADER_TIMEOUT_S, self.transport.close)

    return Protocol
