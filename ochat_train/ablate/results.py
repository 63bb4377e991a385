"""The runs of an ablation as numbers: what each measured, means over seeds, and what they allow to say."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ochat_train.ablate.arms import ARMS, Ablation
from ochat_train.evaluate.held_out import open_held_out
from ochat_train.files import read_json_lines
from ochat_train.recipe import Recipe, to_json
from ochat_train.tokens.recondition import Selected
from ochat_train.tokens.store import TokenStore
from ochat_train.training.checkpoint import Checkpoint, find_checkpoints, newest_readable

LOSS, PROBE = "held-out loss", "condition probe"  # no check has a space in its name
# Which arm is compared with which, and how a sentence names it.
COMPARED = (
    ("conditions", "all", "conditions"),
    ("weights", "all", "weights"),
    ("both", "all", "the two together"),
    ("good", "all", "the good source's data alone"),
    ("both", "good", "the two together, against the good source's data alone,"),
)


class Estimate(NamedTuple):
    """A mean over seeds, and half of its 95 % interval; None of a single seed."""

    mean: float
    half: float | None


@dataclass(frozen=True, slots=True)
class RunResult:
    """A finished run. measures: the held-out loss, the probe where the arm knows conditions, the scores of checks."""

    arm: str
    seed: int
    num_steps: int
    num_tokens: int
    measures: dict[str, float]


def estimate(values: Sequence[float]) -> Estimate:
    """The mean and Student's interval of 95 %: t(n - 1) * s / sqrt(n), s with n - 1 degrees of freedom."""
    mean, num = float(np.mean(values)), len(values)
    return Estimate(mean, None if num < 2 else t_quantile_95(num - 1) * float(np.std(values, ddof=1)) / math.sqrt(num))


def t_quantile_95(degrees: int) -> float:
    """The t with P(|T| <= t) = 0.95: where T = sqrt(degrees) tan(a), a has a density of cos(a) ** (degrees - 1)."""
    angles = np.linspace(0, math.pi / 2, 200_001)
    density = np.cos(angles) ** (degrees - 1)
    mass = np.concatenate(([0.0], np.cumsum(density[1:] + density[:-1])))
    return math.sqrt(degrees) * math.tan(float(np.interp(0.95, mass / mass[-1], angles)))


def mean_of(results: Sequence[RunResult], arm: str, measure: str) -> Estimate | None:
    """The mean of an arm's runs; None where it has none with this measure."""
    values = [run.measures[measure] for run in results if run.arm == arm and measure in run.measures]
    return estimate(values) if values else None


def gain_of(results: Sequence[RunResult], measure: str, arm: str, base: str) -> Estimate | None:
    """How much better `arm` is than `base`, paired by seed: a higher score, a lower loss; None without such pairs."""
    values = {(run.arm, run.seed): run.measures[measure] for run in results if measure in run.measures}
    sign = -1 if measure == LOSS else 1
    seeds = [seed for name, seed in values if name == arm and (base, seed) in values]
    return estimate([sign * (values[arm, seed] - values[base, seed]) for seed in seeds]) if seeds else None


def measures_of(results: Sequence[RunResult]) -> list[str]:
    """By what arms are compared: checks first."""
    names = dict.fromkeys(name for run in results for name in run.measures)
    return [*(name for name in names if name not in (LOSS, PROBE)), LOSS]


def claim(results: Sequence[RunResult], measure: str) -> str:
    """What the runs allow to say of a measure, in one sentence: an effect where the interval does not hold 0."""
    clauses, is_any_seen = [], False
    for arm, base, words in COMPARED:
        gain = gain_of(results, measure, arm, base)
        if gain is None:
            continue
        if gain.half is None:
            return f"By {measure}: a single seed shows no spread, so nothing can be claimed."
        is_seen = abs(gain.mean) > gain.half
        verb = ("help by" if gain.mean > 0 else "hurt by") if is_seen else "make no difference that was seen,"
        clauses.append(f"{words} {verb} {abs(gain.mean) if is_seen else gain.mean:.3f} ± {gain.half:.3f}")
        is_any_seen |= is_seen
    if not clauses:
        return f"By {measure}: no two of these arms are compared."
    return f"By {measure}: {'; '.join(clauses) if is_any_seen else 'no difference was seen'}."


# ------------------------------------------------------------------------------------------------------- the runs


def is_finished(recipe: Recipe) -> bool:
    """Whether the run of this very recipe has ended and is exported."""
    run, checkpoint = Path(recipe.checkpoint.dir), _newest(recipe)
    ends = [line for line in read_json_lines(run / "metrics.jsonl") if line["event"] == "end"]
    return (
        checkpoint is not None
        and checkpoint.state.recipe == to_json(recipe)
        and bool(ends)
        and ends[-1]["step"] == checkpoint.state.step
        and ends[-1]["reason"] in ("finished", "max_steps", "early_stop")
        and (run / "model/config.json").is_file()
    )


def _newest(recipe: Recipe) -> Checkpoint | None:
    return newest_readable(find_checkpoints(Path(recipe.checkpoint.dir))[::-1])


def read_results(ablation: Ablation, recipes: Mapping[tuple[str, int], Recipe]) -> list[RunResult]:
    """The results of the finished runs; recipes: of each arm and seed.

    The held-out loss is over the conversations of the good sources that all arms' stores hold out; ValueError is raised
    where there are none.
    """
    held_out = []
    for path in {recipe.data.store for recipe in recipes.values()}:
        store = TokenStore(path, "eval")
        ids = [store.manifest.sources.index(name) for name in ablation.good_sources]
        held_out.append({store.name(place) for place in np.flatnonzero(np.isin(store.source_ids, ids)).tolist()})
    common = set.intersection(*held_out)
    if not common:
        raise ValueError("no conversation of the good source is held out by all arms; raise data.eval_fraction")
    print(f"held-out loss: over {len(common):,} conversations of the good source", flush=True)
    return [_read_run(recipe, *place, common, ablation.good_condition) for place, recipe in recipes.items()]


def _read_run(recipe: Recipe, arm: str, seed: int, common: set[str], good_condition: str) -> RunResult:
    run, checkpoint = Path(recipe.checkpoint.dir), _newest(recipe)
    assert checkpoint is not None  # it is finished
    held_out = open_held_out(str(run / "model"), recipe.data.store, split="eval", tokens_per_batch=None).held_out
    places = np.array([place for place in range(len(held_out.store)) if held_out.store.name(place) in common])
    nll, num_tokens, _ = held_out.loss_sums(Selected(held_out.store, places)).table[1].sum(-1)
    measures = {LOSS: float(nll / num_tokens)}
    evaluation = [line for line in read_json_lines(run / "metrics.jsonl") if line["event"] == "eval"][-1]
    known = good_condition if ARMS[arm].has_conditions else ""
    probe = (evaluation["probe_by_condition"] or {}).get(known, {})
    if known and None not in (probe.get("own"), probe.get("other")):
        measures[PROBE] = probe["other"] - probe["own"]
    scores = {name: by_condition[known]["score"] for name, by_condition in (evaluation["checks"] or {}).items()}
    measures |= {name: score for name, score in scores.items() if score is not None}
    return RunResult(arm, seed, checkpoint.state.step, checkpoint.state.tokens_seen, measures)
