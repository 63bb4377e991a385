"""Requests to an OpenAI-compatible API: several at once, tried again when they fail, none asked twice."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tqdm import tqdm

from ochat_train.evaluate.endpoint import Endpoint
from ochat_train.evaluate.journal import Answer, Journal, key_of

T = TypeVar("T")
Messages = list[dict[str, str]]
_LONGEST_WAIT_S = 30.0
_RETRIED = {408, 409, 429}  # and all from 500 on
_WRONG_FOR_ALL = {401, 403, 404}


class Unanswered(Exception):
    """A request that failed for good; the message says why."""


@dataclass(slots=True)
class Counts:
    """Of one run, without what earlier ones asked."""

    num_answered: int = 0
    num_known: int = 0  # from earlier runs
    num_retries: int = 0
    num_cut: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    failures: dict[str, str] = field(default_factory=dict)  # what was asked, and why it has no answer

    def __str__(self) -> str:
        lines = [
            f"{self.num_answered:,} answers asked for, {self.num_known:,} known already; {self.prompt_tokens:,} tokens "
            f"asked, {self.completion_tokens:,} answered; {self.num_retries:,} requests tried again"
        ]
        if self.num_cut:
            lines.append(f"{self.num_cut:,} answers were cut at --max-tokens")
        if self.failures:
            lines.append(f"{len(self.failures):,} failed; the same command asks them again:")
            lines += [f"  {_one_line(name)[:60]}: {reason}" for name, reason in self.failures.items()]
        return "\n".join(lines)


class Asker:
    """Asks one model. What the journal has is not asked.

    num_tries: of each request; in between it waits 1, 2, 4 ... seconds, or as long as the server says, 30 at most.
    """

    def __init__(
        self, endpoint: Endpoint, journal: Journal, *, condition: str | None, num_tries: int, timeout_s: float
    ) -> None:
        import openai

        self._client = openai.AsyncOpenAI(base_url=endpoint.url, api_key=endpoint.key, max_retries=0, timeout=timeout_s)
        self._endpoint, self._journal, self._condition, self._num_tries = endpoint, journal, condition, num_tries
        self._num_failed_in_a_row = 0
        self.counts = Counts()

    async def ask(self, messages: Messages, *, temperature: float, max_tokens: int) -> Answer:
        """The answer to a chat. Raises Unanswered; ValueError when nothing can be asked of this server."""
        request: dict[str, Any] = {"messages": messages, "temperature": temperature, "max_tokens": max_tokens}
        if self._condition is not None:
            request["extra_body"] = {"chat_template_kwargs": {"condition": self._condition}}
        key = key_of({"of": self._endpoint.identity, "model": self._endpoint.model, **request})
        if (known := self._journal.get(key)) is not None:
            self.counts.num_known += 1
        else:
            known = await self._ask_anew(request)
            self._journal.add(key, known)
            self.counts.num_answered += 1
            self.counts.prompt_tokens += known.prompt_tokens or 0
            self.counts.completion_tokens += known.completion_tokens or 0
        self.counts.num_cut += known.is_cut
        return known

    async def run(
        self, items: dict[str, T], work: Callable[[T], Awaitable[None]], *, concurrency: int, title: str
    ) -> None:
        """`work` on every item, so many at once; items by names under which their failures are counted."""
        room = asyncio.Semaphore(concurrency)
        most_failures = max(10, concurrency)
        with tqdm(total=len(items), desc=title, mininterval=0.5) as bar:

            async def one(name: str, item: T) -> None:
                async with room:
                    try:
                        await work(item)
                        self._num_failed_in_a_row = 0
                    except Unanswered as error:
                        self.counts.failures[name] = str(error)
                        self._num_failed_in_a_row += 1
                        if self._num_failed_in_a_row >= most_failures and not self.counts.num_answered:
                            raise ValueError(
                                f"the first {most_failures} requests all failed; the last: {error}"
                            ) from None
                counts = self.counts
                bar.set_postfix_str(
                    f"{counts.prompt_tokens:,} tokens asked, {counts.completion_tokens:,} answered, "
                    f"{counts.num_retries} retries, {len(counts.failures)} failed",
                    refresh=False,
                )
                bar.update()

            async with self._client:
                await asyncio.gather(*(one(name, item) for name, item in items.items()))

    async def _ask_anew(self, request: dict[str, Any]) -> Answer:
        import openai

        for number in range(1, self._num_tries + 1):
            wait = min(2.0 ** (number - 1) * random.uniform(0.75, 1.25), _LONGEST_WAIT_S)
            try:
                return _read(await self._client.chat.completions.create(model=self._endpoint.model, **request))
            except openai.APIStatusError as error:
                reason = f"status {error.status_code}: {_one_line(_said(error))}"
                if error.status_code in _WRONG_FOR_ALL:
                    raise ValueError(f"{self._endpoint.url} refuses all requests, with {reason}") from None
                if error.status_code not in _RETRIED and error.status_code < 500:
                    raise Unanswered(reason) from None
                wait = min(_asked_wait(error.response.headers.get("retry-after")) or wait, _LONGEST_WAIT_S)
            except (openai.OpenAIError, ValueError) as error:  # no connection, a cut one, a body that is not the API's
                reason = _one_line(f"{error} ({type(error.__cause__ or error).__name__})")
            if number < self._num_tries:
                self.counts.num_retries += 1
                await asyncio.sleep(wait)
        raise Unanswered(f"{reason}, {self._num_tries} times")


def _read(reply: Any) -> Answer:
    """The first choice. Raises ValueError when there is none."""
    choices: Sequence[Any] | None = getattr(reply, "choices", None)
    text = choices[0].message.content if choices and choices[0].message else None
    if not isinstance(text, str):
        raise ValueError("the server's answer has no text")
    usage = reply.usage
    return Answer(
        text=text,
        is_cut=choices[0].finish_reason == "length" if choices else False,
        prompt_tokens=usage.prompt_tokens if usage else None,
        completion_tokens=usage.completion_tokens if usage else None,
    )


def _said(error: Any) -> str:
    body = error.body
    return str(body["message"]) if isinstance(body, dict) and "message" in body else str(error)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]


def _asked_wait(header: str | None) -> float | None:
    """Of Retry-After in seconds; a date, which it also may be, counts as nothing."""
    try:
        return max(float(header), 0.0) if header else None
    except ValueError:
        return None
