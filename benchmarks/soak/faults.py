"""The faults, each a function. Those at rest happen between two starts of a run, the others while its ranks train."""

import errno
import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from soak.hosts import OneHost, TwoHosts
from soak.ranks import LOST_AFTER_S, Ranks, Run

# Micro-batches of a step where the number of ranks changes: it must not, or the steps would be others.
NUM_BINS = 6


@dataclass(slots=True)
class Bench:
    """A run under faults.

    options: what the next start has besides the run's arguments. problems: what came otherwise than it should have.
    """

    run: Run
    store: Path
    hosts: OneHost | TwoHosts
    rng: random.Random
    options: dict[str, str] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def start(self) -> Ranks:
        """Start the run, or go on with it."""
        self.counts["starts"] += 1
        return Ranks(self.run, self.hosts.size, self.hosts.enter, [f"{k}={v}" for k, v in self.options.items()])

    def end(self, ranks: Ranks, after: str, expected: set[int]) -> bool:
        """Wait for the ranks, note how they ended, and return whether the run has. expected: codes besides 0."""
        codes = ranks.wait()
        told = ranks.told()
        self.codes[" ".join(map(str, sorted(codes)))] += 1
        self.counts["ranks left behind"] += ranks.num_left_behind
        self.counts["stops saved"] += "stopped on request" in told
        self.counts["fallbacks"] += "falling back to" in told
        self.counts["undone set aside"] += "set aside and no longer counted" in told
        self.counts["saves that failed"] += told.count("was not saved")
        self.counts["refusals"] += "lacks room" in told
        # What a full disk may cost at the beginning and at the end of a run: named, and made good by the next start.
        costs = ("lacks room", "could not be saved", "was not written")
        expected = expected | ({1} if any(cost in told for cost in costs) else set())
        if set(codes) - expected - {0}:
            self.problem(after, codes, told)
        return set(codes) == {0}

    def has_failed(self) -> bool:
        """Whether so much went wrong that the run is given up."""
        return len(self.problems) > 5

    def problem(self, after: str, codes: list[int], told: str) -> None:
        """Note what should not have come."""
        lines = [line for line in told.splitlines() if re.search(r"[Ee]rror", line)] or told.splitlines()[-5:]
        self.problems.append(f"after {after}: {codes}: {' | '.join(lines[-5:])[:1500]}")


Fault = Callable[[Bench, Ranks], tuple[str, set[int] | None]]
FaultAtRest = Callable[[Bench], str | None]


# ---- While the ranks train: what it was, and the codes with which they end, None where they go on ----


def kill(bench: Bench, ranks: Ranks) -> tuple[str, set[int] | None]:
    """A rank is killed, as by a kernel that lacks memory."""
    ranks.signal(bench.rng.randrange(bench.hosts.size), signal.SIGKILL)
    return "SIGKILL", {-signal.SIGKILL, 1}


def ask_to_stop(bench: Bench, ranks: Ranks) -> tuple[str, set[int] | None]:
    """A rank is asked to stop."""
    number = bench.rng.choice([signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
    ranks.signal(bench.rng.randrange(bench.hosts.size), number)
    # Before a rank listens, a signal ends it; the other is left, or waits for it until it is killed too.
    return number.name, {75, -number, 1, -signal.SIGKILL}


def suspend(bench: Bench, ranks: Ranks) -> tuple[str, set[int] | None]:
    """All ranks are stopped, and go on one after the other, as a laptop sleeps; half the time beyond patience."""
    order = list(range(bench.hosts.size))
    for rank in order:
        ranks.signal(rank, signal.SIGSTOP)
    is_long = bench.rng.random() < 0.5
    time.sleep(LOST_AFTER_S + bench.rng.uniform(1, 4) if is_long else bench.rng.uniform(0.2, 3))
    bench.rng.shuffle(order)
    for rank in order:
        ranks.signal(rank, signal.SIGCONT)
        time.sleep(bench.rng.uniform(0, 3))
    return f"all stopped {'beyond' if is_long else 'within'} the patience", None


def freeze(bench: Bench, ranks: Ranks) -> tuple[str, set[int] | None]:
    """A host stands still for good and closes no connection; its rank is killed when the other has ended."""
    frozen = bench.rng.randrange(2)
    _await_watchdogs(ranks)
    ranks.signal(frozen, signal.SIGSTOP)
    ranks.await_end()
    ranks.signal(frozen, signal.SIGKILL)
    return "a host frozen", {1, -signal.SIGKILL}


def cut_briefly(bench: Bench, ranks: Ranks) -> tuple[str, set[int] | None]:
    """The cable is cut and mended within the patience: connections send again what was lost."""
    assert isinstance(bench.hosts, TwoHosts)
    bench.hosts.set_cable("down")
    time.sleep(bench.rng.uniform(0.2, LOST_AFTER_S / 3))
    bench.hosts.set_cable("up")
    return "a cable cut and mended", None


def cut(bench: Bench, ranks: Ranks) -> tuple[str, set[int] | None]:
    """The cable is cut until both ranks have ended by themselves."""
    assert isinstance(bench.hosts, TwoHosts)
    _await_watchdogs(ranks)
    bench.hosts.set_cable("down")
    ranks.wait()
    bench.hosts.set_cable("up")
    return "a cable cut", {1}


def _await_watchdogs(ranks: Ranks) -> None:
    """Before they have met, hosts wait for each other for as long as torch does, which is half an hour."""
    ranks.await_steps(1)


def fill_disk(bench: Bench, ranks: Ranks) -> tuple[str, set[int] | None]:
    """Something else fills the disk of the run's folder for some steps."""
    stranger = bench.run.folder / "filled by something else"
    with open(stranger, "wb", buffering=0) as file:
        try:
            while file.write(bytes(1 << 16)):
                pass
        except OSError as error:
            assert error.errno == errno.ENOSPC
    ranks.await_steps(bench.rng.randint(2, 6))
    stranger.unlink()
    return "a full disk", None


# ---- At rest: what it was, None where it was not possible ----


def damage_checkpoint(bench: Bench) -> str | None:
    """A file of the newest checkpoint is cut off, changed by a bit, or removed."""
    whole = bench.run.checkpoints()
    if len(whole) < 2:
        return None
    files = sorted(path for path in whole[-1].rglob("*") if path.is_file() and path.stat().st_size)
    file, kind = bench.rng.choice(files), bench.rng.choice(["cut off", "changed by a bit", "removed"])
    if kind == "cut off":
        os.truncate(file, bench.rng.randrange(file.stat().st_size))
    elif kind == "removed":
        file.unlink()
    else:
        _flip_a_bit(file, bench.rng)
    bench.options["checkpoint.resume"] = "auto"
    return f"file of a checkpoint {kind}"


def damage_store(bench: Bench) -> str | None:
    """A bit of the store is flipped: the start is refused with the file's name, and the file is restored."""
    files = [path for path in sorted(bench.store.rglob("*")) if path.suffix in (".arrow", ".npy")]
    file = bench.rng.choice([*files, bench.store / "manifest.json"])
    whole = file.read_bytes()
    _flip_a_bit(file, bench.rng)
    ranks = bench.start()
    codes, told = ranks.wait(), ranks.told()
    file.write_bytes(whole)
    bench.codes[" ".join(map(str, sorted(codes)))] += 1
    bench.counts["refusals"] += 1
    if set(codes) != {1} or file.name not in told or "is damaged" not in told or "Traceback" in told:
        bench.problem(f"a bit of {file.name}", codes, told)
    return "bit of the store flipped"


def branch(bench: Bench) -> str | None:
    """The run goes on from an earlier checkpoint, named as a path; what is newer is set aside, here removed."""
    whole = bench.run.checkpoints()
    if len(whole) < 2:
        return None
    bench.options["checkpoint.resume"] = str(bench.rng.choice(whole[:-1]))
    return "branch from an earlier step"


def change_ranks(bench: Bench) -> str | None:
    """The run goes on with another number of ranks, another ZeRO stage, or both; stage 0 has states of its own."""
    was = (bench.hosts.size, bench.options.get("zero.stage"))
    size, stage = bench.rng.choice([(n, str(s)) for n in (1, 2, 3) for s in (1, 2, 3) if (n, str(s)) != was])
    bench.hosts = OneHost(size)
    bench.options |= {"zero.stage": stage, "packing.grad_accum": str(NUM_BINS // size)}
    return "other ranks or ZeRO stage"


def _flip_a_bit(file: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
