"""Requests to an OpenAI-compatible API: several at once, retried by the openai client, and none sent twice."""

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tqdm import tqdm

from ochat_train.evaluate.endpoint import Endpoint
from ochat_train.evaluate.journal import Answer, Journal, key_of

T = TypeVar("T")
CHARACTERS_PER_TOKEN = 4  # about, in English
ChatMessages = list[dict[str, str]]
_WRONG_FOR_ALL = {401, 403, 404}
_TOO_LONG = ("context_length", "context length", "max_model_len")  # in what servers say of a prompt that has no room


class Unanswered(Exception):
    """A request that failed for good; the message is the reason."""


class TooLong(Unanswered):
    """A prompt that the model has no room for, however often it is asked."""


@dataclass(slots=True)
class Counts:
    """Of one run, without the requests of earlier runs. failures: reasons by the name of what was asked.

    too_long: reasons by the names of questions that the model has no room for.
    """

    num_answered: int = 0
    num_known: int = 0  # from earlier runs
    num_retries: int = 0
    num_cut: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    failures: dict[str, str] = field(default_factory=dict)
    too_long: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [
            f"{self.num_answered:,} new answers, {self.num_known:,} known from earlier runs; "
            f"{self.prompt_tokens:,} tokens in prompts, {self.completion_tokens:,} in answers; "
            f"{self.num_retries:,} retries"
        ]
        if self.num_cut:
            lines.append(f"{self.num_cut:,} answers were cut at --max-tokens")
        for reasons, what in (
            (self.too_long, "longer than the model takes; their answers are $ERROR$:"),
            (self.failures, "failed; the same command asks them again:"),
        ):
            if reasons:
                lines.append(f"{len(reasons):,} {what}")
                lines += [f"  {_one_line(name)[:60]}: {reason}" for name, reason in reasons.items()]
        return "\n".join(lines)


class CachedClient:
    """Asks one model. What the journal has is not asked again.

    concurrency: items at once. num_tries: of each request, by the openai client's own retries. timeout_s: of each try.
    rehearses: send nothing; count what would be sent, with 4 characters a token and answers as long as they may be.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        journal: Journal,
        *,
        condition: str | None,
        concurrency: int,
        num_tries: int,
        timeout_s: float,
        rehearses: bool = False,
    ) -> None:
        self.endpoint, self._journal = endpoint, journal
        self._condition, self._concurrency = condition, concurrency
        self._num_tries, self._timeout_s, self.rehearses = num_tries, timeout_s, rehearses
        self._client: Any = None  # while it runs
        self._under_way: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._num_failed_in_a_row = 0
        self.counts = Counts()

    async def ask(self, messages: ChatMessages, *, temperature: float, max_tokens: int) -> Answer:
        """The answer to a chat. Raises Unanswered; ValueError when the server refuses all requests."""
        request: dict[str, Any] = {"messages": messages, "temperature": temperature, "max_tokens": max_tokens}
        if self._condition is not None:
            request["extra_body"] = {"chat_template_kwargs": {"condition": self._condition}}
        key = key_of({"of": self.endpoint.identity, "model": self.endpoint.model, **request})
        async with self._under_way[key]:  # the same request, asked at once, waits for the answer
            answer = self._journal.get(key)
            if answer is not None:
                self.counts.num_known += 1
            else:
                if self.rehearses:
                    num_prompt = sum(len(message["content"]) for message in messages) // CHARACTERS_PER_TOKEN
                    answer = Answer("x" * CHARACTERS_PER_TOKEN * max_tokens, False, num_prompt, max_tokens)
                else:
                    answer = await self._send(request)
                    self._journal.add(key, answer)
                self.counts.num_answered += 1
                self.counts.prompt_tokens += answer.prompt_tokens or 0
                self.counts.completion_tokens += answer.completion_tokens or 0
        self.counts.num_cut += answer.is_cut
        return answer

    async def run(self, items: dict[str, T], work: Callable[[T], Awaitable[None]], *, title: str) -> None:
        """Run `work` on every item. Failures are counted by the items' names."""
        import openai

        self._under_way.clear()
        room = asyncio.Semaphore(self._concurrency)
        most_failures = max(10, self._concurrency)
        counts = self.counts
        with tqdm(total=len(items), desc=title, mininterval=0.5, disable=self.rehearses) as bar:

            async def run_one(name: str, item: T) -> None:
                async with room:
                    try:
                        await work(item)
                        self._num_failed_in_a_row = 0
                    except Unanswered as error:
                        counts.failures[name] = str(error)
                        self._num_failed_in_a_row += 1
                        if self._num_failed_in_a_row >= most_failures and not counts.num_answered:
                            raise ValueError(
                                f"the first {most_failures} requests all failed; the last: {error}"
                            ) from None
                bar.set_postfix_str(
                    f"{counts.prompt_tokens:,} tokens in prompts, {counts.completion_tokens:,} in answers, "
                    f"{counts.num_retries} retries, {len(counts.failures)} failed",
                    refresh=False,
                )
                bar.update()

            async with openai.AsyncOpenAI(
                base_url=self.endpoint.url,
                api_key=self.endpoint.key,
                max_retries=self._num_tries - 1,
                timeout=self._timeout_s,
            ) as self._client:
                await asyncio.gather(*(run_one(name, item) for name, item in items.items()))

    async def _send(self, request: dict[str, Any]) -> Answer:
        import openai

        create = self._client.chat.completions.with_raw_response.create
        try:
            response = await create(model=self.endpoint.model, **request)
            self.counts.num_retries += response.retries_taken
            return _read(response.parse())
        except openai.APIStatusError as error:
            body = error.body if isinstance(error.body, dict) else {}
            reason = f"status {error.status_code}: {_one_line(str(body.get('message', error)))}"
            if error.status_code in _WRONG_FOR_ALL:
                raise ValueError(f"{self.endpoint.url} refuses all requests, with {reason}") from None
            if any(words in f"{body.get('code')} {body.get('message')}" for words in _TOO_LONG):
                raise TooLong(reason) from None
            raise Unanswered(reason + self._count_tries(error.request)) from None
        except openai.APIConnectionError as error:
            reason = _one_line(f"{error} ({type(error.__cause__ or error).__name__})")
            raise Unanswered(reason + self._count_tries(error.request)) from None
        except (openai.OpenAIError, ValueError) as error:  # the response is not the API's
            raise Unanswered(_one_line(f"{error} ({type(error).__name__})")) from None

    def _count_tries(self, request: Any) -> str:
        """Count the retries of a request that failed; `, 3 times` for its message."""
        num_retries = int(request.headers.get("x-stainless-retry-count", 0))
        self.counts.num_retries += num_retries
        return f", {num_retries + 1} times" if num_retries else ""


def _read(completion: Any) -> Answer:
    """The first choice. Raises ValueError when it has no text."""
    choices: Any = getattr(completion, "choices", None)
    text = choices[0].message.content if choices and choices[0].message else None
    if not isinstance(text, str):
        raise ValueError("the server's answer has no text")
    usage = completion.usage
    return Answer(
        text=text,
        is_cut=choices[0].finish_reason == "length",
        prompt_tokens=usage.prompt_tokens if usage else None,
        completion_tokens=usage.completion_tokens if usage else None,
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
