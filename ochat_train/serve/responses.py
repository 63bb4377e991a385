"""OpenAI's Responses API in terms of chat completions: requests on their way in, answers and events on their way out.

Nothing is kept between requests, so fields that refer to an earlier one are refused by their names.
"""

import time
from collections.abc import Iterator
from typing import Any

import orjson

from ochat_train.serve.protocol import STREAM_END, Refusal

_STATEFUL = ("previous_response_id", "conversation", "prompt", "background")
_EVENT_END = b"\n\n"


def to_chat(asked: Any) -> dict[str, Any]:
    """The request as one for a chat completion. Raises Refusal 400."""
    if not isinstance(asked, dict):
        raise Refusal(400, "the body: it is an object of JSON")
    for name in _STATEFUL:
        if asked.get(name):
            raise Refusal(400, f"{name}: this server keeps nothing between requests", param=name)
    if asked.get("n") not in (None, 1):
        raise Refusal(400, "n: a response is one answer", param="n")
    chat = {name: value for name, value in asked.items() if name not in _STATEFUL}
    messages = [{"role": "system", "content": chat["instructions"]}] if chat.get("instructions") else []
    chat["messages"] = messages + _read_input(chat.pop("input", None))
    chat["max_completion_tokens"] = chat.pop("max_output_tokens", None)
    text = chat.pop("text", None) or {}
    form = text.get("format") or {} if isinstance(text, dict) else None
    if not isinstance(form, dict):
        raise Refusal(400, "text.format: it is an object of JSON", param="text.format")
    if form.get("type") == "json_schema":
        form = {"type": "json_schema", "json_schema": {name: form[name] for name in form if name != "type"}}
    chat |= {"response_format": form or None, "logprobs": True if asked.get("top_logprobs") else None}
    chat["tools"] = [_read_tool(tool, f"tools[{number}]") for number, tool in enumerate(_listed(asked, "tools"))]
    if isinstance(choice := asked.get("tool_choice"), dict):
        chat["tool_choice"] = {"type": choice.get("type"), "function": {"name": choice.get("name")}}
    if asked.get("stream"):
        chat["stream_options"] = {"include_usage": True}
    chat.pop("instructions", None)
    return chat


def _read_input(value: Any) -> list[dict[str, Any]]:
    """The messages of a text, or of items: messages, calls, and what they returned."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise Refusal(400, "input: it is a text or a list of items", param="input")
    messages: list[dict[str, Any]] = []
    for number, item in enumerate(value):
        where = f"input[{number}]"
        kind = item.get("type") or ("message" if "role" in item else None) if isinstance(item, dict) else None
        if kind == "message":
            messages.append({"role": item.get("role"), "content": item.get("content")})
        elif kind == "function_call":
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": None})
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            messages[-1].setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")})
        elif kind == "item_reference":  # the package ai sends these unless `store` is false
            raise Refusal(400, f"{where}: this server keeps nothing between requests; send items whole", param=where)
        elif kind != "reasoning":  # which is another model's: this one's stands in its texts
            raise Refusal(400, f"{where}: messages and calls of functions are taken, and their outputs", param=where)
    return messages


def _listed(asked: dict[str, Any], name: str) -> list[Any]:
    value = asked.get(name) or []
    if not isinstance(value, list):
        raise Refusal(400, f"{name}: it is a list", param=name)
    return value


def _read_tool(tool: Any, where: str) -> dict[str, Any]:
    if not isinstance(tool, dict) or tool.get("type") != "function" or not isinstance(tool.get("name"), str):
        raise Refusal(400, f"{where}: this server has functions as tools alone", param=where)
    return {"type": "function", "function": {name: tool[name] for name in tool if name not in ("type", "strict")}}


class ResponseWriter:
    """The answer to a request, from a chat completion or from its events."""

    def __init__(self, asked: dict[str, Any], id_: str) -> None:
        self._id = id_
        self._output: list[dict[str, Any]] = []
        self._finish_reason: str | None = None
        self._unread = b""
        self._num_events = 0
        self._is_begun = False
        shown = ("instructions", "max_output_tokens", "metadata", "temperature", "top_p", "user", "top_logprobs")
        self._response: dict[str, Any] = {
            "id": f"resp_{id_}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "model": asked.get("model"),
            "output": [],
            "parallel_tool_calls": asked.get("parallel_tool_calls") is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "text": asked.get("text") or {"format": {"type": "text"}},
            "tool_choice": asked.get("tool_choice") or "auto",
            "tools": asked.get("tools") or [],
            "truncation": "disabled",
            "usage": None,
        } | {name: asked.get(name) for name in shown}

    def whole(self, body: bytes | bytearray) -> bytes:
        """The response for a chat completion."""
        completion = orjson.loads(body)
        choice = completion["choices"][0]
        for _ in self._add(choice["message"], choice.get("logprobs")):
            pass
        self._finish_reason = choice.get("finish_reason")
        for _ in self._finish(completion.get("usage")):
            pass
        return orjson.dumps(self._response)

    def events(self, body: bytes) -> bytes:
        """The events for a part of a chat completion's stream."""
        *whole, self._unread = (self._unread + body).split(_EVENT_END)
        return b"".join(self._write(event) for data in whole for event in self._read_event(data))

    def failure(self, refusal: Refusal) -> bytes:
        """The last events of a stream that fails."""
        error = {"code": refusal.code or "server_error", "message": refusal.message}
        self._response |= {"status": "failed", "error": error}
        last = {"type": "error", **error, "param": refusal.param}
        return self._write(last) + self._write({"type": "response.failed", "response": self._response})

    def _write(self, event: dict[str, Any]) -> bytes:
        self._num_events += 1
        data = orjson.dumps({**event, "sequence_number": self._num_events - 1})
        return f"event: {event['type']}\ndata: ".encode() + data + _EVENT_END

    def _read_event(self, data: bytes) -> Iterator[dict[str, Any]]:
        if not data.startswith(b"data: ") or data + _EVENT_END == STREAM_END:
            return
        chunk = orjson.loads(data.removeprefix(b"data: "))
        if not self._is_begun:
            self._is_begun = True
            yield {"type": "response.created", "response": self._response}
            yield {"type": "response.in_progress", "response": self._response}
        for choice in chunk.get("choices") or []:
            yield from self._add(choice.get("delta") or {}, choice.get("logprobs"))
            self._finish_reason = choice.get("finish_reason") or self._finish_reason
        if chunk.get("usage") and self._finish_reason is not None:
            yield from self._finish(chunk["usage"])

    def _add(self, delta: dict[str, Any], logprobs: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
        """Add a message, or a piece of one, to the output."""
        found = [
            {**one, "top_logprobs": one.get("top_logprobs") or []} for one in (logprobs or {}).get("content") or []
        ]
        if delta.get("content") or found:
            if not self._output or self._output[-1]["type"] != "message":
                yield from self._open({"type": "message", "role": "assistant", "content": []})
            part = self._output[-1]["content"][0]
            part["text"] += delta.get("content") or ""
            part["logprobs"] += found
            where = {**self._where(), "content_index": 0}
            yield {
                "type": "response.output_text.delta",
                **where,
                "delta": delta.get("content") or "",
                "logprobs": found,
            }
        for call in delta.get("tool_calls") or []:
            function = call.get("function") or {}
            if function.get("name"):
                call_id = call.get("id") or f"call_{self._id}"
                yield from self._open(
                    {"type": "function_call", "call_id": call_id, "name": function["name"], "arguments": ""}
                )
            self._output[-1]["arguments"] += function.get("arguments") or ""
            arguments = {"delta": function.get("arguments") or ""}
            yield {"type": "response.function_call_arguments.delta", **self._where(), **arguments}

    def _open(self, item: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield from self._close()
        kind = "msg" if item["type"] == "message" else "fc"
        self._output.append({"id": f"{kind}_{self._id}_{len(self._output)}", "status": "in_progress", **item})
        place = {"output_index": len(self._output) - 1}
        yield {"type": "response.output_item.added", **place, "item": self._output[-1]}
        if kind == "msg":
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            self._output[-1]["content"].append(part)
            yield {"type": "response.content_part.added", **self._where(), "content_index": 0, "part": part}

    def _close(self) -> Iterator[dict[str, Any]]:
        """End the last item of the output."""
        if not self._output:
            return
        item, where = self._output[-1], self._where()
        item["status"] = "incomplete" if self._finish_reason == "length" else "completed"
        if item["type"] == "message":
            part, where = item["content"][0], {**where, "content_index": 0}
            done = {"text": part["text"], "logprobs": part["logprobs"]}
            yield {"type": "response.output_text.done", **where, **done}
            yield {"type": "response.content_part.done", **where, "part": part}
        else:
            done = {"name": item["name"], "arguments": item["arguments"]}
            yield {"type": "response.function_call_arguments.done", **where, **done}
        yield {"type": "response.output_item.done", "output_index": len(self._output) - 1, "item": item}

    def _where(self) -> dict[str, Any]:
        return {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1}

    def _finish(self, usage: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
        if not self._output:
            yield from self._open({"type": "message", "role": "assistant", "content": []})
        yield from self._close()
        is_cut = self._finish_reason == "length"
        counts = usage or {}
        self._response |= {
            "status": "incomplete" if is_cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "output": self._output,
            "usage": {
                "input_tokens": counts.get("prompt_tokens", 0),
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": counts.get("completion_tokens", 0),
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": counts.get("total_tokens", 0),
            },
        }
        yield {"type": f"response.{self._response['status']}", "response": self._response}
