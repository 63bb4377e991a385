"""A model that calls a tool and says what it returned, trained in a moment, and clients that do as it asks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson

from ochat_train.conversations.base_template import BaseTemplate
from ochat_train.conversations.schema import Conversation, ParsedRecord
from ochat_train.conversations.spell_out import spell_out
from ochat_train.conversations.template import TEMPLATES
from ochat_train.serve.protocol import RequestMessage
from ochat_train.tokens.chat_template import spelling_of
from ochat_train.tokens.tokenizer import load_tokenizer
from tests.chat_model import write_chat_model
from tests.chat_server import Server
from tests.small_tokenizers import write_base
from tests.waiting import wait_until

# Definitions in the system turn, and calls between tags, as Qwen 2.5's.
TAGS = (
    "{%- set system = messages[0].content if messages[0].role == 'system' else 'You help.' %}"
    "{{- '<start_of_turn>system\n' + system }}"
    "{%- for tool in tools or [] %}{{- '\n' + (tool | tojson) }}{%- endfor %}{{- '</s>\n' }}"
    "{%- for message in messages if message.role != 'system' %}{{- '<start_of_turn>' + message.role + '\n' }}"
    "{{- message.content or '' }}{%- for call in message.tool_calls or [] %}"
    "{{- '\n' if message.content or not loop.first }}"
    "{{- '<tool_call>\n' + (call.function | tojson) + '\n</tool_call>' }}{%- endfor %}"
    "{{- '</s>\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<start_of_turn>assistant\n' }}{%- endif %}"
)
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "What is to be seen at a place.",
        "parameters": {"type": "object", "properties": {"at": {"type": "string"}}, "required": ["at"]},
    },
}
ASKED: Any = {"role": "user", "content": "What is in the garden?"}
CALLED = {
    "role": "assistant",
    "content": "I look.",
    "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": '{"at": "the garden"}'}}],
}
SEEN = {"role": "tool", "content": "a cat"}
ANSWERED = {"role": "assistant", "content": "There is a cat."}


def write_calling_model(run: Path, *, template: str, chat_template: str | None) -> Path:
    """The model in a run's folder, with the template of that name and the base's own chat template."""
    base = write_base(run / "base", "gpt4", model_type="llama", chat_template=chat_template)
    tokenizer = load_tokenizer(str(base), BaseTemplate() if template == "base" else TEMPLATES[template])
    spelling = spelling_of(tokenizer, chat_template, reasoning="drop", tool_calls="train")
    says = []
    for messages in ([ASKED, CALLED], [ASKED, CALLED, SEEN, ANSWERED]):
        turns = [RequestMessage.model_validate(message).to_message("") for message in messages]
        turns = [replace(turn, weight=1.0) if turn.role == "assistant" else turn for turn in turns]
        parsed = ParsedRecord("", "", False, None, "", tuple(turns), (), tools=orjson.dumps([TOOL]).decode())
        spelled = spell_out(parsed, spelling)
        says.append(Conversation("", "", "Careful", spelled.system, spelled.messages, spelled.tools))
    return write_chat_model(
        run / "model", tokenizer, says=says, base_chat_template=chat_template, data={"tool_calls": "train"}
    )


def check_chat_round_trip(server: Server) -> None:
    """The openai package gets a call, whole and as a stream, and sends back what the tool returned."""
    options: Any = {"model": "tiny-chat", "tools": [TOOL], "temperature": 0}
    whole = server.client.chat.completions.create(messages=[ASKED], **options).choices[0]
    with server.client.chat.completions.stream(messages=[ASKED], **options) as stream:
        streamed = stream.get_final_completion().choices[0]
    for choice in (whole, streamed):
        message: Any = choice.message
        (call,) = message.tool_calls
        assert (choice.finish_reason, (message.content or "").strip()) == ("tool_calls", "I look.")
        assert (call.type, call.function.name) == ("function", "look")
        assert orjson.loads(call.function.arguments) == {"at": "the garden"}
        seen = {**SEEN, "tool_call_id": call.id}
        answer = server.client.chat.completions.create(messages=[ASKED, message, seen], **options)
        assert answer.usage.prompt_tokens == _logged(server, answer.id)["prompt_tokens"]  # the gate's own count
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("There is a cat.", "stop")


def _logged(server: Server, id_: str) -> dict[str, Any]:
    """The line of the log for a request; `id_` contains the request's."""
    wait_until(lambda: any(line["id"] in id_ for line in server.lines()))
    return next(line for line in server.lines() if line["id"] in id_)


def check_responses_round_trip(server: Server) -> None:
    """The same by the Responses API."""
    options: Any = {"model": "tiny-chat", "tools": [{"type": "function", **TOOL["function"]}], "temperature": 0}
    chat = server.client.chat.completions.create(model="tiny-chat", messages=[ASKED], tools=[TOOL], temperature=0)
    whole = server.client.responses.create(input=ASKED["content"], **options)
    with server.client.responses.stream(input=[ASKED], **options) as stream:
        streamed = stream.get_final_response()
    assert whole.usage.input_tokens == streamed.usage.input_tokens == chat.usage.prompt_tokens
    for response in (whole, streamed):
        text, call = response.output
        assert (text.content[0].text.strip(), response.status) == ("I look.", "completed")
        assert (call.name, orjson.loads(call.arguments)) == ("look", {"at": "the garden"})
        seen = {"type": "function_call_output", "call_id": call.call_id, "output": "a cat"}
        history: Any = [ASKED, *response.output, seen]
        assert server.client.responses.create(input=history, **options).output_text == "There is a cat."
        with server.client.responses.stream(input=history, **options) as stream:
            texts = [event.delta for event in stream if event.type == "response.output_text.delta"]
        assert "".join(texts) == "There is a cat."
