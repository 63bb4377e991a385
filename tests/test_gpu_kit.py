"""The GPU kit: all of its stages in their short form, and what becomes of a stage that is cut."""

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from benchmarks.gpu_kit import prepare, report, run
from tests.waiting import HANG_S

ROOT = Path(__file__).resolve().parents[1]


def call(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"benchmarks.gpu_kit.{module}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2 * HANG_S)


def test_every_stage_runs_on_a_cpu_and_is_in_the_summary(tmp_path: Path) -> None:
    prepared, out = tmp_path / "prepared", tmp_path / "out"
    done = call("prepare", "--without-wheels", "--into", str(prepared))
    assert done.returncode == 0, done.stderr
    done = call("run", str(out), "--preset", "cpu", "--prepared", str(prepared))
    assert done.returncode == 0, done.stdout + done.stderr + (out / "log.txt").read_text()[-4000:]
    assert [(e["name"], e["status"]) for e in json.loads((out / "run.json").read_text())["stages"]] == [
        (name, "passed") for name in report.STAGES
    ]
    files = [file for file in out.rglob("*") if file.is_file()]
    assert len(files) == 8 and all(file.parent == out and file.stat().st_size < 2**24 for file in files)
    (trained,) = json.loads((out / "training.json").read_text())
    assert trained["stopped_at"] >= 3 and len(trained["losses"]) == trained["stopped_at"] + 2
    assert trained["resumed_from"] and trained["worst"] < 1e-3 and trained["exported_tensors"] > 30
    (engine,) = json.loads((out / "memory.json").read_text())["engines"]
    assert engine["planned_bytes"] > 0 and engine["of_product_peak"] > 0
    summary = (out / "summary.md").read_text()
    assert summary in done.stdout and "Nothing was written." not in summary
    assert "0 passed, 0 failed" in summary and "skipped: CUDA is not available" in summary
    assert call("report", str(out)).stdout == summary + "\n"


def test_a_stage_at_its_limit_may_write_what_it_has_and_its_children_end(tmp_path: Path) -> None:
    code = f"""
import subprocess, sys, time
child = subprocess.Popen(["sleep", "60"])
open({str(tmp_path / "child")!r}, "w").write(str(child.pid))
try:
    time.sleep(60)
except KeyboardInterrupt:
    open({str(tmp_path / "kept")!r}, "w").write("partial")
"""
    stage = run.Stage("slow", 5, ["-c", code])
    ended = run.run_stage(stage, tmp_path / "log.txt", dict(os.environ), time.monotonic() + 100)
    assert ended.status == "cut at 5 s" and (tmp_path / "kept").read_text() == "partial"
    state = Path(f"/proc/{(tmp_path / 'child').read_text()}/stat")
    with suppress(FileNotFoundError):  # it was killed, which takes a moment
        while state.read_text().rsplit(")")[-1].split()[0] not in "ZX":
            time.sleep(0.01)
    late = run.run_stage(stage, tmp_path / "log.txt", dict(os.environ), time.monotonic() + run.GRACE)
    assert late.status == "not run: no time left"
    failing = run.Stage("failing", 50, ["-c", "raise SystemExit(3)"])
    status = run.run_stage(failing, tmp_path / "log.txt", dict(os.environ), time.monotonic() + 100).status
    assert status == "failed with 3"


def test_a_summary_is_made_of_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "memory.json").write_text('{"product_peak_tflops": 1')  # cut while it was written
    said = report.summary(tmp_path)
    assert said.count("Nothing was written.") == len(report.STAGES)
    engine = {"policy": "none", "failure": "", "attention": "torch", "kernels": "liger", "waits": {"a.py:3": 2}}
    engine |= {"planned_bytes": 11e9, "allocated_bytes": 10e9, "reserved_bytes": 12e9}
    engine |= {"tokens_per_s": 5000.0, "of_product_peak": 0.5}
    failed = {"policy": "full", "failure": "OutOfMemoryError: no room"}
    (tmp_path / "memory.json").write_text(json.dumps({"product_peak_tflops": 700.0, "engines": [engine, failed]}))
    said = report.summary(tmp_path)
    assert "| none | 11 | 10 | +10.0 % | 12 | 2 | 5,000 | 50.0 % | torch, kernels liger |" in said
    assert "| full | OutOfMemoryError: no room |" in said and "- the host waits in a.py:3" in said


@pytest.mark.parametrize(
    ("wheel", "fits"),
    [
        ("hjson-3.1.0-py3-none-any.whl", True),
        ("orjson-3.13.0-cp312-cp312-manylinux_2_17_x86_64.manylinux2014_x86_64.whl", True),
        ("orjson-3.13.0-cp311-cp311-manylinux_2_17_x86_64.whl", False),
        ("deepspeed-0.19.8-cp312-cp312-linux_aarch64.whl", False),
    ],
)
def test_wheels_of_another_python_or_processor_are_refused(wheel: str, fits: bool) -> None:
    assert prepare.fits_target(wheel) == fits


def test_a_folder_that_is_not_prepared_is_named(tmp_path: Path) -> None:
    done = call("run", str(tmp_path / "out"), "--prepared", str(tmp_path))
    assert (
        done.returncode == 2 and f"{tmp_path} is not prepared; run python -m benchmarks.gpu_kit.prepare" in done.stderr
    )
