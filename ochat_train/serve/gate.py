"""The gate in front of every engine: who may ask what, and one line of the log for each request.

ASGI middleware around an engine's application. What passes it is known: an allowed route, a key, a body that was parsed
and written again, a model and a condition that exist, a prompt that leaves room for an answer. docs/serving.md explains
each of them.
"""

import asyncio
import logging
import re
import time
import traceback
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from ochat_train.conversations.base_template import BaseTemplate, TemplateRefused
from ochat_train.conversations.schema import Conversation
from ochat_train.serve.keys import ApiKeys
from ochat_train.serve.protocol import STREAM_END, ChatRequest, Refusal, read_chat_request, read_json
from ochat_train.serve.request_log import RequestRecord
from ochat_train.serve.responses import ResponseWriter, to_chat
from ochat_train.serve.served import Served, explain_unknown
from ochat_train.tokens.chat_template import ControlText, encode_prompt
from ochat_train.tokens.tokenizer import ChatTokenizer

CHAT, RESPONSES, MODELS, HEALTH, METRICS = "/v1/chat/completions", "/v1/responses", "/v1/models", "/health", "/metrics"
_ROUTES = (CHAT, RESPONSES, MODELS, HEALTH, METRICS)
_STOPPING = Refusal(503, "the server is stopping; ask again")
BODY_TIMEOUT_S = 30.0
CLIENT_GONE = 499  # nginx's status for a client that did not wait for its answer
_COMPLETION_TOKENS = re.compile(rb'"completion_tokens":\s*(\d+)')
_STREAM_ERROR = b'data: {"error":'  # within the JSON of an answer the quotes would be escaped
_KEPT_HEADERS = {b"content-type", b"content-length", b"cache-control"}


@dataclass(frozen=True, slots=True)
class EngineTraits:
    """What the gate must know of the engine.

    name: for messages. can_force_a_form: it makes answers that are JSON, by a schema too, and calls of tools.
    reads_calls: it finds calls of tools in an answer. renders_text: it makes one string of a chat, in which text that
    spells special tokens becomes control. fills_room: an answer without a limit of its own gets what room there is;
    else the engine's default holds. has_metrics: it has METRICS, for Prometheus.
    """

    name: str
    can_force_a_form: bool
    reads_calls: bool
    renders_text: bool
    fills_room: bool
    has_metrics: bool = False


class Gate:
    """The middleware. log: None for silence."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        served: Served,
        tokenizer: ChatTokenizer,
        engine: EngineTraits,
        keys: ApiKeys,
        log: logging.Logger | None,
    ) -> None:
        self._app, self._served, self._tokenizer, self._engine = app, served, tokenizer, engine
        self._keys, self._log = keys, log
        self._spelling = served.spelling(tokenizer)
        self._control = ControlText(tokenizer) if engine.renders_text else None
        self._created = int(time.time())
        self.is_stopping = False  # then new requests are refused
        self._named: set[str] = set()  # ignored fields that the log has named
        # A token is rarely more than 16 bytes of JSON; no more is read than a prompt could need.
        self.max_body_bytes = min(2**16 + 16 * served.num_positions, 2**24)
        routes = [
            Route(CHAT, self._chat, methods=["POST"]),
            Route(RESPONSES, self._respond, methods=["POST"]),
            Route(MODELS, self._list_models),
            Route(f"{MODELS}/{{name:path}}", self._show_model),
            Route(HEALTH, self._pass),
        ]
        routes += [Route(METRICS, self._pass)] if engine.has_metrics else []
        self._router = Router(routes, redirect_slashes=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # WebSockets of an engine are not offered
            await WebSocketClose(code=1008)(scope, receive, send)
            return
        client = Client(scope, receive, send)
        # With "app" in the scope the router raises HTTPException for unknown paths and methods.
        scope = {**scope, "app": self, "state": {"client": client}}
        try:
            if self.is_stopping:
                raise _STOPPING
            self._check_path_and_key(Request(scope))
            await self._router(scope, client.receive, client.send)
        except Refusal as refusal:
            await client.refuse(refusal)
        except HTTPException as error:
            known = f"this server has POST {CHAT} and {RESPONSES}, GET {MODELS} and GET {HEALTH}"
            message = known if error.status_code == 404 else f"{scope['method']} is not allowed here; {known}"
            if scope["path"] == "/v1/completions":  # which clients try
                message = f"no {scope['path']}, since the model was trained on chats alone; {known}"
            if scope["path"].startswith(f"{RESPONSES}/"):
                message = f"this server keeps no responses; {known}"
            await client.refuse(Refusal(error.status_code, message))
        except ClientDisconnect:
            client.is_gone = True
        except asyncio.CancelledError:  # the server ends, and this answer has had its time
            client.record.error = "the server ended"
            await client.refuse(_STOPPING)
        except Exception as error:  # whatever an engine's code raises
            # Where it was raised, never its message, which may quote what a user wrote.
            frame = traceback.extract_tb(error.__traceback__)[-1]
            client.record.error = f"{type(error).__name__} at {frame.filename.rpartition('/')[2]}:{frame.lineno}"
            await client.refuse(engine_failure(500, client.record))
        finally:
            if client.is_gone:
                client.record.status = CLIENT_GONE
            if self._log is not None:
                self._log.info(client.record.to_json())

    def _check_path_and_key(self, request: Request) -> None:
        path = request.scope["path"]
        # The path as it was sent, so that an engine cannot decode it to another one than was checked here.
        is_plain = (request.scope.get("raw_path") or path.encode()).partition(b"?")[0] == path.encode()
        request.state.client.record.route = path if is_plain and path in _ROUTES else "other"
        if is_plain and path == HEALTH and request.method in ("GET", "HEAD"):  # for load balancers, which have no key
            return
        if not self._keys.allow(request.headers.getlist("authorization")):
            raise Refusal(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key")
        if not is_plain:
            raise HTTPException(404)

    async def _pass(self, request: Request) -> ASGIApp:
        return self._forward(b"")

    async def _list_models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model_card(name) for name in self._served.names]})

    async def _show_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self._served.names:
            raise HTTPException(404)
        request.state.client.record.route = MODELS
        return JSONResponse(self._model_card(name))

    def _model_card(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._created, "owned_by": "ochat_train"}

    async def _chat(self, request: Request) -> ASGIApp:
        fields = read_json(await self._read_body(request))
        return self._forward(self._admit(fields, request.state.client.record))

    async def _respond(self, request: Request) -> ASGIApp:
        client: Client = request.state.client
        fields = read_json(await self._read_body(request))
        body = self._admit(to_chat(fields), client.record)
        client.writer = ResponseWriter(fields, client.record.id)
        return self._forward(body)

    def _admit(self, fields: Any, record: RequestRecord) -> bytes:
        """The body for the engine. Raises Refusal."""
        chat = read_chat_request(fields)
        if chat.model not in self._served.names:
            names = ", ".join(self._served.names)
            raise Refusal(404, f"no such model; this server has {names}", param="model", code="model_not_found")
        record.model = chat.model
        condition = self._served.condition if chat.asked_condition is None else chat.asked_condition
        if condition not in self._served.conditions:
            where = "chat_template_kwargs.condition" if chat.chat_template_kwargs else "condition"
            raise Refusal(400, f"{where}: {explain_unknown(condition, self._served.conditions)}", param=where)
        record.condition = condition
        if chat.has_format and not self._engine.can_force_a_form:
            raise Refusal(
                400, f"response_format: {self._engine.name} cannot do this; vLLM can", param="response_format"
            )
        record.ignored = [name for name in chat.ignored if name not in self._named]
        self._named.update(record.ignored)
        ids = [*map(int, filter(str.isdecimal, chat.logit_bias or {})), *(chat.stop_token_ids or [])]
        if len(ids) < len(chat.logit_bias or {}) or not all(0 <= id_ < self._tokenizer.num_ids for id_ in ids):
            raise Refusal(400, f"logit_bias, stop_token_ids: an id is not from 0 to {self._tokenizer.num_ids - 1}")
        conversation = chat.to_conversation(condition, self._spelling)
        continues = bool(chat.continue_final_message)
        try:
            record.prompt_tokens = num_tokens = len(encode_prompt(conversation, self._tokenizer, continues=continues))
        except TemplateRefused as error:
            raise Refusal(400, f"the model's chat template: {error}", param="messages") from None
        if self._control is not None and (forged := self._control.find(conversation)):
            raise Refusal(400, f"{forged} is a control token, which {self._engine.name} would obey; write it otherwise")
        room = self._served.num_positions - num_tokens
        if room < 1:
            raise Refusal(
                400,
                f"the prompt has {num_tokens:,} tokens, and the model {self._served.num_positions:,} positions for "
                "prompt and answer; shorten it",
                param="messages",
                code="context_length_exceeded",
            )
        asked = chat.max_completion_tokens or chat.max_tokens
        limit = min(asked, room) if asked else room if self._engine.fills_room else None
        choice = self._choose_tools(chat, conversation)
        body = chat.for_engine(conversation, model=self._served.name, max_tokens=limit, tool_choice=choice)
        return orjson.dumps(body)

    def _choose_tools(self, chat: ChatRequest, conversation: Conversation) -> str | dict[str, Any] | None:
        """With what choice the engine gets the tools; None: not at all. Raises Refusal where it cannot be honoured."""
        if chat.forces_a_call and not self._engine.can_force_a_form:
            raise Refusal(
                400,
                f"tool_choice: {self._engine.name} cannot force a call; auto and none it can, and vLLM can",
                param="tool_choice",
            )
        is_base = isinstance(self._tokenizer.template, BaseTemplate)
        if not chat.tool_names or (is_base and not conversation.tools):  # the base's template would write them anew
            return None
        if chat.forces_a_call or self._engine.reads_calls:
            return chat.tool_choice or "auto"
        return "none" if conversation.tools else None

    async def _read_body(self, request: Request) -> bytes:
        limit = self.max_body_bytes
        too_large = Refusal(413, f"the body is above {limit:,} bytes, which no prompt of this model needs")
        lengths = request.headers.getlist("content-length")
        if any(not length.isdecimal() or len(length) > 9 or int(length) > limit for length in lengths):
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                async for part in request.stream():
                    body += part
                    if len(body) > limit:
                        raise too_large
        except TimeoutError:
            raise Refusal(408, f"the body did not arrive within {BODY_TIMEOUT_S:.0f} s") from None
        return bytes(body)

    def _forward(self, body: bytes) -> ASGIApp:
        """A response that the engine gives to a body of ours. It learns from `receive` that a client has gone."""

        async def respond(scope: Scope, receive: Receive, send: Send) -> None:
            client: Client = scope["state"]["client"]
            headers = [
                (b"host", b"localhost"),
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"x-request-id", client.record.id.encode()),  # never the client's, which might be another client's
            ]
            unread = [{"type": "http.request", "body": body, "more_body": False}]

            async def receive_body() -> Message:
                return unread.pop() if unread else await receive()

            engine_scope = {**client.scope, "headers": headers, "query_string": b""}
            if client.writer is not None:
                engine_scope |= {"path": CHAT, "raw_path": CHAT.encode()}
            await self._app(engine_scope, receive_body, EngineResponse(client).send)

        return respond


def engine_failure(status: int, record: RequestRecord) -> Refusal:
    """The refusal that a client gets for a fault of the engine; the log has its kind and place."""
    return Refusal(status, f"the engine failed; the log says more of {record.id}")


class Client:
    """The connection to a client, and the record of its request. scope: as the server made it."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope, self._receive, self._send = scope, receive, send
        self.record = RequestRecord()
        self.is_complete = self.is_gone = False
        self.is_stream = False
        self.writer: ResponseWriter | None = None  # of another API than chat completions

    async def receive(self) -> Message:
        """The next part of the body, or that the client has gone."""
        message = await self._receive()
        if message["type"] == "http.disconnect" and not self.is_complete:
            self.is_gone = True
        return message

    async def send(self, message: Message) -> None:
        """Send a part of the response, with the request's id in its headers."""
        if message["type"] == "http.response.start":
            self.record.status = message["status"]
            self.is_stream = any(value.startswith(b"text/event-stream") for _, value in message["headers"])
            message["headers"] = [*message["headers"], (b"x-request-id", self.record.id.encode())]
        else:
            self.is_complete = not message.get("more_body", False)
        await self._send(message)

    async def refuse(self, refusal: Refusal) -> None:
        """Send the refusal: as a response, or as the last event of a stream that has begun."""
        body = refusal.to_json()
        if not self.record.status:
            headers = {"www-authenticate": "Bearer"} if refusal.status == 401 else {}
            response = Response(body, refusal.status, headers, "application/json")
            await response({"type": "http"}, self.receive, self.send)
        elif self.is_stream and not self.is_complete:
            last = b"data: " + body + b"\n\n" + STREAM_END if self.writer is None else self.writer.failure(refusal)
            await self.send({"type": "http.response.body", "body": last})


class EngineResponse:
    """An engine's response on its way to the client: few headers, errors as OpenAI writes them, tokens counted."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._error_status = 0
        self._error_body = bytearray()
        self._tail = b""  # the last bytes of the response, where the usage stands
        self._whole = bytearray()  # the response so far that another API needs at once

    async def send(self, message: Message) -> None:
        """Send a message of the engine to the client."""
        if self._client.is_complete:  # what follows an error that ended the stream
            return
        if message["type"] == "http.response.start":
            if message["status"] >= 400:
                self._error_status = message["status"]
                return
            kept = _KEPT_HEADERS if self._client.writer is None else _KEPT_HEADERS - {b"content-length"}
            headers = [(name, value) for name, value in message["headers"] if name.lower() in kept]
            await self._client.send({**message, "headers": headers})
            return
        body, is_last = message.get("body", b""), not message.get("more_body", False)
        if self._error_status:
            self._error_body += body[:4096]
            if is_last:
                await self._client.refuse(self._read_error())
            return
        record, place = self._client.record, body.find(_STREAM_ERROR)
        if place >= 0:
            record.error = "the stream ended in an error"
            body, is_last = body[:place], False
        self._tail = (self._tail + body)[-2048:]
        if is_last and (found := _COMPLETION_TOKENS.findall(self._tail)):
            record.completion_tokens = int(found[-1])
        if (writer := self._client.writer) is not None and self._client.is_stream:
            body = writer.events(body)
        elif writer is not None:
            self._whole += body
            body = writer.whole(self._whole) if is_last else b""
        await self._client.send({"type": "http.response.body", "body": body, "more_body": not is_last})
        if place >= 0:
            await self._client.refuse(engine_failure(500, record))

    def _read_error(self) -> Refusal:
        if self._error_status >= 500:
            return engine_failure(self._error_status, self._client.record)
        try:
            fields = orjson.loads(self._error_body)
            error = fields.get("error", fields)
            message = error.get("message") or error.get("detail")
        except (orjson.JSONDecodeError, AttributeError):
            message = self._error_body.decode(errors="replace")
        return Refusal(self._error_status, str(message))
