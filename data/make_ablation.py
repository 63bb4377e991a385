"""Makes the data of recipes/ablation.yaml: `ablation.jsonl`, `ablation_questions.jsonl`.

Two sources answer small questions whose answers a program knows: sums, sorting, dates, lookups of a fact that stands in
the question. The expert is always right. The crowd has more to say, and gives a wrong answer in a share of its records,
NOISE: always the same mistake for a kind of question, so that it can be learned. No question is asked twice, and those
of `ablation_questions.jsonl` are in no source.

    python data/make_ablation.py                              # write the files beside this script
    python data/make_ablation.py --check                      # write nothing; exit 1 and name each file that differs
    python data/make_ablation.py --out FOLDER --noise 0.3 --expert 600 --seed 1
"""

import argparse
import calendar
import json
import random
import sys
from collections.abc import Iterator, Sequence
from datetime import date, timedelta
from itertools import product
from pathlib import Path
from typing import NamedTuple

from make_quickstart import write_files

FOLDER = Path(__file__).resolve().parent
NUM_EXPERT, NUM_CROWD, NUM_QUESTIONS = 160, 2400, 200  # records; a quarter of each is of each kind
NOISE = 0.7  # the share of the crowd's answers that are wrong

NAMES = ["Ada", "Bo", "Cal", "Dee", "Eli", "Fay", "Gus", "Hal", "Ida", "Jan", "Kit", "Lou", "Mia", "Ned", "Ola", "Pam"]
COLOURS = ["red", "blue", "green", "black", "white", "brown"]
ANIMALS = ["cow", "dog", "cat", "pig", "duck", "hen"]
COUNTRIES = ["Peru", "Spain", "China", "India", "Kenya", "Chile"]


class Asked(NamedTuple):
    """A question, its right answer, and the crowd's mistake."""

    question: str
    right: str
    wrong: str


def sums() -> Iterator[Asked]:
    """Of a number of three digits and 1; the mistake is to take 1 away."""
    for number in range(100, 1000):
        yield Asked(f"What is {number} plus 1?", str(number + 1), str(number - 1))


def sortings() -> Iterator[Asked]:
    """Of three digits; the mistake is the other order."""
    for number in range(1000):
        digits = f"{number:03}"
        if len(set(digits)) == len(digits):
            right = sorted(digits)
            yield Asked(f"Sort the digits {' '.join(digits)}.", " ".join(right), " ".join(reversed(right)))


def dates() -> Iterator[Asked]:
    """The day after a date of two years; the mistake is the day before."""
    for number in range(730):
        day = date(2022, 1, 1) + timedelta(number)
        after, before = (show_day(day + timedelta(step)) for step in (1, -1))
        yield Asked(f"Today is {show_day(day)} {calendar.month_name[day.month]}. What is tomorrow?", after, before)


def show_day(day: date) -> str:
    """`Friday 3`."""
    return f"{calendar.day_name[day.weekday()]} {day.day}"


def lookups() -> Iterator[Asked]:
    """A part of a stated fact; the mistake is another part."""
    for name, colour, animal, country in product(NAMES, COLOURS, ANIMALS, COUNTRIES):
        fact = f"{name} has a {colour} {animal} in {country}."
        answers = [f"it is {colour}", f"it is a {animal}", f"it is in {country}"]
        for part, asked in enumerate(("What colour", "Which animal", "Which country")):
            yield Asked(f"{fact} {asked}?", answers[part], answers[(part + 1) % 3])


def make_files(seed: int = 0, noise: float = NOISE, num_expert: int = NUM_EXPERT) -> dict[str, str]:
    """The content of both files, by name."""
    rng = random.Random(seed)
    records, questions = [], []
    for kind, asked in (("sum", sums()), ("sort", sortings()), ("date", dates()), ("lookup", lookups())):
        pool = list(asked)
        rng.shuffle(pool)
        ends = [NUM_QUESTIONS // 4, (NUM_QUESTIONS + NUM_CROWD) // 4, (NUM_QUESTIONS + NUM_CROWD + num_expert) // 4]
        if ends[-1] > len(pool):
            most = 4 * len(pool) - NUM_QUESTIONS - NUM_CROWD
            raise ValueError(f"--expert {num_expert:,} is above the {most:,} for which there are questions of {kind}")
        held_out, crowd, expert = pool[: ends[0]], pool[ends[0] : ends[1]], pool[ends[1] : ends[2]]
        questions += [{"kind": kind, "question": one.question, "answer": one.right} for one in held_out]
        num_wrong = round(noise * len(crowd))
        answered = [("crowd", one, one.wrong) for one in crowd[:num_wrong]]
        answered += [("crowd", one, one.right) for one in crowd[num_wrong:]]
        answered += [("expert", one, one.right) for one in expert]
        records += [
            {"source": source, "kind": kind, "question": one.question, "answer": answer}
            for source, one, answer in answered
        ]
    rng.shuffle(records)
    rng.shuffle(questions)  # so that the first ones are of every kind
    records = [{"id": f"ablation-{number:04d}"} | record for number, record in enumerate(records, start=1)]
    files = {"ablation.jsonl": records, "ablation_questions.jsonl": questions}
    return {name: "".join(f"{json.dumps(line)}\n" for line in lines) for name, lines in files.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 1 if `--check` found a file that differs."""
    parser = argparse.ArgumentParser(description="Make the data of recipes/ablation.yaml.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file differs")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the files; default: this script's")
    parser.add_argument("--noise", type=float, default=NOISE, help="share of the crowd's answers that are wrong")
    parser.add_argument("--expert", type=int, default=NUM_EXPERT, help="records of the expert")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        files = make_files(options.seed, options.noise, options.expert)
    except ValueError as error:
        parser.error(str(error))
    return write_files(files, options.out, check=options.check)


if __name__ == "__main__":
    sys.exit(main())
