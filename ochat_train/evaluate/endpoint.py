"""Where a model answers: at a given URL, or by a server of ours that runs during the evaluation."""

import hashlib
import http.client
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ochat_train.files import free_port
from ochat_train.model.exported import METADATA_FILE
from ochat_train.serve.keys import KEYS_VARIABLE
from ochat_train.serve.process import PARENT_VARIABLE

KEY_VARIABLE, JUDGE_KEY_VARIABLE = "OPENAI_API_KEY", "JUDGE_API_KEY"
_SHOWN = 2000  # characters of the output of a server that does not start
START_TIMEOUT_S = 1800.0  # for a server to load its model
_END_S = 30.0  # for a server to end by itself


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A model on an OpenAI-compatible API.

    url: the base, up to /v1; empty for a folder that is not served yet. model: its name there. identity: the same
    wherever the model is served. num_positions: of prompt and answer together, where it is known.
    """

    url: str
    key: str
    model: str
    identity: str
    num_positions: int | None = None


def is_url(target: str) -> bool:
    """Whether MODEL_OR_URL is a URL."""
    return target.startswith(("http://", "https://"))


@contextmanager
def reach(target: str, *, model: str | None, condition: str | None, flags: Sequence[str]) -> Iterator[Endpoint]:
    """The model at a URL, or in a folder, which is served until the block ends; as `find_endpoint` and `serve`."""
    with serve(target, find_endpoint(target, model=model, condition=condition, flags=flags), flags) as endpoint:
        yield endpoint


def find_endpoint(
    target: str, *, model: str | None, condition: str | None, flags: Sequence[str], key_variable: str = KEY_VARIABLE
) -> Endpoint:
    """The model at a URL, or in a folder, which is not served yet.

    model: its name at a URL; None takes the first that the server lists. condition: checked for a folder. flags: for
    the server of a folder. key_variable: has the key of a URL; KEY_VARIABLE where it is not set. Raises ValueError.
    """
    if is_url(target):
        if flags:
            raise ValueError(f"no flag {flags[0]}; flags of a server are for a MODEL, not for a URL")
        url, key = target.rstrip("/"), os.environ.get(key_variable) or os.environ.get(KEY_VARIABLE) or "none"
        if model is not None:
            return Endpoint(url, key, model, url)
        first = _first_model(url, key)
        return Endpoint(url, key, first.id, url, getattr(first, "max_model_len", None))
    from ochat_train.serve.served import find_served  # loads transformers, which a URL does not need

    served = find_served(target, condition)
    if model is not None:
        raise ValueError("--model names a model at a URL; a folder has one")
    digest = hashlib.sha256((served.folder / METADATA_FILE).read_bytes()).hexdigest()
    return Endpoint("", secrets.token_hex(16), served.name, digest, served.num_positions)


@contextmanager
def serve(target: str, endpoint: Endpoint, flags: Sequence[str]) -> Iterator[Endpoint]:
    """The endpoint itself, or that of a server of the folder `target`, which runs until the block ends."""
    if endpoint.url:
        yield endpoint
        return
    arguments = [target, "--disable-log-requests", *flags]
    with (
        tempfile.TemporaryDirectory() as folder,
        started(arguments, output=Path(folder) / "output", variables={KEYS_VARIABLE: endpoint.key}) as server,
    ):
        yield replace(endpoint, url=f"http://127.0.0.1:{server.port}/v1")


@dataclass(frozen=True, slots=True)
class OwnServer:
    """A server in a process of its own, on a port that only this machine reaches."""

    port: int
    process: subprocess.Popen[bytes]


@contextmanager
def started(arguments: Sequence[str], *, output: Path, variables: dict[str, str]) -> Iterator[OwnServer]:
    """Run `ochat_train.serve` with the arguments on a free port until the block ends; it answers when the block begins.

    output: the file for what it prints. variables: added to its environment. A terminal's Ctrl-C does not reach it.
    Raises ValueError, with the end of its output, when it does not start.
    """
    port = free_port()
    command = [sys.executable, "-m", "ochat_train.serve", *arguments, "--host", "127.0.0.1", "--port", str(port)]
    with open(output, "wb") as stream:
        process = subprocess.Popen(
            command,
            env=os.environ | variables | {PARENT_VARIABLE: str(os.getpid())},
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_until_ready(process, port, output)
        yield OwnServer(port, process)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, output: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        if process.poll() is not None or time.monotonic() > deadline:
            said = output.read_text(errors="replace")[-_SHOWN:].strip()
            raise ValueError(f"the server did not start; the end of what it printed:\n{said}")
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except (OSError, http.client.HTTPException):
            pass
        time.sleep(0.1)


def _first_model(url: str, key: str) -> Any:
    import openai

    try:
        with openai.OpenAI(base_url=url, api_key=key, max_retries=2, timeout=30) as client:
            models = client.models.list().data
    except openai.OpenAIError as error:
        raise ValueError(f"{url}/models does not answer ({error}); the key is taken from {KEY_VARIABLE}") from None
    if not models:
        raise ValueError(f"{url} lists no models; name one with --model")
    return models[0]
