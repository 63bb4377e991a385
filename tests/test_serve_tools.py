"""The engine transformers with tools: the openai package gets calls, and sends back what they return."""

from collections.abc import Iterator

import openai
import pytest

from tests.calling_model import (
    ASKED,
    TAGS,
    TOOL,
    check_chat_round_trip,
    check_responses_round_trip,
    write_calling_model,
)
from tests.chat_server import Server, serving


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    run = tmp_path_factory.mktemp("run")
    write_calling_model(run, template="base", chat_template=TAGS)
    with serving(run, "--engine", "transformers", "--device", "cpu") as made:
        yield made


def test_calls_come_as_calls_and_go_back_as_history(server: Server) -> None:
    check_chat_round_trip(server)
    check_responses_round_trip(server)


def test_no_call_is_made_that_was_not_allowed_and_none_is_promised(server: Server) -> None:
    def ask(**options: object) -> object:
        create = server.client.chat.completions.create
        return create(model="tiny-chat", messages=[ASKED], tools=[TOOL], temperature=0, max_tokens=40, **options)  # type: ignore[call-overload]

    answer = ask(tool_choice="none")
    assert answer.choices[0].message.tool_calls is None and answer.choices[0].finish_reason != "tool_calls"  # type: ignore[attr-defined]
    named = {"type": "function", "function": {"name": "look"}}
    for choice in ("required", named):
        with pytest.raises(openai.BadRequestError, match="tool_choice: the engine transformers cannot force a call"):
            ask(tool_choice=choice)
