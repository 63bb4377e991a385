"""Models side by side: they answer MT-bench and AlpacaEval, a judge grades and compares; first all is counted."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from ochat_train.evaluate.alpaca import AlpacaRate, alpaca_win_rate
from ochat_train.evaluate.ask import CachedClient, Counts
from ochat_train.evaluate.endpoint import Endpoint, serve
from ochat_train.evaluate.grade import Grade, grade_turn
from ochat_train.evaluate.journal import Answer
from ochat_train.evaluate.judge import Outcome, Pair, compare_pair
from ochat_train.evaluate.question_sets import QUESTION_SETS, Question, ask_turns
from ochat_train.evaluate.table_inputs import ALPACA, MT, Benchmark, Contender
from ochat_train.report.page import align

_JUDGE_TOKENS = 1024  # of a verdict


@dataclass(slots=True)
class Findings:
    """Of a contender, by the names of benchmarks and questions. grades: of MT-bench, one a turn."""

    answers: dict[str, dict[str, list[Answer]]]
    counts: Counts
    grades: dict[str, dict[int, Grade]] = field(default_factory=dict)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    alpaca: AlpacaRate | None = None


# A client of an endpoint, under a condition; rehearses as in CachedClient.
ClientMaker = Callable[[Endpoint, str | None, bool], CachedClient]


def rehearse(
    contenders: Sequence[Contender],
    benchmarks: Sequence[Benchmark],
    judge: Endpoint,
    make_client: ClientMaker,
    *,
    max_tokens: int | None,
) -> tuple[dict[str, Findings], dict[str, Counts]]:
    """What is known from earlier runs, and the counts of what is not, by contender and for the judge."""
    found = {
        contender.label: ask_all(
            make_client(replace(contender.endpoint, url=""), contender.condition, True),
            benchmarks,
            title=contender.label,
            max_tokens=max_tokens,
        )
        for contender in contenders
    }
    client = make_client(judge, None, True)
    judge_all(client, found, benchmarks)
    return found, {label: findings.counts for label, findings in found.items()} | {"the judge": client.counts}


def describe_costs(costs: dict[str, Counts]) -> str:
    """The requests to come of a rehearsal, as lines."""
    rows = [
        ["asked", "requests", "tokens in prompts", "tokens in answers", "known"],
        *(
            [name, *(f"{num:,}" for num in (c.num_answered, c.prompt_tokens, c.completion_tokens, c.num_known))]
            for name, c in costs.items()
        ),
    ]
    note = "At most; a token is taken as 4 characters, and each answer as long as it may be."
    return "\n".join([*align(rows), note])


def measure(
    contenders: Sequence[Contender],
    benchmarks: Sequence[Benchmark],
    judge: CachedClient,
    make_client: ClientMaker,
    *,
    known: dict[str, Findings],
    max_tokens: int | None,
    flags: Sequence[str],
) -> dict[str, Findings]:
    """Ask all contenders, one after the other, and then the judge.

    known: of a rehearsal; a contender whose answers are all known is not served.
    """
    found = {}
    for contender in contenders:
        findings = replace(known[contender.label], grades={}, outcomes={}, alpaca=None)
        if findings.counts.num_answered:
            with serve(contender.target, contender.endpoint, flags) as endpoint:
                findings = ask_all(
                    make_client(endpoint, contender.condition, False),
                    benchmarks,
                    title=contender.label,
                    max_tokens=max_tokens,
                )
        found[contender.label] = findings
    judge_all(judge, found, benchmarks)
    return found


def ask_all(client: CachedClient, benchmarks: Iterable[Benchmark], *, title: str, max_tokens: int | None) -> Findings:
    """The answers to all questions, as far as the model gives them."""
    answers: dict[str, dict[str, list[Answer]]] = {benchmark.name: {} for benchmark in benchmarks}

    async def work(item: tuple[str, Question]) -> None:
        name, question = item
        answers[name][question.name] = await ask_turns(
            client, question, max_tokens=max_tokens or QUESTION_SETS[name].max_tokens, temperature=None
        )

    items = {
        f"{benchmark.name} {question.name}": (benchmark.name, question)
        for benchmark in benchmarks
        for question in benchmark.questions
    }
    asyncio.run(client.run(items, work, title=title))
    return Findings(answers, client.counts)


def judge_all(judge: CachedClient, found: dict[str, Findings], benchmarks: Iterable[Benchmark]) -> None:
    """Add the judge's grades, comparisons and AlpacaEval's figure to the findings."""
    for benchmark in benchmarks:
        if benchmark.name == MT:
            jobs: dict[str, Callable[[], Awaitable[None]]] = {}
            for label, findings in found.items():
                for question in benchmark.questions:
                    if answers := findings.answers[MT].get(question.name):
                        texts = tuple(answer.text for answer in answers)
                        for turn in range(1, len(texts) + 1):
                            jobs[f"{label}, {question.name}, turn {turn}"] = partial(
                                _grade, judge, findings, question, texts, turn
                            )
                        if benchmark.baseline is not None:
                            pair = Pair(question.turns, texts, benchmark.baseline_answers[question.name])
                            jobs[f"{label}, {question.name}, pair"] = partial(
                                _compare, judge, findings, question.name, pair
                            )
            asyncio.run(judge.run(jobs, lambda job: job(), title=f"judge, {MT}"))
        else:
            references = [
                {"instruction": name, "output": output, "generator": f"{benchmark.baseline} (baseline)"}
                for name, (output,) in benchmark.baseline_answers.items()
            ]
            for label, findings in found.items():
                outputs = [
                    {"instruction": name, "output": answers[0].text, "generator": label}
                    for name, answers in findings.answers[ALPACA].items()
                ]
                mine = [row for row in references if row["instruction"] in findings.answers[ALPACA]]
                findings.alpaca = alpaca_win_rate(judge, label, outputs, mine) if outputs else None


async def _grade(
    judge: CachedClient, findings: Findings, question: Question, texts: tuple[str, ...], turn: int
) -> None:
    grade = await grade_turn(judge, question, texts, turn, max_tokens=_JUDGE_TOKENS)
    findings.grades.setdefault(question.name, {})[turn] = grade


async def _compare(judge: CachedClient, findings: Findings, name: str, pair: Pair) -> None:
    findings.outcomes[name] = await compare_pair(judge, pair, max_tokens=_JUDGE_TOKENS)
