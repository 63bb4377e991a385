"""An ablation: its arms differ in what they say alone, intervals and sentences are right, a stopped one goes on."""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import orjson
import pytest

from ochat_train.ablate.arms import ARMS, Ablation, count_steps, read_ablation
from ochat_train.ablate.results import LOSS, PROBE, RunResult, claim, estimate, gain_of, t_quantile_95
from ochat_train.ablate.sections import ablation_document
from ochat_train.preprocess.run import preprocess
from ochat_train.recipe import differences, load_recipe, to_json
from ochat_train.report.page import as_html, as_text
from ochat_train.tokens.store import TokenStore
from ochat_train.training.checkpoint import find_checkpoints
from tests.e2e.harness import ROOT, launch_environment, tiny_recipe, write_dump
from tests.waiting import HANG_S, wait_until

SEED = 3  # of tiny_recipe


def tiny_ablation(folder: Path, *words: str) -> Ablation:
    """Of 120 conversations of the quickstart, whose careful source is the good one."""
    write_dump(folder, 120)
    return read_ablation(str(tiny_recipe(folder)), ["data.eval_fraction=0.2", *words])


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the stores of all arms are."""
    folder = tmp_path_factory.mktemp("ablation")
    ablation = tiny_ablation(folder)
    for arm in ("both", *ARMS):
        preprocess(ablation.load(ablation.words(arm, SEED)))
    return folder


def test_an_arm_differs_from_the_recipe_in_what_it_says_alone(stores: Path) -> None:
    ablation = tiny_ablation(stores)
    whole = to_json(ablation.recipe)
    for arm, about in ARMS.items():
        found = differences(whole, to_json(ablation.load(ablation.words(arm, SEED))))
        keys = {line.partition(":")[0] for line in found} - {"name", "checkpoint.dir", "data.store"}
        sources = {"condition"} if not about.has_conditions else set()
        sources |= {"weight", "weight_field"} if not about.has_weights else set()
        allowed = {f"data.sources.{number}.{key}" for number in (0, 1) for key in sources}
        assert keys <= allowed and bool(keys) == (arm != "both"), arm


def test_the_good_arm_trains_the_source_of_inference_alone(stores: Path) -> None:
    ablation = tiny_ablation(stores)
    assert ablation.good_sources == {"careful"}
    store = TokenStore(ablation.load(ablation.words("good", SEED)).data.store)
    assert {store.manifest.sources[id] for id in store.source_ids.tolist()} == {"careful"}
    assert store.manifest.conditions == [""]


def test_arms_train_as_many_steps_or_tokens_as_the_recipe(stores: Path) -> None:
    def totals(equal: str, arm: str) -> tuple[int, int]:
        ablation = tiny_ablation(stores, f"equal={equal}")
        recipe = ablation.load(ablation.settle(arm, SEED, 1))
        store = TokenStore(recipe.data.store)
        epochs = {source.name: source.epochs for source in recipe.data.sources}
        shares = [
            int(epochs[name] * recipe.train.epochs * len(store.members(id)))
            / max(1, len(store.members(id)))
            * int(store.lengths[store.members(id)].sum())
            for id, name in enumerate(store.manifest.sources)
        ]
        return count_steps(recipe, 1), round(sum(shares))

    steps, tokens = totals("steps", "both")
    for arm in ARMS:
        assert totals("steps", arm)[0] == steps
        assert totals("tokens", arm)[1] == pytest.approx(tokens, rel=0.02)


@pytest.mark.parametrize(("degrees", "t"), [(1, 12.706205), (2, 4.302653), (4, 2.776445), (30, 2.042272)])
def test_the_quantile_is_that_of_students_t(degrees: int, t: float) -> None:
    assert t_quantile_95(degrees) == pytest.approx(t, rel=1e-6)  # scipy.stats.t.ppf(0.975, degrees)


def test_the_interval_is_the_textbooks() -> None:
    values = [0.5, 0.7, 0.9]
    deviation = math.sqrt(sum((value - 0.7) ** 2 for value in values) / 2)
    assert estimate(values) == pytest.approx((0.7, 4.302653 * deviation / math.sqrt(3)), rel=1e-6)
    assert estimate([0.5]) == (0.5, None)


def runs(**scores: list[float]) -> list[RunResult]:
    """Runs of arms with the scores of a check, and a loss of 1 minus the score."""
    return [
        RunResult(arm, seed, 10, 100, {LOSS: 1 - score, "right": score})
        for arm, of_arm in scores.items()
        for seed, score in enumerate(of_arm)
    ]


def test_gains_are_paired_by_seed() -> None:
    # Seeds differ by far more than the arms do.
    found = runs(all=[0.1, 0.5, 0.9], both=[0.2, 0.62, 0.98])
    for measure in ("right", LOSS):
        assert gain_of(found, measure, "both", "all") == pytest.approx(estimate([0.1, 0.12, 0.08]))
    assert gain_of(found, "right", "weights", "all") is None
    assert np.isfinite(gain_of(found, "right", "both", "all")).all()  # type: ignore[arg-type]


def test_the_claim_says_what_the_numbers_allow() -> None:
    found = runs(all=[0.1, 0.5, 0.9], conditions=[0.2, 0.62, 0.98], weights=[0.3, 0.4, 0.9], both=[0.0, 0.38, 0.82])
    assert claim(found, "right") == (
        "By right: conditions help by 0.100 ± 0.050; weights make no difference that was seen, 0.033 ± 0.379; the two "
        "together hurt by 0.100 ± 0.050."
    )
    assert claim(runs(all=[0.1, 0.5], both=[0.2, 0.4]), "right") == "By right: no difference was seen."
    assert "a single seed" in claim(runs(all=[0.1], both=[0.9]), "right")
    assert "no two of these arms" in claim(runs(both=[0.2, 0.4]), LOSS)


def test_the_document_has_the_claims_and_all_runs() -> None:
    found = runs(all=[0.1, 0.5, 0.9], both=[0.2, 0.62, 0.98])
    document = ablation_document("mine", found, "steps")
    text = as_text(document)
    assert claim(found, "right") in " ".join(text.split())
    assert "0.600 ± 0.970" in text and "both against all" in text
    assert as_html(document).count("<svg") == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["arms=all,none"], "there is no arm 'none'; there are all, good"),
        (["seeds=0"], "seeds=0 is not a number"),
        (["equal=time"], "equal=time is neither"),
        (["data.eval_fraction=0"], "eval_fraction is 0"),
        (["data.sources.0.condition=null"], "each have a condition"),
        (["equal=tokens", "train.max_steps=3"], "leave train.max_steps out"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_made(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_ablation(tmp_path, *words)
    assert not (tmp_path / "store").exists()


def test_a_stopped_ablation_goes_on_and_trains_no_finished_run_again(tmp_path: Path) -> None:
    write_dump(tmp_path, 120)
    recipe = tiny_recipe(tmp_path, train={"epochs": 1, "max_steps": 2, "seed": SEED})
    words = [str(recipe), "arms=all,both", "seeds=1", "data.eval_fraction=0.2"]
    command = [sys.executable, "-m", "ochat_train.ablate", *words]
    printed = tmp_path / "printed"
    environment = launch_environment(NUM_GPUS="1")

    with printed.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
    first = tmp_path / "run/all-3"
    for is_there in (
        lambda: "run 1 of 2" in printed.read_text(),
        (first / "metrics.jsonl").exists,
        lambda: find_checkpoints(first),
        lambda: "run 2 of 2" in printed.read_text(),
    ):
        wait_until(lambda is_there=is_there: is_there() or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    assert process.wait(HANG_S) == 75, printed.read_text()
    made = [os.stat(path).st_mtime_ns for path in find_checkpoints(first)]
    assert len(made) == 1 and not (tmp_path / "run/ablation.json").exists()

    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=2 * HANG_S)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all data plain: no condition, weight 1, seed 3: finished before" in done.stdout
    assert [os.stat(path).st_mtime_ns for path in find_checkpoints(first)] == made
    results = orjson.loads((tmp_path / "run/ablation.json").read_bytes())["runs"]
    assert [(run["arm"], run["num_steps"]) for run in results] == [("all", 2), ("both", 2)]
    assert PROBE in results[1]["measures"] and PROBE not in results[0]["measures"]
    # Two steps from the same weights: the same answers, read under different headers, have nearly the same loss.
    assert results[0]["measures"][LOSS] == pytest.approx(results[1]["measures"][LOSS], rel=0.2)
    assert load_recipe(recipe, words[3:]).checkpoint.dir in done.stdout.splitlines()[-1]
