"""How long finding duplicates takes, and how much memory and disk, over generated keys of many conversations.

    python benchmarks/duplicates.py [--conversations 1000000 10000000] [--dir DIR]

Each conversation has three answers, so two prefixes. 5 % are exact copies of an earlier one, 8 % earlier snapshots, 3 %
near-duplicates, as in the dumps of dumps.py; a tenth have the first question of another one. Three runs for each size:
copies and snapshots alone; with a split too; with near-duplicates at 0.8 too. Memory is what the process takes beyond
its mapped files, whose pages the system can give to others: its peak, above what it was before. The generated keys come
shard by shard, as in preprocessing, and the time to generate them is in the time.
"""

import argparse
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from machine import describe_machine, write_results

from ochat_train.conversations.dedupe import DROP_REASONS, find_duplicates
from ochat_train.conversations.text_keys import NUM_HASHES, TextKeys

SHARD = 50_000  # conversations
WAYS: dict[str, dict[str, Any]] = {
    "copies": {"near": None, "eval_fraction": 0.0},
    "split": {"near": None, "eval_fraction": 0.01},
    "near, split": {"near": 0.8, "eval_fraction": 0.01},
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure everything, print a line for each run and write the numbers down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--dir", type=Path, help="folder for the files of keys, 316 bytes a conversation")
    options = parser.parse_args(arguments)
    results = describe_machine(("numpy",))
    print(orjson.dumps(results, option=orjson.OPT_INDENT_2).decode())
    results["runs"] = [measure(size, way, options.dir) for size in options.conversations for way in WAYS]
    write_results("duplicates", results)


def measure(num_conversations: int, way: str, parent: Path | None) -> dict[str, Any]:
    """Seconds, peak bytes of memory and of files for one run."""
    with tempfile.TemporaryDirectory(dir=parent) as name:
        done = threading.Event()
        peaks = {"memory": 0, "files": 0}
        before = _anonymous_bytes()

        def watch() -> None:
            while not done.wait(0.05):
                peaks["memory"] = max(peaks["memory"], _anonymous_bytes() - before)
                peaks["files"] = max(peaks["files"], sum(path.stat().st_size for path in Path(name).rglob("*")))

        watcher = threading.Thread(target=watch)
        watcher.start()
        started = time.perf_counter()
        shards = make_keys(num_conversations, minhash=way != "copies")
        decisions = find_duplicates(shards, exact=True, prefix=True, work_dir=Path(name), **WAYS[way])
        seconds = time.perf_counter() - started
        done.set()
        watcher.join()
    counts = np.bincount(decisions.status, minlength=4).tolist()
    result = {"conversations": num_conversations, "way": way, "seconds": seconds, **peaks}
    result |= {reason: counts[status] for status, reason in DROP_REASONS.items()}
    print(f"{num_conversations:>11,} {way:12} {seconds:7.1f} s", end="")
    print(f" {peaks['memory'] / 1e9:7.2f} GB of memory {peaks['files'] / 1e9:7.2f} GB of files", counts)
    return result


def make_keys(num_conversations: int, *, minhash: bool) -> Iterator[TextKeys]:
    """The keys of all conversations, in shards."""
    rng = np.random.default_rng(0)
    for start in range(0, num_conversations, SHARD):
        size = min(SHARD, num_conversations - start)
        chain = _random(rng, size, 3)  # the hash up to each answer
        question = _random(rng, size)
        kinds, others = rng.random(size), rng.integers(0, size, size)
        exact, snapshot, near = kinds < 0.05, (kinds >= 0.05) & (kinds < 0.13), (kinds >= 0.13) & (kinds < 0.16)
        chain[exact] = chain[others[exact]]
        chain[snapshot, 2] = chain[others[snapshot], 1]
        same_question = rng.random(size) < 0.1
        question[same_question] = question[others[same_question]]
        signatures = rng.integers(0, 1 << 16, (size if minhash else 0, NUM_HASHES), dtype=np.uint16)
        if minhash:
            copies = signatures[others[near]]
            changed = rng.random(copies.shape) < 0.05
            signatures[near] = np.where(changed, rng.integers(0, 1 << 16, copies.shape, dtype=np.uint16), copies)
        yield TextKeys(
            own=chain[:, 2],
            num_prefixes=np.full(size, 2, np.int32),
            prefixes=chain[:, :2].ravel(),
            priority=_random(rng, size, 2),
            condition=np.zeros(size, np.uint64),
            question=question,
            record=np.zeros(size, np.uint64),
            signatures=signatures if minhash else np.zeros((size, 0), np.uint16),
            held_out=np.zeros(size, np.bool_),
            said=np.zeros(0, np.uint64),
        )


def _random(rng: np.random.Generator, *shape: int) -> Any:
    return rng.integers(0, 1 << 64, shape, dtype=np.uint64)


def _anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


if __name__ == "__main__":
    main()
