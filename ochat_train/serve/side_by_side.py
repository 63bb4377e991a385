"""Conversations side by side, answered at the same time through the API, for the chat page."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

REFRESH_S = 0.05  # between two looks at growing answers
_LOST = "The connection to the server was lost before the end of the answer."


@dataclass(frozen=True, slots=True)
class ChatPage:
    """The API's URL, the page's own, the model's name, its conditions, the one that is chosen at first."""

    api: str
    address: str
    model: str
    conditions: tuple[str, ...]
    condition: str
    num_positions: int


@dataclass(frozen=True, slots=True)
class Exchange:
    """A question and its answer. One with an error or without an answer is shown, and not sent again.

    is_cut: whether the answer reached the limit of tokens.
    """

    question: str
    answer: str = ""
    error: str = ""
    is_cut: bool = False


@dataclass(frozen=True, slots=True)
class Sampling:
    """The settings of the answers."""

    system: str
    temperature: float
    max_tokens: int


Chat = tuple[Exchange, ...]
# The conversations that stand side by side, one for each condition.
Chats = tuple[Chat, ...]


def to_messages(chat: Chat, system: str) -> list[dict[str, str]]:
    """The messages of the request for an answer to the chat's last question."""
    messages = [{"role": "system", "content": system}] if system else []
    for exchange in chat[:-1]:
        if exchange.answer and not exchange.error:
            messages.append({"role": "user", "content": exchange.question})
            messages.append({"role": "assistant", "content": exchange.answer})
    return [*messages, {"role": "user", "content": chat[-1].question}]


async def answer(
    client: Any, page: ChatPage, chat: Chat, condition: str, sampling: Sampling
) -> AsyncIterator[Exchange]:
    """The chat's last exchange as its answer grows. An error ends it, and is described in words."""
    import openai

    exchange, is_finished = chat[-1], False
    try:
        stream = await client.chat.completions.create(
            model=page.model,
            messages=to_messages(chat, sampling.system),
            temperature=sampling.temperature,
            max_tokens=sampling.max_tokens,
            stream=True,
            extra_body={"chat_template_kwargs": {"condition": condition}},
        )
        async with stream:
            async for chunk in stream:
                for choice in chunk.choices:
                    is_finished = is_finished or choice.finish_reason is not None
                    grown, is_cut = exchange.answer + (choice.delta.content or ""), choice.finish_reason == "length"
                    if grown != exchange.answer or is_cut:
                        exchange = replace(exchange, answer=grown, is_cut=is_cut)
                        yield exchange
    except openai.APIStatusError as error:
        body = error.body if isinstance(error.body, dict) else {}
        yield replace(exchange, error=str(body.get("message") or error.message))
    except openai.APIConnectionError:
        absent = f"The server does not answer at {page.api}. Is it still starting, or was it stopped?"
        yield replace(exchange, error=_LOST if exchange.answer else absent)
    except openai.APIError as error:  # an error event in the stream
        yield replace(exchange, error=error.message)
    except Exception:  # of the client's HTTP library, in the middle of a stream; its type differs by version
        yield replace(exchange, error=_LOST)
    else:
        if not is_finished:
            yield replace(exchange, error=_LOST)
        elif not exchange.answer:
            yield replace(exchange, error="The answer is empty.")


async def answer_all(
    client: Any, page: ChatPage, chats: Chats, conditions: Sequence[str], sampling: Sampling
) -> AsyncIterator[Chats]:
    """All chats as their answers grow at the same time."""
    growing = list(chats)

    async def grow(place: int) -> None:
        async for exchange in answer(client, page, chats[place], conditions[place], sampling):
            growing[place] = (*chats[place][:-1], exchange)

    tasks = {asyncio.ensure_future(grow(place)) for place in range(len(chats))}
    shown, running = chats, tasks
    try:
        while running:
            _, running = await asyncio.wait(running, timeout=REFRESH_S)
            if (now := tuple(growing)) != shown:
                shown = now
                yield shown
        for task in tasks:
            task.result()
    finally:  # a stopped page closes the connections, which ends the answers at the server
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
