"""Stage: what machine this is, its clocks idle and under load, and whether everything imports.

    python -m benchmarks.gpu_kit.environment FILE PRESET

Exits with 1 where a package cannot be imported.
"""

import importlib
import json
import pkgutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "temperature.gpu", "power.draw", "power.limit")
NEEDED = (
    *("torch", "transformers", "tokenizers", "numpy", "numba", "pyarrow", "datasets", "deepspeed", "orjson"),
    *("pydantic", "psutil", "xxhash", "yaml", "matplotlib", "rich", "tqdm", "jinja2", "pytest", "hypothesis"),
)
OPTIONAL = ("liger_kernel", "bitsandbytes", "peft", "triton", "flash_attn", "flash_attn_interface", "xdist")
# Rooms that no stage runs, of packages that a bare machine need not have.
NOT_TRAINING = ("conversations", "preprocess", "serve", "evaluate", "report", "launch", "doctor")


def main() -> None:
    """Write the file step by step, the cheapest first."""
    file, preset = Path(sys.argv[1]), sys.argv[2]
    found: dict[str, Any] = {"python": sys.version, "preset": preset}

    def save() -> None:
        file.write_text(json.dumps(found, indent=1, default=str))

    found["versions"] = {one.name: one.version for one in metadata.distributions() if one.name}
    if preset == "gpu":
        found["clocks"] = {"idle": clocks()}
    save()
    found["imports"] = {name: seconds_to_import(name) for name in NEEDED}
    found["optional"] = {name: seconds_to_import(name) for name in OPTIONAL}
    save()
    import ochat_train

    names = [module.name for module in pkgutil.walk_packages(ochat_train.__path__, "ochat_train.")]
    training = [name for name in names if name.split(".")[1] not in NOT_TRAINING and not name.endswith("__main__")]
    found["ours"] = {name: seconds_to_import(name) for name in training}
    save()
    if preset == "gpu":
        import torch
        from machine import describe_machine
        from measure import product_peak

        found["machine"] = describe_machine(("torch", "transformers", "numpy"), (), "cuda")
        found["capability"] = torch.cuda.get_device_capability()
        found["product_peak_tflops"] = product_peak([(8192, 8192, 8192)], torch.bfloat16, torch.device("cuda")) / 1e12
        found["clocks"]["after products"] = clocks()
        save()
    failed = {name: said for part in ("imports", "ours") for name, said in found[part].items() if isinstance(said, str)}
    for name, said in failed.items():
        print(f"{name}: {said}")
    sys.exit(bool(failed))


def seconds_to_import(name: str) -> float | str:
    """Seconds, or why it cannot be imported."""
    started = time.perf_counter()
    try:
        importlib.import_module(name)
    except Exception as error:  # imports raise anything
        return f"{type(error).__name__}: {error}"
    return round(time.perf_counter() - started, 3)


def clocks() -> dict[str, str]:
    """What nvidia-smi says of the first GPU."""
    command = ["nvidia-smi", f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader", "--id=0"]
    said = subprocess.run(command, capture_output=True, text=True)
    return dict(zip(CLOCKS, said.stdout.strip().split(", "), strict=False)) if said.returncode == 0 else {}


if __name__ == "__main__":
    main()
