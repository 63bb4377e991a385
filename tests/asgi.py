"""One request to an ASGI application, without a server."""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import orjson
from starlette.types import ASGIApp

from ochat_train.serve.gate import CHAT
from tests.waiting import HANG_S


@dataclass
class Answer:
    status: int = 0
    headers: dict[bytes, bytes] = field(default_factory=dict)
    body: bytes = b""

    @property
    def error(self) -> dict[str, Any]:
        """Of OpenAI's error JSON, which has nothing else."""
        fields = orjson.loads(self.body)
        assert list(fields) == ["error"] and sorted(fields["error"]) == ["code", "message", "param", "type"]
        return dict(fields["error"])


async def exchange(
    app: ASGIApp,
    parts: list[bytes],
    *,
    method: str = "POST",
    path: str = CHAT,
    raw_path: bytes | None = None,
    headers: Iterable[tuple[bytes, bytes]] = (),
    vanishes: bool = False,
) -> Answer:
    """The answer to a body that comes in parts; what was read of them is gone from the list."""
    answer, begun = Answer(), asyncio.Event()

    async def receive() -> dict[str, Any]:
        if parts:
            return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}
        if vanishes:
            await begun.wait()
            return {"type": "http.disconnect"}
        await asyncio.sleep(2 * HANG_S)
        raise AssertionError("the exchange did not end")

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            answer.status, answer.headers = message["status"], dict(message["headers"])
        else:
            answer.body += message["body"]
            begun.set()

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode() if raw_path is None else raw_path,
        "query_string": b"",
        "headers": list(headers),
    }
    await asyncio.wait_for(app(scope, receive, send), timeout=HANG_S)
    return answer
