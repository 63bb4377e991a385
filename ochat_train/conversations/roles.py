"""The names that roles have in dumps."""

import re
from collections.abc import Mapping
from typing import Literal

from ochat_train.conversations.schema import Role

# Compared in lower case, without "-", "_" and white space. A tool's output is context without a loss.
ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "prompter": "user",  # OpenAssistant
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "claude": "assistant",
    "assistant": "assistant",
    "model": "assistant",  # Gemini, Gemma
    "bot": "assistant",
    "chatbot": "assistant",  # Cohere
    "ai": "assistant",  # LangChain
    "system": "system",
    "developer": "system",  # OpenAI
    "function_call": "assistant",  # the assistant calls a tool and says nothing else
    "tool_call": "assistant",
    "tool_calls": "assistant",
    "tool": "tool",
    "tool_response": "tool",
    "tool_result": "tool",
    "tool_output": "tool",
    "function": "tool",
    "function_response": "tool",
    "function_result": "tool",
    "function_output": "tool",
    "observation": "tool",
    "ipython": "tool",  # Llama 3
}
CALL_ROLES = ("function_call", "tool_call", "tool_calls")

_ROLE_BY_LETTERS: dict[str, Role | Literal["call"]] = {
    name.replace("_", ""): "call" if name in CALL_ROLES else role for name, role in ROLES.items()
}
NO_ROLES: Mapping[str, Role] = {}


def find_role(name: object, own_roles: Mapping[str, Role] = NO_ROLES) -> Role | Literal["call"] | None:
    """The role that this name stands for, "call" where the assistant only calls tools, or None.

    `own_roles` come before ROLES.
    """
    if not isinstance(name, str):
        return None
    if name in ROLES and name not in CALL_ROLES and not own_roles:  # nearly always
        return ROLES[name]
    letters = _letters(name)
    for own_name, role in own_roles.items():
        if _letters(own_name) == letters:
            return role
    return _ROLE_BY_LETTERS.get(letters)


def _letters(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name.lower())
