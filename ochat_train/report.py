"""Look at a run, at a token store, or at what a run would do.

    python -m ochat_train.report run RUN
    python -m ochat_train.report store STORE [--text | --out FILE]
    python -m ochat_train.report plan RECIPE [WORD ...] [--vs [RECIPE] [WORD ...]] [--text | --out FILE]

RUN is a recipe's checkpoint.dir. Prints where the model is, the loss of each condition at the start and at the end, and
the model's reply to the recipe's log.question under each condition.

STORE is a recipe's data.store. Writes one HTML page, STORE/report.html or FILE, and prints its path: what was read,
kept and dropped, what each source counts in the loss, lengths, packing, and samples with their weights. --text prints
the same instead.

plan shows the steps of the recipe's run before it is begun: figures, wall time, what each source counts, how the ranks
wait for each other. A WORD is gpus=N, tokens_per_s=X (of one GPU; else it is taken from the run's metrics.jsonl), or
key=value, an override of the recipe; the weights and epochs of sources, too, can be tried without preprocessing again.
--vs sets a second plan beside the first: of another recipe, or of the same with these words on top. Prints it, and
writes it as a page, checkpoint.dir/plan.html or FILE, whose path is the last line. --text writes nothing.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson

from ochat_train.report_store import read_report
from ochat_train.report_store_view import as_html, as_text
from ochat_train.report_tables import align, show_condition

_MAX_REPLY_TOKENS = 96


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a report."""
    parser = argparse.ArgumentParser(prog="python -m ochat_train.report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="a finished run: losses and replies per condition")
    run.add_argument("run", metavar="RUN", type=Path, help="the run's folder, checkpoint.dir of its recipe")
    store = commands.add_parser("store", help="a token store: records, sources, lengths, packing, samples")
    store.add_argument("store", metavar="STORE", type=Path, help="the store's folder, data.store of its recipe")
    _form_arguments(store, "STORE/report.html")
    plan = commands.add_parser("plan", help="what a recipe's run would do: steps, wall time, sources, balance")
    plan.add_argument("recipe", metavar="RECIPE", help="the recipe's YAML file")
    plan.add_argument("words", metavar="WORD", nargs="*", help="gpus=N, tokens_per_s=X, or key=value of the recipe")
    plan.add_argument("--vs", metavar="WORD", nargs="*", help="a second plan: [RECIPE] and such words")
    _form_arguments(plan, "checkpoint.dir/plan.html")
    options = parser.parse_args(arguments)
    try:
        if options.command == "run":
            print(report_run(options.run))
        else:
            print(report_store(options) if options.command == "store" else report_plan(options))
    except ValueError as error:
        sys.exit(f"error: {error}")


def report_run(run: Path) -> str:
    """The report of a run as text. Raises ValueError when the run has no exported model yet."""
    from ochat_train.export import read_export  # it imports torch, which the report of a store does without

    exported = read_export(run / "model")
    if exported is None:
        raise ValueError(f"{run} has no exported model; train it to its end, or use python -m ochat_train.export")
    question = exported["run"]["recipe"]["log"]["question"]
    conditions = exported["conditions"]
    losses = _loss_table(run / "metrics.jsonl", conditions)
    lines = [f"model: {run / 'model'}", "", *losses, "", f"question: {question}"]
    width = max(len(show_condition(condition)) for condition in conditions)
    replies = ask(run / "model", question, conditions)
    lines += [
        f"  {show_condition(condition):<{width}}  {reply}" for condition, reply in zip(conditions, replies, strict=True)
    ]
    return "\n".join(lines)


def report_store(options: argparse.Namespace) -> str:
    """The report of a store as text, or the path of the page written."""
    report = read_report(options.store)
    if options.text:
        return as_text(report)
    page: Path = options.out or options.store / "report.html"
    _write_page(page, as_html(report))
    return str(page)


def report_plan(options: argparse.Namespace) -> str:
    """The report of a plan, or of two, as text, with the path of the page that was written, if one was."""
    from ochat_train import report_plan_view  # they import torch, as above
    from ochat_train.report_plan import read_plans, read_requests

    reports = read_plans(read_requests(options.recipe, options.words, options.vs))
    text = report_plan_view.as_text(reports)
    if options.text:
        return text
    page: Path = options.out or Path(reports[0].recipe.checkpoint.dir) / "plan.html"
    _write_page(page, report_plan_view.as_html(reports), makes_folder=options.out is None)
    return f"{text}\n\n{page}"


def ask(model_dir: Path, question: str, conditions: Sequence[str]) -> list[str]:
    """The model's greedy reply to one question under each condition."""
    import torch  # as above
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer: Any = AutoTokenizer.from_pretrained(model_dir)
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    replies = []
    for condition in conditions:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            condition=condition,
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        ).to(model.device)
        output = model.generate(**prompt, do_sample=False, max_new_tokens=_MAX_REPLY_TOKENS)
        reply = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        replies.append(" ".join(reply.split()))
    return replies


def _form_arguments(parser: argparse.ArgumentParser, page: str) -> None:
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--text", action="store_true", help="print the report, write no page")
    form.add_argument("--out", metavar="FILE", type=Path, help=f"the page's file; default {page}")


def _write_page(page: Path, html: str, *, makes_folder: bool = False) -> None:
    try:
        if makes_folder:
            page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(html, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{page} cannot be written: {error.strerror}; name another file with --out") from None


def _loss_table(metrics: Path, conditions: Sequence[str]) -> list[str]:
    """Losses at the start and the end: held-out ones, or the training steps' where nothing was held out."""
    events = [orjson.loads(line) for line in metrics.read_bytes().splitlines()]
    held_out = [event for event in events if event["event"] == "eval"]
    kind, series = ("held-out loss", held_out) if held_out else ("training loss", events)
    first, last = series[0]["loss_by_condition"], series[-1]["loss_by_condition"]
    rows = [(kind, f"step {series[0]['step']}", f"step {series[-1]['step']}")]
    rows += [(show_condition(name), _loss(first.get(name)), _loss(last.get(name))) for name in conditions]
    return align(rows)


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


if __name__ == "__main__":
    main()
