"""The chat page: what it asks and shows, and its process beside the real server, asked by Gradio's client."""

import asyncio
import http.client
import itertools
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import gradio_client
import openai
import pytest
from transformers import AutoModelForCausalLM

from ochat_train.conversations.template import TEMPLATES
from ochat_train.files import free_port
from ochat_train.serve import chat_page
from ochat_train.serve.__main__ import bind, check_page, main
from ochat_train.serve.chat_page import to_bubbles
from ochat_train.serve.side_by_side import ChatPage, Chats, Exchange, Sampling, answer_all, to_messages
from ochat_train.tokens.tokenizer import ChatTokenizer, load_tokenizer
from tests.chat_model import write_chat_model
from tests.chat_server import KEY, ROOT, Server, generate, serving
from tests.waiting import HANG_S, wait_until

NUM_POSITIONS = 9_000  # an answer that long does not end by itself before it is stopped
GREEDY = Sampling(system="", temperature=0, max_tokens=12)


# ------------------------------------------------------------------------------------------- asking


def test_turns_that_failed_are_not_sent_again() -> None:
    chat = (
        Exchange("a", "b"),
        Exchange("c", "cut", error="lost"),
        Exchange("stopped at once"),
        Exchange("d", " e\n"),
        Exchange("f"),
    )
    assert to_messages(chat, "Be brief.") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "d"},
        {"role": "assistant", "content": " e\n"},
        {"role": "user", "content": "f"},
    ]
    assert to_messages((Exchange("f"),), "") == [{"role": "user", "content": "f"}]


def test_an_error_is_shown_below_what_came_before_it() -> None:
    shown = [
        (bubble["role"], bubble["content"][0]["text"], "metadata" in bubble)
        for bubble in to_bubbles(
            (Exchange("a", "b"), Exchange("c", "cut", error="lost"), Exchange("d", error="refused"), Exchange("e"))
        )
    ]
    assert shown == [
        ("user", "a", False),
        ("assistant", "b", False),
        ("user", "c", False),
        ("assistant", "cut", False),
        ("assistant", "lost", True),
        ("user", "d", False),
        ("assistant", "refused", True),
        ("user", "e", False),
        ("assistant", "…", False),
    ]


@asynccontextmanager
async def server_that_says(answer: bytes) -> AsyncIterator[int]:
    """The port of a server that answers each request so, and hangs up."""

    async def say(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(say, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


def page_of(port: int, address: str = "http://nowhere") -> ChatPage:
    return ChatPage(f"http://127.0.0.1:{port}/v1", address, "tiny-chat", ("Careful", "Hasty"), "Careful", NUM_POSITIONS)


async def ask_all(page: ChatPage, chats: Chats) -> list[Chats]:
    client = openai.AsyncOpenAI(base_url=page.api, api_key=KEY, max_retries=0)
    return [grown async for grown in answer_all(client, page, chats, page.conditions, GREEDY)]


def chunk(content: str, finish: str = "null") -> bytes:
    choice = f'{{"index":0,"delta":{{"content":"{content}"}},"finish_reason":{finish}}}'
    return (
        f'data: {{"id":"x","object":"chat.completion.chunk","created":0,"model":"m","choices":[{choice}]}}\n\n'.encode()
    )


STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
CUT = STREAM.replace(b"Connection: close", b"Content-Length: 9999")
ENGINE_FAILED = b'data: {"error": {"message": "the engine failed", "type": "server_error"}}\n\ndata: [DONE]\n\n'
LOST = "The connection to the server was lost before the end of the answer."
REFUSED = b'HTTP/1.1 400 X\r\nContent-Type: application/json\r\n\r\n{"error": {"message": "shorten it"}}'


def test_what_a_user_wrote_is_shown_as_text_and_a_cut_answer_is_marked() -> None:
    question, answer, cut = to_bubbles((Exchange("<input> *a*", "*b*", is_cut=True),))
    assert question["content"][0]["text"] == r"\<input\> \*a\*" and answer["content"][0]["text"] == "*b*"
    assert "max tokens" in cut["content"][0]["text"] and "Cut" in cut["metadata"]["title"]


@pytest.mark.parametrize(
    ("said", "answer", "error"),
    [
        (STREAM + chunk("Hi") + chunk("", '"stop"') + b"data: [DONE]\n\n", "Hi", ""),
        (STREAM + chunk("", '"stop"') + b"data: [DONE]\n\n", "", "The answer is empty."),
        (STREAM + chunk("Hi"), "Hi", LOST),
        (CUT + chunk("Hi"), "Hi", LOST),
        (STREAM + chunk("Hi") + ENGINE_FAILED, "Hi", "the engine failed"),
        (REFUSED, "", "shorten it"),
        (b"HTTP/1.1 502 X\r\nContent-Length: 11\r\n\r\nBad Gateway", "", "Error code: 502"),
    ],
    ids=["whole", "empty", "ended", "lost", "failed", "refused", "gateway"],
)
def test_what_went_wrong_is_said_in_words(said: bytes, answer: str, error: str) -> None:
    async def run() -> Exchange:
        async with server_that_says(said) as port:
            return (await ask_all(page_of(port), ((Exchange("a"),),)))[-1][0][-1]

    turn = asyncio.run(run())
    assert turn == Exchange("a", answer, error)


def test_a_server_that_is_not_there_is_said_so() -> None:
    page = page_of(free_port())
    left, right = asyncio.run(ask_all(page, ((Exchange("a", "b"), Exchange("c")), (Exchange("c"),))))[-1]
    expected = f"The server does not answer at {page.api}. Is it still starting, or was it stopped?"
    assert left == (Exchange("a", "b"), Exchange("c", error=expected)) and right == (Exchange("c", error=expected),)


# ------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Its own: an export leaves marks on a tokenizer.
    tokenizer = load_tokenizer(str(ROOT / "data/quickstart_tokenizer"), TEMPLATES["openchat_v3.2"])
    return write_chat_model(
        tmp_path_factory.mktemp("run") / "model", tokenizer, num_positions=NUM_POSITIONS, can_end=False
    )


def test_the_page_has_the_next_port_and_a_way_to_every_host(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[ChatPage, list[str]]] = []

    def start(page: ChatPage, sockets: Any, keys: list[str]) -> None:
        started.append((page, keys))
        for one in sockets:
            one.close()

    monkeypatch.setattr(chat_page, "start", start)
    monkeypatch.setattr("ochat_train.serve.transformers_engine.serve", lambda *_, **__: None)
    port = free_port()
    command = [str(model), "--engine", "transformers", "--ui", "--port", str(port), "--api-keys", KEY]
    main([*command, "--host", "127.0.0.1"])
    main([*command, "--host", "0.0.0.0", "--ui-port", str(free_port()), "--condition", "Hasty"])
    (first, keys), (second, _) = started
    assert keys == [KEY]
    assert first == page_of(port, f"http://127.0.0.1:{port + 1}")
    assert (second.api, second.condition) == (f"http://127.0.0.1:{port}/v1", "Hasty")
    assert second.address.startswith("http://0.0.0.0:")


def test_the_page_is_there_before_vllm_starts(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.33.0")
    monkeypatch.setattr(chat_page, "start", lambda page, sockets, keys: done.append(page.model))
    run = lambda words, environment, **_: done.append(words[words.index("-m") + 1])  # noqa: E731
    monkeypatch.setattr("ochat_train.serve.vllm_engine.run", run)
    with pytest.raises(SystemExit):
        main([str(model), "--ui", "--host", "127.0.0.1", "--port", str(free_port())])
    assert done == ["tiny-chat", "ochat_train.serve.vllm_command"]


def test_a_page_that_cannot_be_shown_is_refused(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ochat_train.serve.transformers_engine.serve", lambda *_, **__: pytest.fail("it was loaded"))
    command = [str(model), "--engine", "transformers", "--host", "127.0.0.1", "--ui", "--port", str(free_port())]
    with pytest.raises(SystemExit, match="--ui-port 70000 is not between"):
        main([*command, "--ui-port", "70000"])
    with pytest.raises(SystemExit, match=r"is the API's"):
        main([*command, "--ui-port", command[-1]])
    (taken,) = bind("127.0.0.1", free_port())
    taken.listen()
    with taken, pytest.raises(SystemExit, match=r"cannot be used .* name another --ui-port"):
        main([*command, "--ui-port", str(taken.getsockname()[1])])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "gradio" else object())
    with pytest.raises(ValueError, match=r"--ui needs the package gradio: pip install 'ochat_train\[ui\]'"):
        check_page(None)  # type: ignore[arg-type]  # it is not looked at


# ------------------------------------------------------------------------------------------- the running page


@pytest.fixture(scope="module")
def page_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def server(model: Path, page_port: int) -> Iterator[Server]:
    with serving(
        model.parent, "--engine", "transformers", "--device", "cpu", "--ui-port", str(page_port), "--ui"
    ) as made:
        wait_until(lambda: "chat page on" in made.output.read_text())
        yield made
    # The page ends with the server that it stands beside.
    wait_until(lambda: not is_open(page_port))
    assert "Traceback" not in made.output.read_text()


@pytest.fixture(scope="module")
def client(server: Server, page_port: int) -> gradio_client.Client:
    return gradio_client.Client(f"http://127.0.0.1:{page_port}", auth=("anybody", KEY), verbose=False)


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> ChatTokenizer:
    return load_tokenizer(str(model), TEMPLATES["openchat_v3.2"])


@pytest.fixture(scope="module")
def loaded(model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model)


def is_open(port: int) -> bool:
    try:
        get(port, "/")
        return True
    except OSError:
        return False


def get(port: int, path: str, method: str = "GET", body: bytes | None = None) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=HANG_S)
    connection.request(method, path, body, {"Content-Type": "application/json"})
    return connection.getresponse()


def submit(client: gradio_client.Client, question: str, *, compares: bool = False, **options: Any) -> Any:
    given = {"left": "Careful", "right": "Hasty", "system": "", "temperature": 0, "max_tokens": 12} | options
    return client.submit(question, compares, *given.values(), api_name="/ask")


def shown(job: Any) -> list[Any]:
    """What the two sides showed, one after the other; what did not change is no list."""
    job.result(300)
    return [[side for side in sides if isinstance(side, list)] for _, *sides in job.outputs() if sides]


def ask(client: gradio_client.Client, question: str, **options: Any) -> Any:
    """The bubbles of the sides at the end."""
    return next(sides for sides in reversed(shown(submit(client, question, **options))) if sides)


def answers(bubbles: list[dict[str, Any]]) -> list[str]:
    return [
        bubble["content"][0]["text"]
        for bubble in bubbles
        if bubble["role"] == "assistant" and "Cut" not in ((bubble.get("metadata") or {}).get("title") or "")
    ]


def test_a_chat_is_answered_as_generate_answers_and_goes_on_in_two_conditions(
    client: gradio_client.Client, tokenizer: ChatTokenizer, loaded: Any
) -> None:
    def expected(condition: str, *texts: str) -> str:
        return generate(loaded, tokenizer, texts, condition)[0]

    client.reset_session()
    first = expected("Careful", "Hi")
    (left,) = ask(client, "Hi")
    assert answers(left) == [first]
    # The second side goes on from what the first one said.
    left, right = ask(client, " And now?\n", compares=True)
    assert answers(left) == [first, expected("Careful", "Hi", first, " And now?\n")]
    assert answers(right) == [first, expected("Hasty", "Hi", first, " And now?\n")]
    assert answers(left) != answers(right)


def test_an_answer_is_seen_growing(client: gradio_client.Client) -> None:
    client.reset_session()
    seen = [answers(sides[0])[-1] for sides in shown(submit(client, "Tell me", max_tokens=400)) if sides]
    assert seen[0] == "…" and len(set(seen)) > 4
    grown = seen[1:]
    assert all(after.startswith(before) for before, after in itertools.pairwise(grown))


def test_a_stopped_answer_ends_at_the_server(client: gradio_client.Client, server: Server) -> None:
    client.reset_session()
    num_before = len(server.lines())
    job = submit(client, "Tell me", compares=True, max_tokens=8_000)
    wait_until(lambda: len(job.outputs()) > 2)
    job.cancel()
    wait_until(lambda: len(server.lines()) == num_before + 2)
    assert [line["status"] for line in server.lines()[num_before:]] == [499, 499]


def test_an_error_of_the_server_is_shown_and_the_chat_goes_on(client: gradio_client.Client) -> None:
    client.reset_session()
    (left,) = ask(client, "word " * 10_000)
    assert f"{NUM_POSITIONS:,} positions" in answers(left)[-1] and "Error" in left[-1]["metadata"]["title"]
    (left,) = ask(client, "Hi")
    assert "Error" not in (left[-1]["metadata"] or {"title": ""})["title"] and answers(left)[-1]


def test_nobody_is_let_in_without_a_key(server: Server, page_port: int) -> None:
    for auth in (None, ("anybody", "wrong" + KEY), (KEY, "")):
        with pytest.raises(Exception, match=r"(?i)auth|credentials|log ?in|valid"):
            gradio_client.Client(f"http://127.0.0.1:{page_port}", auth=auth, verbose=False)
    ask = b'{"data": ["Hi", null, false, "Careful", "Hasty", "", 0, 5], "fn_index": 0, "session_hash": "x"}'
    for method, path in [
        ("GET", "/config"),
        ("GET", "/gradio_api/info"),
        ("GET", "/gradio_api/queue/data?session_hash=x"),
        ("POST", "/gradio_api/queue/join"),
        ("POST", "/gradio_api/run/ask"),
        ("POST", "/gradio_api/call/ask"),
        ("POST", "/gradio_api/upload"),
    ]:
        assert get(page_port, path, method, ask if method == "POST" else None).status == 401, path
    assert KEY not in server.output.read_text() + get(page_port, "/").read().decode()


def test_the_page_asks_no_other_host(server: Server, page_port: int) -> None:
    answer = get(page_port, "/")
    page = answer.read().decode()
    assert answer.status == 200 and "default-src 'self'" in answer.headers["Content-Security-Policy"]
    assert not re.findall(r"<(?:script|img|link)[^>]+(?:src|href)=[\"']?(?:https?:)?//[^>]+>", page)
