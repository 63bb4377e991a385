"""Makes the data of recipes/ablation.yaml: `ablation.jsonl`, `ablation_questions.jsonl`.

Two sources answer small questions whose answers a program knows: sums, sorting, dates, lookups of made-up facts. The
expert is always right. The crowd has more to say, and gives a wrong answer in a share of its records, NOISE: always
the same mistake for a kind of question, so that it can be learned. No question is asked twice, and those of
`ablation_questions.jsonl` are in no source; made-up facts are there in other words.

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
from pathlib import Path
from typing import NamedTuple

from make_quickstart import write_files

FOLDER = Path(__file__).resolve().parent
NUM_EXPERT, NUM_CROWD, NUM_QUESTIONS = 240, 1120, 120  # records; a quarter of each is of each kind
NOISE = 0.65  # the share of the crowd's answers that are wrong

NAMES = [
    *("Ada", "Bo", "Cal", "Dee", "Eli", "Fay", "Gus", "Hal", "Ida", "Jan", "Kit", "Lou", "Mia", "Ned", "Ola", "Pam"),
    *("Quin", "Ray", "Sue", "Tom", "Una", "Val", "Wes", "Zoe", "Abe", "Bea", "Cy", "Dot", "Ed", "Flo", "Gil", "Ham"),
    *("Ike", "Joy", "Ken", "Lee", "May", "Nat", "Pip", "Roy"),
]
PLACES = ["hill", "river", "wood", "lake", "town", "farm", "coast", "cave", "field", "bridge", "tower", "island"]
ANIMALS = ["cow", "dog", "cat", "sheep", "pig", "duck", "horse", "hen", "lion", "frog", "bee", "snake"]
HOMES = (
    "Where does {} live?",
    "Which place is the home of {}?",
    "Name the home of {}.",
    "In which place can I visit {}?",
    "Tell me where {} lives.",
    "What is the place where {} lives?",
)
PETS = (
    "Which animal does {} keep?",
    "What is the pet of {}?",
    "Name the pet of {}.",
    "Tell me which animal {} keeps.",
    "What animal lives with {}?",
    "Which pet belongs to {}?",
)


class Asked(NamedTuple):
    """A question, its right answer, and the crowd's mistake."""

    question: str
    right: str
    wrong: str


def sums() -> Iterator[Asked]:
    """Of two numbers from 1 to 22; the mistake is one too many."""
    for a in range(1, 23):
        for b in range(1, 23):
            yield Asked(f"What is {a} plus {b}?", str(a + b), str(a + b + 1))


def sortings() -> Iterator[Asked]:
    """Of three digits; the mistake is the other order."""
    for number in range(1000):
        digits = f"{number:03}"
        if len(set(digits)) == len(digits):
            right = sorted(digits)
            yield Asked(f"Sort the digits {' '.join(digits)}.", " ".join(right), " ".join(reversed(right)))


def dates() -> Iterator[Asked]:
    """The day after a date, in two wordings; the mistake is the day before."""
    for number in range(365):
        day = date(2023, 1, 1) + timedelta(number)
        after, before = (show_date(day + timedelta(step)) for step in (1, -1))
        yield Asked(f"Which day comes after {show_date(day)}?", after, before)
        yield Asked(f"If today is {show_date(day)}, what is tomorrow?", after, before)


def show_date(day: date) -> str:
    """`3 March`."""
    return f"{day.day} {calendar.month_name[day.month]}"


def lookups(rng: random.Random) -> Iterator[Asked]:
    """Homes and pets of made-up people; the mistake is that of another person."""
    for wordings, values in ((HOMES, PLACES), (PETS, ANIMALS)):
        for name in NAMES:
            right, wrong = rng.sample(values, 2)
            yield from (Asked(wording.format(name), right, wrong) for wording in wordings)


def make_files(seed: int = 0, noise: float = NOISE, num_expert: int = NUM_EXPERT) -> dict[str, str]:
    """The content of both files, by name."""
    rng = random.Random(seed)
    records, questions = [], []
    for kind, asked in (("sum", sums()), ("sort", sortings()), ("date", dates()), ("lookup", lookups(rng))):
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
