"""The results of an ablation as a document: what can be claimed, the arms side by side, gains, single runs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ochat_train.ablate.arms import ARMS
from ochat_train.ablate.results import COMPARED, LOSS, PROBE, Estimate, RunResult, claim, gain_of, mean_of, measures_of
from ochat_train.report.charts import Chart, colour_of
from ochat_train.report.page import Block, Document, Section, Table, Text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_METHOD = (
    "The held-out loss is the mean over the tokens of the good source's held-out answers, read under its condition by "
    "arms that were trained with conditions, and without one by the others. Only conversations count that all arms "
    "hold out. Checks are asked in the same way. The probe is how much higher that loss is under another condition.",
    "± is half of the 95 % interval over seeds, by Student's t: the chance in training, not that in the choice of "
    "held-out questions.",
)


def ablation_document(name: str, results: Sequence[RunResult], equal: str) -> Document:
    """The document of an ablation of the recipe `name`."""
    arms = [arm for arm in ARMS if any(run.arm == arm for run in results)]
    compared = measures_of(results)
    shown = [*compared, *([PROBE] if any(PROBE in run.measures for run in results) else [])]
    means = [[arm, *(_show(mean_of(results, arm, measure)) for measure in shown), ARMS[arm].about] for arm in arms]
    gains = [
        [f"{arm} against {base}", *(_show(gain_of(results, measure, arm, base)) for measure in compared)]
        for arm, base, _ in COMPARED
        if {arm, base} <= {*arms}
    ]
    runs = [
        [run.arm, f"{run.seed}", *(_show(mean_of([run], run.arm, measure)) for measure in shown)] for run in results
    ]
    for row, run in zip(runs, results, strict=True):
        row += [f"{run.num_steps:,}", f"{run.num_tokens:,}"]
    head: list[Block] = [
        *(Text(claim(results, measure), is_lead=True) for measure in compared),
        Table(["arm", *shown, ""], means, left=(0, 1 + len(shown)), title="Means over seeds"),
    ]
    if gains:
        head.append(Table(["", *compared], gains, title="Gains, paired by seed; above 0 is better"))
    length = (
        f"All arms were trained for as many {equal} as the recipe, with batches of one capacity and the same seeds."
    )
    return Document(
        f"Ablation of {name}",
        head,
        [
            Section("arms", "Arms", [_chart(results, arms, measure) for measure in compared]),
            Section("runs", "Runs", [Table(["arm", "seed", *shown, "steps", "tokens"], runs)]),
            Section("measured", "How it was measured", [Text(words) for words in (length, *_METHOD)]),
        ],
    )


def _show(found: Estimate | None) -> str:
    if found is None:
        return "-"
    return f"{found.mean:.3f}" if found.half is None else f"{found.mean:.3f} ± {found.half:.3f}"


def _chart(results: Sequence[RunResult], arms: Sequence[str], measure: str) -> Chart:
    """Of each arm a dot for each seed, and the mean with its interval."""

    def draw(axes: "Axes") -> None:
        for row, arm in enumerate(arms):
            found = mean_of(results, arm, measure)
            if found is not None:
                axes.errorbar(found.mean, row, xerr=found.half, fmt="o", color=colour_of(row), capsize=4)
            values = [run.measures[measure] for run in results if run.arm == arm and measure in run.measures]
            axes.plot(values, [row + 0.25] * len(values), ".", color=colour_of(row), alpha=0.5)
        axes.set_yticks(range(len(arms)), list(arms))
        axes.set_ylim(len(arms) - 0.5, -0.5)
        axes.margins(x=0.05)
        axes.grid(False)
        axes.grid(True, axis="x")

    unit = "lower is better" if measure == LOSS else "score; higher is better"
    return Chart(measure, unit, draw, height=40 + 30 * len(arms))
