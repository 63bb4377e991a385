"""A trained model measured: held-out loss, answers for MT-bench and AlpacaEval, lm-eval, comparison by a judge.

python -m ochat_train.evaluate held-out MODEL STORE | answer BENCHMARK MODEL_OR_URL OUT [flags of serve]
    | compare BENCHMARK FIRST SECOND --judge URL | lm-eval MODEL_OR_URL TASK ...
"""

import argparse
import asyncio
import importlib.util
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson

from ochat_train.evaluate.ask import Asker, Counts
from ochat_train.evaluate.benchmarks import (
    BENCHMARKS,
    Question,
    ask_turns,
    find_questions,
    read_questions,
    replace_file,
)
from ochat_train.evaluate.endpoint import Endpoint, reach
from ochat_train.evaluate.harness import run_tasks
from ochat_train.evaluate.journal import Answer, Journal
from ochat_train.evaluate.judge import Outcome, Pair, judge, read_pairs, win_rate

INCOMPLETE, CUT = 1, 130


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one of the commands. Exit code 1 when requests failed for good, 130 when it was cut."""
    options, flags = make_parser().parse_known_args(arguments)
    if flags and options.command != "answer":
        sys.exit(f"error: no flag {flags[0]}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that a server of its own ends with it
    try:
        sys.exit(options.run(options, flags))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("cut; the same command goes on where it was", file=sys.stderr)
        sys.exit(CUT)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m ochat_train.evaluate", description="Measure a trained model.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    held_out = commands.add_parser(
        "held-out", help="loss and condition probe on a token store, as training reports them", allow_abbrev=False
    )
    held_out.add_argument("model", metavar="MODEL", help="an exported model, or the folder of a run")
    held_out.add_argument("store", metavar="STORE", help="a token store of the same template")
    held_out.add_argument("--split", choices=("eval", "train"), default="eval", help="which examples (eval)")
    held_out.add_argument("--tokens-per-batch", type=int, metavar="T", help="(those of training)")
    held_out.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    held_out.set_defaults(run=_held_out)

    answer = commands.add_parser(
        "answer", help="answers to a benchmark, for its judge; other flags go to serve", allow_abbrev=False
    )
    answer.add_argument("benchmark", choices=sorted(BENCHMARKS))
    answer.add_argument("target", metavar="MODEL_OR_URL", help="a model, which is served meanwhile, or http://HOST/v1")
    answer.add_argument("out", metavar="OUT", type=Path, help="file of the answers; OUT.asked grows beside it")
    answer.add_argument("--questions", type=Path, metavar="F", help="(those of the installed package)")
    answer.add_argument("--condition", help="(the model's own)")
    answer.add_argument("--name", help="of the model in the answers (its own, with the condition)")
    answer.add_argument("--temperature", type=float, metavar="X", help="of all answers (the benchmark's)")
    _add_asking(answer, max_tokens=None)
    answer.set_defaults(run=_answer)

    compare = commands.add_parser("compare", help="win rate of two files of answers, by a judge", allow_abbrev=False)
    compare.add_argument("benchmark", choices=sorted(BENCHMARKS))
    compare.add_argument("first", metavar="FIRST", type=Path, help="answers, as `answer` writes them")
    compare.add_argument("second", metavar="SECOND", type=Path)
    compare.add_argument("--judge", required=True, metavar="URL", dest="target", help="http://HOST/v1 of the judge")
    compare.add_argument("--questions", type=Path, metavar="F", help="of mt-bench (those of the installed package)")
    compare.add_argument("--out", type=Path, required=True, help="JSON file of the outcomes; OUT.asked grows beside it")
    _add_asking(compare, max_tokens=1024)
    compare.set_defaults(run=_compare)

    harness = commands.add_parser("lm-eval", help="tasks of EleutherAI's harness", allow_abbrev=False)
    harness.add_argument("target", metavar="MODEL_OR_URL")
    harness.add_argument("tasks", metavar="TASK", nargs="+", help="names that lm-eval knows, or files of tasks")
    harness.add_argument("--model", metavar="M", help="its name at a URL (the first that is listed)")
    harness.add_argument("--condition", help="(the model's own)")
    harness.add_argument("--limit", type=int, metavar="N", help="examples of each task (all)")
    harness.add_argument("--batch-size", type=int, default=1, metavar="B", help="of a MODEL (1)")
    harness.add_argument("--concurrency", type=int, default=8, metavar="N", help="requests at once to a URL (8)")
    harness.add_argument("--out", type=Path, help="also write all results to this JSON file")
    harness.set_defaults(run=_harness)
    return parser


def _add_asking(parser: argparse.ArgumentParser, *, max_tokens: int | None) -> None:
    parser.add_argument("--model", metavar="M", help="its name at a URL (the first that is listed)")
    shown = max_tokens or "the benchmark's"
    parser.add_argument("--max-tokens", type=int, default=max_tokens, metavar="T", help=f"of an answer ({shown})")
    parser.add_argument("--concurrency", type=int, default=8, metavar="N", help="questions at once (8)")
    parser.add_argument("--tries", type=int, default=6, metavar="N", help="of a request, before it has failed (6)")
    parser.add_argument("--timeout", type=float, default=600, metavar="S", help="of a request, in seconds (600)")


def _check_asking(options: argparse.Namespace) -> None:
    """Raise ValueError for what cannot be meant, or without the client."""
    if importlib.util.find_spec("openai") is None:
        raise ValueError("the package openai is not installed: pip install 'ochat_train[serve]'")
    for name in ("concurrency", "tries", "max_tokens", "timeout"):
        if (value := getattr(options, name)) is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} {value} is not above 0")


def _held_out(options: argparse.Namespace, flags: Sequence[str]) -> int:
    from ochat_train.evaluate.held_out import evaluate_held_out  # loads DeepSpeed, which takes seconds

    figures = evaluate_held_out(
        options.model, options.store, split=options.split, tokens_per_batch=options.tokens_per_batch
    )
    print(orjson.dumps(figures, option=orjson.OPT_INDENT_2).decode())
    if options.out is not None:
        replace_file(options.out, orjson.dumps(figures, option=orjson.OPT_INDENT_2))
    return 0


def _answer(options: argparse.Namespace, flags: Sequence[str]) -> int:
    _check_asking(options)
    if options.temperature is not None and not 0 <= options.temperature <= 2:
        raise ValueError(f"--temperature {options.temperature} is not between 0 and 2")
    benchmark = BENCHMARKS[options.benchmark]
    questions = read_questions(benchmark, find_questions(benchmark, options.questions))
    max_tokens = options.max_tokens or benchmark.max_tokens
    answered: dict[str, list[Answer]] = {}

    with (
        Journal(_journal_of(options.out)) as journal,
        reach(options.target, model=options.model, condition=options.condition, flags=flags) as endpoint,
    ):
        asker = _asker(options, endpoint, journal, options.condition)

        async def work(question: Question) -> None:
            answered[question.name] = await ask_turns(
                asker, question, max_tokens=max_tokens, temperature=options.temperature
            )

        items = {question.name: question for question in questions}
        asyncio.run(asker.run(items, work, concurrency=options.concurrency, title=options.benchmark))
    of_condition = "" if options.condition is None else f"-{options.condition}"
    name = options.name or endpoint.model + of_condition
    done = [(question, answered[question.name]) for question in questions if question.name in answered]
    replace_file(options.out, benchmark.write(done, name))
    print(f"{options.out}: {len(done):,} of {len(questions):,} questions, answered by {name}")
    return _end(asker.counts)


def _compare(options: argparse.Namespace, flags: Sequence[str]) -> int:
    _check_asking(options)
    questions = None
    if options.benchmark == "mt-bench":
        benchmark = BENCHMARKS[options.benchmark]
        questions = read_questions(benchmark, find_questions(benchmark, options.questions))
    pairs = read_pairs(options.first, options.second, questions)
    outcomes: dict[str, Outcome] = {}
    with (
        Journal(_journal_of(options.out)) as journal,
        reach(options.target, model=options.model, condition=None, flags=()) as endpoint,
    ):
        asker = _asker(options, endpoint, journal, None)

        async def work(named: tuple[str, Pair]) -> None:
            outcomes[named[0]] = await judge(asker, named[1], max_tokens=options.max_tokens)

        items = {name: (name, pair) for name, pair in pairs.items()}
        asyncio.run(asker.run(items, work, concurrency=options.concurrency, title="judge"))
    rate = win_rate(Counter(outcomes.values()))
    result: dict[str, Any] = {
        "first": str(options.first),
        "second": str(options.second),
        "judge": endpoint.model,
        "win_rate": rate.rate,
        "interval_95": [rate.low, rate.high],
        "counts": dict(rate.outcomes),
        "failed": len(asker.counts.failures),
        "outcomes": {name: outcomes[name] for name in pairs if name in outcomes},
    }
    replace_file(options.out, orjson.dumps(result, option=orjson.OPT_INDENT_2))
    print(rate)
    return _end(asker.counts)


def _harness(options: argparse.Namespace, flags: Sequence[str]) -> int:
    results = run_tasks(
        options.target,
        options.tasks,
        model=options.model,
        condition=options.condition,
        limit=options.limit,
        batch_size=options.batch_size,
        concurrency=options.concurrency,
    )
    for task, figures in results["results"].items():
        for name, value in figures.items():
            if isinstance(value, float):
                print(f"{task}  {name}  {value:.4f}")
    if options.out is not None:
        del results["samples"]
        replace_file(
            options.out, orjson.dumps(results, default=str, option=orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY)
        )
    return 0


def _asker(options: argparse.Namespace, endpoint: Endpoint, journal: Journal, condition: str | None) -> Asker:
    return Asker(endpoint, journal, condition=condition, num_tries=options.tries, timeout_s=options.timeout)


def _journal_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.asked")


def _end(counts: Counts) -> int:
    print(counts)
    return INCOMPLETE if counts.failures else 0


if __name__ == "__main__":
    main()
