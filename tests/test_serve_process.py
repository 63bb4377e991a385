"""The server as a process: what it waits for, and how it ends."""

import signal
import socket
import subprocess
import sys

from ochat_train.files import free_port
from ochat_train.serve.process import PARENT_VARIABLE

# An application whose streams have no end of their own.
ENDLESS = """
import asyncio
import ochat_train.serve.process as process
from ochat_train.serve.__main__ import bind

async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": b"begun", "more_body": True})
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        await send({"type": "http.response.body", "body": b"cut"})

process.HEADER_TIMEOUT_S, process.DRAIN_S = 0.3, 0.3
process.listen(app, bind("127.0.0.1", PORT), lambda: print("ready", flush=True))
"""


def run(script: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def read_to_end(connection: socket.socket) -> bytes:
    received = b""
    while part := connection.recv(65536):
        received += part
    return received


def test_half_a_header_is_not_waited_for_and_what_is_under_way_is_cut_when_its_time_is_over() -> None:
    port = free_port()
    with run(ENDLESS.replace("PORT", str(port))) as server:
        assert server.stdout is not None and server.stdout.readline() == "ready\n"  # it listens already
        half, asking, again = (socket.create_connection(("127.0.0.1", port), timeout=60) for _ in range(3))
        half.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n")
        asking.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        again.sendall(b"GET ")
        assert asking.recv(65536).startswith(b"HTTP/1.1 200")
        assert read_to_end(half) == read_to_end(again) == b""
        server.send_signal(signal.SIGTERM)
        assert b"cut" in read_to_end(asking)  # the connection that was answered was not closed by the limit
        server.wait(60)
        assert server.stderr is not None and server.stderr.read() == ""


def test_a_server_ends_with_the_process_that_started_it_also_when_that_is_killed() -> None:
    child = (
        "import time\nfrom ochat_train.serve.process import end_by_signal, watch_parent\n"
        "watch_parent(end_by_signal)\nprint('up', flush=True)\ntime.sleep(300)"
    )
    parent = (
        "import os, subprocess, sys, time\n"
        f"settings = os.environ | {{{PARENT_VARIABLE!r}: str(os.getpid())}}\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}], env=settings, start_new_session=True)\ntime.sleep(300)"
    )
    with run(parent) as process:
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        process.kill()
        assert process.stdout.read() == ""  # at its end no process has it open any more
