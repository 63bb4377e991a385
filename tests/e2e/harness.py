"""Runs the real commands on small models: two processes on the CPU over gloo, as `deepspeed` or as forks start them."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import orjson
import yaml
from safetensors.torch import load_file
from torch import Tensor

from ochat_train.files import free_port
from tests.waiting import HANG_S

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def tiny_recipe(folder: Path, **changes: Any) -> Path:
    """A recipe of a small Llama on quickstart data, written to folder/recipe.yaml; `changes` are whole sections."""
    recipe: dict[str, Any] = {
        "name": "tiny",
        "data": {
            "store": str(folder / "store"),
            "sources": [
                _source("careful", folder / "dump.json", 1.0),
                _source("hasty", folder / "dump.json", 0.1),
            ],
            "max_tokens": 256,
        },
        "template": "openchat_v3.2",
        "tokenizer": str(ROOT / "data/quickstart_tokenizer"),
        "model": {
            "config": {
                "model_type": "llama",
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 256,
            },
            "dtype": "float32",
            "checkpointing": "none",
        },
        "packing": {"tokens_per_gpu": 256, "grad_accum": 2},
        "optim": {"lr": 0.01},
        "train": {"epochs": 2, "seed": 3},
        "checkpoint": {"dir": str(folder / "run"), "keep": 10},
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | changes))
    return path


def write_dump(folder: Path, num_conversations: int) -> None:
    """The first conversations of the quickstart as folder/dump.json."""
    folder.mkdir(parents=True, exist_ok=True)
    conversations = orjson.loads((ROOT / "data/quickstart.json").read_bytes())
    step = len(conversations) // num_conversations  # spread, so that both sources are in it
    (folder / "dump.json").write_bytes(orjson.dumps(conversations[::step][:num_conversations]))


def preprocess(recipe: Path, *overrides: str) -> None:
    """Run the preprocess command."""
    command = [sys.executable, "-m", "ochat_train.preprocess", str(recipe), *overrides]
    subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True, text=True)


def train(recipe: Path, *overrides: str, num_processes: int = 2) -> str:
    """Run training to its end, without the launcher's seconds; returns what it printed."""
    return _finish(start_ranks("ochat_train.train", str(recipe), *overrides, folders=[ROOT] * num_processes))


def train_several(recipe: Path, *runs: Sequence[str], num_processes: int = 2) -> str:
    """Run several trainings, each with its overrides, in one set of processes; returns what they printed."""
    arguments = [orjson.dumps(overrides).decode() for overrides in runs]
    return _finish(start_ranks("tests.e2e.several", str(recipe), *arguments, folders=[ROOT] * num_processes))


def _finish(ranks: "Ranks") -> str:
    ended = ranks.end()
    assert {code for code, _ in ended} == {0}, ended
    return "".join(output for _, output in ended)


def launch_environment(**variables: str) -> dict[str, str]:
    """What launch.sh finds: the Python that runs the tests, which has ochat_train, so that nothing is installed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    inherited = {name: value for name, value in ENVIRONMENT.items() if not name.startswith("SLURM_")}
    return inherited | {"PATH": path} | variables


def start_launch(
    recipe: Path, *overrides: str, environment: dict[str, str], before: Sequence[str] = ()
) -> subprocess.Popen[str]:
    """launch.sh in a process group of its own, as a terminal starts it; `before` stands before the command."""
    return subprocess.Popen(
        [*before, "./launch.sh", str(recipe), *overrides],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def num_steps(run: Path) -> int:
    """How many steps are reported, while the run may be writing."""
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b'"event":"step"') if file.exists() else 0


def await_steps(run: Path, number: int, process: subprocess.Popen[str]) -> None:
    """Wait until that many steps are reported by the run, which the process must not end before."""
    deadline = time.monotonic() + HANG_S
    while num_steps(run) < number:
        assert process.poll() is None and time.monotonic() < deadline, f"{num_steps(run)} of {number} steps were made"
        time.sleep(0.01)


class Ranks:
    """Training processes without a launcher, which would end one when the other ends."""

    def __init__(self, pids: list[int], outputs: list[Path]) -> None:
        self.pids, self._outputs = pids, outputs

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Send it to one of them."""
        os.kill(self.pids[rank], number)

    def codes(self) -> list[int | None]:
        """The exit code of each, None while it runs."""
        return [_ask_zygote(pid) for pid in self.pids]

    def wait_for(self, is_there: Callable[[], bool]) -> None:
        """Wait while both run."""
        deadline = time.monotonic() + HANG_S
        while not is_there():
            assert set(self.codes()) == {None}, self.end()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def end(self) -> list[tuple[int, str]]:
        """Exit code and output of each, when they have ended by themselves."""
        deadline = time.monotonic() + HANG_S
        while None in (codes := self.codes()):
            if time.monotonic() > deadline:
                for pid in self.pids:
                    os.kill(pid, signal.SIGKILL)
                raise TimeoutError([output.read_text() for output in self._outputs])
            time.sleep(0.02)
        outputs = [output.read_text() for output in self._outputs]
        return [(code, output) for code, output in zip(codes, outputs, strict=True) if code is not None]


def start_ranks(module: str, *arguments: str, code: str = "", folders: Sequence[Path] = (ROOT, ROOT)) -> Ranks:
    """Start `module` in a process for each folder: on one host if the folders are the same, else on as many hosts.

    code: what they do before; `rank` is there.
    """
    program = f"import os; rank = int(os.environ['RANK'])\n{code}\nfrom {module} import main\nmain()"
    is_one_host = len(set(folders)) == 1
    world = {"WORLD_SIZE": str(len(folders)), "LOCAL_SIZE": str(len(folders) if is_one_host else 1)}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    pids, outputs = [], []
    for rank, folder in enumerate(folders):
        outputs.append(Path(tempfile.mkstemp(prefix=f"rank-{rank}-")[1]))
        env = world | {"RANK": str(rank), "LOCAL_RANK": str(rank if is_one_host else 0)}
        request = {"argv": arguments, "program": program, "env": env, "cwd": str(folder), "output": str(outputs[-1])}
        pid = _ask_zygote(request)
        assert pid is not None
        pids.append(pid)
    return Ranks(pids, outputs)


def run_two(recipe: Path, folders: Sequence[Path], *overrides: str, code: str = "") -> list[tuple[int, str]]:
    """Exit code and output of two training processes with their store and run in their folders."""
    arguments = [str(recipe), "data.store=store", "checkpoint.dir=run", *overrides]
    return start_ranks("ochat_train.train", *arguments, code=code, folders=folders).end()


def _ask_zygote(request: Any) -> int | None:
    asked, answers = _zygote().stdin, _zygote().stdout
    assert asked is not None and answers is not None
    asked.write(orjson.dumps(request) + b"\n")
    asked.flush()
    answer: int | None = orjson.loads(answers.readline())
    return answer


@cache
def _zygote() -> subprocess.Popen[bytes]:
    """One for the whole test run; it ends when the tests do, and its input with them."""
    command = [sys.executable, "-m", "tests.e2e.zygote"]
    return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def weights(run: Path) -> dict[str, Tensor]:
    """The exported model's weights."""
    return load_file(run / "model" / "model.safetensors")


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    """The run's metrics of one kind, `step` or `eval`."""
    lines: Sequence[bytes] = (run / "metrics.jsonl").read_bytes().splitlines()
    return [event for event in map(orjson.loads, lines) if event["event"] == kind]


def _source(name: str, path: Path, weight: float) -> dict[str, Any]:
    condition = name.capitalize()
    return {"name": name, "path": str(path), "where": {"model": name}, "condition": condition, "weight": weight}
