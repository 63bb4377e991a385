"""OpenAI's protocol for chat completions, as far as this server speaks it: requests, answers, errors."""

from typing import Annotated, Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ochat_train.conversations.schema import Conversation, Message, Role

STREAM_END = b"data: [DONE]\n\n"
_INT64 = 2**63
_ERROR_TYPES = {401: "authentication_error", 404: "not_found_error", 405: "not_found_error"}


class Refusal(Exception):
    """A request that is not served: an HTTP status, a message for the client, and the field that is at fault."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def to_json(self) -> bytes:
        """OpenAI's JSON of an error."""
        kind = _ERROR_TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return orjson.dumps({"error": error})


# ---- Requests ----


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class TextPart(_Strict):
    """A part of a message's content; other types, such as images, are refused."""

    type: Literal["text"]
    text: str


class RequestMessage(_Strict):
    """One message of the conversation."""

    role: Role
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        """The content; parts become lines."""
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)


class TemplateOptions(_Strict):
    """What a request may set of the chat template."""

    condition: str | None = None


class StreamOptions(_Strict):
    """Options of a stream."""

    include_usage: bool | None = None


_Stop = Annotated[str, Field(min_length=1, max_length=256)]


class ChatRequest(_Strict):
    """The body of POST /v1/chat/completions, without what no model of ours was trained for (tools, images, audio)."""

    model: str
    messages: list[RequestMessage] = Field(min_length=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=_INT64)
    stop: _Stop | list[_Stop] | None = None
    n: int | None = Field(None, ge=1, le=16)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    logit_bias: dict[str, float] | None = None
    user: str | None = None
    chat_template_kwargs: TemplateOptions | None = None

    @property
    def condition(self) -> str | None:
        """The condition that the request asks for."""
        return self.chat_template_kwargs.condition if self.chat_template_kwargs else None

    @property
    def stops(self) -> list[str]:
        """The texts that end an answer."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def to_conversation(self, condition: str) -> Conversation:
        """The messages under a condition."""
        messages = tuple(Message(message.role, message.text) for message in self.messages)
        return Conversation("", "", condition, "", messages)

    def for_engine(self, *, model: str, condition: str, max_tokens: int | None) -> dict[str, Any]:
        """The body for an engine: the given values, and what else this request sets. Contents are strings."""
        replaced = {"model", "messages", "max_tokens", "max_completion_tokens", "chat_template_kwargs", "user"}
        body = self.model_dump(exclude_none=True, exclude=replaced)
        body |= {} if max_tokens is None else {"max_tokens": max_tokens}
        messages = [{"role": message.role, "content": message.text} for message in self.messages]
        return body | {"model": model, "messages": messages, "chat_template_kwargs": {"condition": condition}}


def read_chat_request(body: bytes) -> ChatRequest:
    """Parse a body. Raises Refusal 400, which names the first field that is wrong."""
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Refusal(400, f"the body is not JSON: {error}") from None
    try:
        return ChatRequest.model_validate(fields)
    except ValidationError as error:
        # Each member of a union reports its errors; the first is as good as any.
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
        what = "this server does not know it" if first["type"] == "extra_forbidden" else first["msg"]
        raise Refusal(400, f"{where or 'the body'}: {what}", param=where or None) from None


# ---- Answers ----

FinishReason = Literal["stop", "length"]


class Usage(BaseModel):
    """Tokens of a prompt and its answer."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class AnswerText(BaseModel):
    """The message of an answer, or a piece of it in a stream."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class Choice(BaseModel):
    """An answer: `message` is the whole one, `delta` a piece of a stream."""

    index: int = 0
    message: AnswerText | None = None
    delta: AnswerText | None = None
    finish_reason: FinishReason | None = None


class ChatCompletion(BaseModel):
    """An answer, or an event of a stream. created: seconds since 1970."""

    id: str
    object: Literal["chat.completion", "chat.completion.chunk"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None = None

    def to_json(self) -> bytes:
        """The JSON, without fields that are None."""
        return self.model_dump_json(exclude_none=True).encode()

    def to_event(self) -> bytes:
        """The same as a server-sent event."""
        return b"data: " + self.to_json() + b"\n\n"
