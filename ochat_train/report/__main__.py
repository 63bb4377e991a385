"""Look at a run, at a token store, or at what a run would do.

    ochat report run RUN [--text | --out FILE]
    ochat report store STORE [--text | --out FILE]
    ochat report plan RECIPE [WORD ...] [--vs [RECIPE] [WORD ...]] [--text | --out FILE]

RUN is a recipe's checkpoint.dir; the run may be at any moment. Writes one HTML page, RUN/report.html or FILE, with the
losses of each condition, the best epoch, what the condition probe means, shares of sources, speed, restarts and
checkpoints. Prints how the run stands, the losses at the start and at the end, the model's reply to log.question under
each condition if RUN/model is there, and the page's path. --text prints the whole report instead.

STORE is a recipe's data.store. Writes one HTML page, STORE/report.html or FILE, and prints its path: what was read,
kept and dropped, what each source counts in the loss, lengths, packing, and samples with their weights. --text prints
the same instead.

plan shows the steps of the recipe's run before it is begun: figures, wall time, what each source counts, how the ranks
wait for each other; and how long it would take on other machines. A WORD is gpus=N, tokens_per_s=X (of one GPU; else
it is taken from the run's metrics.jsonl, or modelled for the GPUs that are here), or key=value, an override of the
recipe; the weights and epochs of sources, too, can be tried without preprocessing again. --vs sets a second plan beside
the first: of another recipe, or of the same with these words on top. Prints it, and writes it as a page,
checkpoint.dir/plan.html or FILE, whose path is the last line. --text writes nothing.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ochat_train.recipe import piped_output
from ochat_train.report.page import Document, as_html, as_text, blocks_as_text
from ochat_train.report.run import generate_replies, read_run
from ochat_train.report.run_sections import run_document, run_summary
from ochat_train.report.store import read_store
from ochat_train.report.store_sections import store_document


@piped_output()
def main(arguments: Sequence[str] | None = None) -> None:
    """Print a report."""
    parser = argparse.ArgumentParser(prog="ochat report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="a run at any moment: losses, best epoch, replies, speed")
    run.add_argument("run", metavar="RUN", type=Path, help="the run's folder, checkpoint.dir of its recipe")
    _form_arguments(run, "RUN/report.html")
    store = commands.add_parser("store", help="a token store: records, sources, lengths, packing, samples")
    store.add_argument("store", metavar="STORE", type=Path, help="the store's folder, data.store of its recipe")
    _form_arguments(store, "STORE/report.html")
    plan = commands.add_parser("plan", help="what a recipe's run would do: steps, wall time, sources, balance")
    plan.add_argument("recipe", metavar="RECIPE", help="the recipe's YAML file")
    plan.add_argument("words", metavar="WORD", nargs="*", help="gpus=N, tokens_per_s=X, or key=value of the recipe")
    plan.add_argument("--vs", metavar="WORD", nargs="*", help="a second plan: [RECIPE] and such words")
    _form_arguments(plan, "checkpoint.dir/plan.html")
    options = parser.parse_args(arguments)
    makers = {"run": report_run, "store": report_store, "plan": report_plan}
    try:
        print(makers[options.command](options))
    except ValueError as error:
        sys.exit(f"error: {error}")


def report_run(options: argparse.Namespace) -> str:
    """The report of a run as text: all of it, or what matters most, with the path of the page written."""
    report = read_run(options.run)
    if report.recipe and any(folder.path == "model" for folder in report.saved):
        try:
            replies = generate_replies(options.run / "model", report.question, report.conditions)
            report = replace(report, replies=replies)
        except Exception as error:  # of any kind: it is that of the model's code; the rest of the report stands
            print(f"WARNING: log.question is not answered, the model does not generate: {error!r}", file=sys.stderr)
    if options.text:
        return as_text(run_document(report))
    page: Path = options.out or options.run / "report.html"
    _write_page(page, run_document(report))
    return f"{blocks_as_text(run_summary(report))}\n\n{page}"


def report_store(options: argparse.Namespace) -> str:
    """The report of a store as text, or the path of the page written."""
    document = store_document(read_store(options.store))
    if options.text:
        return as_text(document)
    page: Path = options.out or options.store / "report.html"
    _write_page(page, document)
    return str(page)


def report_plan(options: argparse.Namespace) -> str:
    """The report of a plan, or of two, as text, with the path of the page that was written, if one was."""
    from ochat_train.report.plan import read_plans, read_requests  # they import torch: the other reports do without
    from ochat_train.report.plan_sections import plan_document

    reports = read_plans(read_requests(options.recipe, options.words, options.vs))
    document = plan_document(reports)
    if options.text:
        return as_text(document)
    page: Path = options.out or Path(reports[0].recipe.checkpoint.dir) / "plan.html"
    _write_page(page, document, makes_folder=options.out is None)
    return f"{as_text(document)}\n\n{page}"


def _form_arguments(parser: argparse.ArgumentParser, page: str) -> None:
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--text", action="store_true", help="print the report, write no page")
    form.add_argument("--out", metavar="FILE", type=Path, help=f"the page's file; default {page}")


def _write_page(page: Path, document: Document, *, makes_folder: bool = False) -> None:
    try:
        if makes_folder:
            page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(as_html(document), encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{page} cannot be written: {error.strerror}; name another file with --out") from None


if __name__ == "__main__":
    main()
