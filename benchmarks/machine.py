"""What every benchmark does alike: say what it was measured on, and write its numbers down."""

import importlib.metadata
import os
import platform
import re
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Any

import orjson
import psutil

ROOT = Path(__file__).resolve().parents[1]


def describe_machine(packages: Iterable[str]) -> dict[str, Any]:
    """What the numbers were measured on and with; packages: those whose versions matter."""
    cpu = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "date": date.today().isoformat(),
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "load": os.getloadavg()[0],  # above 0.5 before we begin, others work here too
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def write_results(benchmark: str, results: dict[str, Any]) -> None:
    """Write the numbers to benchmarks/results/; results holds what `describe_machine` says."""
    slug = re.sub(r"[^a-z0-9]+", "-", f"{results['cpu']} {results['cores']} cores".lower()).strip("-")
    file = ROOT / "benchmarks/results" / f"{benchmark}-{results['date']}-{slug}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(orjson.dumps(results, option=orjson.OPT_INDENT_2) + b"\n")
    print(f"written to {file.relative_to(ROOT)}")
