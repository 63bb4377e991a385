"""One run, disturbed again and again: does it end as the run that was left alone?

    python benchmarks/soak.py [--disturbances 200] [--seed 0]

Trains a small model on the quickstart's conversations in two processes, ZeRO 2, with a checkpoint every second step.
One run is left alone. The other is disturbed: a rank is killed, a rank is sent a signal, a file of the newest
checkpoint is cut off, changed by a bit or removed; then it is started again. At the end every example of every epoch
must have been trained once in the steps that count, and the weights must be, bit for bit, those of the first run. The
counts are printed and written to benchmarks/results/.

The processes are forks of this one, which has imported all they need, so that a start takes a second and not ten. Needs
psutil.
"""

import argparse
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import numpy as np
import orjson
import torch
from machine import ROOT, describe_machine, write_results
from safetensors.torch import load_file
from tqdm import tqdm

from ochat_train.preprocess.__main__ import main as preprocess
from ochat_train.recipe import load_recipe
from ochat_train.tokens.store import TokenStore
from ochat_train.train import Trainer
from ochat_train.train import main as main_of_training
from ochat_train.training.checkpoint import find_checkpoints

WORLD_SIZE = 2
# When one rank has ended, the launcher kills the others after 30 s. They end by themselves well before, unless they
# still wait for it to join them: only then does the watchdog begin.
PATIENCE_S = 15.0
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def main() -> None:
    """Disturb, compare, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--disturbances", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    results = describe_machine(("torch", "deepspeed", "transformers")) | vars(options)
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as name:
        folder, began = Path(name), time.perf_counter()
        common = [
            "recipes/quickstart.yaml",
            f"data.store={folder / 'store'}",
            "checkpoint.every_steps=2",
            "checkpoint.keep=3",
            f"train.epochs={options.disturbances}",  # of 24 steps; 5 to 13 passed between two disturbances
            *(f"model.config.{key}={value}" for key, value in SIZES.items()),
        ]
        preprocess(common)
        # Forks inherit these. A handler that raises, such as that of preprocess, is swallowed in the first moments of a
        # fork; and a shell starts what it puts into the background with SIGINT ignored.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        alone, disturbed = folder / "alone", folder / "disturbed"
        assert Ranks(common, alone).wait() == [0] * WORLD_SIZE, (alone / "log-0").read_text()
        results |= disturb(common, disturbed, random.Random(options.seed), options.disturbances)
        results |= compare(alone, disturbed, load_recipe(common[0], common[1:]).data.store)
        results["minutes"] = round((time.perf_counter() - began) / 60, 1)
    print(orjson.dumps(results, option=orjson.OPT_INDENT_2).decode())
    write_results("soak", results)
    if not (results["is_every_example_trained_once"] and results["are_weights_equal"]):
        sys.exit("the disturbed run is not the one that was left alone")


class Ranks:
    """The processes of one start of the run in `run`."""

    def __init__(self, arguments: list[str], run: Path) -> None:
        run.mkdir(exist_ok=True)
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        self.pids = [os.fork() or train(rank, port, arguments, run) for rank in range(WORLD_SIZE)]
        self.codes: dict[int, int] = {}
        self.num_left_behind = 0

    def is_running(self) -> bool:
        """Whether no rank has ended."""
        self._collect()
        return not self.codes

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Send it, if the rank is there."""
        if self.is_running():
            os.kill(self.pids[rank], number)

    def wait(self) -> list[int]:
        """The exit codes. Ranks that do not end in time after the first are counted, and killed as a launcher would."""
        first_ended_at = None
        while len(self.codes) < WORLD_SIZE:
            self._collect()
            if self.codes and first_ended_at is None:
                first_ended_at = time.monotonic()
            if first_ended_at is not None and time.monotonic() - first_ended_at > PATIENCE_S:
                for pid in set(self.pids) - self.codes.keys():
                    self.num_left_behind += 1
                    os.kill(pid, signal.SIGKILL)
                    self.codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            time.sleep(0.01)
        return [self.codes[pid] for pid in self.pids]

    def _collect(self) -> None:
        for pid in set(self.pids) - self.codes.keys():
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self.codes[pid] = os.waitstatus_to_exitcode(status)


def train(rank: int, port: int, arguments: list[str], run: Path) -> int:
    """What a forked process does; it does not return. The examples of each step go to `run`/trained."""
    log = os.open(run / f"log-{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as Python starts
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD_SIZE, "LOCAL_SIZE": WORLD_SIZE}
    os.environ |= {name: str(value) for name, value in world.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    original = Trainer.train_one_step

    def train_one_step(trainer: Trainer, ready: Any, *others: Any, **options: Any) -> Any:
        done = original(trainer, ready, *others, **options)
        if rank == 0:
            positions = np.concatenate(ready.item.bins).tolist()
            with open(run / "trained", "ab") as file:
                file.write(orjson.dumps({"step": trainer.state.step, "positions": positions}) + b"\n")
        return done

    Trainer.train_one_step = train_one_step  # type: ignore[method-assign]
    code: Any = 1
    try:
        main_of_training([*arguments, f"checkpoint.dir={run}"])
        code = 0
    except SystemExit as error:
        code = error.code
        if isinstance(code, str):
            print(code, flush=True)
            code = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def disturb(arguments: list[str], run: Path, rng: random.Random, num_disturbances: int) -> dict[str, Any]:
    """Disturb the run that often, then let it end; what was done and what came of it."""
    counts: Counter[str] = Counter()
    codes: Counter[str] = Counter()
    num_starts = num_left_behind = 0
    with tqdm(total=num_disturbances, desc="disturbances") as bar:
        while bar.n < num_disturbances:
            whole = find_checkpoints(run)
            if len(whole) > 1 and rng.random() < 0.3:
                counts[damage(whole[-1], rng)] += 1
                bar.update()
            ranks = Ranks(arguments, run)
            num_starts += 1
            # From the first moments of a start to some steps behind the checkpoint.
            await_steps(run, ranks, rng.choice([0, 1, 2, 3, 5]))
            time.sleep(rng.uniform(0, 1.5) if rng.random() < 0.3 else rng.uniform(0, 0.1))
            rank = rng.randrange(WORLD_SIZE)
            number = rng.choice([signal.SIGKILL] * 3 + [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
            if ranks.is_running():
                ranks.signal(rank, number)
                counts[number.name] += 1
                bar.update()
            codes[" ".join(map(str, sorted(ranks.wait())))] += 1
            num_left_behind += ranks.num_left_behind
            if set(ranks.codes.values()) == {0}:
                raise SystemExit(f"the run ended after {bar.n} disturbances; give it more epochs")
    ended = Ranks(arguments, run).wait()
    assert ended == [0] * WORLD_SIZE, (run / "log-0").read_text()[-3000:]
    log = (run / "log-0").read_text()
    return {
        "disturbances_by_kind": dict(counts),
        "starts": num_starts + 1,
        "exit_codes": dict(codes),
        "ranks_left_behind": num_left_behind,
        "stops_saved": log.count("stopped on request"),
        "fallbacks": log.count("falling back to"),
        "steps_trained": len((run / "trained").read_bytes().splitlines()),
    }


def await_steps(run: Path, ranks: Ranks, num_steps: int) -> None:
    """Wait until that many steps more are done, or a rank has ended."""
    file = run / "trained"
    before = file.stat().st_size if file.exists() else 0
    while ranks.is_running() and num_steps:
        if file.exists() and file.read_bytes()[before:].count(b"\n") >= num_steps:
            return
        time.sleep(0.005)


def damage(checkpoint: Path, rng: random.Random) -> str:
    """Damage one file of a checkpoint; how."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.stat().st_size)
    file, kind = rng.choice(files), rng.choice(["cut off", "a bit flipped", "removed"])
    if kind == "cut off":
        os.truncate(file, rng.randrange(file.stat().st_size))
    elif kind == "removed":
        file.unlink()
    else:
        content = bytearray(file.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
    return f"file {kind}"


def compare(alone: Path, disturbed: Path, store: str) -> dict[str, Any]:
    """Whether the two runs are one."""
    num_examples = len(TokenStore(store))
    steps: dict[int, list[int]] = {}  # the last time that a step was trained is the one that counts
    for line in (disturbed / "trained").read_bytes().splitlines():
        steps[orjson.loads(line)["step"]] = orjson.loads(line)["positions"]
    order = [position for step in sorted(steps) for position in steps[step]]
    epochs = [sorted(order[start : start + num_examples]) for start in range(0, len(order), num_examples)]
    ours, theirs = (load_file(run / "model/model.safetensors") for run in (disturbed, alone))
    told = [
        [(event["step"], event["loss"]) for line in lines if (event := orjson.loads(line))["event"] == "step"]
        for lines in ((run / "metrics.jsonl").read_bytes().splitlines() for run in (disturbed, alone))
    ]
    return {
        "steps": len(steps),
        "epochs": len(epochs),
        "is_every_example_trained_once": all(epoch == list(range(num_examples)) for epoch in epochs),
        "are_weights_equal": ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours),
        "are_losses_equal": told[0] == told[1],
    }


if __name__ == "__main__":
    main()
