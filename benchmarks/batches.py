"""How long a micro-batch takes to be made from a mapped store, which a training step must not wait for.

    python benchmarks/batches.py

A store of 20,000 ShareGPT-like examples in a temporary folder; micro-batches of 27 random ones, about 33,000 tokens,
one after the other in one thread, after a warm-up. The numbers are printed and written to benchmarks/results/. Needs
psutil.
"""

import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import orjson
import pyarrow as pa
from machine import describe_machine, write_results

from ochat_train.tokens.store import Manifest, StoreWriter, TokenStore
from ochat_train.training.data import make_batch

NUM_EXAMPLES, NUM_BATCHES, WARM_UP, EXAMPLES_A_BATCH = 20_000, 200, 20, 27
WRITTEN_AT_ONCE = 1000  # examples, as many as a shard has


def main() -> None:
    """Measure, print and write down."""
    results = describe_machine(("numpy", "torch", "pyarrow", "datasets"))
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        write_store(Path(folder), rng)
        store = TokenStore(Path(folder) / "store")
        seconds, tokens = [], []
        for positions in rng.integers(0, NUM_EXAMPLES, (WARM_UP + NUM_BATCHES, EXAMPLES_A_BATCH)):
            started = time.perf_counter()
            make_batch(store, positions)
            seconds.append(time.perf_counter() - started)
            tokens.append(int(store.lengths[positions].sum()))
    measured = sorted(1000 * second for second in seconds[WARM_UP:])
    results["ms"] = measured
    results["mean_tokens"] = sum(tokens[WARM_UP:]) / NUM_BATCHES
    print(orjson.dumps({key: value for key, value in results.items() if key != "ms"}).decode())
    print(f"ms a micro-batch: median {median(measured):.2f}, from {measured[0]:.2f} to {measured[-1]:.2f}")
    write_results("batches", results)


def write_store(folder: Path, rng: np.random.Generator) -> None:
    """A store of random tokens in folder/store, half of them with a loss."""
    (folder / "staging").mkdir()
    writer = StoreWriter(folder / "staging", ["all"], 2**31)
    for _ in range(NUM_EXAMPLES // WRITTEN_AT_ONCE):
        ends = np.cumsum(np.clip(rng.lognormal(6.8, 0.9, WRITTEN_AT_ONCE), 8, 4096).astype(np.int32))
        offsets = pa.array(np.concatenate([[0], ends]), pa.int32())
        ids, weights = rng.integers(0, 32_000, ends[-1]), rng.integers(0, 2, ends[-1])
        texts = {name: ["all"] * WRITTEN_AT_ONCE for name in ("id", "source", "condition")}
        columns = {
            "input_ids": pa.ListArray.from_arrays(offsets, pa.array(ids, pa.int32())),
            "loss_weights": pa.ListArray.from_arrays(offsets, pa.array(weights, pa.float32())),
            "answer_lengths": pa.array(np.add.reduceat(weights, offsets[:-1])[:, None].tolist(), pa.list_(pa.int32())),
        }
        writer.add("train", pa.table(texts | columns))
    manifest = Manifest(
        fingerprint="benchmark",
        made_from={},
        template="",
        conditions=writer.conditions,
        sources=writer.sources,
        inference_condition="",
        added_tokens={},
        splits=writer.split_totals(),
        counts={},
        overlong={},
    )
    writer.finish(manifest, folder / "store")


if __name__ == "__main__":
    main()
