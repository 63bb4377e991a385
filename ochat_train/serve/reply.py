"""The way back to a client, and the line that the log gets for a request."""

import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from ochat_train.serve.refusal import Refusal

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]

_COMPLETION_TOKENS = re.compile(rb'"completion_tokens":\s*(\d+)')
_DONE = b"data: [DONE]\n\n"
_KEPT_HEADERS = {b"content-type", b"content-length", b"cache-control"}


@dataclass(slots=True)
class Entry:
    """A line of the log."""

    id: str
    route: str = "other"
    model: str | None = None
    condition: str | None = None
    status: int = 0
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    error: str | None = None
    started: float = field(default_factory=time.monotonic)

    def to_json(self) -> bytes:
        """The line; times are UTC and seconds."""
        return orjson.dumps(
            {
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "id": self.id,
                "route": self.route,
                "model": self.model,
                "condition": self.condition,
                "status": self.status,
                "prompt_tokens": self.prompt_tokens,
                "completion_tokens": self.completion_tokens,
                "seconds": round(time.monotonic() - self.started, 3),
            }
            | ({"error": self.error} if self.error else {})
        )


class Reply:
    """The way back to the client: counts, and makes the engine's errors OpenAI's."""

    def __init__(self, send: Send, entry: Entry) -> None:
        self.entry = entry
        self.is_complete = False
        self._send = send
        self._is_stream = False
        self._error: tuple[int, bytearray] | None = None  # an engine's status and body, until both are known
        self._tail = b""  # the last bytes, where usage stands

    async def send_json(self, status: int, body: bytes) -> None:
        """A whole answer of our own, unless an answer has begun."""
        if self.entry.status and not self.is_complete:  # in the middle of a stream
            if self._is_stream:
                await self._send({"type": "http.response.body", "body": b"data: " + body + b"\n\n" + _DONE})
            self.is_complete = True
            return
        if self.is_complete:
            return
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        if status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        await self._start(status, headers)
        await self._send({"type": "http.response.body", "body": body})
        self.is_complete = True

    async def relay(self, message: Message) -> None:
        """A message of the engine."""
        if message["type"] == "http.response.start":
            if message["status"] >= 400:
                self._error = message["status"], bytearray()
                return
            kinds = [(name, value) for name, value in message["headers"] if name.lower() in _KEPT_HEADERS]
            self._is_stream = any(value.startswith(b"text/event-stream") for _, value in kinds)
            await self._start(message["status"], kinds)
        elif message["type"] == "http.response.body":
            body, is_last = message.get("body", b""), not message.get("more_body", False)
            if self._error is None:
                await self._relay_body(body, is_last)
                return
            status, collected = self._error
            collected += body[:4096]
            if is_last:
                refusal = _translate(status, bytes(collected), self.entry.id)
                await self.send_json(refusal.status, refusal.body)

    async def _relay_body(self, body: bytes, is_last: bool) -> None:
        # What transformers' server says of an error in the middle is not JSON, and may quote anything. Within the JSON
        # of an answer the quotes would be escaped.
        if self._is_stream and (place := body.find(b'data: {"error": "')) >= 0:
            self.entry.error = "the stream ended in an error"
            body = body[:place] + b"data: " + _translate(500, b"", self.entry.id).body + b"\n\n"
        self._tail = (self._tail + body)[-2048:]
        if is_last:
            self.is_complete = True
            found = _COMPLETION_TOKENS.findall(self._tail)
            self.entry.completion_tokens = int(found[-1]) if found else None
            if self._is_stream and not self._tail.endswith(_DONE):  # transformers' server leaves it out
                body += _DONE
        await self._send({"type": "http.response.body", "body": body, "more_body": not is_last})

    async def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.entry.status = status
        headers = [*headers, (b"x-request-id", self.entry.id.encode())]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})


def _translate(status: int, body: bytes, id_: str) -> Refusal:
    """An engine's error as ours. What a server says of its own faults is for its log."""
    if status >= 500:
        return Refusal(status, f"the engine failed; the log says more of {id_}")
    try:
        said = orjson.loads(body)
        error = said.get("error", said)
        message = error.get("message") or error.get("detail")
    except (orjson.JSONDecodeError, AttributeError):
        message = body.decode(errors="replace")
    return Refusal(status, str(message))
