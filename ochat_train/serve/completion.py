"""Chat completions as the engine without vLLM answers them: whole, or as the events of a stream."""

from typing import Literal

from pydantic import BaseModel

FinishReason = Literal["stop", "length", "tool_calls"]


class Usage(BaseModel):
    """Tokens of a prompt and its answers."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ToolCall(BaseModel):
    """A call of a tool. index: its place among the calls of an answer. function: its name, and arguments as JSON."""

    index: int
    id: str
    type: Literal["function"] = "function"
    function: dict[str, str]


class AnswerText(BaseModel):
    """The message of an answer, or a piece of it in a stream."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCall] | None = None


class TokenLogprob(BaseModel):
    """A token of an answer and the logarithm of its probability; top_logprobs: the most probable ones in its place."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list["TokenLogprob"] | None = None


class Logprobs(BaseModel):
    """The tokens of an answer, or of a piece of it."""

    content: list[TokenLogprob]


class Choice(BaseModel):
    """An answer: `message` is the whole one, `delta` a piece of a stream."""

    index: int = 0
    message: AnswerText | None = None
    delta: AnswerText | None = None
    logprobs: Logprobs | None = None
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
