"""What a conversation is, after reading and before tokens: plain text with roles, weights and a condition."""

from dataclasses import dataclass
from typing import Literal

Role = Literal["user", "assistant", "system", "tool"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    `weight` is the loss weight of every token of `text` and of the end token behind it; None means
    "as the role says": the source's weight on an assistant turn, 0 on any other.
    """

    role: Role
    text: str
    weight: float | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """One training example as text. `condition` and `system` are empty strings where there is none."""

    id: str
    source: str
    condition: str
    system: str
    messages: tuple[Message, ...]
