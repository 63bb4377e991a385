"""Measure a trained model: its prompts, held-out loss, MT-bench and AlpacaEval, a judge's table, lm-eval.

ochat evaluate prompts MODEL STORE | held-out MODEL STORE
    | answer BENCHMARK MODEL_OR_URL OUT [flags of serve] | compare BENCHMARK FIRST SECOND --judge URL
    | table MODEL_OR_URL ... --judge URL --judge-model NAME [flags of serve] | lm-eval MODEL_OR_URL TASK ...
"""

import argparse
import asyncio
import signal
import sqlite3
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from ochat_train.evaluate.ask import CachedClient, Counts
from ochat_train.evaluate.endpoint import JUDGE_KEY_VARIABLE, Endpoint, find_endpoint, reach
from ochat_train.evaluate.harness import run_tasks
from ochat_train.evaluate.journal import Answer, Journal, open_journal
from ochat_train.evaluate.judge import Outcome, Pair, compare_pair, read_pairs, win_rate
from ochat_train.evaluate.prompts import compare_prompts
from ochat_train.evaluate.question_sets import QUESTION_SETS, Question, ask_turns, find_questions, read_questions
from ochat_train.evaluate.table import describe_costs, measure, rehearse
from ochat_train.evaluate.table_inputs import read_benchmarks, read_contenders
from ochat_train.evaluate.table_results import judgments, summarize, write_answers
from ochat_train.evaluate.table_sections import table_document
from ochat_train.files import publish_file, require_packages
from ochat_train.report.page import as_html, as_text

INCOMPLETE, INTERRUPTED = 1, 130


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one of the commands. Exit code 1 when requests failed for good, 130 after an interrupt."""
    options, flags = make_parser().parse_known_args(arguments)
    if flags and options.command not in ("answer", "table"):
        sys.exit(f"error: no flag {flags[0]}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that a server that was started ends too
    try:
        sys.exit(options.run(options, flags))
    except (ValueError, OSError, sqlite3.Error) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted; the same command continues where it was", file=sys.stderr)
        sys.exit(INTERRUPTED)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="ochat evaluate", description="Measure a trained model.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    prompts = commands.add_parser(
        "prompts", help="whether servers ask it with the ids of its training", allow_abbrev=False
    )
    prompts.add_argument("model", metavar="MODEL", help="an exported model")
    prompts.add_argument("store", metavar="STORE", help="the token store that it was trained on")
    prompts.add_argument("--num", type=int, default=200, metavar="N", help="conversations to compare (200)")
    prompts.set_defaults(run=_prompts)

    held_out = commands.add_parser(
        "held-out", help="loss and condition probe on a token store, as training reports them", allow_abbrev=False
    )
    held_out.add_argument("model", metavar="MODEL", help="an exported model, or the folder of a run")
    held_out.add_argument("store", metavar="STORE", help="a token store of the same template")
    held_out.add_argument("--split", choices=("eval", "train"), default="eval", help="which examples (eval)")
    held_out.add_argument("--tokens-per-batch", type=int, metavar="T", help="(the value of training)")
    held_out.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    held_out.set_defaults(run=_held_out)

    answer = commands.add_parser(
        "answer", help="answers to a benchmark, for its judge; other flags go to serve", allow_abbrev=False
    )
    answer.add_argument("benchmark", choices=sorted(QUESTION_SETS))
    answer.add_argument("target", metavar="MODEL_OR_URL", help="a model, which is served meanwhile, or http://HOST/v1")
    answer.add_argument("out", metavar="OUT", type=Path, help="file of the answers; OUT.asked grows beside it")
    answer.add_argument("--questions", type=Path, metavar="F", help="(those of the installed package)")
    answer.add_argument("--condition", help="(the model's own)")
    answer.add_argument("--name", help="the model's name in the file of answers (its own, with the condition)")
    answer.add_argument("--temperature", type=float, metavar="X", help="for all answers (the benchmark's)")
    _add_client_options(answer, max_tokens=None)
    answer.set_defaults(run=_answer)

    compare = commands.add_parser("compare", help="win rate of two files of answers, by a judge", allow_abbrev=False)
    compare.add_argument("benchmark", choices=sorted(QUESTION_SETS))
    compare.add_argument("first", metavar="FIRST", type=Path, help="answers, as `answer` writes them")
    compare.add_argument("second", metavar="SECOND", type=Path)
    compare.add_argument("--judge", required=True, metavar="URL", dest="target", help="http://HOST/v1 of the judge")
    compare.add_argument("--questions", type=Path, metavar="F", help="of mt-bench (those of the installed package)")
    compare.add_argument("--out", type=Path, required=True, help="JSON file of the outcomes; OUT.asked grows beside it")
    _add_client_options(compare, max_tokens=1024)
    compare.set_defaults(run=_compare, condition=None)

    _add_table(commands)
    harness = commands.add_parser("lm-eval", help="tasks of EleutherAI's harness", allow_abbrev=False)
    harness.add_argument("target", metavar="MODEL_OR_URL")
    harness.add_argument("tasks", metavar="TASK", nargs="+", help="names that lm-eval knows, or files of tasks")
    harness.add_argument("--model", metavar="M", help="its name at a URL (the first that is listed)")
    harness.add_argument("--condition", help="(the model's own)")
    harness.add_argument("--limit", type=int, metavar="N", help="examples of each task (all)")
    harness.add_argument("--batch-size", type=int, default=1, metavar="B", help="examples at once of a MODEL (1)")
    harness.add_argument("--concurrency", type=int, default=8, metavar="N", help="requests at once to a URL (8)")
    harness.add_argument("--out", type=Path, help="also write all results to this JSON file")
    harness.set_defaults(run=_harness)
    return parser


def _add_table(commands: Any) -> None:
    table = commands.add_parser(
        "table",
        help="models side by side on MT-bench and AlpacaEval, by a judge; other flags go to serve",
        allow_abbrev=False,
    )
    table.add_argument(
        "targets", metavar="MODEL_OR_URL", nargs="+", help="[NAME=]MODEL[@CONDITION] or [NAME=]URL[#MODEL][@CONDITION]"
    )
    table.add_argument("--judge", required=True, metavar="URL", help="http://HOST/v1 of the judge")
    table.add_argument("--judge-model", required=True, metavar="M", help="the judge's name there")
    files: Any = {"nargs": "+", "action": "extend", "default": [], "metavar": "BENCHMARK=FILE"}
    table.add_argument("--questions", help="(those of installed packages); mt-bench=FILE", **files)
    table.add_argument("--baseline", help="answers to compare with; mt-bench=FILE", **files)
    table.add_argument("--references", type=Path, metavar="F", help="right answers for MT-bench, as FastChat has them")
    table.add_argument(
        "--out", type=Path, default=Path("evaluation"), help="folder of all that is written (evaluation)"
    )
    table.add_argument("--dry-run", action="store_true", help="count the requests, ask nothing")
    _add_client_options(table, max_tokens=None, has_model=False)
    table.set_defaults(run=_table)


def _add_client_options(parser: argparse.ArgumentParser, *, max_tokens: int | None, has_model: bool = True) -> None:
    if has_model:
        parser.add_argument("--model", metavar="M", help="its name at a URL (the first that is listed)")
    shown = max_tokens or "the benchmark's"
    parser.add_argument("--max-tokens", type=int, default=max_tokens, metavar="T", help=f"of an answer ({shown})")
    parser.add_argument("--concurrency", type=int, default=8, metavar="N", help="questions at once (8)")
    parser.add_argument("--tries", type=int, default=6, metavar="N", help="of a request, before it has failed (6)")
    parser.add_argument("--timeout", type=float, default=600, metavar="S", help="of each try, in seconds (600)")


def _check_client_options(options: argparse.Namespace) -> None:
    require_packages(f"evaluate {options.command}", "openai", extra="evaluate")
    for name in ("concurrency", "tries", "max_tokens", "timeout"):
        if (value := getattr(options, name)) is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} {value} is not above 0")


@contextmanager
def _open_client(options: argparse.Namespace, flags: Sequence[str]) -> Iterator[CachedClient]:
    """A client of the model or the judge, with the journal beside the output."""
    with (
        open_journal(options.out.with_name(f"{options.out.name}.asked")) as journal,
        reach(options.target, model=options.model, condition=options.condition, flags=flags) as endpoint,
    ):
        yield _client(options, journal, endpoint, options.condition)


def _client(
    options: argparse.Namespace,
    journal: Journal,
    endpoint: Endpoint,
    condition: str | None = None,
    rehearses: bool = False,
) -> CachedClient:
    return CachedClient(
        endpoint,
        journal,
        condition=condition,
        concurrency=options.concurrency,
        num_tries=options.tries,
        timeout_s=options.timeout,
        rehearses=rehearses,
    )


def _prompts(options: argparse.Namespace, flags: Sequence[str]) -> int:
    parity = compare_prompts(options.model, options.store, num=options.num)
    print(parity)
    return 0 if parity.is_equal else 1


def _held_out(options: argparse.Namespace, flags: Sequence[str]) -> int:
    from ochat_train.evaluate.held_out import measure_held_out  # loads DeepSpeed, which takes seconds

    figures = measure_held_out(
        options.model, options.store, split=options.split, tokens_per_batch=options.tokens_per_batch
    )
    data = orjson.dumps(figures, option=orjson.OPT_INDENT_2)
    print(data.decode())
    if options.out is not None:
        _write(options.out, data)
    return 0


def _answer(options: argparse.Namespace, flags: Sequence[str]) -> int:
    _check_client_options(options)
    if options.temperature is not None and not 0 <= options.temperature <= 2:
        raise ValueError(f"--temperature {options.temperature} is not between 0 and 2")
    question_set = QUESTION_SETS[options.benchmark]
    questions = read_questions(question_set, find_questions(question_set, options.questions))
    max_tokens = options.max_tokens or question_set.max_tokens
    answered: dict[str, list[Answer]] = {}

    with _open_client(options, flags) as client:

        async def work(question: Question) -> None:
            answered[question.name] = await ask_turns(
                client, question, max_tokens=max_tokens, temperature=options.temperature
            )

        items = {question.name: question for question in questions}
        asyncio.run(client.run(items, work, title=options.benchmark))
    suffix = "" if options.condition is None else f"-{options.condition}"
    name = options.name or client.endpoint.model + suffix
    done = [(question, answered[question.name]) for question in questions if question.name in answered]
    _write(options.out, question_set.write(done, name))
    print(f"{options.out}: {len(done):,} of {len(questions):,} questions, answered by {name}")
    return _report(client.counts)


def _compare(options: argparse.Namespace, flags: Sequence[str]) -> int:
    _check_client_options(options)
    questions = None
    if options.benchmark == "mt-bench":
        question_set = QUESTION_SETS[options.benchmark]
        questions = read_questions(question_set, find_questions(question_set, options.questions))
    pairs = read_pairs(options.first, options.second, questions)
    outcomes: dict[str, Outcome] = {}
    with _open_client(options, ()) as judge:

        async def work(named: tuple[str, Pair]) -> None:
            outcomes[named[0]] = await compare_pair(judge, named[1], max_tokens=options.max_tokens)

        items = {name: (name, pair) for name, pair in pairs.items()}
        asyncio.run(judge.run(items, work, title="judge"))
    rate = win_rate(Counter(outcomes.values()))
    result: dict[str, Any] = {
        "first": str(options.first),
        "second": str(options.second),
        "judge": judge.endpoint.model,
        "win_rate": rate.rate,
        "interval_95": [rate.low, rate.high],
        "counts": dict(rate.outcomes),
        "failed": len(judge.counts.failures),
        "outcomes": {name: outcomes[name] for name in pairs if name in outcomes},
    }
    _write(options.out, orjson.dumps(result, option=orjson.OPT_INDENT_2))
    print(rate)
    return _report(judge.counts)


def _table(options: argparse.Namespace, flags: Sequence[str]) -> int:
    _check_client_options(options)
    benchmarks = read_benchmarks(options.questions, options.baseline, options.references)
    contenders = read_contenders(options.targets, flags)
    judge = find_endpoint(
        options.judge, model=options.judge_model, condition=None, flags=(), key_variable=JUDGE_KEY_VARIABLE
    )
    with open_journal(options.out / "asked") as journal:
        make_client = partial(_client, options, journal)
        known, costs = rehearse(contenders, benchmarks, judge, make_client, max_tokens=options.max_tokens)
        print(describe_costs(costs), flush=True)
        if options.dry_run:
            return 0
        client = make_client(judge)
        found = measure(
            contenders,
            benchmarks,
            client,
            make_client,
            known=known,
            max_tokens=options.max_tokens,
            flags=flags,
        )
    for contender in contenders:
        write_answers(options.out, benchmarks, contender, found[contender.label])
    results = summarize(contenders, found, benchmarks, judge)
    document = table_document(results)
    text = as_text(document)
    _write(options.out / "table.json", orjson.dumps(results, option=orjson.OPT_INDENT_2))
    _write(options.out / "table.txt", (text + "\n").encode())
    _write(options.out / "table.html", as_html(document).encode())
    _write(options.out / "judgments.jsonl", judgments(judge.model, found))
    print(f"\n{text}\n\n{options.out / 'table.html'}")
    codes = []
    for label, findings in found.items():
        print(f"\n{label}: ", end="")
        codes.append(_report(findings.counts))
    print("\nthe judge: ", end="")
    return max(*codes, _report(client.counts))


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
        _write(options.out, orjson.dumps(results, default=str, option=orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY))
    return 0


def _write(path: Path, data: bytes) -> None:
    with publish_file(path) as file:
        file.write(data)


def _report(counts: Counts) -> int:
    """Print the counts. The exit code."""
    print(counts)
    return INCOMPLETE if counts.failures else 0


if __name__ == "__main__":
    main()
