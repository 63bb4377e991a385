"""Rules that repair the turns of one conversation: each a small pure function, all applied by `repair_turns`.

A rule takes turns away or joins them, and its repair name says so in the ledger. No rule trims or otherwise
changes a text: white space at its ends is the writer's.
"""

from collections.abc import Callable
from itertools import takewhile

from ochat_train.conversations.schema import Message

Messages = tuple[Message, ...]

BLANK_LINE = "\n\n"


def repair_turns(system: str, messages: Messages) -> tuple[str, Messages, tuple[str, ...]] | str:
    """(system, messages, names of the rules that changed something), or "no_answer" if no answer is left.

    Applies RULES in their order, then lifts leading system turns into `system`, which counts as no repair:
    the two are two ways to write the same. A `system` of only white space is an empty turn too. Repairing
    twice changes nothing that repairing once left.

    Worked example: "", [assistant "Welcome!", user "Hi", user "there", assistant "Hello", user "Bye"] gives
    "", [user "Hi\\n\\nthere", assistant "Hello"],
    (leading_answer_removed, user_turns_joined, unanswered_turn_removed).
    """
    repairs = []
    for name, rule in RULES:
        repaired = rule(messages)
        if repaired != messages:
            repairs.append(name)
        messages = repaired
    if not any(message.role == "assistant" for message in messages):
        return "no_answer"
    if system and not system.strip():
        system = ""
        if "empty_turn_removed" not in repairs:
            repairs.insert(0, "empty_turn_removed")
    system, messages = lift_leading_system(system, messages)
    return system, messages, tuple(repairs)


def remove_empty_turns(messages: Messages) -> Messages:
    """Without the turns whose text is empty or only white space."""
    return tuple(message for message in messages if message.text.strip())


def remove_leading_answers(messages: Messages) -> Messages:
    """Without the assistant and tool turns before the first user turn: they answer nothing that is known."""
    leading = tuple(takewhile(lambda message: message.role != "user", messages))
    return tuple(message for message in leading if message.role == "system") + messages[len(leading) :]


def join_user_turns(messages: Messages) -> Messages:
    """With user turns in a row made one, a blank line between their texts.

    Turns of unequal weight stay two, since a turn has one weight.
    """
    joined: list[Message] = []
    for message in messages:
        last = joined[-1] if joined else None
        if last and last.role == message.role == "user" and last.weight == message.weight:
            joined[-1] = Message("user", last.text + BLANK_LINE + message.text, message.weight)
        else:
            joined.append(message)
    return tuple(joined)


def remove_unanswered_turns(messages: Messages) -> Messages:
    """Without the turns behind the last assistant turn."""
    answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
    return messages[: answers[-1] + 1] if answers else ()


def lift_leading_system(system: str, messages: Messages) -> tuple[str, Messages]:
    """(system text, the other messages), the leading system turns joined behind `system` by blank lines.

    A system turn that carries a weight above 0 stays a message, and so do those behind it: the system text of
    a conversation has no weight, so lifting would silently take it out of the loss.
    """
    leading = tuple(takewhile(lambda message: message.role == "system" and not message.weight, messages))
    texts = ([system] if system else []) + [message.text for message in leading]
    return BLANK_LINE.join(texts), messages[len(leading) :]


# Empty turns go first, so that no other rule sees them; turns are joined after removals that make them
# neighbours.
RULES: tuple[tuple[str, Callable[[Messages], Messages]], ...] = (
    ("empty_turn_removed", remove_empty_turns),
    ("leading_answer_removed", remove_leading_answers),
    ("user_turns_joined", join_user_turns),
    ("unanswered_turn_removed", remove_unanswered_turns),
)
