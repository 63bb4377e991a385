"""vLLM's server: the command that starts it, and the gate as the middleware that it puts around its application."""

import itertools
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from ochat_train.serve.gate import App, Engine, Gate, Receive
from ochat_train.serve.keys import VARIABLE, ApiKeys, read_keys
from ochat_train.serve.log import open_log
from ochat_train.serve.reply import Message, Send
from ochat_train.serve.served import Served, find_served
from ochat_train.tokens.tokenizer import locate_base

GATE_VARIABLE = "OCHAT_TRAIN_GATE"
# What would change prompts or names behind the gate's back, or open a way around it.
_OURS = {
    "--api-key": f"give --api-keys, or the environment variable {VARIABLE}",
    "--chat-template": "the exported template is what was trained",
    "--default-chat-template-kwargs": "give --condition",
    "--trust-request-chat-template": "the exported template is what was trained",
    "--served-model-name": "the model answers to the recipe's name",
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
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes


@dataclass(frozen=True, slots=True)
class Command:
    """What to run, and the environment variables that it needs besides."""

    words: list[str]
    environment: dict[str, str]


def make_command(
    served: Served,
    flags: Sequence[str],
    *,
    host: str,
    port: int,
    tensor_parallel: int,
    keys: Sequence[str],
    log_file: Path | None,
    is_logging: bool,
) -> Command:
    """The command that serves the model with vLLM behind the gate. The keys are in the environment alone.

    Raises ValueError for flags that would go around the gate, and for adapters that vLLM cannot load.
    """
    for flag in flags:
        name = "--" + flag.partition("=")[0].lstrip("-").replace("_", "-")
        if flag.startswith("-") and name in _OURS:
            raise ValueError(f"{name} is set by ochat_train.serve: {_OURS[name]}")
    model = served.folder if served.adapter is None else Path(_base_of(served))
    words = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)]
    words += ["--host", host, "--port", str(port), "--tensor-parallel-size", str(tensor_parallel)]
    words += ["--tokenizer", str(served.folder), "--generation-config", str(served.folder)]
    words += ["--chat-template", str(served.folder / "chat_template.jinja")]
    words += ["--middleware", f"{__name__}.VllmGate", "--disable-uvicorn-access-log", "--disable-fastapi-docs"]
    if served.adapter is None:
        words += ["--served-model-name", served.name]
    else:
        rank = next((rank for rank in _RANKS if rank >= served.adapter.rank), _RANKS[-1])
        words += ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", f"{served.name}={served.folder}"]
    gate = {"folder": str(served.folder), "condition": served.condition, "is_logging": is_logging}
    gate |= {"log_file": str(log_file.absolute()) if log_file else None, "num_positions": _given_length(flags)}
    environment = {GATE_VARIABLE: orjson.dumps(gate).decode(), VARIABLE: " ".join(keys)}
    environment["VLLM_USE_RUST_FRONTEND"] = "0"  # that one knows no middleware
    return Command([*words, *flags], environment)


def _base_of(served: Served) -> str:
    """The base of the adapters, as vLLM takes it."""
    assert served.adapter is not None
    remedy = "export the merged model, without --adapter, or serve it with --engine transformers"
    if served.adapter.has_tokens:
        raise ValueError(f"{served.folder} has rows of tokens, which vLLM does not load; {remedy}")
    if served.adapter.rank > _RANKS[-1]:
        raise ValueError(f"{served.folder} has rank {served.adapter.rank}, and vLLM takes up to {_RANKS[-1]}; {remedy}")
    files = locate_base(served.adapter.base)
    if files.gguf_file is not None:
        raise ValueError(f"the base of {served.folder} is a .gguf file, beside which vLLM loads no adapters; {remedy}")
    return files.name


def _given_length(flags: Sequence[str]) -> int | None:
    """The number of --max-model-len, if it is given as one."""
    words = [word for flag in flags for word in flag.partition("=")[::2] if word]
    values = [after for word, after in itertools.pairwise(words) if word == "--max-model-len"]
    return int(values[-1]) if values and values[-1].isdigit() else None


class VllmGate:
    """The gate, made of the environment: vLLM imports this class and gives it nothing but its application."""

    def __init__(self, app: App) -> None:
        settings: Mapping[str, Any] = orjson.loads(os.environ[GATE_VARIABLE])
        served = find_served(settings["folder"], settings["condition"], num_positions=settings["num_positions"])
        log_file = settings["log_file"]
        self._gate = Gate(
            app,
            served=served,
            tokenizer=served.load_tokenizer(),
            engine=Engine("vLLM", served.name, unable={}, renders_text=True, fills_room=False),
            keys=ApiKeys(read_keys([])),
            log=open_log(Path(log_file) if log_file else None) if settings["is_logging"] else None,
        )

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """As the gate."""
        await self._gate(scope, receive, send)
