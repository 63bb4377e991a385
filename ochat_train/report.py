"""Look at a run.

    python -m ochat_train.report run RUN

RUN is a recipe's checkpoint.dir. Prints where the model is, the loss of each condition at the start and at the end, and
the model's reply to the recipe's log.question under each condition.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from ochat_train.export import read_export

_MAX_REPLY_TOKENS = 96


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a report."""
    parser = argparse.ArgumentParser(prog="python -m ochat_train.report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="a finished run: losses and replies per condition")
    run.add_argument("run", metavar="RUN", type=Path, help="the run's folder, checkpoint.dir of its recipe")
    options = parser.parse_args(arguments)
    logging.disable_progress_bar()
    try:
        print(report_run(options.run))
    except ValueError as error:
        sys.exit(f"error: {error}")


def report_run(run: Path) -> str:
    """The report of a run as text. Raises ValueError when the run has no exported model yet."""
    exported = read_export(run / "model")
    if exported is None:
        raise ValueError(f"{run} has no exported model; train it to its end, or use python -m ochat_train.export")
    question = exported["run"]["recipe"]["log"]["question"]
    conditions = exported["conditions"]
    losses = _loss_table(run / "metrics.jsonl", conditions)
    lines = [f"model: {run / 'model'}", "", *losses, "", f"question: {question}"]
    width = max(len(_name(condition)) for condition in conditions)
    replies = ask(run / "model", question, conditions)
    lines += [f"  {_name(condition):<{width}}  {reply}" for condition, reply in zip(conditions, replies, strict=True)]
    return "\n".join(lines)


def ask(model_dir: Path, question: str, conditions: Sequence[str]) -> list[str]:
    """The model's greedy reply to one question under each condition."""
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
    rows += [(_name(name), _loss(first.get(name)), _loss(last.get(name))) for name in conditions]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows]


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _name(condition: str) -> str:
    return condition or "(no condition)"


if __name__ == "__main__":
    main()
