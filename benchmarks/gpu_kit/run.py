"""Measure everything on this machine, in nine minutes at most; needs what `prepare` made, and no network.

    python -m benchmarks.gpu_kit.run OUT               on a GPU
    python -m benchmarks.gpu_kit.run OUT --preset cpu  all stages in a short form, so that the kit cannot rot

Each stage is a process of its own under a limit of its own, so that none takes the results of another with it. What a
stage finds is written to OUT as it is found; OUT/run.json says how each stage ended, OUT/log.txt has all that they
printed, and OUT/summary.md is what `report` makes of it. The exit status is 1 where a stage failed. Wheels of the
prepared folder are unpacked into a temporary folder: nothing is installed.
"""

import argparse
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks.gpu_kit import PREPARED, ROOT, report

MOST_SECONDS = 540
CPU_PATIENCE = 10  # a CPU that others use, too, takes longer; nothing is lent there
_GROUP = ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
GRACE = 10  # seconds between asking a stage to end, so that it writes what it has, and killing it


@dataclass(frozen=True, slots=True)
class Stage:
    """A process and its limit in seconds; command: what stands after `python`."""

    name: str
    limit_s: float
    command: list[str]


def stages_of(preset: str, out: Path, prepared: Path, scratch: Path) -> list[Stage]:
    """The stages in their order, which is that of importance should time run out."""
    is_gpu = preset == "gpu"
    tests = [
        "-m",
        "pytest",
        "-v",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        "--color=no",
        f"--junitxml={out / 'tests.xml'}",
    ]
    if is_gpu and importlib.util.find_spec("xdist"):
        tests += ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "worksteal"]
    step = ["benchmarks/train_step.py", "--results", str(out)]
    if is_gpu:
        step += ["--capacities", "32768", "--checkpointing", "full", "none", "--repeats", "3", "--minutes", "2.5"]
    else:
        step += ["--preset", "cpu", "--width", "64", "--capacities", "512", "--compared", "512", "--max-tokens", "128"]
        step += ["--checkpointing", "none", "--batches", "1", "--repeats", "1"]
    own = {
        name: ["-m", f"benchmarks.gpu_kit.{name}", str(out / f"{name}.json"), preset]
        for name in ("environment", "training", "memory")
    }
    return [
        Stage("environment", 45, own["environment"]),
        Stage("tests", 150, [*tests, "tests/gpu"]),
        Stage("train_step", 200, step),
        Stage("training", 90, [*own["training"], str(prepared), str(scratch)]),
        Stage("memory", 70, own["memory"]),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the stages one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder of results, made if it does not exist")
    parser.add_argument("--preset", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--prepared", type=Path, default=PREPARED, metavar="FOLDER", help="instead of prepared/")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="some of the stages: " + ", ".join(report.STAGES))
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.only or ()) - set(report.STAGES)):
        parser.error(f"--only {unknown[0]}: there are {', '.join(report.STAGES)}")
    out, prepared = options.out.resolve(), options.prepared.resolve()
    if not (prepared / "recipe.yaml").is_file():
        parser.error(f"{prepared} is not prepared; run python -m benchmarks.gpu_kit.prepare where a registry is")
    out.mkdir(parents=True, exist_ok=True)
    patience = CPU_PATIENCE if options.preset == "cpu" else 1
    deadline = time.monotonic() + patience * MOST_SECONDS
    ended = []
    with tempfile.TemporaryDirectory(prefix="gpu-kit-") as folder:
        scratch = Path(folder)
        environment = unpack(prepared / "wheels", scratch / "site") | accelerator_of(options.preset)
        for stage in stages_of(options.preset, out, prepared, scratch / "runs"):
            if options.only and stage.name not in options.only:
                continue
            stage = replace(stage, limit_s=patience * stage.limit_s)
            ended.append(run_stage(stage, out / "log.txt", environment, deadline))
            print(f"{stage.name}: {ended[-1].status} after {ended[-1].seconds:.0f} s", flush=True)
            (out / "run.json").write_text(json.dumps({"preset": options.preset, "stages": [asdict(e) for e in ended]}))
            (out / "summary.md").write_text(report.summary(out))
    print((out / "summary.md").read_text())
    if any(end.status != "passed" for end in ended):
        sys.exit(1)


def unpack(wheels: Path, site: Path) -> dict[str, str]:
    """Unpack the wheels; returns the environment in which they, the tree and the benchmarks' modules are found."""
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as opened:
            opened.extractall(site)
    paths = [str(site), str(ROOT), str(ROOT / "benchmarks")]
    # Each stage makes its own process group, of itself alone.
    own = {name: value for name, value in os.environ.items() if name not in _GROUP}
    found = own | {"PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])}
    return found | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}


def accelerator_of(preset: str) -> dict[str, str]:
    """On a CPU DeepSpeed needs to be told, and the share of cores stays small."""
    return {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if preset == "cpu" else {}


@dataclass(frozen=True, slots=True)
class Ended:
    """How a stage ended: passed, failed with its exit status, cut at its limit, or not run for want of time."""

    name: str
    status: str
    seconds: float


def run_stage(stage: Stage, log: Path, environment: dict[str, str], deadline: float) -> Ended:
    """Run it to its end or its limit; at the limit it is interrupted, and killed with its children after GRACE."""
    limit = min(stage.limit_s, deadline - time.monotonic() - GRACE)
    if limit < 5:
        return Ended(stage.name, "not run: no time left", 0.0)
    started = time.monotonic()
    with open(log, "a") as output:
        output.write(f"\n===== {stage.name}: python {' '.join(stage.command)}   (Python {platform.python_version()})\n")
        output.flush()
        process = subprocess.Popen(
            [sys.executable, *stage.command],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
            status = "passed" if code == 0 else f"failed with {code}"
        except subprocess.TimeoutExpired:
            status = f"cut at {limit:.0f} s"
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        with suppress(ProcessLookupError):  # what it left behind, and itself
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return Ended(stage.name, status, time.monotonic() - started)


if __name__ == "__main__":
    main()
