"""OpenAI's protocol for chat completions, as far as this server speaks it: requests and errors.

Clients send more than one server honours. A field is honoured, or it has no effect here and is ignored (`ignored` says
which), or it would change what the answer means and is refused by its name.
"""

import difflib
import json
from dataclasses import replace
from functools import cached_property
from typing import Annotated, Any

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ochat_train.conversations.schema import Conversation, Message, ParsedRecord, Role
from ochat_train.conversations.spell_out import Spelling, read_calls, spell_out

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

# Fields without an effect on the answers of this server.
_IGNORED = {
    "cache_salt",
    "chat_id",
    "id",
    "include",
    "include_reasoning",
    "keep_alive",
    "max_tool_calls",
    "metadata",
    "prediction",
    "priority",
    "prompt_cache_key",
    "prompt_cache_retention",
    "reasoning",
    "reasoning_effort",
    "request_id",
    "safety_identifier",
    "service_tier",
    "session_id",
    "store",
    "truncation",
    "user",
    "verbosity",
}
_IGNORED_OF_MESSAGES = {"annotations", "id", "name", "parsed", "provider_specific_fields", "status", "tool_call_id"}
# Fields that would change the answer, with the values that change nothing; every other value is refused.
_UNSERVED: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (False,),
    "allowed_token_ids": ([],),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "generation_config": (),
    "grammar": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1.0,),
    "logits_processors": ([],),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"], []),
    "prompt_logprobs": (0, False),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True, False),  # between tokens that are skipped
    "structured_outputs": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "web_search_options": (),
}
_MEDIA_OF_MESSAGES = ("audio", "files", "image", "image_url", "images", "video", "videos")


class _Fields(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    @property
    def extra(self) -> dict[str, Any]:
        """The given fields that the class does not name."""
        return {name: value for name, value in (self.model_extra or {}).items() if value is not None}


def _read_content(value: Any) -> Any:
    """A text; parts become its lines."""
    if not isinstance(value, list):
        return value
    texts = []
    for position, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, dict) else None
        if kind not in ("text", "input_text", "output_text", "refusal") or not isinstance(text, str):
            known = kind if kind in ("image_url", "input_image", "input_audio", "video_url", "file") else "no text"
            raise ValueError(f"part {position} is {known}; this model takes text alone")
        texts.append(text)
    return "\n".join(texts)


def _read_role(value: Any) -> Any:
    return {"developer": "system", "function": "tool"}.get(value, value) if isinstance(value, str) else value


def _read_whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _read_seed(value: Any) -> Any:
    return None if value == -1 else value  # which many clients send for none


def _read_stops(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else value
    if isinstance(stops, list):
        short = [stop for stop in stops if isinstance(stop, str) and 0 < len(stop) <= 256]
        if len(short) < len(stops) or len(stops) > 4:
            raise ValueError("at most 4 texts, each of 1 to 256 characters")
    return stops


Whole = Annotated[int, BeforeValidator(_read_whole)]


class RequestMessage(_Fields):
    """One message of the conversation, also as an answer of this API gave it or as a client's package writes it."""

    role: Annotated[Role, BeforeValidator(_read_role)]
    content: Annotated[str | None, BeforeValidator(_read_content)] = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    function_call: dict[str, Any] | None = None

    def to_message(self, where: str) -> Message:
        """The turn. Raises Refusal for a message without anything, and for media."""
        for name in _MEDIA_OF_MESSAGES:
            if self.extra.get(name):
                raise Refusal(400, f"{where}.{name}: this model takes text alone", param=f"{where}.{name}")
        calls = self.tool_calls or ([{"function": self.function_call}] if self.function_call else [])
        for function in (call.get("function") for call in calls):
            if isinstance(function, dict):
                function.pop("parsed_arguments", None)  # which openai's package adds
        text = self.refusal if self.content is None else self.content
        if text is None and not calls and self.role != "assistant":
            raise Refusal(400, f"{where}.content: there is none", param=f"{where}.content")
        written = orjson.dumps(calls).decode() if calls else ""
        return Message(self.role, text or "", None, self.reasoning_content or self.reasoning or "", written)


class StreamOptions(_Fields):
    """Options of a stream."""

    include_usage: bool | None = None


class ChatRequest(_Fields):
    """The body of POST /v1/chat/completions. Engines get it again, with spelled out messages, from `for_engine`."""

    model: str
    messages: list[RequestMessage] = Field(min_length=1)
    condition: str | None = None  # as OpenChat's own server takes it
    chat_template_kwargs: dict[str, Any] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Whole | None = Field(None, ge=1)
    max_completion_tokens: Whole | None = Field(None, ge=1)
    min_tokens: Whole | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: Whole | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = None
    seed: Annotated[Whole | None, BeforeValidator(_read_seed)] = Field(None, ge=-_INT64, lt=_INT64)
    stop: Annotated[list[str] | None, BeforeValidator(_read_stops)] = None
    stop_token_ids: list[int] | None = Field(None, max_length=64)
    ignore_eos: bool | None = None
    n: Whole | None = Field(None, ge=1, le=16)
    logprobs: bool | None = None
    top_logprobs: Whole | None = Field(None, ge=0, le=20)
    response_format: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None

    @cached_property
    def ignored(self) -> list[str]:
        """The known fields that have no effect here, and how many others, whose names may be anything."""
        names = self.extra.keys() - _UNSERVED.keys()
        if self.stream_options is not None and self.stream_options.extra:
            names |= {"stream_options.*"}
        for message in self.messages:
            names |= {f"messages.{name}" for name in message.extra.keys() - set(_MEDIA_OF_MESSAGES)}
        known = _IGNORED | {"stream_options.*"} | {f"messages.{name}" for name in _IGNORED_OF_MESSAGES}
        others = len(names - known)
        return sorted(names & known) + ([f"{others} unknown"] if others else [])

    def check(self) -> None:
        """Raise Refusal 400 for fields that would change what the answer means."""
        for name, value in self.extra.items():
            if name in _UNSERVED and value not in _UNSERVED[name]:
                raise Refusal(400, f"{name}: this server does not have it", param=name)
            meant = difflib.get_close_matches(name, type(self).model_fields, n=1, cutoff=0.85)
            if meant and name not in _IGNORED | _UNSERVED.keys():
                raise Refusal(400, f"unknown field; did you mean {meant[0]}?", param=meant[0])
        for name in (self.chat_template_kwargs or {}).keys() - {"condition"}:
            shown = name if name.isidentifier() else "a field"
            raise Refusal(400, f"chat_template_kwargs.{shown}: only the condition may be set here")
        if self.add_generation_prompt is False and not self.continue_final_message:
            where = "add_generation_prompt"
            raise Refusal(400, f"{where}: false goes with continue_final_message alone", param=where)
        if self.continue_final_message and self.messages[-1].role != "assistant":
            where = "continue_final_message"
            raise Refusal(400, f"{where}: the last message is not the assistant's", param=where)
        named = self.tool_choice if isinstance(self.tool_choice, dict) else {}
        names = [{"type": "function", "function": {"name": name}} for name in self.tool_names]
        if named and named not in names:
            raise Refusal(400, "tool_choice: it names no function of tools", param="tool_choice")
        if not named and self.tool_choice not in (None, "none", "auto", "required"):
            raise Refusal(400, "tool_choice: it is none, auto, required or a function", param="tool_choice")
        if self.forces_a_call and not self.tools:
            raise Refusal(400, "tool_choice: there are no tools to call", param="tool_choice")
        if self.has_format and (self.response_format or {}).get("type") not in ("json_object", "json_schema"):
            raise Refusal(400, "response_format: its type is text, json_object or json_schema", param="response_format")

    @property
    def has_format(self) -> bool:
        """Whether the answer must have a form of its own."""
        return self.response_format is not None and self.response_format.get("type") != "text"

    @property
    def forces_a_call(self) -> bool:
        """Whether the answer must call a tool."""
        return self.tool_choice not in (None, "none", "auto")

    @property
    def tool_names(self) -> list[str]:
        """The names of the tools that an answer may call."""
        functions = [tool.get("function") for tool in self.tools or []] if self.tool_choice != "none" else []
        return [str(function.get("name")) for function in functions if isinstance(function, dict)]

    @property
    def asked_condition(self) -> str | None:
        """The condition that the request asks for. Raises Refusal 400 when it is not a text."""
        asked = (self.chat_template_kwargs or {}).get("condition", self.condition or None)
        if asked is not None and not isinstance(asked, str):
            where = "chat_template_kwargs.condition"
            raise Refusal(400, f"{where}: it is a text", param=where)
        return asked

    def to_conversation(self, condition: str, spelling: Spelling | None = None) -> Conversation:
        """The messages under a condition, calls and tools as training wrote them; None: as they are.

        Raises Refusal 400.
        """
        messages = tuple(message.to_message(f"messages[{number}]") for number, message in enumerate(self.messages))
        tools = orjson.dumps(self.tools).decode() if self.tools else ""
        parsed = ParsedRecord("", "", False, None, "", messages, (), tools=tools)
        if spelling is not None:
            parsed = spell_out(replace(parsed, tools="") if self.tool_choice == "none" else parsed, spelling)
        return Conversation("", "", condition, parsed.system, parsed.messages, parsed.tools)

    def for_engine(
        self, conversation: Conversation, *, model: str, max_tokens: int | None, tool_choice: Any
    ) -> dict[str, Any]:
        """The body for an engine: the conversation, and what else this request sets of what engines honour.

        tool_choice: with what choice the engine gets the tools; None: not at all.
        """
        replaced = {"model", "messages", "condition", "max_tokens", "max_completion_tokens", "tools", "tool_choice"}
        replaced |= {"stream_options", "add_generation_prompt"} | (set() if self.has_format else {"response_format"})
        body = self.model_dump(include=type(self).model_fields.keys() - replaced, exclude_none=True)
        if self.stream and self.stream_options is not None:
            body["stream_options"] = {"include_usage": bool(self.stream_options.include_usage)}
        body |= {} if max_tokens is None else {"max_tokens": max_tokens}
        body |= {"add_generation_prompt": False} if self.continue_final_message else {}
        messages: list[dict[str, Any]] = []
        if conversation.system:
            messages.append({"role": "system", "content": conversation.system})
        for turn in conversation.messages:
            messages.append({"role": turn.role, "content": turn.text})
            messages[-1] |= {"reasoning_content": turn.reasoning} if turn.reasoning else {}
            messages[-1] |= {"tool_calls": _to_api(turn.calls)} if turn.calls else {}
        body |= {"tools": self.tools, "tool_choice": tool_choice} if tool_choice is not None else {}
        return body | {
            "model": model,
            "messages": messages,
            "chat_template_kwargs": {"condition": conversation.condition},
        }


def _to_api(calls: str) -> list[dict[str, Any]]:
    """Calls as the API has them, whatever order their fields had: a template writes them in the order that it gets."""
    return [
        {"id": f"call_{number}", "type": "function", "function": {**call, "arguments": json.dumps(call["arguments"])}}
        for number, call in enumerate(read_calls(calls))
    ]


def read_json(body: bytes) -> Any:
    """The value of a body. Raises Refusal 400."""
    try:
        return orjson.loads(body.removeprefix(b"\xef\xbb\xbf"))
    except orjson.JSONDecodeError as error:
        raise Refusal(400, f"the body is not JSON: {error}") from None


def read_chat_request(fields: Any) -> ChatRequest:
    """The request of a body. Raises Refusal 400, which names the first field that is wrong."""
    try:
        request = ChatRequest.model_validate(fields)
    except ValidationError as error:
        # Each member of a union reports its errors; the first is as good as any.
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
        what = first["msg"].removeprefix("Value error, ")
        raise Refusal(400, f"{where or 'the body'}: {what}", param=where or None) from None
    request.check()
    return request
