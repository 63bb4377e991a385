"""One summary of a folder that `run` filled, as far as it came.

python -m benchmarks.gpu_kit.report OUT
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

STAGES = ("environment", "tests", "train_step", "training", "memory")


def main() -> None:
    """Print it."""
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit(f"error: one folder of results is needed, not {sys.argv[1:]}")
    print(summary(Path(sys.argv[1])))


def summary(out: Path) -> str:
    """All stages as Markdown; what a stage has not written is named, and what it has written in part is used."""
    run = read(out / "run.json") or {"preset": "?", "stages": []}
    ended = {stage["name"]: stage for stage in run["stages"]}
    lines = ["# GPU kit", "", f"Preset {run['preset']}."]
    for name in STAGES:
        stage = ended.get(name)
        said = f"{stage['status']}, {stage['seconds']:.0f} s" if stage else "not run"
        lines += ["", f"## {name}: {said}", ""]
        lines += list(SECTIONS[name](out)) or ["Nothing was written."]
    return "\n".join(lines) + "\n"


def read(file: Path) -> Any:
    """The JSON of a file; None where it is missing, or was cut while it was written."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


def table(*rows: tuple[Any, ...]) -> Iterator[str]:
    """Rows as Markdown, the first one as the head."""
    for number, row in enumerate(rows):
        yield "| " + " | ".join("" if cell is None else str(cell).replace("|", "/") for cell in row) + " |"
        if number == 0:
            yield "|" + " --- |" * len(row)


def of_environment(out: Path) -> Iterator[str]:
    """Machine, clocks, what does not import."""
    if (found := read(out / "environment.json")) is None:
        return
    versions = found.get("versions", {})
    named = ("torch", "transformers", "deepspeed", "liger-kernel", "liger_kernel", "triton", "numpy")
    yield f"Python {found['python'].split()[0]}; " + ", ".join(f"{n} {versions[n]}" for n in named if n in versions)
    if machine := found.get("machine"):
        words = "{gpu}, {gpu_memory_gb} GB, {power_limit}, driver {driver}, CUDA {cuda}; {cpu}, {cores} cores; {date}"
        yield words.format(**machine)
        yield f"bf16 product of 8,192: {found['product_peak_tflops']:.0f} TFLOP/s"
    for state, clocks in found.get("clocks", {}).items():
        yield f"{state}: " + ", ".join(f"{name} {value}" for name, value in clocks.items())
    imports = {**found.get("imports", {}), **found.get("ours", {})}
    yield f"{sum(isinstance(said, float) for said in imports.values())} of {len(imports)} modules import"
    failed = imports | found.get("optional", {})
    yield from (f"- {name}: {said}" for name, said in failed.items() if isinstance(said, str))


def of_tests(out: Path) -> Iterator[str]:
    """How many passed, and each that did not."""
    try:
        cases = list(ElementTree.parse(out / "tests.xml").iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return
    kinds = {"failure": "failed", "error": "failed", "skipped": "skipped"}
    ended = [next((kinds[child.tag] for child in case if child.tag in kinds), "passed") for case in cases]
    yield ", ".join(f"{ended.count(kind)} {kind}" for kind in ("passed", "failed", "skipped"))
    for case, kind in zip(cases, ended, strict=True):
        if kind == "failed":
            message = next(child.get("message", "") for child in case if child.tag in kinds)
            yield f"- {case.get('classname')}::{case.get('name')}: {(message.splitlines() or [''])[0][:300]}"
    reasons = [child.get("message", "") for case in cases for child in case if child.tag == "skipped"]
    yield from (f"- {reasons.count(reason)} skipped: {reason[:300]}" for reason in dict.fromkeys(reasons))


def of_train_step(out: Path) -> Iterator[str]:
    """Each way, and the extrapolation to the whole model."""
    (found,) = [read(file) for file in sorted(out.glob("train_step-*.json"))][-1:] or (None,)
    if found is None:
        return
    yield f"matrix product {found['product_peak_tflops']:.3g} TFLOP/s; kernels {' '.join(found['options']['kernels'])}"
    yield ""
    rows = [
        (one["name"], f"{one['capacity']:,}", one["policy"], one["num_layers"])
        + (
            (one["failure"],)
            if one["failure"]
            else (
                f"{one['tokens_per_s']:,.0f}",
                f"{100 * one['of_peak']:.1f} %",
                f"{one['peak_bytes'] / 1e9:.3g}",
                one["planned_bytes"] and f"{one['planned_bytes'] / 1e9:.3g}",
                one["waits"],
                one["note"],
            )
        )
        for one in found.get("steps", [])
    ]
    head = ("way", "tokens", "checkpointing", "layers", "tokens/s", "of peak", "GB", "planned", "waits", "")
    yield from table(head, *rows)
    for one in found.get("differences", []):
        if one["loss"] > one["tolerances"][0] or one["gradient"] > one["tolerances"][1]:
            yield f"- {one['name']} {one['policy']} does not agree: loss {one['loss']}, gradient {one['gradient']}"
    for one in found.get("whole", []):
        yield (
            f"- 40 layers, 8 GPUs, calculated: {one['name']} {one['capacity']:,} {one['policy']} "
            f"{one['tokens_per_s']:,.0f} tokens/s a GPU, +- {100 * one['error']:.1f} %"
        )
        if one["speed"]:
            yield f"  `{one['speed']}`"


def of_training(out: Path) -> Iterator[str]:
    """Each case."""
    if found := read(out / "training.json"):
        head = ("case", "worst loss", "allowed", "stopped at", "resumed from", "attention", "tensors", "s", "")
        yield from table(
            head,
            *(
                (
                    one["name"],
                    None if one["worst"] is None else f"{one['worst']:.1e}",
                    f"{one['tolerance']:.0e}",
                    one["stopped_at"],
                    one["resumed_from"],
                    one["attention"],
                    one["exported_tensors"],
                    f"{one['seconds']:.0f}",
                    (one["failure"].splitlines() or [""])[0],
                )
                for one in found
            ),
        )


def of_memory(out: Path) -> Iterator[str]:
    """Each engine, and where the host waits."""
    if found := read(out / "memory.json"):
        yield f"matrix product {found['product_peak_tflops']:.3g} TFLOP/s"
        yield ""
        rows, places = [], set()
        for one in found["engines"]:
            if one["failure"]:
                rows.append((one["policy"], one["failure"]))
                continue
            allocated, reserved, planned = (
                one[f"{kind}_bytes"] and one[f"{kind}_bytes"] / 1e9 for kind in ("allocated", "reserved", "planned")
            )
            rows.append(
                (
                    one["policy"],
                    f"{planned:.3g}",
                    allocated and f"{allocated:.3g}",
                    allocated and f"{100 * (planned / allocated - 1):+.1f} %",
                    reserved and f"{reserved:.3g}",
                    sum(one["waits"].values()),
                    f"{one['tokens_per_s']:,.0f}",
                    f"{100 * one['of_product_peak']:.1f} %",
                    f"{one['attention']}, kernels {one['kernels']}",
                )
            )
            places |= set(one["waits"])
        head = ("checkpointing", "GB planned", "allocated", "", "reserved", "waits", "tokens/s", "of product", "")
        yield from table(head, *rows)
        yield from (f"- the host waits in {place}" for place in sorted(places))


SECTIONS: dict[str, Callable[[Path], Iterator[str]]] = {
    "environment": of_environment,
    "tests": of_tests,
    "train_step": of_train_step,
    "training": of_training,
    "memory": of_memory,
}

if __name__ == "__main__":
    main()
