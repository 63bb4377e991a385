"""The results of `table` as data: the answers in the benchmarks' formats, the JSON file, the judge's grades."""

from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from ochat_train.evaluate.alpaca import ANNOTATOR
from ochat_train.evaluate.endpoint import Endpoint
from ochat_train.evaluate.grade import NEED_REFERENCE, mean_interval
from ochat_train.evaluate.judge import Outcome, win_rate
from ochat_train.evaluate.question_sets import ERROR_ANSWER, QUESTION_SETS
from ochat_train.evaluate.table import Findings
from ochat_train.evaluate.table_inputs import MT, Benchmark, Contender
from ochat_train.files import publish_file


def write_answers(folder: Path, benchmarks: Iterable[Benchmark], contender: Contender, findings: Findings) -> None:
    """Write FOLDER/BENCHMARK/LABEL in the format of each benchmark."""
    for benchmark in benchmarks:
        answers = findings.answers[benchmark.name]
        done = [(question, answers[question.name]) for question in benchmark.questions if question.name in answers]
        ending = "jsonl" if benchmark.name == MT else "json"
        with publish_file(folder / benchmark.name / f"{contender.label}.{ending}") as file:
            file.write(QUESTION_SETS[benchmark.name].write(done, contender.label))


def summarize(
    contenders: Sequence[Contender], found: dict[str, Findings], benchmarks: Sequence[Benchmark], judge: Endpoint
) -> dict[str, Any]:
    """All results, as they are in the JSON file."""
    described = {}
    for benchmark in benchmarks:
        described[benchmark.name] = {
            "questions": str(benchmark.path),
            "num_questions": len({question.name for question in benchmark.questions}),
            "baseline": benchmark.baseline,
        } | (
            {
                "num_without_reference": sum(
                    question.category in NEED_REFERENCE and not question.references for question in benchmark.questions
                )
            }
            if benchmark.name == MT
            else {"annotator": ANNOTATOR}
        )
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "judge": {"model": judge.model, "url": judge.url},
        "benchmarks": described,
        "models": [_row(contender, found[contender.label], benchmarks) for contender in contenders],
    }


def _row(contender: Contender, findings: Findings, benchmarks: Iterable[Benchmark]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": contender.label,
        "model": contender.endpoint.model,
        "condition": contender.condition,
        "context": contender.endpoint.num_positions,
    }
    for benchmark in benchmarks:
        answers = findings.answers[benchmark.name]
        names = list(dict.fromkeys(question.name for question in benchmark.questions))
        row[benchmark.name] = {
            "num_answered": len(answers),
            "error": [name for name in names if any(said.text == ERROR_ANSWER for said in answers.get(name, ()))],
            "unanswered": [name for name in names if name not in answers],
        } | (_mt_bench(findings, benchmark) if benchmark.name == MT else _alpaca_eval(findings))
    return row


def _mt_bench(findings: Findings, benchmark: Benchmark) -> dict[str, Any]:
    ratings = {}
    for question in benchmark.questions:
        if question.name in findings.answers[MT]:
            grades = findings.grades.get(question.name, {})
            turns = range(1, len(question.turns) + 1)
            ratings[question.name] = [grades[turn].rating if turn in grades else None for turn in turns]
    categories: dict[str, list[str]] = {}
    for question in benchmark.questions:
        categories.setdefault(question.category, []).append(question.name)
    num_turns = max(len(question.turns) for question in benchmark.questions)
    return {
        **_score(ratings.values()),
        "num_unrated": sum(rating is None for group in ratings.values() for rating in group),
        "turns": [_score([group[turn : turn + 1] for group in ratings.values()])["score"] for turn in range(num_turns)],
        **_rate(findings.outcomes.values()),
        "categories": {
            category: {
                **_score(ratings[name] for name in names if name in ratings),
                **_rate(findings.outcomes[name] for name in names if name in findings.outcomes),
            }
            for category, names in categories.items()
        },
        "ratings": ratings,
        "comparisons": findings.outcomes,
    }


def _score(groups: Iterable[Sequence[float | None]]) -> dict[str, Any]:
    rated = [known for group in groups if (known := [rating for rating in group if rating is not None])]
    if not rated:
        return {"score": None, "score_95": None, "num_rated": 0}
    score, *interval = mean_interval(rated)
    return {"score": score, "score_95": interval, "num_rated": sum(map(len, rated))}


def _rate(outcomes: Iterable[Outcome]) -> dict[str, Any]:
    rate = win_rate(Counter(outcomes))
    interval = None if rate.rate is None else [rate.low, rate.high]
    return {"win_rate": rate.rate, "win_rate_95": interval, "outcomes": dict(rate.outcomes)}


def _alpaca_eval(findings: Findings) -> dict[str, Any]:
    found = findings.alpaca
    return {
        "win_rate": found and found.rate,
        "win_rate_95": found and [found.low, found.high],
        "num_judged": found.num_judged if found else 0,
        "alpaca_eval": found and found.version,
    }


def judgments(judge: str, found: dict[str, Findings]) -> bytes:
    """The grades as JSON lines with the fields that FastChat's show_result reads; without a rating the score is -1."""
    lines = []
    for label, findings in found.items():
        for name, turns in findings.grades.items():
            for turn, grade in sorted(turns.items()):
                row = {
                    "question_id": int(name) if name.isdecimal() else name,
                    "model": label,
                    "judge": [judge, "single"],
                    "judgment": grade.judgment,
                    "score": -1 if grade.rating is None else grade.rating,
                    "turn": turn,
                }
                lines.append(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
    return b"".join(lines)
