"""What a conversation is, after reading and before tokens: plain text with roles, weights and a condition."""

from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["user", "assistant", "system", "tool"]


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a file: `file[offset:end]` in bytes, without the space, comma or line end around it.

    `file` is the path, followed by the name of an archive's member: "dump.zip/pages/a.html", with each byte that is not
    UTF-8 escaped. In a compressed file offsets count decompressed bytes; in a table `offset` is the row's number.
    `fields` is the parsed value. Where there is none, it is None and `damage` is the reason of its drop: "not_json",
    "not_utf8", "truncated_record", "record_too_large", "bad_row", "no_next_data", "no_page_content", "no_parent" or
    "repeated_message". `repairs`
    names what was changed in its bytes so that they could be parsed. `is_page` is whether it is a saved ShareGPT page.
    `raw` is the beginning of a line that is not JSON, 2,000 bytes for a person to look at. `is_row` is whether it is a
    row of a table, whose missing fields are null. The last two are left out of comparisons.
    """

    file: str
    offset: int
    end: int
    fields: Any
    damage: str | None = None
    repairs: tuple[str, ...] = ()
    is_page: bool = False
    raw: str | None = field(default=None, compare=False)
    is_row: bool = field(default=False, compare=False)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    `weight` is the loss weight of every token of `text` and of the end token after it. None means that the role
    decides: the source's weight on an assistant turn, 0 on any other.

    `reasoning` and `calls` are an assistant's reasoning before its text and its tool calls after it, as the record
    writes them, or empty. `spell_out` writes into the text what the template does not take as arguments.
    """

    role: Role
    text: str
    weight: float | None = None
    reasoning: str = ""
    calls: str = ""

    @property
    def has_weight(self) -> bool:
        """Whether the turn has a weight of its own above 0."""
        return bool(self.weight)

    @property
    def all_text(self) -> str:
        """Everything that the turn says, to compare it by."""
        return f"{self.reasoning}{self.text}{self.calls}"


@dataclass(frozen=True, slots=True)
class Conversation:
    """One training example as text. `condition`, `system` and `tools` are empty strings where there is none.

    `tools` are definitions that the template takes as arguments, as the record writes them. `record` is the place of
    its record where that has several conversations, else empty. `held_out`: its source is, whole.
    """

    id: str
    source: str
    condition: str
    system: str
    messages: tuple[Message, ...]
    tools: str = ""
    record: str = ""
    held_out: bool = False


# What was found and not read, once for each time: ("record field" | "answer field" | "turn field" | "part field" |
# "role", its name).
Unread = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class ParsedRecord:
    """The turns of a record that can be used, before its source gives it condition and weights.

    `dialect` is how it is written: "from/value", "role/content", "pairs", or several of them with " + " between; before
    it the names of the fields that its turns are of, where they are not one list.
    `is_page` is whether it comes from a saved ShareGPT page. `condition`, `weight` and the `weight` of each message are
    the record's own, None (1.0 for the record's weight) where it has none. `tools` are the definitions of tools as the
    record writes them, or empty.
    """

    id: str
    dialect: str
    is_page: bool
    condition: str | None
    system: str
    messages: tuple[Message, ...]
    repairs: tuple[str, ...]
    weight: float = 1.0
    tools: str = ""
    unread: Unread = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class Drop:
    """Why a record cannot be used: `reason` is a fixed name to count by, `detail` is for a person.

    `hint` is the line of a recipe with which the record would be read, or empty.
    """

    id: str
    reason: str
    detail: str
    repairs: tuple[str, ...]
    hint: str = field(default="", compare=False)
    unread: Unread = field(default=(), compare=False)


class RecordError(ValueError):
    """A record cannot be used; its attributes are those of the `Drop` that it becomes."""

    def __init__(self, reason: str, detail: str, hint: str = "") -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail, self.hint = reason, detail, hint
