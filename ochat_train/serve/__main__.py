"""A trained model on an OpenAI-compatible API, prompted exactly as it was trained.

ochat serve MODEL [--host HOST] [--port PORT] [--api-keys K ...] [--condition C] [--ui] [engine flags]
"""

import argparse
import errno
import importlib.metadata
import ipaddress
import socket
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ochat_train.files import require_packages
from ochat_train.serve import chat_page
from ochat_train.serve.keys import KEYS_VARIABLE, ApiKeys, read_keys
from ochat_train.serve.process import allow_origins, end_by_signal, watch_parent
from ochat_train.serve.request_log import log_engine, open_log
from ochat_train.serve.side_by_side import ChatPage

if TYPE_CHECKING:
    from ochat_train.serve.served import Served


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until a signal comes."""
    parser = argparse.ArgumentParser(
        prog="ochat serve",
        usage="%(prog)s MODEL [options] [flags of the engine]",
        description="Serve MODEL, an exported model, the folder of a run, or exported adapters, on an "
        "OpenAI-compatible API. Flags that are not listed go to the engine.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", metavar="MODEL", help="the same as MODEL, as OpenChat's server takes it")
    add("--model-type", metavar="TEMPLATE", help="the template, checked against the one of the model's training")
    add("--served-model-name", nargs="+", default=[], metavar="NAME", help="more names that requests may call it")
    add("--host", default="localhost", help="address to listen on (localhost)")
    add("--port", type=int, default=18888, help="port to listen on (18888)")
    add("--api-keys", nargs="+", default=[], metavar="K", help=f"allowed API keys; safer in {KEYS_VARIABLE}")
    add("--allowed-origins", nargs="+", default=[], metavar="URL", help="pages whose scripts may ask; * for all (none)")
    add("--tensor-parallel-size", type=int, default=1, metavar="N", help="GPUs that share the model, with vLLM (1)")
    add("--max-model-len", type=int, metavar="N", help="tokens of prompt and answer together (the model's positions)")
    add("--condition", help="condition of requests that name none (the model's own)")
    add("--engine", choices=("auto", "vllm", "transformers"), default="auto", help="auto: vLLM if it is installed")
    add("--ui", action="store_true", help="also show a page to chat on")
    add("--ui-port", type=int, metavar="PORT", help="port of that page (--port + 1)")
    add("--log-file", type=Path, help="file for one line per request, and for what the engine prints (stderr)")
    add("--disable-log-requests", action="store_true", help="write no line per request")
    for flag in ("--engine-use-ray", "--worker-use-ray"):
        add(flag, action="store_true", help="taken, without a meaning here")
    options, flags = parser.parse_known_args(arguments)
    try:
        start(options, take_model(options, flags))
    except ValueError as error:
        sys.exit(f"error: {error}")
    except ImportError as error:  # such as of a torchvision that was built for another torch
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        remedy = "install versions that fit together; torchvision, where nothing needs it, may be removed"
        sys.exit(f"error: a package cannot be loaded ({type(cause).__name__}: {cause}); {remedy}")
    except KeyboardInterrupt:
        sys.exit(130)


def take_model(options: argparse.Namespace, flags: list[str]) -> list[str]:
    """Put MODEL into the options where --model does not name it, and return the flags without it. Raises ValueError."""
    words = [word for word in flags if not word.startswith("-")]  # MODEL, and values of an engine's flags
    folders = [word for word in words if Path(word).is_dir()]
    if options.model is not None:
        if flags[:1] == words[:1] and words:
            raise ValueError(f"the model is named twice, as {words[0]} and by --model {options.model}")
        return flags
    for several in (options.api_keys, options.served_model_name, options.allowed_origins):
        if not folders and len(several) > 1 and Path(several[-1]).is_dir():
            options.model = several.pop()  # --api-keys K1 K2 MODEL
            return flags
    found = folders or words
    if not found:
        raise ValueError("no MODEL; name an exported model, or the folder of a run")
    options.model, place = found[0], flags.index(found[0])
    return flags[:place] + flags[place + 1 :]


def start(options: argparse.Namespace, flags: Sequence[str]) -> None:
    """Check everything that can be wrong, then load the model and serve. Raises ValueError."""
    from ochat_train.conversations.described import read_template
    from ochat_train.serve.served import find_served  # imports transformers

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
    served = find_served(options.model, options.condition, options.max_model_len, options.served_model_name)
    if options.model_type is not None and options.model_type not in served.names:
        name = read_template(served.template).name
        raise ValueError(f"--model-type {options.model_type}: the model was trained with the template {name}")
    print(f"engine: {engine}, {reason}")
    for flag in ("--engine-use-ray", "--worker-use-ray"):
        if getattr(options, flag[2:].replace("-", "_")):
            print(f"{flag} has no meaning here; vLLM chooses how its workers run")
    if not keys and not is_loopback(options.host):
        print(f"warning: anybody who reaches {options.host} can ask; give --api-keys, or set {KEYS_VARIABLE}")
    if any(len(key) < 16 for key in keys):
        print("warning: an API key below 16 characters can be guessed")
    if engine == "vllm":
        _serve_with_vllm(served, options, flags, keys)
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


def _serve_with_vllm(served: "Served", options: argparse.Namespace, flags: Sequence[str], keys: Sequence[str]) -> None:
    from ochat_train.serve.vllm_engine import make_command, run

    words, environment = make_command(served, options, flags, keys)
    log = open_log(options.log_file) if options.log_file is not None else None
    sockets = bind(options.host, options.port)
    if options.ui:
        _start_page(served, options, keys)
    for one in sockets:
        one.close()
    health = f"{_url(_reached(options.host), options.port)}/health"
    sys.exit(run(words, environment, health=health, ready=_describe(served, options), log=log))


def _serve_with_transformers(
    served: "Served", options: argparse.Namespace, flags: Sequence[str], keys: Sequence[str]
) -> None:
    from ochat_train.serve.transformers_engine import parse_flags, serve

    engine_options, without_meaning = parse_flags(flags)
    for flag in without_meaning:
        print(f"{flag} has no meaning with the engine transformers")
    log = open_log(options.log_file)
    sockets = bind(options.host, options.port)
    if options.ui:
        _start_page(served, options, keys)
    watch_parent(end_by_signal)

    def ready() -> None:
        print(_describe(served, options), flush=True)
        if options.log_file is not None:
            log_engine(log, _describe(served, options))

    serve(
        served,
        engine_options,
        sockets,
        keys=ApiKeys(keys),
        log=None if options.disable_log_requests else log,
        wrap=partial(allow_origins, origins=options.allowed_origins),
        ready=ready,
    )


def _start_page(served: "Served", options: argparse.Namespace, keys: Sequence[str]) -> None:
    page = ChatPage(
        api=f"{_url(_reached(options.host), options.port)}/v1",
        address=_url(options.host, options.ui_port),
        model=served.name,
        conditions=served.conditions,
        condition=served.condition,
        num_positions=served.num_positions,
    )
    chat_page.start(page, bind(options.host, options.ui_port, "--ui-port"), keys)


def _reached(host: str) -> str:
    """The address at which this machine reaches the server."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _describe(served: "Served", options: argparse.Namespace) -> str:
    also = "".join(f", also {name}" for name in served.names[1:])
    return f"serving {served.name}{also}, condition {served.condition!r}, on {_url(options.host, options.port)}/v1"


if __name__ == "__main__":
    main()
