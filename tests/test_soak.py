"""The soak in small: under a few faults, on two hosts where that can be, a run ends as the one that was left alone."""

import subprocess
import sys
from pathlib import Path

import orjson

from tests.waiting import HANG_S

ROOT = Path(__file__).resolve().parents[1]


def test_a_run_under_faults_ends_as_the_one_that_was_left_alone() -> None:
    command = [sys.executable, "benchmarks/soak", "--faults", "3", "--no-write"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2 * HANG_S)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = orjson.loads(done.stdout[done.stdout.index('{\n  "date"') :])
    assert (results["faults"], results["problems"]) == (3, [])
    assert results["rounds"] == {"one host" if "two hosts" in results["left_out"] else "two hosts": 1}
    assert results["counts"]["steps trained"] >= results["counts"]["steps"] == 48
