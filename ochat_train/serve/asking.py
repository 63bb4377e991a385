"""What the chat page asks: conversations side by side, answered at the same time, through the openai client."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

REFRESH_S = 0.05  # how often a growing answer is shown
_LOST = "The connection to the server was lost before the end of the answer."


@dataclass(frozen=True, slots=True)
class Page:
    """What the page shows and asks: the API's address, the model's name, its conditions, the first one chosen."""

    api: str
    address: str
    model: str
    conditions: tuple[str, ...]
    condition: str
    num_positions: int


@dataclass(frozen=True, slots=True)
class Turn:
    """A question and what came back. A turn with an error or without an answer is shown, and not sent again."""

    question: str
    answer: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How answers are made."""

    system: str
    temperature: float
    max_tokens: int


Chat = tuple[Turn, ...]
# The conversations that stand side by side, with their conditions.
Chats = tuple[Chat, ...]


def to_messages(chat: Chat, system: str) -> list[dict[str, str]]:
    """The request's messages of a chat whose last turn is to be answered."""
    messages = [{"role": "system", "content": system}] if system else []
    for turn in chat[:-1]:
        if turn.answer and not turn.error:
            messages.append({"role": "user", "content": turn.question})
            messages.append({"role": "assistant", "content": turn.answer})
    return [*messages, {"role": "user", "content": chat[-1].question}]


async def answer(client: Any, page: Page, chat: Chat, condition: str, sampling: Sampling) -> AsyncIterator[Turn]:
    """The last turn of the chat as its answer grows. An error of the server ends it, in words."""
    import openai

    turn, is_ended = chat[-1], False
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
                    is_ended = is_ended or choice.finish_reason is not None
                    if choice.delta.content:
                        turn = replace(turn, answer=turn.answer + choice.delta.content)
                        yield turn
    except openai.APIStatusError as error:
        body = error.body if isinstance(error.body, dict) else {}
        yield replace(turn, error=str(body.get("message") or error.message))
    except openai.APIConnectionError:
        lost = f"The server does not answer at {page.api}. Is it still starting, or was it stopped?"
        yield replace(turn, error=_LOST if turn.answer else lost)
    except openai.APIError as error:  # in the middle of a stream
        yield replace(turn, error=error.message)
    except Exception:  # of the client's transport, in the middle of a stream; which one differs by its version
        yield replace(turn, error=_LOST)
    else:
        if not is_ended:
            yield replace(turn, error=_LOST)
        elif not turn.answer:
            yield replace(turn, error="The answer is empty.")


async def answer_all(
    client: Any, page: Page, chats: Chats, conditions: Sequence[str], sampling: Sampling
) -> AsyncIterator[Chats]:
    """All chats as their answers grow at the same time."""
    growing = list(chats)

    async def grow(place: int) -> None:
        async for turn in answer(client, page, chats[place], conditions[place], sampling):
            growing[place] = (*chats[place][:-1], turn)

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
    finally:  # a stopped page hangs up, which ends the server's work
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
