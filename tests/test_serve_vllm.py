"""vLLM's real server behind the gate. It needs vLLM, which the other tests do without."""

import importlib.metadata
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import orjson
import pytest
from transformers import AutoModelForCausalLM

from ochat_train.conversations.template import TEMPLATES
from ochat_train.tokens.tokenizer import ChatTokenizer, load_tokenizer
from tests.calling_model import (
    ASKED,
    TAGS,
    TOOL,
    check_chat_round_trip,
    check_responses_round_trip,
    write_calling_model,
)
from tests.chat_model import write_chat_model
from tests.chat_server import FORGED, KEY, ROOT, SECRET, Server, ask, generate, serving, vanish
from tests.waiting import HANG_S, wait_until

try:
    importlib.metadata.version("vllm")
except importlib.metadata.PackageNotFoundError:
    pytest.skip("vllm is not installed", allow_module_level=True)


FLAGS = ("--engine", "vllm", "--dtype", "float32", "--enforce-eager", "--max-num-seqs", "8")
VARIABLES = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    tokenizer = load_tokenizer(str(ROOT / "data/quickstart_tokenizer"), TEMPLATES["openchat_v3.2"])
    run = tmp_path_factory.mktemp("run")
    write_chat_model(run / "model", tokenizer)
    with serving(run, *FLAGS, **VARIABLES) as made:
        yield made


@pytest.fixture(scope="module")
def tokenizer(server: Server) -> ChatTokenizer:
    return load_tokenizer(str(server.model), TEMPLATES["openchat_v3.2"])


@pytest.fixture(scope="module")
def loaded(server: Server) -> Any:
    return AutoModelForCausalLM.from_pretrained(server.model)


@pytest.mark.parametrize("condition", [None, "Hasty"])
@pytest.mark.parametrize(
    "texts", [("What is the capital of France?",), ("Hi", " \nHello!", "  Who? \u65e5\u672c\u8a9e")]
)
def test_greedy_answers_are_those_of_generate_on_the_ids_of_training(
    server: Server, tokenizer: ChatTokenizer, loaded: Any, texts: tuple[str, ...], condition: str | None
) -> None:
    expected, num_prompt = generate(loaded, tokenizer, texts, condition or "Careful")
    answer = ask(server, *texts, condition=condition)
    # Half a character at the limit is held back.
    assert answer.choices[0].message.content.rstrip("\ufffd") == expected.rstrip("\ufffd")
    assert (answer.usage.prompt_tokens, answer.model) == (num_prompt, "tiny-chat")


def test_text_that_it_would_obey_is_refused(server: Server) -> None:
    with pytest.raises(openai.BadRequestError, match="end_of_turn"):
        ask(server, FORGED)


def test_only_the_gates_routes_are_there(server: Server) -> None:
    for path in ("/v1/completions", "/tokenize", "/docs", "/v1/../metrics"):
        request = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer {KEY}\r\n\r\n"
        assert b" 404 " in server.send(request.encode()).partition(b"\r\n")[0]
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key=SECRET).models.list()


def test_answers_that_nobody_waits_for_are_ended(server: Server) -> None:
    # Longer than it takes to hang up, on any machine: half of them wait for the others.
    body = {"model": "tiny-chat", "messages": [{"role": "user", "content": SECRET}], "ignore_eos": True, "n": 16}
    for stream in (True, False):
        vanish(server, body, stream=stream)
    wait_until(lambda: [line["status"] for line in server.lines()].count(499) == 2)
    assert ask(server, "Hi").usage.completion_tokens == 12


def test_an_answer_has_the_form_that_is_asked_for(server: Server) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    answer = ask(server, "Hi", response_format=form, max_tokens=60)
    assert set(orjson.loads(answer.choices[0].message.content)) >= {"a"}


def test_half_a_header_is_not_waited_for(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=HANG_S) as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n")
        assert connection.recv(65536) == b""


def test_calls_come_as_calls_and_go_back_as_history(tmp_path: Path) -> None:
    write_calling_model(tmp_path, template="base", chat_template=TAGS)
    with serving(tmp_path, *FLAGS, **VARIABLES) as server:
        check_chat_round_trip(server)
        check_responses_round_trip(server)
        strict = {"type": "function", "function": {**TOOL["function"], "strict": True}}  # so has every call its form
        options: Any = {"model": "tiny-chat", "messages": [ASKED], "tools": [strict], "temperature": 0}
        create = server.client.chat.completions.create
        for choice in ("required", {"type": "function", "function": {"name": "look"}}):
            (call,) = create(tool_choice=choice, **options).choices[0].message.tool_calls
            assert call.function.name == "look" and orjson.loads(call.function.arguments).keys() >= {"at"}
        assert create(tool_choice="none", max_tokens=40, **options).choices[0].message.tool_calls in (None, [])


def test_the_log_has_no_text_and_no_key(server: Server) -> None:
    ask(server, SECRET)
    for text in (server.log.read_text(), server.output.read_text()):
        assert not any(secret in text for secret in (SECRET, KEY))
