"""The engine vLLM: the command of its server, and the gate as the middleware that it puts around its application."""

import argparse
import asyncio
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import orjson
from starlette.types import ASGIApp, Receive, Scope, Send

from ochat_train.serve.gate import EngineTraits, Gate
from ochat_train.serve.keys import KEYS_VARIABLE, ApiKeys, read_keys
from ochat_train.serve.process import DRAIN_S, PARENT_VARIABLE, allow_origins, end_by_signal, watch_parent
from ochat_train.serve.request_log import log_engine, open_log
from ochat_train.serve.served import Served, find_served
from ochat_train.serve.tool_calls import CallForm, find_form
from ochat_train.tokens.tokenizer import locate_base

GATE_VARIABLE = "OCHAT_TRAIN_GATE"
# Flags that would change prompts or names without the gate's knowledge, or open a way around it.
_REFUSED_FLAGS = {
    "--api-key": f"give --api-keys, or the environment variable {KEYS_VARIABLE}",
    "--chat-template": "the exported template is what was trained",
    "--default-chat-template-kwargs": "give --condition",
    "--trust-request-chat-template": "the exported template is what was trained",
    "--tokenizer": "the exported tokenizer is what was trained",
    "--generation-config": "the exported one ends answers at the template's end token",
    "--middleware": "the gate is the middleware",
    "--lora-modules": "name the folder that export --adapter wrote as MODEL",
    "--uds": "give --host and --port",
    "--root-path": "let the proxy in front strip its path",
    "--grpc": "it would be a way around the gate",
    "--grpc-port": "it would be a way around the gate",
    "--config": "give flags",
}
_PARSER_FLAG = "--tool-call-parser"
_END_S = 10  # for vLLM to end by itself once it was asked to; loading a model it may not
_ERROR_LINE = re.compile(r"((?:[A-Za-z_][\w.]*)?(?:Error|Exception|Interrupt): .*)")
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the values of --max-lora-rank


def make_command(
    served: Served, options: argparse.Namespace, flags: Sequence[str], keys: Sequence[str]
) -> tuple[list[str], dict[str, str]]:
    """The command that serves the model with vLLM and the gate in front, and the environment variables that it needs.

    The keys are in the environment alone.
    options: those of `ochat_train.serve`. flags: vLLM's own. Raises ValueError for flags that would go around the gate,
    and for adapters that vLLM cannot load.
    """
    for flag in flags:
        name = "--" + flag.partition("=")[0].lstrip("-").replace("_", "-")
        if flag.startswith("-") and name in _REFUSED_FLAGS:
            raise ValueError(f"{name} is set by ochat_train.serve: {_REFUSED_FLAGS[name]}")
    model = str(served.folder) if served.adapter is None else _find_base(served)
    words = [sys.executable, "-m", "ochat_train.serve.vllm_command", "serve", model]
    words += ["--host", options.host, "--port", str(options.port)]
    words += ["--tensor-parallel-size", str(options.tensor_parallel_size)]
    words += ["--tokenizer", str(served.folder), "--generation-config", str(served.folder)]
    words += ["--chat-template", str(served.folder / "chat_template.jinja")]
    words += ["--middleware", f"{__name__}.VllmGate", "--disable-uvicorn-access-log", "--disable-fastapi-docs"]
    names = {flag.partition("=")[0] for flag in flags}
    if "--dtype" not in names and served.dtype == "float32":
        words += ["--dtype", "float32"]  # vLLM's own choice would be a narrower one
    parser = None if _PARSER_FLAG in names else _choose_call_parser(served)
    if parser is not None:
        words += ["--enable-auto-tool-choice", _PARSER_FLAG, parser]
    if options.max_model_len is not None:
        words += ["--max-model-len", str(options.max_model_len)]
    if served.adapter is None:
        words += ["--served-model-name", served.name]
    else:
        rank = next(rank for rank in _RANKS if rank >= served.adapter.rank)
        words += ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", f"{served.name}={served.folder}"]
    settings = {
        "folder": str(served.folder),
        "condition": served.condition,
        "num_positions": options.max_model_len,
        "names": options.served_model_name,
        "origins": options.allowed_origins,
        "reads_calls": parser is not None or _PARSER_FLAG in names,
        "is_logging": not options.disable_log_requests,
        "log_file": str(options.log_file.absolute()) if options.log_file else None,
    }
    environment = {GATE_VARIABLE: orjson.dumps(settings).decode(), KEYS_VARIABLE: " ".join(keys)}
    environment["VLLM_USE_RUST_FRONTEND"] = "0"  # which has no middleware
    return [*words, *flags], environment


def _choose_call_parser(served: Served) -> str | None:
    """vLLM's parser of the calls that training wrote; None where it has none."""
    tokenizer = served.load_tokenizer()
    form = find_form(served.spelling(tokenizer))
    if form == CallForm("<tool_call>", "</tool_call>"):
        return "hermes"
    is_llama = "<|python_tag|>" in tokenizer.pretrained.get_vocab()  # that parser refuses to start without the token
    return "llama3_json" if form == CallForm("", "") and is_llama else None


def _find_base(served: Served) -> str:
    """The base of the adapters, as vLLM takes it."""
    assert served.adapter is not None
    remedy = "export the merged model, without --adapter, or serve it with --engine transformers"
    if served.adapter.is_dora or served.adapter.base_bits:
        raise ValueError(
            f"{served.folder} was trained with DoRA or beside a base in 4 bits, which vLLM does not serve as it was "
            f"trained; {remedy}"
        )
    if served.adapter.has_tokens:
        raise ValueError(f"{served.folder} has rows of tokens, which vLLM does not load; {remedy}")
    if served.adapter.rank > _RANKS[-1]:
        raise ValueError(f"{served.folder} has rank {served.adapter.rank}, and vLLM takes up to {_RANKS[-1]}; {remedy}")
    files = locate_base(served.adapter.base)
    if files.gguf_file is not None:
        raise ValueError(f"the base of {served.folder} is a .gguf file, for which vLLM loads no adapters; {remedy}")
    return files.name


def run(
    words: Sequence[str], environment: dict[str, str], *, health: str, ready: str, log: logging.Logger | None
) -> int:
    """Run the command of `make_command` until a signal comes or it ends, and return its exit code.

    health: the URL that answers once it listens; then `ready` is printed. What vLLM prints goes to the log, or to
    stderr without one. Raises ValueError, with the last error that it printed, when it ends before it listens.
    """
    settings = os.environ | environment | {PARENT_VARIABLE: str(os.getpid())}
    vllm = subprocess.Popen(
        words, env=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    show = print if log is None else partial(log_engine, log)
    held: list[str] = []  # from the first traceback on, until it listens
    is_ready, was_stopped = threading.Event(), threading.Event()

    def relay() -> None:
        assert vllm.stdout is not None
        for line in vllm.stdout:
            if not is_ready.is_set() and (held or "Traceback (most recent call last)" in line):
                held.append(line)
            else:
                show(line.rstrip())

    def stop(*_: Any) -> None:
        # The gate ends vLLM after the answers that are under way; before it listens, there are none.
        vllm.send_signal(signal.SIGUSR1 if is_ready.is_set() else signal.SIGTERM)
        was_stopped.set()
        late = threading.Timer(_END_S + DRAIN_S * is_ready.is_set(), os.killpg, (vllm.pid, signal.SIGKILL))
        late.daemon = True
        late.start()

    for signal_ in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signal_, stop)
    reader = threading.Thread(target=relay, daemon=True)
    reader.start()
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy stands before this machine
    while vllm.poll() is None and not is_ready.is_set():
        try:
            with direct.open(health, timeout=5):
                is_ready.set()
                print(ready, flush=True)
                if log is not None:
                    log_engine(log, ready)
        except OSError:
            time.sleep(0.2)
    code = vllm.wait()
    reader.join(timeout=5)
    if was_stopped.is_set():
        return 0
    if is_ready.is_set():
        return code
    errors = [found[1] for line in held if (found := _ERROR_LINE.search(line))]
    said = errors[-1] if errors else f"exit code {code}"
    if held:
        with tempfile.NamedTemporaryFile("w", prefix="vllm-", suffix=".log", delete=False) as file:
            file.writelines(held)
        said += f"; the rest stands in {file.name}"
    raise ValueError(f"vLLM did not start: {said}")


class VllmGate:
    """The gate, made from the environment: vLLM imports this class and passes nothing but its application."""

    def __init__(self, app: ASGIApp) -> None:
        settings = orjson.loads(os.environ[GATE_VARIABLE])
        served = find_served(settings["folder"], settings["condition"], settings["num_positions"], settings["names"])
        log_file = Path(settings["log_file"]) if settings["log_file"] else None
        log = open_log(log_file) if settings["is_logging"] else None
        traits = EngineTraits(
            "vLLM",
            can_force_a_form=True,
            reads_calls=settings["reads_calls"],
            renders_text=True,
            fills_room=False,
            has_metrics=True,
        )
        self._gate = Gate(
            app, served=served, tokenizer=served.load_tokenizer(), engine=traits, keys=ApiKeys(read_keys([])), log=log
        )
        self._app = allow_origins(self._gate, settings["origins"])
        self._running: set[asyncio.Task[Any]] = set()
        watch_parent(end_by_signal)
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, self._begin_to_stop)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        task = asyncio.current_task()
        assert task is not None
        if scope["type"] == "http":
            self._running.add(task)
            task.add_done_callback(self._running.discard)
        await self._app(scope, receive, send)

    def _begin_to_stop(self) -> None:
        if not self._gate.is_stopping:
            self._gate.is_stopping = True
            self._stopping = asyncio.ensure_future(self._stop())

    async def _stop(self) -> None:
        """End vLLM after the answers that are under way, or DRAIN_S seconds; it would cut them at once."""
        if self._running:
            _, late = await asyncio.wait(self._running, timeout=DRAIN_S)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late, timeout=1)
        end_by_signal()
