"""The turns of one record, cleaned: HTML to markdown, page noise removed, tools spelled out, the order repaired."""

from collections.abc import Callable
from dataclasses import replace
from itertools import groupby, takewhile
from typing import Literal

from ochat_train.conversations.html import convert_text, is_rendered
from ochat_train.conversations.page_noise import Messages, remove_page_noise
from ochat_train.conversations.schema import Drop, Message, ParsedRecord, RecordError
from ochat_train.conversations.spell_out import AS_WRITTEN, Spelling, spell_out

LeadingAnswers = Literal["context", "train", "drop"]


def clean_turns(
    parsed: ParsedRecord,
    *,
    html: Literal["auto", "always", "never"],
    spelling: Spelling = AS_WRITTEN,
    leading_answers: LeadingAnswers = "context",
) -> ParsedRecord | Drop:
    """The record with clean turns, or why it cannot be used.

    HTML is converted in saved pages and in records whose answers are ChatGPT's own HTML (`html` "auto"), in all records
    ("always") or in none ("never"). The names of the steps that changed something are added to `repairs`, in their
    order: "html_converted", "page_noise_removed", then those of `spell_out` and of `repair_turns`. The drop's reason is
    "no_answer", "html_too_deep" or "html_not_converted".

    Worked example: user "2 / 2\\n\\nIs a &lt; b?" and assistant "<p>Yes</p>" of a page become user "Is a < b?" and
    assistant "Yes", (html_converted, page_noise_removed).
    """
    repairs = parsed.repairs
    system, messages = parsed.system, parsed.messages
    is_html = parsed.is_page or any(message.role == "assistant" and is_rendered(message.text) for message in messages)
    if html == "always" or (html == "auto" and is_html):
        try:
            system, messages = convert_html(system, messages, sure=html == "always")
        except RecordError as error:
            return Drop(parsed.id, error.reason, error.detail, repairs, unread=parsed.unread)
        if (system, messages) != (parsed.system, parsed.messages):
            repairs += ("html_converted",)
    clean = remove_page_noise(messages, is_page=parsed.is_page or "html_converted" in repairs)
    if clean != messages:
        repairs += ("page_noise_removed",)
    spelled = spell_out(replace(parsed, system=system, messages=clean, repairs=repairs), spelling)
    repaired = repair_turns(spelled.system, spelled.messages, leading_answers=leading_answers)
    if isinstance(repaired, str):
        roles = " ".join(message.role for message in clean[:8]) + (" ..." if len(clean) > 8 else "")
        return Drop(parsed.id, repaired, f"turns: {roles}", spelled.repairs, unread=parsed.unread)
    system, messages, names = repaired
    return replace(spelled, system=system, messages=messages, repairs=spelled.repairs + names)


def convert_html(system: str, messages: Messages, *, sure: bool) -> tuple[str, Messages]:
    """(system, messages) as markdown, see `convert_text`. A tool's output is data, and stays unless `sure`."""
    converted = tuple(
        message
        if message.role == "tool" and not sure
        else replace(message, text=convert_text(message.text, typed=message.role != "assistant", sure=sure))
        for message in messages
    )
    return convert_text(system, typed=True, sure=sure), converted


# ---- The order of turns ----

# A turn to which the record itself gives a weight above 0 is trained: no rule removes it or joins it to another.


def repair_turns(
    system: str, messages: Messages, *, leading_answers: LeadingAnswers = "context"
) -> tuple[str, Messages, tuple[str, ...]] | str:
    """(system, messages, names of the rules that changed something), or "no_answer" if no answer is left.

    Applies the rules below in their order, then moves leading system turns into `system`. The latter is no repair,
    since both are ways to write the same. A `system` of only white space counts as an empty turn. Repairing twice
    changes nothing that repairing once left.

    leading_answers: whether answers before the first user turn stay as context without a loss, are trained like all
    others, or are removed.

    Worked example: "", [assistant "Welcome!", user "Hi", user "there", assistant "Hello", user "Bye"] gives
    "", [assistant "Welcome!" of weight 0, user "Hi\\n\\nthere", assistant "Hello"],
    (leading_answer_untrained, user_turns_joined, unanswered_turn_removed).
    """
    rules: list[tuple[str, Callable[[Messages], Messages]]] = [("empty_turn_removed", remove_empty_turns)]
    if leading_answers == "context":
        rules.append(("leading_answer_untrained", mute_leading_answers))
    elif leading_answers == "drop":
        rules.append(("leading_answer_removed", remove_leading_answers))
    rules += [  # after the removals, which make turns neighbours
        ("user_turns_joined", join_user_turns),
        ("unanswered_turn_removed", remove_unanswered_turns),
    ]
    repairs = []
    for name, rule in rules:
        repaired = rule(messages)
        if repaired != messages:
            repairs.append(name)
        messages = repaired
    _, rest = _split_leading(messages)
    answers = messages if leading_answers == "train" else rest
    if not any(message.role == "assistant" for message in answers) and not any(m.has_weight for m in messages):
        return "no_answer"
    if system and not system.strip():
        system = ""
        if "empty_turn_removed" not in repairs:
            repairs.insert(0, "empty_turn_removed")
    system, messages = lift_leading_system(system, messages)
    return system, messages, tuple(repairs)


def _split_leading(messages: Messages) -> tuple[Messages, Messages]:
    """The turns before the first user turn, and the others."""
    leading = tuple(takewhile(lambda message: message.role != "user", messages))
    return leading, messages[len(leading) :]


def remove_empty_turns(messages: Messages) -> Messages:
    """The messages without those whose text is empty or only white space."""
    return tuple(message for message in messages if message.all_text.strip() or message.has_weight)


def remove_leading_answers(messages: Messages) -> Messages:
    """The messages without assistant and tool turns before the first user turn, whose question is not known."""
    leading, rest = _split_leading(messages)
    return tuple(message for message in leading if message.role == "system" or message.has_weight) + rest


def mute_leading_answers(messages: Messages) -> Messages:
    """The messages with weight 0 on the assistant turns before the first user turn that have no weight of their own."""
    leading, rest = _split_leading(messages)
    muted = (
        replace(message, weight=0.0) if message.role == "assistant" and message.weight is None else message
        for message in leading
    )
    return (*muted, *rest)


def join_user_turns(messages: Messages) -> Messages:
    """The messages with each run of user turns made one, with a blank line between their texts."""
    joined: list[Message] = []
    for is_joined, run in groupby(messages, key=lambda message: message.role == "user" and not message.has_weight):
        turns = list(run)
        if is_joined:
            turns = [replace(turns[0], text="\n\n".join(turn.text for turn in turns))]
        joined += turns
    return tuple(joined)


def remove_unanswered_turns(messages: Messages) -> Messages:
    """The messages without those after the last one that is an assistant's or has a weight."""
    answers = [index for index, message in enumerate(messages) if message.role == "assistant" or message.has_weight]
    return messages[: answers[-1] + 1] if answers else ()


def lift_leading_system(system: str, messages: Messages) -> tuple[str, Messages]:
    """(system text, other messages): the texts of leading system turns follow `system`, with blank lines between.

    A system turn with a weight above 0 stays a message, and so do those after it: the system text of a conversation has
    no weight, so the turn would lose its loss without notice.
    """
    leading = tuple(takewhile(lambda message: message.role == "system" and not message.has_weight, messages))
    texts = ([system] if system else []) + [message.text for message in leading]
    return "\n\n".join(texts), messages[len(leading) :]
