"""When the expert's condition pays: the ablation over noise and size of the expert source, in a picture.

    python -m benchmarks.ablation_sweep [--noise 0.3 0.5 0.7] [--expert 40 160 280] [--seeds 1] [WORD ...]

Each cell makes the data anew and runs `ochat ablate recipes/ablation.yaml arms=all,good,both` in runs/sweep; the same
command goes on after a stop. A WORD is an override of the recipe. Writes the scores, with the machine, to
benchmarks/results/, and the picture to runs/sweep/sweep.html.
"""

import argparse
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from benchmarks.machine import ROOT, describe_machine
from ochat_train.report.charts import Chart, LegendEntry, colour_of
from ochat_train.report.page import Document, Section, Table, as_html, as_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ARMS = ("all", "good", "both")
FOLDER = ROOT / "runs/sweep"
SCORE = "right"


def run_cell(noise: float, num_expert: int, seeds: int, words: list[str]) -> dict[str, Any]:
    """The scores of each arm, one a seed."""
    folder = FOLDER / f"noise-{noise:g}-expert-{num_expert}"
    make = [ROOT / "data/make_ablation.py", "--out", folder, "--noise", str(noise), "--expert", str(num_expert)]
    subprocess.run([sys.executable, *make], check=True)
    places = {f"data.sources.{number}.path": folder / "ablation.jsonl" for number in (0, 1)}
    places |= {"eval.checks.0.questions": folder / "ablation_questions.jsonl"}
    places |= {"data.store": folder / "store", "checkpoint.dir": folder / "runs"}
    overrides = [f"{key}={place}" for key, place in places.items()]
    command = ["-m", "ochat_train.ablate", "recipes/ablation.yaml", f"arms={','.join(ARMS)}", f"seeds={seeds}"]
    subprocess.run([sys.executable, *command, *overrides, *words], check=True, cwd=ROOT)
    runs = orjson.loads((folder / "runs/ablation.json").read_bytes())["runs"]
    scores = {arm: [run["measures"][SCORE] for run in runs if run["arm"] == arm] for arm in ARMS}
    return {"noise": noise, "num_expert": num_expert, "scores": scores}


def chart(cells: list[dict[str, Any]], num_expert: int) -> Chart:
    """The mean scores over the noise, at one size of the expert source."""
    row = [cell for cell in cells if cell["num_expert"] == num_expert]

    def draw(axes: "Axes") -> None:
        for number, arm in enumerate(ARMS):
            means = [np.mean(cell["scores"][arm]) for cell in row]
            axes.plot([cell["noise"] for cell in row], means, color=colour_of(number), marker="o")
        axes.set_ylim(0, 1)
        axes.margins(x=0.05)

    legend = [LegendEntry(arm, colour_of(number)) for number, arm in enumerate(ARMS)]
    return Chart(f"{num_expert:,} records of the expert", "right answers over the share of noise", draw, legend)


def main() -> None:
    """Run all cells and write what they gave."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noise", type=float, nargs="+", default=[0.3, 0.5, 0.7])
    parser.add_argument("--expert", type=int, nargs="+", default=[40, 160, 280])
    parser.add_argument("--seeds", type=int, default=1)
    options, words = parser.parse_known_args()
    cells = [run_cell(noise, size, options.seeds, words) for size in options.expert for noise in options.noise]
    machine = describe_machine(["torch", "transformers", "deepspeed"])
    out = ROOT / f"benchmarks/results/ablation_sweep-{machine['date']}-{machine['cores']}-cores.json"
    out.write_bytes(orjson.dumps({"machine": machine, "words": words, "cells": cells}, option=orjson.OPT_INDENT_2))
    rows = [
        [f"{cell['num_expert']:,}", f"{cell['noise']:g}", *(f"{np.mean(cell['scores'][arm]):.3f}" for arm in ARMS)]
        for cell in cells
    ]
    blocks = [*(chart(cells, size) for size in options.expert), Table(["expert", "noise", *ARMS], rows)]
    document = Document("Noise and size of the expert source", [], [Section("sweep", "Right answers", blocks)])
    page = FOLDER / "sweep.html"
    page.write_text(as_html(document), encoding="utf-8")
    print(f"{as_text(document)}\n\n{out}\n{page}")


if __name__ == "__main__":
    main()
