"""The layer in front of every engine: who may ask what, and one line of log for each request.

An ASGI application around another. What passes it is known: an allowed route, a key, a body that was read and written
anew, a model name and a condition that exist, a prompt that leaves room for an answer. docs/serving.md lists the rest.
"""

import asyncio
import contextlib
import logging
import secrets
import time
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import orjson

from ochat_train.serve.chat_request import ChatRequest, choose_condition, read_chat_request
from ochat_train.serve.keys import ApiKeys
from ochat_train.serve.refusal import Refusal
from ochat_train.serve.reply import Entry, Message, Reply, Send
from ochat_train.serve.served import Served
from ochat_train.tokens.prompt import ControlText, encode_prompt
from ochat_train.tokens.tokenizer import ChatTokenizer

Receive = Callable[[], Awaitable[Message]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

CHAT, MODELS, HEALTH = "/v1/chat/completions", "/v1/models", "/health"
BODY_TIMEOUT_S = 30.0
GONE = 499  # nginx's number for a client that did not wait for its answer


@dataclass(frozen=True, slots=True)
class Engine:
    """What the gate must know of the server behind it.

    name: for messages. model: what it calls the model. unable: fields of a request that it would ignore or read
    otherwise than OpenAI, with the values that change nothing. renders_text: it makes one string of a chat, in which
    text that spells special tokens becomes control. fills_room: an answer without a limit of its own gets what room
    there is; else the engine's own default holds.
    """

    name: str
    model: str
    unable: dict[str, tuple[Any, ...]]
    renders_text: bool
    fills_room: bool


class Gate:
    """See the module. log: None for silence."""

    def __init__(
        self,
        app: App,
        *,
        served: Served,
        tokenizer: ChatTokenizer,
        engine: Engine,
        keys: ApiKeys,
        log: logging.Logger | None,
    ) -> None:
        self._app, self._served, self._tokenizer, self._engine = app, served, tokenizer, engine
        self._keys, self._log = keys, log
        self._control = ControlText(tokenizer) if engine.renders_text else None
        self._created = int(time.time())
        # A token is rarely more than 16 bytes of JSON; no more is read than a prompt could need.
        self.max_body_bytes = min(2**16 + 16 * served.num_positions, 2**24)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serve one connection, as ASGI says."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # no engine's WebSockets are for us
            await receive()
            await send({"type": "websocket.close", "code": 1008})
            return
        entry = Entry(secrets.token_hex(16))
        reply = Reply(send, entry)
        try:
            await self._answer(scope, receive, reply, entry)
        except Refusal as refusal:
            await reply.send_json(refusal.status, refusal.body)
        except _Vanished:
            entry.status = GONE
        except Exception as error:  # whatever an engine's code raises
            # Where it was raised, never its message, which may quote what a user wrote.
            frame = traceback.extract_tb(error.__traceback__)[-1]
            entry.error = f"{type(error).__name__} at {frame.filename.rpartition('/')[2]}:{frame.lineno}"
            await reply.send_json(500, Refusal(500, f"the engine failed; the log says more of {entry.id}").body)
        finally:
            if self._log is not None:
                self._log.info(entry.to_json().decode())

    async def _answer(self, scope: Message, receive: Receive, reply: Reply, entry: Entry) -> None:
        method, path = scope["method"], scope["path"]
        # As it was sent, so that nothing encoded is read as one thing here and as another behind.
        raw_path = scope.get("raw_path") or path.encode()
        is_plain = raw_path.partition(b"?")[0] == path.encode()
        model = path.removeprefix(f"{MODELS}/")
        entry.route = path if is_plain and path in (CHAT, MODELS, HEALTH) else "other"
        if entry.route == HEALTH and method == "GET":  # for load balancers, which have no key
            await self._forward(scope, receive, reply, b"")
            return
        authorization = [value for name, value in scope["headers"] if name == b"authorization"]
        if not self._keys.allow(authorization):
            raise Refusal(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key")
        if entry.route == "other" and not (is_plain and model in self._served.names):
            raise Refusal(404, f"this server has POST {CHAT}, GET {MODELS} and GET {HEALTH}")
        if method != ("POST" if entry.route == CHAT else "GET"):
            raise Refusal(405, f"{method} is not for {path}")
        if entry.route == CHAT:
            await self._chat(scope, receive, reply, entry)
        elif entry.route == MODELS:
            cards = [self._card(name) for name in self._served.names]
            await reply.send_json(200, orjson.dumps({"object": "list", "data": cards}))
        else:
            entry.route = MODELS
            await reply.send_json(200, orjson.dumps(self._card(model)))

    def _card(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._created, "owned_by": "ochat_train"}

    async def _chat(self, scope: Message, receive: Receive, reply: Reply, entry: Entry) -> None:
        request = read_chat_request(await self._read_body(scope, receive))
        if request.model not in self._served.names:
            names = ", ".join(self._served.names)
            raise Refusal(404, f"no such model; this server has {names}", param="model", code="model_not_found")
        entry.model = request.model
        entry.condition = choose_condition(request, self._served)
        self._check_ability(request)
        conversation = request.to_conversation(entry.condition)
        entry.prompt_tokens = len(encode_prompt(conversation, self._tokenizer))
        if self._control is not None and (forged := self._control.find(conversation)):
            raise Refusal(400, f"{forged} is a control token, which {self._engine.name} would obey; write it otherwise")
        room = self._served.num_positions - entry.prompt_tokens
        if room < 1:
            raise Refusal(
                400,
                f"the prompt has {entry.prompt_tokens:,} tokens, and the model {self._served.num_positions:,} positions"
                " for prompt and answer; shorten it",
                param="messages",
                code="context_length_exceeded",
            )
        asked = request.max_completion_tokens or request.max_tokens
        limit = min(asked, room) if asked else room if self._engine.fills_room else None
        body = request.to_body(model=self._engine.model, condition=entry.condition, max_tokens=limit)
        for name in self._engine.unable:
            body.pop(name, None)
        await self._forward(scope, receive, reply, orjson.dumps(body))

    def _check_ability(self, request: ChatRequest) -> None:
        for name, harmless in self._engine.unable.items():
            if getattr(request, name) not in (None, *harmless):
                raise Refusal(400, f"{name}: {self._engine.name} cannot do this; vLLM can", param=name)
        if self._engine.unable and request.stream and request.stop is not None:
            raise Refusal(400, f"stop: {self._engine.name} cannot do this in a stream; vLLM can", param="stop")

    async def _read_body(self, scope: Message, receive: Receive) -> bytes:
        limit = self.max_body_bytes
        too_large = Refusal(413, f"the body is above {limit:,} bytes, which no prompt of this model needs")
        lengths = [value for name, value in scope["headers"] if name == b"content-length"]
        if any(not value.isdigit() or len(value) > 9 or int(value) > limit for value in lengths):
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _Vanished
                    body += message.get("body", b"")
                    if len(body) > limit:
                        raise too_large
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise Refusal(408, f"the body did not arrive within {BODY_TIMEOUT_S:.0f} s") from None

    async def _forward(self, scope: Message, receive: Receive, reply: Reply, body: bytes) -> None:
        """Let the engine answer. A client that vanishes ends its task, and with that the generation."""
        headers = [
            (b"host", b"localhost"),
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"x-request-id", reply.entry.id.encode()),  # never the client's, which might be another client's
        ]
        is_gone = asyncio.Event()
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def inner_receive() -> Message:
            if messages:
                return messages.pop()
            await is_gone.wait()
            return {"type": "http.disconnect"}

        inner = dict(scope) | {"headers": headers, "query_string": b""}
        engine = asyncio.ensure_future(self._app(inner, inner_receive, reply.relay))
        client = asyncio.ensure_future(_wait_until_gone(receive))
        try:
            await asyncio.wait({engine, client}, return_when=asyncio.FIRST_COMPLETED)
            if not engine.done() and not reply.is_complete:
                is_gone.set()
                raise _Vanished
            await engine
        finally:
            for task in (engine, client):
                if task.cancel():  # else it is done
                    with contextlib.suppress(asyncio.CancelledError, Exception):
                        await task


class _Vanished(Exception):
    """The client closed its connection."""


async def _wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
