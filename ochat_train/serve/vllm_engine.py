"""The engine vLLM: the command of its server, and the gate as the middleware that it puts around its application."""

import argparse
import itertools
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import orjson
from starlette.types import ASGIApp, Receive, Scope, Send

from ochat_train.serve.gate import EngineTraits, Gate
from ochat_train.serve.keys import KEYS_VARIABLE, ApiKeys, read_keys
from ochat_train.serve.request_log import open_log
from ochat_train.serve.served import Served, find_served
from ochat_train.tokens.tokenizer import locate_base

GATE_VARIABLE = "OCHAT_TRAIN_GATE"
# Flags that would change prompts or names without the gate's knowledge, or open a way around it.
_REFUSED_FLAGS = {
    "--api-key": f"give --api-keys, or the environment variable {KEYS_VARIABLE}",
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
    words = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model]
    words += ["--host", options.host, "--port", str(options.port)]
    words += ["--tensor-parallel-size", str(options.tensor_parallel_size)]
    words += ["--tokenizer", str(served.folder), "--generation-config", str(served.folder)]
    words += ["--chat-template", str(served.folder / "chat_template.jinja")]
    words += ["--middleware", f"{__name__}.VllmGate", "--disable-uvicorn-access-log", "--disable-fastapi-docs"]
    if served.adapter is None:
        words += ["--served-model-name", served.name]
    else:
        rank = next(rank for rank in _RANKS if rank >= served.adapter.rank)
        words += ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", f"{served.name}={served.folder}"]
    settings = {
        "folder": str(served.folder),
        "condition": served.condition,
        "num_positions": _find_max_model_len(flags),
        "is_logging": not options.disable_log_requests,
        "log_file": str(options.log_file.absolute()) if options.log_file else None,
    }
    environment = {GATE_VARIABLE: orjson.dumps(settings).decode(), KEYS_VARIABLE: " ".join(keys)}
    environment["VLLM_USE_RUST_FRONTEND"] = "0"  # which has no middleware
    return [*words, *flags], environment


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


def _find_max_model_len(flags: Sequence[str]) -> int | None:
    words = [word for flag in flags for word in flag.partition("=")[::2] if word]
    values = [after for word, after in itertools.pairwise(words) if word == "--max-model-len"]
    return int(values[-1]) if values and values[-1].isdigit() else None


class VllmGate:
    """The gate, made from the environment: vLLM imports this class and passes nothing but its application."""

    def __init__(self, app: ASGIApp) -> None:
        settings = orjson.loads(os.environ[GATE_VARIABLE])
        served = find_served(settings["folder"], settings["condition"], num_positions=settings["num_positions"])
        log_file = Path(settings["log_file"]) if settings["log_file"] else None
        self._gate = Gate(
            app,
            served=served,
            tokenizer=served.load_tokenizer(),
            engine=EngineTraits("vLLM", unable={}, renders_text=True, fills_room=False),
            keys=ApiKeys(read_keys([])),
            log=open_log(log_file) if settings["is_logging"] else None,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        await self._gate(scope, receive, send)
