"""The rounds of the soak: each a whole run under faults, compared with one that was left alone."""

import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import orjson
from safetensors.torch import load_file
from soak import faults
from soak.faults import NUM_BINS, Bench, Fault, FaultAtRest
from soak.hosts import OneHost, TwoHosts, mount_memory, two_hosts, unmount
from soak.ranks import Ranks, Run
from tqdm import tqdm

from ochat_train.preprocess.__main__ import main as preprocess
from ochat_train.tokens.store import TokenStore

MODEL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
COMMON = [
    "recipes/quickstart.yaml",
    *(f"model.config.{key}={value}" for key, value in MODEL.items()),
    "train.epochs=2",
    "checkpoint.every_steps=2",
    "checkpoint.keep=3",
]
# For each kind of round, its recipe, and how often each fault comes: while the ranks train, and at rest.
RECIPES = {
    "one host": [],
    "two hosts": [],
    "other ranks": [f"packing.grad_accum={NUM_BINS // 2}", "zero.stage=2"],
}
UNDER_WAY: dict[str, dict[Fault, int]] = {
    "one host": {faults.kill: 3, faults.ask_to_stop: 3, faults.suspend: 1, faults.fill_disk: 2},
    "two hosts": {faults.kill: 2, faults.ask_to_stop: 1, faults.cut_briefly: 2, faults.cut: 1, faults.freeze: 1},
    "other ranks": {faults.kill: 2, faults.ask_to_stop: 1},
}
AT_REST: dict[str, dict[FaultAtRest, int]] = {
    "one host": {faults.damage_checkpoint: 2, faults.damage_store: 1, faults.branch: 2},
    "two hosts": {faults.damage_checkpoint: 1, faults.branch: 1},
    "other ranks": {faults.change_ranks: 3, faults.branch: 1, faults.damage_checkpoint: 1},
}
FAULTS_A_ROUND = 15
DISK = "160m"  # as much as the check before a run asks for


class Soak:
    """All rounds, until there were so many faults or minutes. is_inside: in the namespaces of `enter_namespaces`."""

    def __init__(self, folder: Path, num_faults: int, minutes: float, seed: int, *, is_inside: bool) -> None:
        self.folder, self.num_faults, self.is_inside = folder, num_faults, is_inside
        self.began, self.minutes = time.monotonic(), minutes
        self.rng = random.Random(seed)
        self.store = folder / "store"
        self.common = [*COMMON, f"data.store={self.store}"]
        self.counts, self.faults, self.rounds, self.codes = (Counter[str]() for _ in range(4))
        self.problems: list[str] = []
        self.differences: list[float] = []
        self.bar = tqdm(total=num_faults, desc="faults")

    def run(self) -> dict[str, Any]:
        """Round after round; what was done and what came of it."""
        preprocess(self.common)
        # Forks inherit these. A handler that raises, such as that of preprocess, is swallowed in the first moments of a
        # fork; and a shell starts what it puts into the background with SIGINT ignored.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        with self.bar, ExitStack() as stack:  # a bar that is open when Python 3.13.0 exits crashes it
            hosts: dict[str, OneHost | TwoHosts] = {"one host": OneHost(), "other ranks": OneHost()}
            if self.is_inside:
                hosts["two hosts"] = stack.enter_context(two_hosts())
            while not self.is_enough():
                for kind in ("two hosts", "one host", "other ranks", "one host"):
                    if kind in hosts and not self.is_enough():
                        self.round(kind, hosts[kind])
        minutes = (time.monotonic() - self.began) / 60
        return {
            "faults": self.bar.n,
            "minutes": round(minutes, 1),
            "faults_per_minute": round(self.bar.n / minutes, 2),
            "left_out": [] if self.is_inside else ["two hosts", "full disks"],
            "rounds": dict(self.rounds),
            "faults_by_kind": dict(self.faults.most_common()),
            "exit_codes": dict(self.codes.most_common()),
            "counts": dict(self.counts),
            "largest_difference_with_other_ranks": max(self.differences, default=None),
            "difference_of_undisturbed_runs_with_other_ranks": self.rounding() if self.differences else None,
            "problems": self.problems,
        }

    def is_enough(self) -> bool:
        """Whether there were as many faults as asked for, or the time is over."""
        return self.bar.n >= self.num_faults or time.monotonic() > self.began + 60 * self.minutes

    def round(self, kind: str, hosts: OneHost | TwoHosts) -> None:
        """A run from its first step to its model, under faults, and what it should have been."""
        number = self.rounds.total()
        self.rounds[kind] += 1
        folder = self.folder / f"run-{number}"
        run = Run(folder, self.folder / f"notes-{number}", [*self.common, *RECIPES[kind]])
        if self.is_inside:
            mount_memory(folder, DISK)
        bench = Bench(run, self.store, hosts, self.rng)
        self.disturb(bench, deck(UNDER_WAY[kind], self.rng), deck(AT_REST[kind], self.rng))
        self.compare(kind, run, bench)
        self.problems += [f"round {number}, {kind}, {problem}" for problem in bench.problems]
        self.counts += bench.counts
        self.codes += bench.codes
        if bench.problems:
            print("\n".join(bench.problems), file=sys.stderr, flush=True)
        if self.is_inside:
            unmount(folder)
        shutil.rmtree(run.notes)

    def disturb(self, bench: Bench, under_way: Iterator[Fault], at_rest: Iterator[FaultAtRest]) -> None:
        """Faults at rest and under way, until the run has ended."""
        has_ended, last = False, self.bar.n + FAULTS_A_ROUND
        while not has_ended and self.bar.n < last and not self.is_enough() and not bench.has_failed():
            if self.rng.random() < 0.6 and (name := next(at_rest)(bench)):
                self.note(name)
            ranks, after, codes = bench.start(), "the start", set[int]()
            while True:
                # From the first moments of a start to some steps behind a checkpoint.
                ranks.await_steps(self.rng.choice([0, 1, 2, 3, 5]))
                time.sleep(self.rng.uniform(0, 1.5) if self.rng.random() < 0.3 else self.rng.uniform(0, 0.1))
                if codes or not ranks.is_running() or self.is_enough():
                    break
                fault = next(under_way)
                if fault is faults.fill_disk and not self.is_inside:
                    continue
                after, may_end = fault(bench, ranks)
                self.note(after)
                codes = may_end or set()
            has_ended = bench.end(ranks, after, codes)
            for undone in [*bench.run.folder.glob("*.undone"), *bench.run.folder.glob("*.damaged")]:
                shutil.rmtree(undone)  # as a user does, who needs the room
        while not has_ended and not bench.has_failed():
            has_ended = bench.end(bench.start(), "the last start", set())

    def note(self, fault: str) -> None:
        """Count a fault."""
        self.faults[fault] += 1
        self.bar.update()

    def compare(self, kind: str, run: Run, bench: Bench) -> None:
        """Whether each example was trained once an epoch, and model and losses are those of a run left alone."""
        num_examples = len(TokenStore(self.store))
        steps = {line["step"]: line["positions"] for line in run.trained()}  # the last time of each is what counts
        order = [position for step in sorted(steps) for position in steps[step]]
        epochs = [sorted(order[start : start + num_examples]) for start in range(0, len(order), num_examples)]
        self.counts["steps"] += len(steps)
        self.counts["steps trained"] += len(run.trained())
        if epochs != [list(range(num_examples))] * 2:
            bench.problems.append("an example was not trained once an epoch")
        if not (run.folder / "model/model.safetensors").exists():
            bench.problems.append("there is no model")
        elif kind == "other ranks":
            self.differences.append(difference(run.folder, self.alone(kind, 2)))
            if self.differences[-1] > 4 * self.rounding():
                bench.problems.append(f"the weights differ by {self.differences[-1]:.3g}")
        elif difference(run.folder, self.alone(kind, 2)) or losses(run.folder) != losses(self.alone(kind, 2)):
            bench.problems.append("the weights or the losses are not those of the run that was left alone")

    @cache  # noqa: B019  # there is one soak
    def alone(self, kind: str, size: int) -> Path:
        """The folder of a run of that kind with so many ranks on one host, which nothing happens to."""
        options = [f"packing.grad_accum={NUM_BINS // size}"] if kind == "other ranks" else []
        name = "-".join(["alone", *options, str(size)])
        run = Run(self.folder / name, self.folder / f"notes-{name}", self.common)
        ranks = Ranks(run, size, OneHost(size).enter, options)
        assert set(ranks.wait()) == {0}, ranks.told()
        return run.folder

    def rounding(self) -> float:
        """The largest difference among undisturbed runs of one, two and three ranks."""
        two = self.alone("other ranks", 2)
        return max(difference(self.alone("other ranks", size), two) for size in (1, 3))


def deck(weights: dict[Any, int], rng: random.Random) -> Iterator[Any]:
    """The keys in an order drawn anew each time, each as often as its weight says, without end."""
    while True:
        cards = [key for key, number in weights.items() for _ in range(number)]
        rng.shuffle(cards)
        yield from cards


def difference(run: Path, other: Path) -> float:
    """The largest difference between two weights of two runs' models."""
    ours, theirs = (load_file(folder / "model/model.safetensors") for folder in (run, other))
    assert ours.keys() == theirs.keys()
    return max(float((ours[key] - theirs[key]).abs().max()) for key in ours)


def losses(run: Path) -> list[tuple[int, float]]:
    """Step and loss of each line of the metrics."""
    events = map(orjson.loads, (run / "metrics.jsonl").read_bytes().splitlines())
    return [(event["step"], event["loss"]) for event in events if event["event"] == "step"]
