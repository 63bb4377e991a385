"""The process of the chat page: started beside the server, on sockets that are bound already, and ended with it."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import orjson

from ochat_train.serve.asking import Page
from ochat_train.serve.chat_page import make_app
from ochat_train.serve.keys import VARIABLE, ApiKeys, read_keys

_SHUTDOWN_S = 1  # for browsers, which hold connections open


def start(page: Page, sockets: Sequence[socket.socket], keys: Sequence[str]) -> None:
    """Start the page on the sockets. It ends when this process does, whatever that has become by exec."""
    settings = asdict(page) | {"parent": os.getpid(), "sockets": [one.fileno() for one in sockets]}
    # The keys are in the environment alone.
    environment = os.environ | {VARIABLE: " ".join(keys), "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
    subprocess.Popen(
        [sys.executable, "-m", __name__, orjson.dumps(settings).decode()],
        pass_fds=settings["sockets"],
        env=environment,
    )
    for one in sockets:
        one.close()


def serve(page: Page, sockets: list[socket.socket], keys: Sequence[str], parent: int) -> None:
    """Show the page until the parent has ended, or a signal comes."""
    import openai
    import uvicorn

    client = openai.AsyncOpenAI(
        base_url=page.api,
        api_key=next(iter(keys), "none"),
        max_retries=0,
        http_client=openai.DefaultAsyncHttpxClient(trust_env=False),  # no proxy stands before this machine
    )
    config = uvicorn.Config(
        make_app(page, ApiKeys(keys), client),
        log_level="error",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_SHUTDOWN_S,
    )
    server = uvicorn.Server(config)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        server.should_exit = True

    threading.Thread(target=watch, daemon=True).start()
    for one in sockets:
        one.listen(config.backlog)  # so that the address answers from when it is printed on
    print(f"chat page on {page.address}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=sockets)


def _main(settings: dict[str, Any]) -> None:
    parent = settings.pop("parent")
    sockets = [socket.socket(fileno=number) for number in settings.pop("sockets")]
    page = Page(**settings | {"conditions": tuple(settings["conditions"])})
    serve(page, sockets, read_keys([]), parent)


if __name__ == "__main__":
    _main(orjson.loads(sys.argv[1]))
