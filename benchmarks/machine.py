"""What every benchmark does alike: say what it was measured on, and write its numbers down."""

import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any

import orjson
import psutil

ROOT = Path(__file__).resolve().parents[1]


def describe_machine(
    packages: Iterable[str], optional_packages: Iterable[str] = (), device_type: str = "cpu"
) -> dict[str, Any]:
    """What the numbers were measured on and with; packages: those whose versions matter, None where one is not there.

    device_type: of a GPU, its name, memory, driver and CUDA are told, too.
    """
    cpu = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    versions: dict[str, str | None] = {name: importlib.metadata.version(name) for name in packages}
    for name in optional_packages:
        versions[name] = None
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "date": date.today().isoformat(),
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "load": os.getloadavg()[0],  # above 0.5 before we begin, others work here too
        "python": platform.python_version(),
        "versions": versions,
        **(describe_gpu() if device_type == "cuda" else {}),
    }


def describe_gpu() -> dict[str, Any]:
    """Name, memory and power limit of the GPU, driver, and the CUDA that torch was built for."""
    import torch  # most benchmarks do without

    query = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader", "--id=0"]
    told = subprocess.run(query, check=True, capture_output=True, text=True).stdout.strip()
    driver, power_limit = told.split(", ")
    return {
        "gpu": torch.cuda.get_device_name(),
        "gpu_memory_gb": round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1),
        "power_limit": power_limit,
        "driver": driver,
        "cuda": torch.version.cuda,
    }


def results_file(benchmark: str, results: dict[str, Any], folder: Path | None = None) -> Path:
    """Where the numbers go, by default in benchmarks/results/; results holds what `describe_machine` says."""
    device = results.get("gpu") or f"{results['cpu']} {results['cores']} cores"
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return (folder or ROOT / "benchmarks/results") / f"{benchmark}-{results['date']}-{slug}.json"


def write_results(benchmark: str, results: dict[str, Any], folder: Path | None = None) -> None:
    """Write the numbers, whole or not at all, so that those of before stay when the process is killed meanwhile."""
    file = results_file(benchmark, results, folder)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_bytes(orjson.dumps(results, option=orjson.OPT_INDENT_2, default=str) + b"\n")
    partial.replace(file)
    print(f"written to {file.relative_to(ROOT) if file.is_relative_to(ROOT) else file}", flush=True)
