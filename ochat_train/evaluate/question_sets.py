"""The questions of MT-bench and AlpacaEval, and the files of answers that their judges read."""

import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from ochat_train.evaluate.ask import CachedClient, ChatMessages, TooLong
from ochat_train.evaluate.journal import Answer, key_of

# FastChat's temperatures by category (llm_judge/common.py, 0.2.36), unless a question has a required_temperature.
MT_TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
    "arena-hard-200": 0.0,
}
_OTHER_TEMPERATURE = 0.7
ERROR_ANSWER = "$ERROR$"  # FastChat's, for what could not be answered


@dataclass(frozen=True, slots=True)
class Question:
    """The texts that a model is asked, one after the other. fields: what goes into the file of answers as it is.

    references: for the first turns, right answers that the question file gives.
    """

    name: str
    turns: tuple[str, ...]
    temperature: float
    fields: dict[str, Any]
    category: str = ""
    references: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class QuestionSet:
    """A benchmark's questions and the format of its answers.

    package, file: where an installation may have the questions. max_tokens: of an answer, as in the benchmark's own
    scripts. write: the bytes of the file of answers, from questions with their answers and the model's name.
    """

    package: str
    file: str
    max_tokens: int
    read: Callable[[dict[str, Any]], Question]
    write: Callable[[Iterable[tuple[Question, Sequence[Answer]]], str], bytes]


def find_questions(question_set: QuestionSet, path: Path | None) -> Path:
    """The file of the questions: as given, or of the installed package. Raises ValueError when there is none."""
    if path is None:
        package = importlib.util.find_spec(question_set.package)
        folders = list(package.submodule_search_locations or []) if package else []
        path = next((file for folder in folders if (file := Path(folder) / question_set.file).is_file()), None)
        if path is None:
            raise ValueError(
                f"no questions: the package {question_set.package} is not installed or lacks {question_set.file}; "
                "give --questions FILE (docs/evaluation.md says where it is)"
            )
    if not path.is_file():
        raise ValueError(f"no file {path} with questions")
    return path


def read_questions(question_set: QuestionSet, path: Path) -> list[Question]:
    """All questions of a file of JSON lines or of one JSON list.

    The same question may be in it twice. Raises ValueError for other rows, and for two questions of one name.
    """
    try:
        questions = [question_set.read(row) for row in read_rows(path)]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not hold questions of this benchmark: {error!r}") from None
    by_name = {question.name: question for question in questions}
    if twice := next((question.name for question in questions if question.turns != by_name[question.name].turns), None):
        raise ValueError(f"{path} holds two questions {twice}")
    if not questions:
        raise ValueError(f"{path} holds no questions")
    return questions


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON list or of JSON lines. Raises ValueError."""
    data = path.read_bytes()
    try:
        rows = orjson.loads(data) if data.lstrip()[:1] == b"[" else [orjson.loads(line) for line in data.splitlines()]
    except orjson.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    return list(rows)


async def ask_turns(
    client: CachedClient, question: Question, *, max_tokens: int, temperature: float | None
) -> list[Answer]:
    """The answers to a question's turns; each is asked after all before it. Raises Unanswered.

    From a turn on that is too long for the model, they are `$ERROR$`.
    """
    messages: ChatMessages = []
    answers: list[Answer] = []
    temperature = question.temperature if temperature is None else temperature
    for turn in question.turns:
        messages = [*messages, {"role": "user", "content": turn}]
        try:
            answers.append(await client.ask(messages, temperature=temperature, max_tokens=max_tokens))
        except TooLong as error:
            client.counts.too_long[question.name] = str(error)
            return answers + [Answer(ERROR_ANSWER, False, None, None)] * (len(question.turns) - len(answers))
        messages = [*messages, {"role": "assistant", "content": answers[-1].text}]
    return answers


def _read_mt(row: dict[str, Any]) -> Question:
    temperature = row.get("required_temperature", MT_TEMPERATURES.get(row["category"], _OTHER_TEMPERATURE))
    turns = tuple(row["turns"])
    if not turns or not all(isinstance(turn, str) for turn in turns):
        raise ValueError(f"question {row['question_id']} has no turns of text")
    references = row.get("reference") or ()
    return Question(
        str(row["question_id"]),
        turns,
        float(temperature),
        {"question_id": row["question_id"]},
        row["category"],
        tuple(map(str, [references] if isinstance(references, str) else references)),
    )


def _write_mt(answered: Iterable[tuple[Question, Sequence[Answer]]], model: str) -> bytes:
    lines = []
    for question, answers in answered:
        turns = [answer.text for answer in answers]
        row = {
            **question.fields,
            "answer_id": key_of({"model": model, "name": question.name, "turns": turns})[:22],
            "model_id": model,
            "choices": [{"index": 0, "turns": turns}],
            "tstamp": answers[-1].time,
        }
        lines.append(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
    return b"".join(lines)


def _read_alpaca(row: dict[str, Any]) -> Question:
    if row.get("input"):
        raise ValueError(
            f"the instruction {row['instruction'][:60]!r} has an input of its own; write that into the instruction"
        )
    fields = {"instruction": row["instruction"], "dataset": row.get("dataset", "")}
    return Question(row["instruction"], (row["instruction"],), 0.0, fields, fields["dataset"])


def _write_alpaca(answered: Iterable[tuple[Question, Sequence[Answer]]], model: str) -> bytes:
    rows = [
        {
            "instruction": question.fields["instruction"],
            "output": answers[0].text,
            "generator": model,
            "dataset": question.fields["dataset"],
        }
        for question, answers in answered
    ]
    return orjson.dumps(rows, option=orjson.OPT_INDENT_2)


QUESTION_SETS = {
    "mt-bench": QuestionSet("fastchat", "llm_judge/data/mt_bench/question.jsonl", 1024, _read_mt, _write_mt),
    "alpaca-eval": QuestionSet("alpaca_eval", "alpaca_eval.json", 2048, _read_alpaca, _write_alpaca),
}
