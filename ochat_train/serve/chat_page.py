"""The chat page: Gradio's components around `asking`, and who is let in."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from ochat_train.serve.asking import Chat, Chats, Page, Sampling, Turn, answer_all
from ochat_train.serve.keys import ApiKeys
from ochat_train.serve.reply import Message, Send

# Nothing that a model writes, such as an image of another host, makes a browser ask others than this page.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; frame-ancestors 'self'; base-uri 'self'; form-action 'self'"
)
_HEIGHT = "calc(100vh - 216px)"  # what a condition above and a question below leave
_CSS = ".fillable {max-width: 1600px !important} footer {display: none !important}"


def to_bubbles(chat: Chat) -> list[dict[str, Any]]:
    """The chat as Gradio's Chatbot takes it."""
    bubbles: list[dict[str, Any]] = []
    for turn in chat:
        bubbles.append({"role": "user", "content": [{"type": "text", "text": turn.question}]})
        if turn.answer or not turn.error:
            bubbles.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer or "…"}]})
        if turn.error:
            text = {"type": "text", "text": turn.error}
            bubbles.append({"role": "assistant", "content": [text], "metadata": {"title": "⚠️ Error"}})
    return bubbles


def build(page: Page, client: Any) -> Any:
    """The Gradio blocks."""
    import gradio as gr

    names = [(condition or "(none)", condition) for condition in page.conditions]
    other = next((condition for condition in page.conditions if condition != page.condition), page.condition)
    idle, busy = {"submit_btn": True, "stop_btn": False}, {"submit_btn": False, "stop_btn": True}

    async def ask(
        question: str,
        chats: Chats,
        is_comparing: bool,
        left: str,
        right: str,
        system: str,
        temperature: float,
        max_tokens: int,
    ) -> AsyncIterator[tuple[Any, ...]]:
        if not question.strip():
            yield (gr.skip(),) * 4
            return
        conditions = (left, right)[: 1 + is_comparing]
        chats = tuple((*chat, Turn(question)) for chat in (*chats, chats[0])[: len(conditions)])
        yield gr.update(value="", **busy), chats, *map(to_bubbles, chats), *[gr.skip()] * (2 - len(chats))
        async for grown in answer_all(client, page, chats, conditions, Sampling(system, temperature, max_tokens)):
            yield gr.skip(), grown, *map(to_bubbles, grown), *[gr.skip()] * (2 - len(grown))
        yield gr.update(**idle), *[gr.skip()] * 3

    def compare(is_comparing: bool, chats: Chats) -> tuple[Any, ...]:
        chats = (chats[0], chats[0]) if is_comparing else chats[:1]  # both go on from the same
        return gr.update(**idle), chats, gr.update(visible=is_comparing), to_bubbles(chats[-1])

    def column(value: str) -> tuple[Any, Any]:
        condition = gr.Dropdown(names, value=value, label="Condition", interactive=True, filterable=len(names) > 8)
        bubbles = gr.Chatbot(show_label=False, height=_HEIGHT, min_height=240, buttons=["copy"], feedback_options=None)
        return condition, bubbles

    with gr.Blocks(title=page.model, analytics_enabled=False, fill_height=True) as blocks:
        chats = gr.State(((),))
        with gr.Sidebar(width=280):
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
        question = gr.Textbox(show_label=False, placeholder="Ask something", autofocus=True, max_lines=12, **idle)
        asked = question.submit(
            ask,
            [question, chats, is_comparing, left, right, system, temperature, max_tokens],
            [question, chats, left_bubbles, right_bubbles],
            trigger_mode="once",
            show_progress="hidden",
        )
        question.stop(lambda: gr.update(**idle), None, question, cancels=asked, queue=False)
        gr.on(
            [new.click, left_bubbles.clear, right_bubbles.clear],
            lambda: (gr.update(**idle), ((),), [], []),
            None,
            [question, chats, left_bubbles, right_bubbles],
            cancels=asked,
        )
        is_comparing.input(compare, [is_comparing, chats], [question, chats, beside, right_bubbles], cancels=asked)
    blocks.queue(default_concurrency_limit=None)
    return blocks


def make_app(page: Page, keys: ApiKeys, client: Any) -> Any:
    """The ASGI application. With keys, nobody is let in without one, which is the password."""
    import fastapi
    import gradio as gr

    def is_let_in(_: str, password: str) -> bool:
        return keys.allow([b"Bearer " + password.encode()])

    mounted = gr.mount_gradio_app(
        fastapi.FastAPI(openapi_url=None),
        build(page, client),
        path="/",
        app_kwargs={"openapi_url": None},
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        max_file_size=1,  # nothing is uploaded here
        auth=is_let_in if keys else None,
        auth_message="Any name; the password is an API key of the server.",
        css=_CSS,
    )

    async def app(scope: Message, receive: Callable[[], Awaitable[Message]], send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", _POLICY.encode())]
            await send(message)

        await mounted(scope, receive, send_with_policy)

    return app
