"""Look at a run or at a token store.

    python -m ochat_train.report run RUN
    python -m ochat_train.report store STORE [--text | --out FILE]

RUN is a recipe's checkpoint.dir. Prints where the model is, the loss of each condition at the start and at the end, and
the model's reply to the recipe's log.question under each condition.

STORE is a recipe's data.store. Writes one HTML page, STORE/report.html or FILE, and prints its path: what was read,
kept and dropped, what each source counts in the loss, lengths, packing, and samples with their weights. --text prints
the same instead.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson

from ochat_train.report_store import read_report
from ochat_train.report_view import align, as_html, as_text, show_condition

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
    form = store.add_mutually_exclusive_group()
    form.add_argument("--text", action="store_true", help="print the report, write no page")
    form.add_argument("--out", metavar="FILE", type=Path, help="the page's file; default STORE/report.html")
    options = parser.parse_args(arguments)
    try:
        print(report_run(options.run) if options.command == "run" else report_store(options))
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
    try:
        page.write_text(as_html(report), encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{page} cannot be written: {error.strerror}; name another file with --out") from None
    return str(page)


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
