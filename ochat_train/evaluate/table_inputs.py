"""What `table` measures: models under conditions, benchmarks with their baselines, as the command line names them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ochat_train.evaluate.alpaca import is_installed
from ochat_train.evaluate.endpoint import Endpoint, find_endpoint, is_url
from ochat_train.evaluate.grade import read_references
from ochat_train.evaluate.judge import read_answers
from ochat_train.evaluate.question_sets import QUESTION_SETS, Question, find_questions, read_questions, read_rows

MT, ALPACA = "mt-bench", "alpaca-eval"


@dataclass(frozen=True, slots=True)
class Benchmark:
    """Questions, and the answers that others are compared with. baseline: its name, None without one."""

    name: str
    path: Path
    questions: list[Question]
    baseline: str | None
    baseline_answers: dict[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Contender:
    """A model under a condition; None is its own. label: its name in the table and of its files."""

    label: str
    target: str
    condition: str | None
    endpoint: Endpoint


def read_contenders(targets: Sequence[str], flags: Sequence[str]) -> list[Contender]:
    """The contenders, each with a name of its own. Raises ValueError."""
    contenders = [read_contender(target, flags) for target in targets]
    if flags and all(is_url(contender.target) for contender in contenders):
        raise ValueError(f"no flag {flags[0]}; flags of a server are for a MODEL, not for a URL")
    names = Counter(contender.label for contender in contenders)
    if twice := next((name for name, num in names.items() if num > 1), None):
        raise ValueError(f"two models have the name {twice}; write NAME=MODEL_OR_URL")
    return contenders


def read_contender(text: str, flags: Sequence[str]) -> Contender:
    """A contender of `[NAME=]MODEL_OR_URL[#MODEL_AT_URL][@CONDITION]`. Raises ValueError."""
    target, label, condition, model = text, "", None, None
    head, equals, tail = target.partition("=")
    if equals and head and not set(head) & set("/:#?") and not Path(target).exists():
        label, target = head, tail
    head, at, tail = target.rpartition("@")
    if at and "/" not in tail and not Path(target).exists():
        target, condition = head, tail
    if is_url(target):
        target, _, name = target.partition("#")
        model = name or None
    endpoint = find_endpoint(target, model=model, condition=condition, flags=() if is_url(target) else flags)
    suffix = "" if condition is None else f"-{condition}"
    label = (label or endpoint.model + suffix).replace("/", "_")
    return Contender(label, target, condition, endpoint)


def read_benchmarks(questions: Sequence[str], baselines: Sequence[str], references: Path | None) -> list[Benchmark]:
    """The benchmarks of `BENCHMARK=FILE` for questions and baselines; without questions, those of installed packages.

    references: a file of right answers for MT-bench. Prints what is left out. Raises ValueError.
    """
    paths, others = _by_benchmark(questions, "questions"), _by_benchmark(baselines, "baseline")
    names = [name for name in QUESTION_SETS if name in paths] or [MT, ALPACA]
    benchmarks, reasons = [], []
    for name in sorted(names, reverse=True):  # MT-bench first, which costs less
        try:
            if name == ALPACA and not is_installed():
                raise LookupError(
                    "AlpacaEval is left out: its own judge is in the package alpaca_eval, which is not "
                    "installed (pip install alpaca_eval)"
                )
            benchmarks.append(read_benchmark(name, paths.get(name), others.get(name)))
        except LookupError as error:
            reasons.append(str(error))
        except ValueError as error:
            if paths:
                raise
            reasons.append(f"{name} is left out: {error}")
    if not benchmarks:
        raise ValueError("; ".join(reasons))
    for reason in reasons:
        print(reason)
    measured = {benchmark.name for benchmark in benchmarks}
    if unused := next((name for name in others if name not in measured and name not in names), None):
        raise ValueError(f"--baseline {unused}: give its questions too, --questions {unused}=FILE")
    if references is not None:
        if MT not in measured:
            raise ValueError(f"--references {references}: MT-bench is not measured")
        benchmarks[0] = replace(benchmarks[0], questions=read_references(references, benchmarks[0].questions))
    return benchmarks


def _by_benchmark(values: Sequence[str], flag: str) -> dict[str, Path]:
    paths: dict[str, Path] = {}
    for value in values:
        name, equals, path = value.partition("=")
        name = name.replace("_", "-")
        if not equals or name not in QUESTION_SETS or name in paths:
            raise ValueError(f"--{flag} {value}: write {' or '.join(f'{known}=FILE' for known in QUESTION_SETS)}, once")
        paths[name] = Path(path)
    return paths


def read_benchmark(name: str, questions_path: Path | None, baseline_path: Path | None) -> Benchmark:
    """A benchmark; AlpacaEval's baseline is in its questions unless another is given. Raises ValueError."""
    path = find_questions(QUESTION_SETS[name], questions_path)
    questions = read_questions(QUESTION_SETS[name], path)
    if baseline_path is None and name == MT:
        return Benchmark(name, path, questions, None, {})
    baseline_path = baseline_path or path
    answers = read_answers(baseline_path, is_alpaca=name == ALPACA)
    for question in questions:
        if len(answers.get(question.name, ())) != len(question.turns):
            raise ValueError(
                f"{baseline_path} has no answer to each of the {len(question.turns)} turns of {question.name[:60]!r}"
            )
    row = read_rows(baseline_path)[0]
    return Benchmark(
        name, path, questions, str(row.get("model_id") or row.get("generator") or baseline_path.stem), answers
    )
