"""Rules that clean the turns of one conversation, all applied by `clean_turns`: first the texts, then their order.

The rules of texts take away what ShareGPT's pages and the tools that converted them left in a text, and only where it
can be nothing else. The rules of turns take turns away or join them. No rule trims a text or changes it otherwise:
white space at its ends is the writer's.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import groupby, takewhile
from typing import Literal

from ochat_train.conversations.html import convert_text, is_rendered
from ochat_train.conversations.schema import Drop, Message, ParsedRecord, RecordError
from ochat_train.conversations.spell_out import AS_WRITTEN, Spelling, spell_out

Messages = tuple[Message, ...]

BLANK_LINE = "\n\n"


LeadingAnswers = Literal["context", "train", "drop"]


def clean_turns(
    turns: ParsedRecord,
    *,
    html: Literal["auto", "always", "never"],
    spelling: Spelling = AS_WRITTEN,
    leading_answers: LeadingAnswers = "context",
) -> ParsedRecord | Drop:
    """The turns as markdown, without page noise, spelled out and repaired, or why they cannot be used.

    HTML becomes markdown in saved pages, and in records whose answers are ChatGPT's own HTML (`html` "auto"), in all
    ("always") or in none ("never"). Names of what changed something are added to `repairs`, in the order in which it
    was done: "html_converted", "page_noise_removed", then those of `spell_out` and of `repair_turns`. The drop's reason
    is "no_answer", "html_too_deep" or "html_not_converted".

    Worked example: user "2 / 2\\n\\nIs a &lt; b?" and assistant "<p>Yes</p>" of a page become user "Is a < b?" and
    assistant "Yes", (html_converted, page_noise_removed).
    """
    repairs = turns.repairs
    system, messages = turns.system, turns.messages
    if html == "always" or (html == "auto" and is_html(turns)):
        try:
            system, messages = convert_html(system, messages, sure=html == "always")
        except RecordError as error:
            return Drop(turns.id, error.reason, error.detail, repairs, unread=turns.unread)
        if (system, messages) != (turns.system, turns.messages):
            repairs += ("html_converted",)
    clean = remove_page_noise(messages, is_page=turns.is_page or "html_converted" in repairs)
    if clean != messages:
        repairs += ("page_noise_removed",)
    spelled = spell_out(replace(turns, system=system, messages=clean, repairs=repairs), spelling)
    repaired = repair_turns(spelled.system, spelled.messages, leading_answers=leading_answers)
    if isinstance(repaired, str):
        roles = " ".join(message.role for message in clean[:8]) + (" ..." if len(clean) > 8 else "")
        return Drop(turns.id, repaired, f"turns: {roles}", spelled.repairs, unread=turns.unread)
    system, messages, names = repaired
    return replace(spelled, system=system, messages=messages, repairs=spelled.repairs + names)


# ---- HTML ----


def is_html(turns: ParsedRecord) -> bool:
    """Whether the record is a saved page, or one of its answers has ChatGPT's own marks."""
    return turns.is_page or any(message.role == "assistant" and is_rendered(message.text) for message in turns.messages)


def convert_html(system: str, messages: Messages, *, sure: bool) -> tuple[str, Messages]:
    """(system, messages) as markdown, see `convert_text`. What a tool says is data, and stays unless `sure`."""
    converted = (
        message
        if message.role == "tool" and not sure
        else replace(message, text=convert_text(message.text, typed=message.role != "assistant", sure=sure))
        for message in messages
    )
    return convert_text(system, typed=True, sure=sure), tuple(converted)


# ---- Page noise: the examples of each rule say what it removes and what it leaves ----


def remove_page_noise(messages: Messages, *, is_page: bool) -> Messages:
    r"""With the rules below applied to every text, but not to what a tool says, which is data.

    A first line like 1 / 2 goes only where the record is surely a page's: it was saved as one or was HTML
    (`is_page`), the other rules found something in it, or `repeats_counter` holds.

    >>> answered = (Message("user", "Hi"), Message("assistant", "1 / 2\n\nHello"))
    >>> [message.text for message in remove_page_noise(answered, is_page=True)]
    ['Hi', 'Hello']
    >>> remove_page_noise(answered, is_page=False) == answered
    True
    >>> glued = (Message("user", "HiShare Prompt"), *answered[1:])
    >>> [message.text for message in remove_page_noise(glued, is_page=False)]
    ['Hi', 'Hello']
    """
    clean = tuple(
        message if message.role == "tool" else _with_text(message, _remove_captions(message)) for message in messages
    )
    counted = _remove_counters(clean)
    return counted if is_page or clean != messages or repeats_counter(clean, counted) else clean


def _with_text(message: Message, text: str) -> Message:
    return message if text == message.text else replace(message, text=text)


def _remove_captions(message: Message) -> str:
    text = remove_glued_buttons(message.text) if message.role == "user" else message.text
    return remove_copy_counts(remove_copy_code(text))


def _remove_counters(messages: Messages) -> Messages:
    clean = []
    question = ""
    for message in messages:
        if message.role != "tool":
            message = _with_text(
                message, remove_regenerate_counter(message.text, question if message.role == "assistant" else "")
            )
        if message.role == "user":
            question = message.text
        clean.append(message)
    return tuple(clean)


_FENCE = re.compile(r"^[ \t>]*(?:(?:[-*+]|\d{1,9}[.)])[ \t]+)*(`{3,}|~{3,})(.*)$", re.MULTILINE)


def find_fences(text: str) -> Iterator[tuple[re.Match[str], int]]:
    r"""Each fenced block of a text: its opening fence, as (marks, what is behind them), and where its inside ends.

    >>> text = "a\n```py\nx\n```\n`b`\n~~~\ny"
    >>> [(fence[0], text[fence.end() : end]) for fence, end in find_fences(text)]
    [('```py', '\nx\n'), ('~~~', '\ny')]
    >>> list(find_fences("```inline``` and `code`"))
    []
    """
    opening = None
    for fence in _FENCE.finditer(text):
        marks, info = fence.groups()
        if opening is None:
            opening = None if marks[0] == "`" and "`" in info else fence
        elif marks[0] == opening[1][0] and len(marks) >= len(opening[1]) and not info.strip():
            yield opening, fence.start()
            opening = None
    if opening is not None:
        yield opening, len(text)


_CAPTION_ON_FENCE = re.compile(r"([ \t]*[\w+#.-]*?)[ \t]*(?:Copy code)+\s*")
_CAPTION = re.compile(
    r"(?P<indent>[ \t>]*)"
    r"(?:(?P<language>[a-z][\w+#.-]{0,19})(?:[ \t]*\r?\n[ \t>]*)?)?"
    r"(?:Copy code)+"
    # Alone on its line, or run into the code. "Copy codes" and "Copy code of" are somebody's text.
    r"(?:[ \t]*(?P<line_end>\r?\n)"
    r"|(?!(?:s|d|rs?|cs?|bases?|books?|points?|words?)\b)(?=[^\s.,:;!?])(?!.*(?:```|~~~|Copy code)))"
)


def remove_copy_code(text: str) -> str:
    r"""Without the caption of a code block, a language and Copy code, where it became the block's first line.

    It may run into the first line of the code. The language goes onto the fence, if that has none.

    >>> remove_copy_code("```\npythonCopy code\nimport os\n\n\n```")
    '```python\nimport os\n\n\n```'
    >>> remove_copy_code("```\nCopy codeimport os\n```"), remove_copy_code("```cssCopy code\na {}\n```")
    ('```\nimport os\n```', '```css\na {}\n```')
    >>> remove_copy_code("pythonCopy code\nPress Copy code to copy.")
    'pythonCopy code\nPress Copy code to copy.'
    >>> remove_copy_code("```\nCopy code from a to b\n```"), remove_copy_code("```\nx\nCopy code\n```")
    ('```\nCopy code from a to b\n```', '```\nx\nCopy code\n```')
    >>> remove_copy_code("The block says only:\n```\nCopy code\n```")
    'The block says only:\n```\nCopy code\n```'
    """
    if "Copy code" not in text:
        return text
    pieces = []
    at = 0
    for fence, end in find_fences(text):
        on_fence = _CAPTION_ON_FENCE.fullmatch(fence[2])
        info = on_fence[1] if on_fence else fence[2].rstrip("\r")
        code_at = fence.end() + 1
        code_end = fence.end() + len(text[fence.end() : end].rstrip())
        indent = ""
        while (caption := _CAPTION.match(text, code_at, end)) and caption.end() < code_end:
            code_at = caption.end()
            indent += "" if caption["line_end"] else caption["indent"]
            info = info if info.strip() else caption["language"] or ""
        if (on_fence and code_end > fence.end()) or code_at > fence.end() + 1:
            line_end = "\r\n" if fence[2].endswith("\r") else "\n"
            pieces += [text[at : fence.start(2)], info, line_end, indent]
            at = code_at
    return "".join(pieces) + text[at:]


_COPY_COUNT = re.compile(r"^(?:[ \t]*Copy ?\d{1,9} chars / \d{1,9} words[ \t]*(?=\r?$)([\r\n]*))+", re.MULTILINE)


def remove_copy_counts(text: str) -> str:
    r"""Without the lines outside of code that only count what a Copy button copies; of the gaps beside one the longer.

    >>> remove_copy_counts("Done.\n\nCopy 123 chars / 45 words"), remove_copy_counts("a\nCopy123 chars / 45 words\n\nb")
    ('Done.', 'a\n\nb')
    >>> remove_copy_counts("It said Copy 123 chars / 45 words."), remove_copy_counts("123 chars / 45 words")
    ('It said Copy 123 chars / 45 words.', '123 chars / 45 words')
    >>> remove_copy_counts("```\nCopy 1 chars / 1 words\n```")
    '```\nCopy 1 chars / 1 words\n```'
    """
    if " chars / " not in text:
        return text
    borders = [0, *(border for fence, end in find_fences(text) for border in (fence.start(), end)), len(text)]
    pieces: list[str] = []
    at = 0
    for start, end in zip(borders[::2], borders[1::2], strict=True):
        for count in _COPY_COUNT.finditer(text, start, end):
            before = text[at : count.start()]
            kept = before.rstrip("\r\n")
            at = count.end()
            has_both = (kept or pieces) and at < len(text)
            pieces += [kept, max(before[len(kept) :], count[1], key=len) if has_both else ""]
    return "".join(pieces) + text[at:]


_COUNTER = re.compile(r"(\d{1,2}) / (\d{1,2})[ \t]*[\r\n]++(?=\s*\S)")
MAX_COUNTED = 30  # nobody asks for more answers to one question; 12 / 31 is a date
_FRACTION_WORD = re.compile(
    r"[¼½¾]|\b(?:fractions?|decimals?|ratios?|percent\w*|proportions?|hal(?:f|ves)|thirds?|quarters?|"
    r"(?:four|fif|six|seven|eigh|nin|ten)ths?|divi[ds]\w*|quotients?|numerators?|denominators?|probabilit\w*|odds|"
    r"chances?|scores?|ratings?|dates?|time signatures?)\b",
    re.IGNORECASE,
)


def remove_regenerate_counter(text: str, question: str) -> str:
    r"""Without a first line that says which of the answers this is; `question` is what an answer answers, else empty.

    Such a line has n <= m <= 30 and more text below it. It may be a fraction, and stays, where the question, or what
    a user typed below the line, has a digit or a word of fractions. Only `remove_page_noise` knows whether the
    record is a page's.

    >>> remove_regenerate_counter("2 / 3\n\nSure! Here is", "Write a poem")
    'Sure! Here is'
    >>> remove_regenerate_counter("3 / 4\nThat is 6/8 in lowest terms.", "What is 6/8?")
    '3 / 4\nThat is 6/8 in lowest terms.'
    >>> remove_regenerate_counter("3 / 4\n\nis the answer.", "What is three quarters as a fraction?")
    '3 / 4\n\nis the answer.'
    >>> remove_regenerate_counter("1 / 2\nWrite a poem", ""), remove_regenerate_counter("3 / 4\nas a decimal", "")
    ('Write a poem', '3 / 4\nas a decimal')
    >>> remove_regenerate_counter("3 / 4 of the people", ""), remove_regenerate_counter("1 / 2", "")
    ('3 / 4 of the people', '1 / 2')
    >>> remove_regenerate_counter("4 / 3\nis above one", ""), remove_regenerate_counter("12 / 31\nParty plan", "")
    ('4 / 3\nis above one', '12 / 31\nParty plan')
    """
    at = 0
    while (counter := _COUNTER.match(text, at)) and 1 <= int(counter[1]) <= int(counter[2]) <= MAX_COUNTED:
        at = counter.end()
    if not at:
        return text
    judged = question or text[at:]
    return text if any(map(str.isdigit, judged)) or _FRACTION_WORD.search(judged) else text[at:]


def repeats_counter(messages: Messages, counted: Messages) -> bool:
    r"""Whether two turns of one role begin with the same counter; `counted` is them without what may be one.

    Parts of a long text are counted too, but then each has a number of its own.

    >>> def repeats(first, second):
    ...     turns = Message("user", first), Message("user", second)
    ...     return repeats_counter(turns, _remove_counters(turns))
    >>> repeats("1 / 1\nWrite a poem", "1 / 1\nLonger"), repeats("1 / 2\nFirst part", "2 / 2\nSecond part")
    (True, False)
    >>> repeats("3 / 4\nas a decimal", "3 / 4\nin percent")
    False
    """
    counters = [
        (before.role, *before.text.split(maxsplit=3)[:3])
        for before, after in zip(messages, counted, strict=True)
        if before.text != after.text
    ]
    return len(set(counters)) < len(counters)


# What a row of the page holds behind what the user typed, as it runs into it where the row was saved as bare text.
_ROW_ENDS = (
    "Save & SubmitCancel",
    "Share Prompt",
    "This content may violate our content policy. If you believe this to be in error, please submit your feedback — "
    "your input will aid our research in this area.",
)
_BEFORE_WORDS = "\"'`“«([{<>*_/-:"  # behind one of these the words are the user's own
_ROW_COUNTER = re.compile(r"\d{1,3} / \d{1,3}(?=[^\s\d])")


def remove_glued_buttons(text: str) -> str:
    """Without the captions of a page's buttons, and its notice, that run into the end of what a user typed.

    Then a counter that runs into the beginning goes too.

    >>> remove_glued_buttons("thanksSave & SubmitCancel"), remove_glued_buttons("1 / 1Write a poem.Share Prompt")
    ('thanks', 'Write a poem.')
    >>> remove_glued_buttons("Where is the button Share Prompt"), remove_glued_buttons("Share Prompt")
    ('Where is the button Share Prompt', 'Share Prompt')
    >>> remove_glued_buttons("1 / 1Write a poem.")
    '1 / 1Write a poem.'
    """
    if not text.endswith(_ROW_ENDS):
        return text
    at = len(text)
    while row_end := next((row_end for row_end in _ROW_ENDS if text.endswith(row_end, 0, at)), ""):
        at -= len(row_end)
    if not at or text[at - 1].isspace() or text[at - 1] in _BEFORE_WORDS:
        return text
    counter = _ROW_COUNTER.match(text)
    return text[counter.end() if counter else 0 : at]


# ---- The order of turns ----

# A turn to which the record itself gives a weight above 0 is trained: no rule removes it or joins it to another.


def repair_turns(
    system: str, messages: Messages, *, leading_answers: LeadingAnswers = "context"
) -> tuple[str, Messages, tuple[str, ...]] | str:
    """(system, messages, names of the rules that changed something), or "no_answer" if no answer is left.

    Applies the rules below in their order, then lifts leading system turns into `system`, which counts as no repair:
    the two are two ways to write the same. A `system` of only white space is an empty turn too. Repairing
    twice changes nothing that repairing once left.

    leading_answers: whether answers before the first user turn stay as context without a loss, are trained as all
    others, or are removed.

    Worked example: "", [assistant "Welcome!", user "Hi", user "there", assistant "Hello", user "Bye"] gives
    "", [assistant "Welcome!" of weight 0, user "Hi\\n\\nthere", assistant "Hello"],
    (leading_answer_untrained, user_turns_joined, unanswered_turn_removed).
    """
    rules: list[tuple[str, Callable[[Messages], Messages]]] = [
        # First, so that no other rule sees them.
        ("empty_turn_removed", remove_empty_turns),
        *_LEADING_RULES[leading_answers],
        # After removals that make turns neighbours.
        ("user_turns_joined", join_user_turns),
        ("unanswered_turn_removed", remove_unanswered_turns),
    ]
    repairs = []
    for name, rule in rules:
        repaired = rule(messages)
        if repaired != messages:
            repairs.append(name)
        messages = repaired
    num_leading = 0 if leading_answers == "train" else _num_leading(messages)
    if not any(message.role == "assistant" for message in messages[num_leading:]) and not any(
        map(_is_trained, messages)
    ):
        return "no_answer"
    if system and not system.strip():
        system = ""
        if "empty_turn_removed" not in repairs:
            repairs.insert(0, "empty_turn_removed")
    system, messages = lift_leading_system(system, messages)
    return system, messages, tuple(repairs)


def _is_trained(message: Message) -> bool:
    return bool(message.weight)


def _num_leading(messages: Messages) -> int:
    """How many turns stand before the first user turn."""
    return sum(1 for _ in takewhile(lambda message: message.role != "user", messages))


def remove_empty_turns(messages: Messages) -> Messages:
    """Without the turns whose text is empty or only white space."""
    return tuple(message for message in messages if message.text.strip() or _is_trained(message))


def remove_leading_answers(messages: Messages) -> Messages:
    """Without the assistant and tool turns before the first user turn: they answer nothing that is known."""
    leading, rest = messages[: _num_leading(messages)], messages[_num_leading(messages) :]
    return tuple(message for message in leading if message.role == "system" or _is_trained(message)) + rest


def mute_leading_answers(messages: Messages) -> Messages:
    """With the weight 0 on the assistant turns before the first user turn that have none of their own."""
    leading, rest = messages[: _num_leading(messages)], messages[_num_leading(messages) :]
    return (
        tuple(
            replace(message, weight=0.0) if message.role == "assistant" and message.weight is None else message
            for message in leading
        )
        + rest
    )


_LEADING_RULES: dict[LeadingAnswers, tuple[tuple[str, Callable[[Messages], Messages]], ...]] = {
    "context": (("leading_answer_untrained", mute_leading_answers),),
    "train": (),
    "drop": (("leading_answer_removed", remove_leading_answers),),
}


def join_user_turns(messages: Messages) -> Messages:
    """With user turns in a row made one, a blank line between their texts."""
    joined: list[Message] = []
    for is_asked, run in groupby(messages, key=lambda message: message.role == "user" and not _is_trained(message)):
        turns = list(run)
        if is_asked:
            turns = [replace(turns[0], text=BLANK_LINE.join(turn.text for turn in turns))]
        joined += turns
    return tuple(joined)


def remove_unanswered_turns(messages: Messages) -> Messages:
    """Without the turns after the last one that is the assistant's or is trained."""
    answers = [index for index, message in enumerate(messages) if message.role == "assistant" or _is_trained(message)]
    return messages[: answers[-1] + 1] if answers else ()


def lift_leading_system(system: str, messages: Messages) -> tuple[str, Messages]:
    """(system text, the other messages), the leading system turns joined behind `system` by blank lines.

    A system turn that carries a weight above 0 stays a message, and so do those behind it: the system text of
    a conversation has no weight, so lifting would silently take it out of the loss.
    """
    leading = tuple(takewhile(lambda message: message.role == "system" and not _is_trained(message), messages))
    texts = ([system] if system else []) + [message.text for message in leading]
    return BLANK_LINE.join(texts), messages[len(leading) :]
