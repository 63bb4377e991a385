"""The body of a chat request: what may stand in it, and what is wrong with one."""

from typing import Annotated, Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ochat_train.conversations.schema import Conversation, Message, Role
from ochat_train.serve.refusal import Refusal
from ochat_train.serve.served import Served, explain_unknown

_INT64 = 2**63


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _TextPart(_Strict):
    type: Literal["text"]
    text: str


class _ChatMessage(_Strict):
    role: Role
    content: str | list[_TextPart]

    @property
    def text(self) -> str:
        """The content; parts are lines."""
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)


class _TemplateOptions(_Strict):
    condition: str | None = None


class _StreamOptions(_Strict):
    include_usage: bool | None = None


_Stop = Annotated[str, Field(min_length=1, max_length=256)]


class ChatRequest(_Strict):
    """OpenAI's request for a chat completion, without what no model of ours was trained for (tools, images, audio)."""

    model: str
    messages: list[_ChatMessage] = Field(min_length=1)
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
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
    chat_template_kwargs: _TemplateOptions | None = None

    @property
    def condition(self) -> str | None:
        """The condition that the request asks for."""
        return self.chat_template_kwargs.condition if self.chat_template_kwargs else None

    def to_conversation(self, condition: str) -> Conversation:
        """The messages under a condition."""
        messages = tuple(Message(message.role, message.text) for message in self.messages)
        return Conversation("", "", condition, "", messages)

    def to_body(self, *, model: str, condition: str, max_tokens: int | None) -> dict[str, Any]:
        """What an engine is sent: what the request says, and what it leaves open; texts are strings."""
        given = self.model_dump(
            exclude_none=True,
            exclude={"model", "messages", "max_tokens", "max_completion_tokens", "chat_template_kwargs", "user"},
        )
        given |= {"max_tokens": max_tokens} if max_tokens is not None else {}
        messages = [{"role": message.role, "content": message.text} for message in self.messages]
        return given | {"model": model, "messages": messages, "chat_template_kwargs": {"condition": condition}}


def read_chat_request(body: bytes) -> ChatRequest:
    """The request. Raises Refusal 400, which says where what is wrong."""
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Refusal(400, f"the body is not JSON: {error}") from None
    try:
        return ChatRequest.model_validate(fields)
    except ValidationError as error:
        # Of a union each kind has errors; the first is as good as any.
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
        what = "this server does not know it" if first["type"] == "extra_forbidden" else first["msg"]
        raise Refusal(400, f"{where or 'the body'}: {what}", param=where or None) from None


def choose_condition(request: ChatRequest, served: Served) -> str:
    """The condition under which the model answers. Raises Refusal 400 for one that it was not trained under."""
    asked = request.condition
    if asked is None:
        return served.condition
    if asked not in served.conditions:
        where = "chat_template_kwargs.condition"
        raise Refusal(400, f"{where}: {explain_unknown(asked, served.conditions)}", param=where)
    return asked
