"""What a conversation is, after reading and before tokens: plain text with roles, weights and a condition."""

from dataclasses import dataclass
from typing import Literal

Role = Literal["user", "assistant", "system", "tool"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    `weight` is the loss weight of every token of `text` and of the end token behind it; None means
    "as the role says": the source's weight on an assistant turn, 0 on any other.

    `reasoning` and `calls` are an assistant's thoughts before its text and the tools it calls after it, as the record
    writes them; empty where there are none. `spell_out` writes them into the text, and a Conversation has neither.
    """

    role: Role
    text: str
    weight: float | None = None
    reasoning: str = ""
    calls: str = ""


@dataclass(frozen=True, slots=True)
class Conversation:
    """One training example as text. `condition` and `system` are empty strings where there is none."""

    id: str
    source: str
    condition: str
    system: str
    messages: tuple[Message, ...]
