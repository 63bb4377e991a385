"""The chat page: Gradio's components, who may open it, and its process beside the server.

The process is started on sockets that are bound already, and ends when the server's process does.
"""

import contextlib
import os
import re
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict
from typing import Any

import orjson

from ochat_train.serve.keys import KEYS_VARIABLE, ApiKeys, read_keys
from ochat_train.serve.process import PARENT_VARIABLE, watch_parent
from ochat_train.serve.side_by_side import Chat, ChatPage, Chats, Exchange, Sampling, answer_all

# A browser asks no host but this page's, whatever a model writes, such as the image of another host.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; frame-ancestors 'self'; base-uri 'self'; form-action 'self'"
)
_HEIGHT = "calc(100vh - 216px)"  # without the condition above and the question below
_CSS = ".fillable {max-width: 1600px !important} footer {display: none !important}"
_MARKUP = re.compile(r"[!-/:-@\[-`{-~]")  # what Markdown takes a backslash before
# With words: a screen reader has no name for the icons.
_IDLE, _BUSY = {"submit_btn": "Ask", "stop_btn": False}, {"submit_btn": False, "stop_btn": "Stop"}
_SHUTDOWN_S = 1  # for browsers, which keep connections open


def to_bubbles(chat: Chat) -> list[dict[str, Any]]:
    """The chat as Gradio's Chatbot takes it."""
    bubbles: list[dict[str, Any]] = []
    for exchange in chat:
        # As text: Markdown and HTML of a user's own would hide what was written.
        question = _MARKUP.sub(r"\\\g<0>", exchange.question)
        bubbles.append({"role": "user", "content": [{"type": "text", "text": question}]})
        if exchange.answer or not exchange.error:
            bubbles.append({"role": "assistant", "content": [{"type": "text", "text": exchange.answer or "…"}]})
        if exchange.is_cut:
            text = {"type": "text", "text": "The answer was cut at the limit of max tokens."}
            bubbles.append({"role": "assistant", "content": [text], "metadata": {"title": "✂️ Cut"}})
        if exchange.error:
            text = {"type": "text", "text": exchange.error}
            bubbles.append({"role": "assistant", "content": [text], "metadata": {"title": "⚠️ Error"}})
    return bubbles


def answer_with(page: ChatPage, client: Any) -> Callable[..., AsyncIterator[tuple[Any, ...]]]:
    """The function that Gradio calls with a question and the settings; it yields what the components show next."""
    import gradio as gr

    async def ask(
        question: str, chats: Chats, is_comparing: bool, left: str, right: str, *sampling: Any
    ) -> AsyncIterator[tuple[Any, ...]]:
        if not question.strip():
            yield (gr.skip(),) * 4
            return
        conditions = (left, right)[: 1 + is_comparing]
        chats = tuple((*chat, Exchange(question)) for chat in (*chats, chats[0])[: len(conditions)])
        yield gr.update(value="", **_BUSY), chats, *map(to_bubbles, chats), *[gr.skip()] * (2 - len(chats))
        async for grown in answer_all(client, page, chats, conditions, Sampling(*sampling)):
            yield gr.skip(), grown, *map(to_bubbles, grown), *[gr.skip()] * (2 - len(grown))
        yield gr.update(**_IDLE), *[gr.skip()] * 3

    return ask


def build(page: ChatPage, client: Any) -> Any:
    """The Gradio blocks."""
    import gradio as gr

    names = [(condition or "(none)", condition) for condition in page.conditions]
    other = next((condition for condition in page.conditions if condition != page.condition), page.condition)

    def compare(is_comparing: bool, chats: Chats) -> tuple[Any, ...]:
        chats = (chats[0], chats[0]) if is_comparing else chats[:1]  # both continue the same conversation
        return gr.update(**_IDLE), chats, gr.update(visible=is_comparing), to_bubbles(chats[-1])

    def column(value: str) -> tuple[Any, Any]:
        condition = gr.Dropdown(names, value=value, label="Condition", interactive=True, filterable=len(names) > 8)
        bubbles = gr.Chatbot(show_label=False, height=_HEIGHT, min_height=240, buttons=["copy"], feedback_options=None)
        return condition, bubbles

    with gr.Blocks(title=page.model, analytics_enabled=False, fill_height=True) as blocks:
        chats = gr.State(((),))
        with gr.Sidebar(width=280, open=False):  # open, it would cover the chat of a narrow page
            gr.Markdown(f"## {page.model}")
            is_comparing = gr.Checkbox(label="Compare two conditions", visible=len(names) > 1)
            temperature = gr.Slider(0, 2, value=1, step=0.05, label="Temperature")
            longest = min(page.num_positions, 8192)
            max_tokens = gr.Slider(1, longest, value=min(longest, 1024), step=1, label="Max tokens")
            system = gr.Textbox(label="System message", lines=3, max_lines=8)
            new = gr.Button("New chat")
        with gr.Row(scale=1):
            with gr.Column():
                left, left_bubbles = column(page.condition)
            with gr.Column(visible=False) as beside:
                right, right_bubbles = column(other)
        question = gr.Textbox(show_label=False, placeholder="Ask something", autofocus=True, max_lines=12, **_IDLE)
        asked = question.submit(
            answer_with(page, client),
            [question, chats, is_comparing, left, right, system, temperature, max_tokens],
            [question, chats, left_bubbles, right_bubbles],
            trigger_mode="once",
            show_progress="hidden",
        )
        question.stop(lambda: gr.update(**_IDLE), None, question, cancels=asked, queue=False)
        gr.on(
            [new.click, left_bubbles.clear, right_bubbles.clear],
            lambda: (gr.update(**_IDLE), ((),), [], []),
            None,
            [question, chats, left_bubbles, right_bubbles],
            cancels=asked,
        )
        is_comparing.input(compare, [is_comparing, chats], [question, chats, beside, right_bubbles], cancels=asked)
    blocks.queue(default_concurrency_limit=None)
    return blocks


def make_app(page: ChatPage, keys: ApiKeys, client: Any) -> Any:
    """The ASGI application. With keys, a user logs in with one of them as the password."""
    import gradio as gr
    from starlette.applications import Starlette
    from starlette.datastructures import MutableHeaders
    from starlette.types import Message, Receive, Scope, Send

    def is_allowed(_: str, password: str) -> bool:
        return keys.allow([f"Bearer {password}"])

    mounted = gr.mount_gradio_app(
        Starlette(),
        build(page, client),
        path="/",
        app_kwargs={"openapi_url": None},
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        max_file_size=1,  # nothing is uploaded here
        auth=is_allowed if keys else None,
        auth_message="Any name; the password is an API key of the server.",
        css=_CSS,
    )

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["content-security-policy"] = _POLICY
            await send(message)

        await mounted(scope, receive, send_with_policy)

    return app


def start(page: ChatPage, sockets: Sequence[socket.socket], keys: Sequence[str]) -> None:
    """Start the page on the sockets. It ends with this process, also after that has become another by exec."""
    settings = asdict(page) | {"sockets": [one.fileno() for one in sockets]}
    # The keys are in the environment alone.
    environment = os.environ | {
        KEYS_VARIABLE: " ".join(keys),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_HUB_OFFLINE": "1",
        PARENT_VARIABLE: str(os.getpid()),
    }
    subprocess.Popen(
        [sys.executable, "-m", "ochat_train.serve.chat_page", orjson.dumps(settings).decode()],
        pass_fds=settings["sockets"],
        env=environment,
    )
    for one in sockets:
        one.close()


def _serve(page: ChatPage, sockets: list[socket.socket], keys: Sequence[str]) -> None:
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

    def stop() -> None:
        server.should_exit = True

    watch_parent(stop)
    for one in sockets:
        one.listen(config.backlog)  # so that the address accepts connections once it is printed
    print(f"chat page on {page.address}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=sockets)


if __name__ == "__main__":
    settings = orjson.loads(sys.argv[1])
    sockets = [socket.socket(fileno=number) for number in settings.pop("sockets")]
    page = ChatPage(**settings | {"conditions": tuple(settings["conditions"])})
    _serve(page, sockets, read_keys([]))
