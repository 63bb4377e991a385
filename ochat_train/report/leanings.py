"""How much held-out answers lean to their condition, as blocks of a run's report."""

from typing import TYPE_CHECKING

import numpy as np

from ochat_train.report.charts import Chart, LegendEntry, colour_of
from ochat_train.report.page import Block, Listing, Table, Text, show_condition
from ochat_train.report.run import RunReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NUM_BINS = 40


def leanings(report: RunReport) -> list[Block]:
    """A histogram, its quartiles, and the examples that lean most and least."""
    found = report.leanings
    values = {name: np.array(of_name) for name, of_name in found.get("leanings", {}).items() if of_name}
    if not values:
        return []
    everything = np.concatenate(list(values.values()))
    # The outermost hundredth would leave the rest a single bar.
    low, high = np.quantile(everything, (0.005, 0.995))

    def draw(axes: "Axes") -> None:
        axes.hist(
            [of_name.clip(low, high) for of_name in values.values()],
            bins=_NUM_BINS,
            stacked=True,
            color=[colour_of(number) for number in range(len(values))],
        )

    legend = [LegendEntry(show_condition(name), colour_of(number)) for number, name in enumerate(values)]
    quartiles = [
        (show_condition(name), f"{len(of_name):,}", *(f"{one:+.3f}" for one in np.quantile(of_name, (0.25, 0.5, 0.75))))
        for name, of_name in values.items()
    ]
    note = (
        f"For each held-out example of step {found['step']:,}: how much smaller the loss of its answers is under its "
        "own condition than under another (none, where there is only one), in nats a token. Above 0 the condition says "
        "something of the answer; near 0 it would be the same under either."
    )
    return [
        Text(note),
        Chart("Leaning", "examples, by nats a token", draw, legend),
        Table(("condition", "examples", "lower quartile", "median", "upper quartile"), quartiles),
        *(
            Listing(
                f"The {len(found[end])} {words}",
                "\n\n".join(
                    f"{one['leaning']:+.3f}  {show_condition(one['condition'])}  {one['id']}\n{one['text']}"
                    for one in found[end]
                ),
            )
            for end, words in (("most", "that lean most"), ("least", "that lean least"))
        ),
    ]
