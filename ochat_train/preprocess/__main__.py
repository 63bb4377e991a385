"""Dumps to a token store.

    ochat preprocess RECIPE [key=value ...]                  make the recipe's store
    ochat preprocess --dry-run RECIPE [key=value ...]        only print the table of what would be in it
    ochat preprocess --explain ID RECIPE [key=value ...]     follow the records of this id through it
    ochat preprocess --fields PATH ...                       what the records of files hold

Files are cut into chunks of whole records. Workers make a shard of each: records are read, cleaned, given to a source,
filtered, templated and tokenized. Then duplicates and the held-out split are decided over all shards, and the store is
assembled in the order of the input. An interrupted run goes on from the shards that are done. A store that was already
made from the same things is not made again.
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from types import FrameType

from ochat_train.preprocess.explain import explain_record
from ochat_train.preprocess.light import without_pandas, without_torch
from ochat_train.preprocess.run import preprocess
from ochat_train.preprocess.survey import survey
from ochat_train.preprocess.workers import WorkerDied
from ochat_train.recipe import check_encoding, load_recipe, parse_arguments, piped_output, recipe_arguments


@piped_output()
def main(arguments: Sequence[str] | None = None) -> None:
    """Make the recipe's token store unless it is up to date, or print what the other options ask for."""
    parser = argparse.ArgumentParser(prog="ochat preprocess", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    recipe_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the table, write nothing")
    parser.add_argument("--explain", metavar="ID", help="show what happens to the records of this id")
    parser.add_argument(
        "--fields", action="store_true", help="the arguments are files, folders or globs: show what their records hold"
    )
    parser.add_argument("--encoding", metavar="NAME", help="with --fields: the files' encoding, if not UTF-8")
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="processes here, or a Ray cluster")
    parser.add_argument("--workers", type=int, metavar="N", help="number of worker processes; default: one a core")
    words = list(sys.argv[1:] if arguments is None else arguments)
    if "--explain" in words[:-1]:  # an id may begin as an option does
        place = words.index("--explain")
        words[place : place + 2] = [f"--explain={words[place + 1]}"]
    options = parse_arguments(parser, words)
    if options.workers is not None and options.workers < 1:
        parser.error(f"--workers {options.workers}: at least 1")
    signal.signal(signal.SIGTERM, _interrupt)
    for stream in (sys.stdout, sys.stderr):  # an id may hold characters that a terminal cannot show
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        if options.fields:
            check_encoding(options.encoding)
            for line in survey([options.recipe, *options.overrides], encoding=options.encoding):
                print(line, flush=True)
            return
        recipe = load_recipe(options.recipe, options.overrides)
        if __name__ == "__main__":  # a process of its own
            without_pandas()
            if not recipe.tokenizer_name.endswith(".gguf"):
                without_torch()
        if options.explain is not None:
            explain_record(recipe, options.explain)
        else:
            preprocess(recipe, dry_run=options.dry_run, executor=options.engine, num_workers=options.workers)
    except (ValueError, WorkerDied) as error:
        sys.exit(f"error: {error}")
    except BrokenPipeError:
        raise
    except OSError as error:  # a full disk, a folder that may not be written
        sys.exit(f"error: {error}; fix it and run the same command again: it goes on from the shards that are done")
    except KeyboardInterrupt:
        goes_on = "" if options.dry_run else ", and the same command goes on from the shards that are done"
        sys.exit(f"interrupted; the store was not touched{goes_on}")


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
