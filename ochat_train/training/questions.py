"""The checks of a recipe, eval.checks: their questions, and the functions that score the answers."""

import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from ochat_train.conversations.schema import Conversation, Message
from ochat_train.files import require_packages
from ochat_train.recipe import CheckSection
from ochat_train.tokens.chat_template import encode_prompt
from ochat_train.tokens.tokenizer import ChatTokenizer

Record = dict[str, Any]
Score = Callable[[str, Record], float]


@dataclass(frozen=True, slots=True)
class Check:
    """Questions and what scores their answers.

    records: lines of the file. chats: of each line, without a condition. score: from an answer's text and its record, a
    number from 0 to 1; it may raise anything.
    """

    name: str
    records: list[Record]
    chats: list[Conversation]
    score: Score
    max_new_tokens: int


@dataclass(frozen=True, slots=True)
class Asked:
    """A question of a check under a condition. number: of the record. prompt: its ids, as in training."""

    check: Check
    number: int
    condition: str
    prompt: list[int]

    @property
    def question(self) -> str:
        """The first text of the user."""
        return first_question(self.check.chats[self.number])


def first_question(chat: Conversation) -> str:
    """The first text of the user."""
    return next(message.text for message in chat.messages if message.role == "user")


def read_checks(sections: Iterable[CheckSection]) -> tuple[Check, ...]:
    """The recipe's checks. Each function is called once, with the answer of its first question.

    Raises ValueError for a file that cannot be read, a line that is no question, or a function that fails.
    """
    checks = []
    for number, section in enumerate(sections):
        key = f"eval.checks.{number}"
        try:
            records, chats = _read_questions(Path(section.questions), section.num)
            needed = "answer" if section.check in ("exact_match", "math") else None
            if needed and (lacking := [line for line, record in enumerate(records, 1) if needed not in record]):
                raise ValueError(f"{section.questions} line {lacking[0]} has no {needed}, which {section.check} needs")
            score = _find_score(section)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
        try:
            _as_score(score(str(records[0].get("answer", "")), records[0]))
        except Exception as error:  # of any kind: it is the user's function
            raise ValueError(
                f"{key}.check: {section.check} fails for the first question of {section.questions} and its own "
                f"answer: {error!r}"
            ) from None
        checks.append(Check(section.name, records, chats, score, section.max_new_tokens))
    return tuple(checks)


def encode_questions(
    checks: Sequence[Check], tokenizer: ChatTokenizer, conditions: Sequence[str], *, max_positions: int
) -> tuple[Asked, ...]:
    """Every question under each condition. Raises ValueError where it and its answer are above `max_positions`."""
    asked = []
    for check in checks:
        for condition in conditions:
            for number, chat in enumerate(check.chats):
                try:
                    prompt = encode_prompt(replace(chat, condition=condition), tokenizer)
                except ValueError as error:
                    raise ValueError(f"check {check.name}, question {number + 1}: {error}") from None
                if len(prompt) + check.max_new_tokens > max_positions:
                    raise ValueError(
                        f"check {check.name}, question {number + 1}: {len(prompt):,} tokens and max_new_tokens "
                        f"{check.max_new_tokens:,} are above the model's {max_positions:,} positions; lower the second"
                    )
                asked.append(Asked(check, number, condition, prompt))
    return tuple(asked)


def score_answer(check: Check, text: str, number: int) -> float:
    """The score of an answer, from 0 to 1. Raises what the check's function raises."""
    return _as_score(check.score(text, check.records[number]))


def _as_score(value: Any) -> float:
    score = float(value)
    if not 0 <= score <= 1:
        raise ValueError(f"the score {value!r} is not from 0 to 1")
    return score


def _read_questions(file: Path, num: int | None) -> tuple[list[Record], list[Conversation]]:
    try:
        lines = [line for line in file.read_bytes().splitlines() if line.strip()][:num]
    except OSError as error:
        raise ValueError(f"questions {file} cannot be read: {error.strerror}") from None
    records, chats = [], []
    for number, line in enumerate(lines, start=1):
        try:
            record = orjson.loads(line)
            chats.append(_chat_of(record, f"{file}:{number}"))
        except (ValueError, TypeError, KeyError) as error:  # orjson's error is a ValueError
            raise ValueError(
                f"{file} line {number} is no question: {error}; a line is a JSON object with question, a text, or "
                "messages, a list of {role, content} that ends with the user's"
            ) from None
        records.append(record)
    if not records:
        raise ValueError(f"{file} has no questions")
    return records, chats


def _chat_of(record: Any, name: str) -> Conversation:
    """The chat of a record. Raises ValueError, TypeError or KeyError."""
    if not isinstance(record, dict):
        raise ValueError(f"it is {type(record).__name__}")
    turns = record["messages"] if "messages" in record else [{"role": "user", "content": record["question"]}]
    messages = [Message(turn["role"], turn["content"]) for turn in turns]
    for message in messages:
        if message.role not in ("system", "user", "assistant", "tool") or not isinstance(message.text, str):
            raise ValueError(f"a message has the role {message.role!r} and the content {message.text!r}")
    system = messages.pop(0).text if messages and messages[0].role == "system" else ""
    if not messages or messages[-1].role != "user":
        raise ValueError("its last message is not the user's")
    return Conversation(name, "check", "", system, tuple(messages))


# ------------------------------------------------------------------------------------------------------ functions


def _find_score(section: CheckSection) -> Score:
    if section.check == "exact_match":
        return lambda text, record: text.strip() == str(record["answer"]).strip()
    if section.check == "regex":
        return _Regex(section.pattern)
    if section.check == "math":
        require_packages("check: math", "math-verify", extra="checks")
        return _equals_in_math
    return _load_function(section.check)


class _Regex:
    """Whether a pattern is found in an answer; one with a group: whether its last match has the record's answer."""

    def __init__(self, pattern: str | None) -> None:
        self._pattern = pattern

    def __call__(self, text: str, record: Record) -> bool:
        pattern = record.get("pattern", self._pattern)
        if pattern is None:
            raise ValueError("neither the record nor the recipe has a pattern")
        matches = list(re.finditer(pattern, text))
        if not re.compile(pattern).groups:
            return bool(matches)
        return bool(matches) and (matches[-1][1] or "").strip() == str(record["answer"]).strip()


def _equals_in_math(text: str, record: Record) -> bool:
    from math_verify import parse, verify  # an extra

    return bool(verify(parse(str(record["answer"])), parse(text)))


def _load_function(place: str) -> Score:
    """The function of `module:function` or `path/to/file.py:function`. Raises ValueError."""
    module_name, _, name = place.rpartition(":")
    try:
        if module_name.endswith(".py"):
            path = Path(module_name)
            if not path.is_file():
                raise ValueError(f"check {place}: there is no file {path}")
            spec = importlib.util.spec_from_file_location(f"ochat_train_check_{path.stem}", path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module  # as an import does, which dataclasses need
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(module_name)
    except ValueError:
        raise
    except Exception as error:  # of any kind: the module is the user's
        raise ValueError(f"check {place}: the module cannot be loaded: {error!r}") from None
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"check {place}: the module has no function {name}")
    return function  # type: ignore[no-any-return]
