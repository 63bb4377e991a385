"""A trained model on an OpenAI-compatible API, prompted exactly as it was trained.

python -m ochat_train.serve MODEL [--host HOST] [--port PORT] [--api-keys K ...] [--condition C] [--ui] [engine flags]
"""

import argparse
import errno
import importlib.metadata
import ipaddress
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from ochat_train.files import require_packages
from ochat_train.serve import chat_page
from ochat_train.serve.keys import KEYS_VARIABLE, ApiKeys, read_keys
from ochat_train.serve.request_log import open_log
from ochat_train.serve.served import Served, find_served
from ochat_train.serve.side_by_side import ChatPage


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until a signal comes."""
    parser = argparse.ArgumentParser(
        prog="python -m ochat_train.serve",
        description="Serve a trained model on an OpenAI-compatible API. Flags that are not listed go to the engine.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="an exported model, the folder of a run, or exported adapters")
    add("--host", default="localhost", help="address to listen on (localhost)")
    add("--port", type=int, default=18888, help="port to listen on (18888)")
    add("--api-keys", nargs="+", default=[], metavar="K", help=f"allowed API keys; safer in {KEYS_VARIABLE}")
    add("--tensor-parallel-size", type=int, default=1, metavar="N", help="GPUs that share the model, with vLLM (1)")
    add("--condition", help="condition of requests that name none (the model's own)")
    add("--engine", choices=("auto", "vllm", "transformers"), default="auto", help="auto: vLLM if it is installed")
    add("--ui", action="store_true", help="also show a page to chat on")
    add("--ui-port", type=int, metavar="PORT", help="port of that page (--port + 1)")
    add("--log-file", type=Path, help="file for one line per request (stderr)")
    add("--disable-log-requests", action="store_true", help="write no line per request")
    options, flags = parser.parse_known_args(arguments)
    try:
        start(options, flags)
    except ValueError as error:
        sys.exit(f"error: {error}")


def start(options: argparse.Namespace, flags: Sequence[str]) -> None:
    """Check everything that can be wrong, then load the model and serve. Raises ValueError."""
    engine, reason = choose_engine(options.engine)
    if options.tensor_parallel_size < 1:
        raise ValueError(f"--tensor-parallel-size {options.tensor_parallel_size} is below 1")
    if engine == "transformers" and options.tensor_parallel_size > 1:
        raise ValueError(
            f"--tensor-parallel-size {options.tensor_parallel_size} needs vLLM ({reason}); install it, or leave it out"
        )
    if options.ui:
        check_page(options)
    keys = read_keys(options.api_keys)
    served = find_served(options.model, options.condition)
    print(f"engine: {engine}, {reason}")
    if not keys and not is_loopback(options.host):
        print(f"warning: anybody who reaches {options.host} can ask; give --api-keys, or set {KEYS_VARIABLE}")
    if engine == "vllm":
        _become_vllm(served, options, flags, keys)
    else:
        _serve_with_transformers(served, options, flags, keys)


def choose_engine(wanted: str) -> tuple[str, str]:
    """The engine and the reason for it. Raises ValueError when it is not installed."""
    try:
        vllm = importlib.metadata.version("vllm")  # vLLM's command looks this up too, and some builds do not have it
    except importlib.metadata.PackageNotFoundError:
        vllm = None
    if wanted == "vllm" and vllm is None:
        raise ValueError("--engine vllm: the package vllm is not installed: pip install 'ochat_train[vllm]'")
    if wanted != "transformers" and vllm is not None:
        return "vllm", "as asked for" if wanted == "vllm" else f"since vllm {vllm} is installed"
    reason = "as asked for" if wanted == "transformers" else "since the package vllm is not installed"
    require_packages(f"the engine transformers, {reason},", "starlette", "uvicorn", "accelerate", extra="serve")
    return "transformers", reason


def check_page(options: argparse.Namespace) -> None:
    """Choose the port of the page. Raises ValueError when the page cannot be shown."""
    require_packages("--ui", "uvicorn", "openai", "gradio", extra="ui")
    if options.ui_port is None:
        options.ui_port = options.port + 1
    if options.ui_port == options.port:
        raise ValueError(f"--ui-port {options.ui_port} is the API's; name another")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bind(host: str, port: int, flag: str = "--port") -> list[socket.socket]:
    """Sockets bound to all addresses of the host, not yet listening. Raises ValueError, which names the flag."""
    if not 1 <= port <= 65535:
        raise ValueError(f"{flag} {port} is not between 1 and 65535")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ValueError(f"--host {host} has no address: {error.strerror}") from error
    sockets = []
    for family, kind, protocol, _, address in found:
        one = socket.socket(family, kind, protocol)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            one.bind(address)
            sockets.append(one)
        except OSError as error:
            one.close()
            if family == socket.AF_INET6 and len(found) > 1 and error.errno != errno.EADDRINUSE:
                continue  # a machine may have the name, and no IPv6
            raise ValueError(f"port {port} of {host} cannot be used ({error.strerror}); name another {flag}") from error
    return sockets


def _become_vllm(served: Served, options: argparse.Namespace, flags: Sequence[str], keys: Sequence[str]) -> None:
    from ochat_train.serve.vllm_engine import make_command

    words, environment = make_command(served, options, flags, keys)
    if options.log_file is not None:
        open_log(options.log_file)
    sockets = bind(options.host, options.port)
    if options.ui:
        _start_page(served, options, keys)
    for one in sockets:
        one.close()
    print(_describe(served, options), flush=True)
    os.execve(words[0], words, os.environ | environment)


def _serve_with_transformers(
    served: Served, options: argparse.Namespace, flags: Sequence[str], keys: Sequence[str]
) -> None:
    from ochat_train.serve.transformers_engine import parse_flags, serve

    engine_options = parse_flags(flags)
    log = None if options.disable_log_requests else open_log(options.log_file)
    sockets = bind(options.host, options.port)
    if options.ui:
        _start_page(served, options, keys)
    serve(served, engine_options, sockets, keys=ApiKeys(keys), log=log, ready=_describe(served, options))


def _start_page(served: Served, options: argparse.Namespace, keys: Sequence[str]) -> None:
    reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(options.host, options.host)
    page = ChatPage(
        api=f"{_url(reached, options.port)}/v1",
        address=_url(options.host, options.ui_port),
        model=served.name,
        conditions=served.conditions,
        condition=served.condition,
        num_positions=served.num_positions,
    )
    chat_page.start(page, bind(options.host, options.ui_port, "--ui-port"), keys)


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _describe(served: Served, options: argparse.Namespace) -> str:
    also = "".join(f", also {name}" for name in served.names[1:])
    return f"serving {served.name}{also}, condition {served.condition!r}, on {_url(options.host, options.port)}/v1"


if __name__ == "__main__":
    main()
