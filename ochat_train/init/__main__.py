"""Write a recipe for your dumps, by five questions or flags.

    ochat init                                                        ask on the terminal
    ochat init --data PATH ... --base MODEL [--gpus 8xH100] [--by FIELD] [--good VALUE ...] [--out recipe.yaml]

Reads the dumps as `ochat preprocess --fields` does. The records of good values of FIELD become one source with the
weight 1, all others a second one with the weight 0.1. Where the good values are not known, each has its own source and
condition, and you set the weights. The template is chosen by the base, and how it is trained by the memory of the GPUs:
in full, with adapters, or with adapters on a base in 4 bits.
"""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ochat_train.files import publish_file
from ochat_train.init.sources import MOST_VALUES, divide, find_field, find_good
from ochat_train.preprocess.survey import contents_of


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the recipe."""
    parser = argparse.ArgumentParser(prog="ochat init", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data", nargs="+", metavar="PATH", help="files, folders, globs or URLs of the dumps")
    parser.add_argument("--base", metavar="MODEL", help="the base: a folder, or a name of the Hugging Face hub")
    parser.add_argument(
        "--gpus", metavar="NxKIND", help="8xH100, 1x4090, 4x40 (GiB of each) or cpu; default: what is here"
    )
    parser.add_argument("--by", metavar="FIELD", help="the records' field that says how good they are; default: found")
    parser.add_argument("--good", nargs="+", metavar="VALUE", help="its values of the good records; default: found")
    parser.add_argument("--out", type=Path, default=Path("recipe.yaml"), help="the recipe's file (recipe.yaml)")
    options = parser.parse_args(arguments)
    try:
        write_recipe(options)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except (KeyboardInterrupt, EOFError):
        sys.exit("\nnothing was written")


def write_recipe(options: argparse.Namespace) -> None:
    """Ask for what the flags leave out, and write the recipe. Raises ValueError for what cannot be."""
    if options.out.exists():
        raise ValueError(f"{options.out} is there already; name another file with --out")
    data = options.data or [_ask("1/5 Where are the dumps (file, folder, glob or URL)?", "--data")]
    contents = contents_of(data)
    print("\n".join([f"{' '.join(data)}:", *contents.lines()]))
    if not contents.num_chars and not contents.hint:
        raise ValueError("no record of the dumps is read, for the reasons above, so a recipe would train nothing")
    base_name = options.base or _ask("2/5 Which base model (folder or name of the hub)?", "--base")
    gpus = options.gpus or _ask("3/5 Which GPUs (8xH100, 1x24, cpu)?", "--gpus", "what is here")
    choices = contents.choices(MOST_VALUES)
    field = _choose_field(options.by, choices)
    values = choices.get(field or "", Counter())
    good = _choose_good(options.good, field, values)

    # Only here: they import torch, which takes seconds.
    from ochat_train.init.draft import draft, read_base, read_machine

    machine, base = read_machine(gpus), read_base(base_name)
    name = re.sub(r"[^\w.-]+", "-", options.out.stem)
    division = divide(data, contents.hint, field, values, good)
    text = draft(base, machine, name, division, contents.num_chars, contents.num_records)
    with publish_file(options.out) as file:
        file.write(text.encode())
    print(f"\n{text}\nwritten to {options.out}; next: ochat train {options.out}")


def _ask(question: str, flag: str, default: str = "") -> str:
    """The answer on the terminal; without a terminal the default, or ValueError where there is none."""
    if sys.stdin.isatty():
        answer = input(f"{question}{f' [{default}]' if default else ''} ").strip()
        while not answer and not default:
            answer = input(f"{question} ").strip()
        return answer or default
    if not default:
        raise ValueError(f"give {flag}: there is no terminal to ask on")
    return default


def _choose_field(given: str | None, choices: dict[str, Counter[str]]) -> str | None:
    if given is not None and given not in choices:
        raise ValueError(
            f"--by {given}: no field with 2 to {MOST_VALUES} values; there are {', '.join(choices) or 'none'}"
        )
    if given is not None or not choices:
        return given
    answer = _ask(
        f"4/5 Which field says how good a record is ({', '.join(choices)})?", "--by", find_field(choices) or "none"
    )
    return None if answer == "none" else _choose_field(answer, choices)


def _choose_good(given: list[str] | None, field: str | None, values: Counter[str]) -> list[str]:
    """The good values as JSON."""
    if field is None:
        return []
    if given is None:
        found = ", ".join(_plain(value) for value in find_good(values))
        shown = ", ".join(_plain(value) for value in values)
        answer = _ask(f"5/5 Which of its values are good ({shown})?", "--good", found or "not known")
        if answer == (found or "not known"):
            return find_good(values)
        given = [part.strip() for part in answer.split(",")]
    by_text = {_plain(value): value for value in values}
    if unknown := [value for value in given if value not in by_text]:
        raise ValueError(f"--good {unknown[0]} is no value of {field}; there are {', '.join(by_text)}")
    if len({*given}) == len(values):
        raise ValueError(f"--good names all values of {field}; leave out those that are worse")
    return [by_text[value] for value in given]


def _plain(value: str) -> str:
    """A value in JSON as one writes it on a command line."""
    loaded = json.loads(value)
    return loaded if isinstance(loaded, str) else value


if __name__ == "__main__":
    main()
