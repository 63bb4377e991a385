"""The rules that remove what ShareGPT's pages, and the tools that converted them, left in texts.

Each rule removes something only where it can be nothing else; its examples show what it removes and what it leaves. No
rule trims a text or changes it otherwise: white space at its ends is the writer's.
"""

import re
from collections.abc import Iterator
from dataclasses import replace

from ochat_train.conversations.schema import Message

Messages = tuple[Message, ...]


def remove_page_noise(messages: Messages, *, is_page: bool) -> Messages:
    r"""The messages with the rules below applied to every text, except a tool's output, which is data.

    A first line like 1 / 2 is removed only where the record surely comes from a page: it was saved as one or was HTML
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
    clean = tuple(map(_remove_captions, messages))
    counted = _remove_counters(clean)
    return counted if is_page or clean != messages or repeats_counter(clean, counted) else clean


def _remove_captions(message: Message) -> Message:
    if message.role == "tool":
        return message
    text = remove_glued_buttons(message.text) if message.role == "user" else message.text
    return replace(message, text=remove_copy_counts(remove_copy_code(text)))


def _remove_counters(messages: Messages) -> Messages:
    clean = []
    question = ""
    for message in messages:
        if message.role != "tool":
            asked = question if message.role == "assistant" else ""
            message = replace(message, text=remove_regenerate_counter(message.text, asked))
        if message.role == "user":
            question = message.text
        clean.append(message)
    return tuple(clean)


_FENCE = re.compile(r"^[ \t>]*(?:(?:[-*+]|\d{1,9}[.)])[ \t]+)*(`{3,}|~{3,})(.*)$", re.MULTILINE)


def find_fences(text: str) -> Iterator[tuple[re.Match[str], int]]:
    r"""Each fenced block of a text: the match of its opening fence (marks, info string) and where its inside ends.

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
    # Alone on its line, or joined to the code. "Copy codes" and "Copy code of" are somebody's text.
    r"(?:[ \t]*(?P<line_end>\r?\n)"
    r"|(?!(?:s|d|rs?|cs?|bases?|books?|points?|words?)\b)(?=[^\s.,:;!?])(?!.*(?:```|~~~|Copy code)))"
)


def remove_copy_code(text: str) -> str:
    r"""The text without captions of code blocks, a language and Copy code, that became the first line of their block.

    A caption may be joined to the first line of the code. Its language is written on the fence, if that has none.

    >>> remove_copy_code("```\npythonCopy code\nimport os\n\n\n```")
    '```python\nimport os\n\n\n```'
    >>> remove_copy_code("```\nCopy codeimport os\n```"), remove_copy_code("```cssCopy code\na {}\n```")
    ('```\nimport os\n```', '```css\na {}\n```')
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
    r"""The text without the lines outside of code that only count what a Copy button copies.

    Of the line breaks before and after such a line the longer run stays.

    >>> remove_copy_counts("Done.\n\nCopy 123 chars / 45 words"), remove_copy_counts("a\nCopy123 chars / 45 words\n\nb")
    ('Done.', 'a\n\nb')
    >>> remove_copy_counts("It said Copy 123 chars / 45 words."), remove_copy_counts("123 chars / 45 words")
    ('It said Copy 123 chars / 45 words.', '123 chars / 45 words')
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
MAX_COUNTED = 30  # nobody regenerates an answer more often; 12 / 31 is a date
_FRACTION_WORD = re.compile(
    r"[¼½¾]|\b(?:fractions?|decimals?|ratios?|percent\w*|proportions?|hal(?:f|ves)|thirds?|quarters?|"
    r"(?:four|fif|six|seven|eigh|nin|ten)ths?|divi[ds]\w*|quotients?|numerators?|denominators?|probabilit\w*|odds|"
    r"chances?|scores?|ratings?|dates?|time signatures?)\b",
    re.IGNORECASE,
)


def remove_regenerate_counter(text: str, question: str) -> str:
    r"""The text without a first line that numbers regenerated answers, n / m. `question` is an answer's, else empty.

    Such a line has n <= m <= 30 and more text below it. It may be a fraction, and stays, where the question, or the
    user's own text below the line, has a digit or a word about fractions. Only `remove_page_noise` knows whether the
    record comes from a page.

    >>> remove_regenerate_counter("2 / 3\n\nSure! Here is", "Write a poem")
    'Sure! Here is'
    >>> remove_regenerate_counter("3 / 4\nThat is 6/8 in lowest terms.", "What is 6/8?")
    '3 / 4\nThat is 6/8 in lowest terms.'
    """
    at = 0
    while (counter := _COUNTER.match(text, at)) and 1 <= int(counter[1]) <= int(counter[2]) <= MAX_COUNTED:
        at = counter.end()
    if not at:
        return text
    judged = question or text[at:]
    return text if any(map(str.isdigit, judged)) or _FRACTION_WORD.search(judged) else text[at:]


def repeats_counter(messages: Messages, counted: Messages) -> bool:
    r"""Whether two turns of one role begin with the same counter; `counted` are the messages without counters.

    Parts of a long text are numbered too, but then each has a number of its own.

    >>> def repeats(first, second):
    ...     turns = Message("user", first), Message("user", second)
    ...     return repeats_counter(turns, _remove_counters(turns))
    >>> repeats("1 / 1\nWrite a poem", "1 / 1\nLonger"), repeats("1 / 2\nFirst part", "2 / 2\nSecond part")
    (True, False)
    """
    counters = [
        (before.role, *before.text.split(maxsplit=3)[:3])
        for before, after in zip(messages, counted, strict=True)
        if before.text != after.text
    ]
    return len(set(counters)) < len(counters)


# What follows the user's text in a row of the page, and is joined to it where the row was saved as bare text.
_ROW_ENDS = (
    "Save & SubmitCancel",
    "Share Prompt",
    "This content may violate our content policy. If you believe this to be in error, please submit your feedback — "
    "your input will aid our research in this area.",
)
_BEFORE_WORDS = "\"'`“«([{<>*_/-:"  # after one of these the words are the user's own
_ROW_COUNTER = re.compile(r"\d{1,3} / \d{1,3}(?=[^\s\d])")


def remove_glued_buttons(text: str) -> str:
    """The text without the captions of a page's buttons, and its notice, that are joined to the end of a user's text.

    With them goes a counter that is joined to its beginning.

    >>> remove_glued_buttons("thanksSave & SubmitCancel"), remove_glued_buttons("1 / 1Write a poem.Share Prompt")
    ('thanks', 'Write a poem.')
    >>> remove_glued_buttons("Where is the button Share Prompt"), remove_glued_buttons("Share Prompt")
    ('Where is the button Share Prompt', 'Share Prompt')
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
