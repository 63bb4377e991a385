"""The report of a plan counts what training would do, says where its wall time is from, and draws who waits."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import torch
import yaml
from datasets import load_from_disk
from matplotlib.figure import Figure

import ochat_train.report.__main__ as report
import ochat_train.report.page as page_module
import ochat_train.report.plan as plan_module
from ochat_train.model.pretrained import load_config
from ochat_train.preprocess.run import preprocess
from ochat_train.recipe import LoraSection, load_recipe
from ochat_train.report.charts import LINE, Chart, colour_of
from ochat_train.report.page import show_duration
from ochat_train.report.plan import MicroBatch, PlanReport, StepPicture, _predict, read_plans, read_requests
from ochat_train.report.plan_sections import plan_document, source_spans
from ochat_train.tokens.store import TokenStore
from ochat_train.training.data import make_run_plan
from ochat_train.training.speed import A100, BANDWIDTHS, H100, MACHINES, Rate, bytes_exchanged
from tests.e2e.harness import tiny_recipe, write_dump
from tests.test_report_store import Page

HOSTILE = '<b>&"'
NUM_CONVERSATIONS = 120


def make(folder: Path, *overrides: str, **changes: Any) -> Path:
    """A recipe whose store is made: two sources, three GPUs' worth of steps."""
    write_dump(folder, NUM_CONVERSATIONS)
    recipe = tiny_recipe(folder, **changes)
    preprocess(load_recipe(recipe, overrides), num_workers=1)
    return recipe


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of a store that no test changes."""
    return make(tmp_path_factory.mktemp("plan"))


@pytest.fixture
def recipe(made: Path, tmp_path: Path) -> Path:
    """The same recipe with a run's folder of its own."""
    return change(made, tmp_path / "recipe.yaml", checkpoint={"dir": str(tmp_path / "run")})


def change(recipe: Path, path: Path, **changes: Any) -> Path:
    """A copy of the recipe, some sections of it changed."""
    path.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | changes))
    return path


def plan(recipe: Path, *words: str, vs: Sequence[str] | None = None) -> list[PlanReport]:
    return list(read_plans(read_requests(str(recipe), words, vs)))


def one(recipe: Path, *words: str) -> PlanReport:
    (found,) = plan(recipe, *words)
    return found


def as_text(reports: Sequence[PlanReport]) -> str:
    return page_module.as_text(plan_document(reports))


def as_html(reports: Sequence[PlanReport]) -> str:
    return page_module.as_html(plan_document(reports))


def rows_of(text: str, first: str) -> list[list[str]]:
    """The cells of each line that begins with a word."""
    return [re.split(r" {2,}", line.strip()) for line in text.splitlines() if line.strip().startswith(f"{first}  ")]


# ---- The figures ----


def recount(recipe: Path, *words: str, num_steps: int | None = None) -> dict[str, Any]:
    """Everything counted example by example, over the steps as training takes them."""
    (request,) = read_requests(str(recipe), words, None)
    resolved = load_recipe(request.recipe, request.overrides)
    store = TokenStore(resolved.data.store)
    rows = load_from_disk(resolved.data.store)["train"].to_list()
    run = make_run_plan(resolved, store, load_config(None, resolved.model.config, 1025), request.num_gpus)
    found: dict[str, Any] = {"steps": 0, "waits": 0, "cost": 0, "sources": {}, "tokens": []}
    for step in list(run.steps())[:num_steps]:
        found["steps"] += 1
        costs = []
        for positions in step.bins:
            costs.append(0)
            for position in positions.tolist():
                row, length = rows[position], len(rows[position]["input_ids"])
                costs[-1] += length * (run.shape.quadratic_length + length)
                numbers = found["sources"].setdefault(row["source"], [0, 0, 0.0])
                numbers[0] += 1
                numbers[1] += length
                numbers[2] += sum(row["loss_weights"])
        ranks, accum = request.num_gpus, resolved.packing.grad_accum
        found["waits"] += sum(max(costs[m * ranks : (m + 1) * ranks]) for m in range(accum))
        found["cost"] += sum(costs)
        found["tokens"].append(sum(len(rows[position]["input_ids"]) for bin in step.bins for position in bin))
    return found


@pytest.mark.parametrize(
    ("words", "num_steps"),
    [
        ((), None),
        (("data.sources.0.epochs=2", "data.sources.1.epochs=0.5", "train.epochs=3"), None),
        (("gpus=3", "packing.grad_accum=1", "packing.tokens_per_gpu=300"), None),
        (("train.max_steps=3",), 3),
    ],
)
def test_the_figures_are_those_of_a_naive_recount(recipe: Path, words: tuple[str, ...], num_steps: int | None) -> None:
    found, expected = one(recipe, *words), recount(recipe, *words, num_steps=num_steps)
    table, shape = found.table, found.table.shape
    assert {name: list(totals[1:3]) for name, totals in found.sources.items()} == {
        name: numbers[:2] for name, numbers in expected["sources"].items()
    }
    for name, (_, _, weight) in expected["sources"].items():
        assert found.sources[name].weight_sum == pytest.approx(weight, rel=1e-9)  # sums of f32 in f64
    assert table.num_steps == expected["steps"] == len(found.balances)
    assert table.num_tokens == sum(expected["tokens"])
    assert table.fill == sum(expected["tokens"]) / (expected["steps"] * shape.capacity * shape.num_bins)
    assert table.efficiency == expected["cost"] / (shape.world_size * expected["waits"])
    assert found.cost == expected["waits"] / shape.quadratic_length
    assert found.num_examples == sum(numbers[0] for numbers in expected["sources"].values())
    text = as_text([found])
    assert rows_of(text, "steps")[0][1] == f"{table.num_steps:,}"
    assert rows_of(text, "tokens")[0][1] == f"{table.num_tokens:,}"
    for name, totals in found.sources.items():
        (cells,) = rows_of(text, name)
        tokens, weights = (100 * totals[n] / sum(other[n] for other in found.sources.values()) for n in (2, 3))
        assert (cells[1], cells[4], cells[6]) == (f"{totals.epochs:g}", f"{tokens:.1f} %", f"{weights:.1f} %")


def test_a_source_is_drawn_as_often_as_its_epochs_say(recipe: Path) -> None:
    members = Counter(TokenStore(load_recipe(recipe).data.store).source_ids.tolist())
    found = one(recipe, "data.sources.0.epochs=2", "data.sources.1.epochs=0.5", "train.epochs=4")
    assert found.sources["careful"][:2] == (2, 2 * 4 * members[0])
    assert found.sources["hasty"][:2] == (0.5, 2 * members[1])


def test_a_run_that_max_steps_stops_says_so(recipe: Path) -> None:
    found = one(recipe, "train.max_steps=3")
    whole = one(recipe)
    text = as_text([found])
    assert rows_of(text, "epochs")[0][1:] == [f"{2 * found.num_examples / whole.num_examples:.3g}", "of 2"]
    assert f"train.max_steps stops the run; all its epochs have {whole.table.num_steps} steps." in joined(text)
    assert max(picture.number for picture in found.pictures) == 3
    assert one(recipe, "train.max_steps=1000").table.num_steps == whole.table.num_steps


def joined(text: str) -> str:
    return " ".join(text.split())


def test_gpus_are_by_default_what_launch_would_start(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "usable_gpus", lambda: 0)
    assert one(recipe).table.shape.world_size == 2
    monkeypatch.setattr(plan_module, "usable_gpus", lambda: 3)
    assert one(recipe).table.shape.world_size == 3
    assert one(recipe, "gpus=5").table.shape.world_size == 5


# ---- Other weights ----


def test_a_weight_can_be_tried_without_preprocessing_again(recipe: Path, tmp_path: Path) -> None:
    tried = one(recipe, "data.sources.1.weight=0.4")
    (tmp_path / "other").mkdir()
    remade = one(make(tmp_path / "other", "data.sources.1.weight=0.4"), "data.sources.1.weight=0.4")
    assert tried.table.rows["checksum"].tolist() == remade.table.rows["checksum"].tolist()
    for name in ("careful", "hasty"):
        assert tried.sources[name] == pytest.approx(remade.sources[name], rel=1e-6)  # 0.4 and 0.1 are rounded to f32
    assert tried.sources["hasty"].weight_sum == pytest.approx(4 * one(recipe).sources["hasty"].weight_sum, rel=1e-12)
    assert tried.table.weight_sum == pytest.approx(remade.table.weight_sum, rel=1e-6)
    assert (tried.scaled, remade.scaled) == ({"hasty": (0.1, 0.4)}, {})
    assert "Source hasty has weight 0.1 in the store, scaled here to 0.4; preprocess might" in joined(as_text([tried]))


def test_a_weight_of_nothing_cannot_be_tried(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^data\.sources\.1\.weight: 0\.1 -> 0, which cannot be tried .*preprocess"):
        one(recipe, "data.sources.1.weight=0")
    without = make(tmp_path / "without", "data.sources.1.weight=0")
    with pytest.raises(ValueError, match=r"^data\.sources\.1\.weight: 0 -> 0\.1, which cannot"):
        one(without)
    assert one(without, "data.sources.1.weight=0").sources["hasty"] == (1, 0, 0, 0)


def test_a_store_of_another_recipe_is_refused_as_training_refuses_it(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"(?s)made for another recipe.*data\.max_tokens: 256 -> 128\nRun ochat"):
        one(recipe, "data.max_tokens=128", "data.sources.1.weight=0.4")
    with pytest.raises(ValueError, match=r"was made for another recipe.*\n  template:"):
        one(recipe, "template=chatml")
    data = yaml.safe_load(recipe.read_text())["data"]
    fewer = change(recipe, tmp_path / "fewer.yaml", data=data | {"sources": data["sources"][:1]})
    with pytest.raises(ValueError, match=r"data\.sources\.1\.name: 'hasty' -> None"):
        one(fewer)
    with pytest.raises(ValueError, match="no complete token store at none; make it with"):
        one(recipe, "data.store=none")


# ---- Wall time ----


def write_metrics(folder: Path, rates: Sequence[float], *, num_processes: int = 4) -> None:
    """A run's metrics with a step for each rate, another kind of line, and one that a crash cut off."""
    folder.mkdir()
    steps = [{"event": "step", "step": n, "tokens_per_s": rate} for n, rate in enumerate(rates)]
    lines = [orjson.dumps(step | {"num_processes": num_processes}) for step in steps]
    others = [b'{"event":"eval","step":0}', orjson.dumps(steps[0])]  # the second is an older version's
    (folder / "metrics.jsonl").write_bytes(b"\n".join([*others, *lines, lines[0][:9]]))


def test_the_rate_is_measured_without_the_warm_up(recipe: Path, tmp_path: Path) -> None:
    write_metrics(tmp_path / "run", [1.0, 1.0, *[4000.0] * 8, *[4400.0] * 2, *[9000.0] * 8])
    found = one(recipe, "gpus=8")
    assert found.rate == Rate(1100.0, "measured", 18, (4,))
    assert found.seconds == found.table.num_tokens / 8800
    text = joined(as_text([found]))
    assert f"1,100 tokens/s a GPU, measured: the median of 18 steps on 4 processes in {tmp_path}/run/metrics" in text


def test_a_given_rate_stands_above_a_measured_one(recipe: Path, tmp_path: Path) -> None:
    write_metrics(tmp_path / "run", [4000.0])
    found = one(recipe, "gpus=2", "tokens_per_s=2.5e1")
    assert found.rate == Rate(25.0, "given")
    assert found.seconds == found.table.num_tokens / 50
    assert rows_of(as_text([found]), "wall time")[0][1] == show_duration(found.table.num_tokens / 50)


def test_without_a_rate_it_is_said_how_to_get_one(recipe: Path, tmp_path: Path) -> None:
    found = one(recipe)
    assert (found.rate, found.seconds) == (None, None)
    text = joined(as_text([found]))
    assert "The wall time is not known: give tokens_per_s=X, the tokens a second of one GPU, or train some" in text
    assert str(tmp_path / "run" / "metrics.jsonl") in text


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.4217, "0.422 s"),
        (59.7, "59.7 s"),
        (60, "1 min"),
        (754.6, "12 min 35 s"),
        (3599.6, "1 h"),
        (14 * 3600 + 50 * 60 + 10, "14 h 50 min"),
        (47.9 * 3600, "47 h 54 min"),
        (49 * 3600, "2 days 1 h"),
    ],
)
def test_a_time_is_said_as_people_read_it(seconds: float, shown: str) -> None:
    assert show_duration(seconds) == shown


# ---- Predictions ----


def on(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this machine have GPUs of a name."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: device)


def test_the_time_on_machines_that_are_not_here_is_predicted_and_said_to_be_modelled(recipe: Path) -> None:
    found = one(recipe, "gpus=2", "model.dtype=bfloat16")
    assert found.rate is None  # no GPU is here
    q = found.table.shape.quadratic_length
    by_name = {prediction.machine.name: prediction for prediction in reversed(found.predictions)}
    assert list(reversed(by_name)) == [machine.name for machine in MACHINES]
    for prediction in by_name.values():
        machine, basis = prediction.machine, prediction.basis
        # Two layers of 64 x 64 twice, 64 x 32 twice, 64 x 128 three times, and a head of 1,025 ids.
        weights = 2 * (2 * 64**2 + 2 * 64 * 32 + 3 * 64 * 128) + 1025 * 64
        pairs = (found.table.rows["cost"].sum() - q * found.table.num_tokens) / q
        per_pass = 2 * weights * np.array([found.table.num_tokens, pairs])
        passes = np.array([2, 3]) if machine.needs_adapters else np.array([3, 3])  # the recipe checkpoints nothing
        peak = {A100: 312e12, H100: 989.5e12}[machine.device]
        seconds = (per_pass @ passes) / (basis.share * peak * machine.num_devices * found.table.efficiency)
        seconds += prediction.communication_s
        assert (prediction.communication_s > 0) is (machine.num_devices > 1)
        assert prediction.seconds == pytest.approx(seconds, rel=1e-6)
        assert basis.device == machine.device and basis.checkpointing == "none"
    text = as_text([found])
    for name, prediction in by_name.items():
        (cells, *_) = rows_of(text, name)
        assert cells[1:3] == [show_duration(prediction.seconds), f"{prediction.tokens_per_s:,.0f}"]
        number = int(cells[-1].removeprefix("modelled on "))
        known = rows_of(text, f"{number}")[-1]
        assert known[1] == f"{prediction.basis.num_devices} x {prediction.basis.device}"
        assert known[-1] == f"{prediction.basis.origin}: {prediction.basis.source}"


def test_checkpointing_and_adapters_of_the_recipe_are_in_the_prediction(recipe: Path) -> None:
    plain, full = one(recipe, "model.dtype=bfloat16"), one(recipe, "model.dtype=bfloat16", "model.checkpointing=full")
    nearest = [found.predictions[0] for found in (plain, full)]
    flops = [(one.seconds - one.communication_s) * one.basis.share for one in nearest]
    assert flops[1] / flops[0] == pytest.approx(4 / 3)
    assert {found.basis.checkpointing for found in full.predictions} >= {"full"}
    model = plain.recipe.model.model_copy(update={"lora": LoraSection()})
    config = load_config(None, model.config, 1025)
    adapters = _predict(plain.recipe.model_copy(update={"model": model}), config, plain.table, 1)
    assert adapters[0].seconds < plain.predictions[0].seconds
    assert adapters[-1] == plain.predictions[-1]  # on one GPU there are only adapters


def test_checkpointing_auto_is_predicted_as_it_would_be_chosen_on_each_machine(recipe: Path) -> None:
    found = one(recipe, "model.dtype=bfloat16", "model.checkpointing=auto")
    plain = one(recipe, "model.dtype=bfloat16", "model.checkpointing=none")  # so small a model fits with all it keeps
    assert found.predictions == plain.predictions
    # Without checkpointing a layer keeps 234 kB of a token, and four 123 GB.
    large = ("hidden_size=5120", "intermediate_size=13824", "num_hidden_layers=4", "num_attention_heads=40")
    words = [f"model.config.{word}" for word in (*large, "num_key_value_heads=40")]
    words += ["gpus=8", "model.dtype=bfloat16", "packing.tokens_per_gpu=131072", "packing.grad_accum=1"]
    none, auto, full = (
        one(recipe, *words, f"model.checkpointing={policy}").predictions[0].seconds
        for policy in ("none", "auto", "full")
    )
    assert none < auto <= full


def test_gpus_that_share_micro_batches_are_planned_as_one(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on(A100, monkeypatch)
    two, four = (
        one(recipe, "model.dtype=bfloat16", f"gpus={number}", f"packing.tokens_per_gpu={tokens}", *shared)
        for number, tokens, *shared in ((2, 512), (4, 256, "packing.sequence_parallel=2"))
    )
    assert np.array_equal(two.table.rows, four.table.rows)
    text = as_text([four])
    assert "4 GPUs, 2 micro-batches of 512 tokens on each 2 of them" in text
    assert [row[0] for row in rows_of(text, "rank 2")] and not rows_of(text, "rank 1")
    first = four.predictions[0]
    assert first.machine.num_devices == 4 and {p.machine.num_devices % 2 for p in four.predictions} == {0}
    busy = [found.predictions[0].seconds - found.predictions[0].communication_s for found in (two, four)]
    assert busy[1] == pytest.approx(busy[0] / 2)
    of_weights = two.predictions[0].communication_s * (3 / 4) / (1 / 2)
    config = load_config(None, four.recipe.model.config, 512)
    exchanged = 2 * bytes_exchanged(config, 2, 2) * four.table.num_tokens / 4  # forward, backward; nothing recomputed
    assert first.communication_s == pytest.approx(of_weights + exchanged / BANDWIDTHS[A100])


def test_without_a_measured_rate_the_time_is_that_which_is_predicted_for_the_gpus_here(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(A100, monkeypatch)
    found = one(recipe, "gpus=8", "model.dtype=bfloat16")
    here = found.predictions[0]
    there = next(prediction for prediction in found.predictions if prediction.machine == MACHINES[0])
    assert here.machine.name == f"this machine: 8 x {A100}"
    assert here.seconds == there.seconds == found.seconds
    assert found.rate == Rate(here.tokens_per_s, "modelled", basis=here.basis)
    assert "tokens/s a GPU, as in the line of this machine below; no run measured it." in joined(as_text([found]))
    write_metrics(tmp_path / "run", [4000.0])
    model = yaml.safe_load(recipe.read_text())["model"] | {"dtype": "bfloat16"}
    measured = one(change(recipe, tmp_path / "bf16.yaml", model=model), "gpus=8")
    assert measured.rate == Rate(1000.0, "measured", 1, (4,))


def test_nothing_is_predicted_of_what_the_speeds_say_nothing_about(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert one(recipe).predictions == ()  # float32
    assert "modelled on" not in as_text([one(recipe)])
    on("Tesla V100-SXM2-32GB", monkeypatch)
    found = one(recipe, "model.dtype=bfloat16")
    assert found.rate is None
    assert found.predictions[0].machine == MACHINES[0]


# ---- Two plans ----


def test_the_second_plan_is_the_first_with_words_on_top(recipe: Path) -> None:
    first, second = plan(recipe, "gpus=4", "train.epochs=3", "packing.grad_accum=1", vs=["packing.grad_accum=3"])
    assert (first.table.shape.world_size, first.table.shape.grad_accum) == (4, 1)
    assert (second.table.shape.world_size, second.table.shape.grad_accum) == (4, 3)
    assert second.recipe.train.epochs == 3
    assert second.request.overrides == ("train.epochs=3", "packing.grad_accum=3")


def test_the_second_plan_may_be_another_recipe(recipe: Path, tmp_path: Path) -> None:
    other = change(recipe, tmp_path / "other.yaml", name="other", train={"epochs": 1, "seed": 3})
    first, second = plan(recipe, "gpus=3", "packing.grad_accum=1", vs=[str(other)])
    assert (second.table.shape.world_size, second.table.shape.grad_accum, second.recipe.train.epochs) == (3, 2, 1)
    assert as_text([first, second]).startswith("Two plans of tiny and other\n")
    assert plan(recipe, vs=[str(other), "gpus=1", "train.epochs=4"])[1].recipe.train.epochs == 4


def test_the_second_time_is_modelled_by_what_ranks_wait_for(recipe: Path, tmp_path: Path) -> None:
    write_metrics(tmp_path / "run", [4000.0])
    for words in ((), ("tokens_per_s=123",)):
        first, second = plan(recipe, "gpus=2", *words, vs=["gpus=5", "packing.grad_accum=1"])
        assert first.seconds is not None and second.seconds is not None and second.rate is not None
        assert second.rate.origin == "modelled"
        assert second.seconds / first.seconds == pytest.approx(second.cost / first.cost)
        rate = f"which makes {second.rate.tokens_per_s:,.0f} tokens/s a GPU."
        assert rate in joined(as_text([first, second]))


def test_the_second_time_is_its_own_where_it_has_one(recipe: Path, tmp_path: Path) -> None:
    given = plan(recipe, "tokens_per_s=100", vs=["gpus=4", "tokens_per_s=90"])
    assert given[1].rate == Rate(90.0, "given")
    write_metrics(tmp_path / "own", [800.0])
    measured = plan(recipe, "tokens_per_s=100", vs=[f"checkpoint.dir={tmp_path / 'own'}"])
    assert measured[1].rate == Rate(200.0, "measured", 1, (4,))


def test_the_time_of_another_model_is_not_modelled(recipe: Path) -> None:
    for word in ("model.config.num_hidden_layers=3", "model.checkpointing=full", "zero.offload=optimizer"):
        first, second = plan(recipe, "tokens_per_s=100", vs=[word])
        assert first.rate is not None and second.rate is None


def test_two_plans_stand_side_by_side(recipe: Path) -> None:
    reports = plan(recipe, "gpus=2", "tokens_per_s=100", vs=["gpus=4", "data.sources.1.epochs=0.5"])
    text = as_text(reports)
    first, second = (found.table for found in reports)
    assert rows_of(text, "steps")[0][1:3] == [str(first.num_steps), str(second.num_steps)]
    assert rows_of(text, "GPUs")[0][1:] == ["2", "4", "\N{MULTIPLICATION SIGN} 2"]
    change = 100 * (second.num_tokens / first.num_tokens - 1)
    assert rows_of(text, "tokens")[0][1:] == [f"{first.num_tokens:,}", f"{second.num_tokens:,}", f"{change:+.1f} %"]
    assert rows_of(text, "fill")[0][3] == f"{100 * (second.fill - first.fill):+.2f} points"
    assert rows_of(text, "packing.grad_accum")[0][1:] == ["2", "2"]
    assert [row[1] for row in rows_of(text, "hasty")] == ["1", "0.5"]
    sections = [line for line in text.splitlines() if line.endswith((": SOURCES", ": STEPS"))]
    assert sections == [f"{name} PLAN: {title}" for name in ("FIRST", "SECOND") for title in ("SOURCES", "STEPS")]
    tables = Page(as_html(reports)).tables
    assert [[cell for cell in row if cell] for row in tables[0][1:]] == [
        rows_of(text, row[0])[0] for row in tables[0][1:]
    ]


# ---- Mistakes ----


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gpus=0"], r"gpus '0' is not a whole number from 1 to 65,536; give one, such as gpus=8"),
        (["gpus=1.5"], r"gpus '1\.5' is not"),
        (["gpus=100000"], r"gpus '100000' is not a whole number from 1 to 65,536"),
        (["gpus"], r"gpus '' is not"),
        (["tokens_per_s=0"], r"tokens_per_s '0' is not a number above 0; give the tokens a second of one GPU"),
        (["tokens_per_s=fast"], r"tokens_per_s 'fast' is not"),
        (["tokens_per_s=inf"], r"tokens_per_s 'inf' is not"),
        (["--vs", "gpus=-1"], r"gpus '-1' is not"),
        (["--vs"], r"--vs has no words after it; name another recipe, or what differs, such as gpus=64"),
        (["--vs", "none.yaml"], r"no recipe at none\.yaml"),
        (["train.epoch=3"], r"[\s\S]*train\.epoch: unknown key .*the nearest known key is train\.epochs"),
        (["packing.tokens_per_gpu=64"], r"[\s\S]*data\.max_tokens 256 is above packing\.tokens_per_gpu 64"),
    ],
)
def test_mistakes_are_refused_with_their_remedy(recipe: Path, words: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        report.main(["plan", str(recipe), *words, "--text"])


# ---- Pictures ----


def test_the_pictures_are_the_first_a_median_the_worst_full_and_the_last_step(recipe: Path) -> None:
    found = one(recipe, "gpus=3", "packing.grad_accum=1")
    numbers = {name: picture.number for picture in found.pictures for name in picture.names}
    is_full = [not is_end for is_end in found.is_epoch_end]
    assert is_full.count(False) == 2
    full = sorted(balance for balance, full in zip(found.balances, is_full, strict=True) if full)
    assert numbers["first"] == 1
    assert numbers["last"] == found.table.num_steps
    assert found.balances[numbers["worst balanced"] - 1] == full[0]
    assert found.balances[numbers["of median balance"] - 1] == full[len(full) // 2]


def test_a_single_step_is_one_picture(recipe: Path) -> None:
    found = one(recipe, "packing.tokens_per_gpu=100000", "train.epochs=1")
    (picture,) = found.pictures
    assert picture.names == ("first", "of median balance", "worst balanced", "last")


def test_a_picture_holds_all_sequences_of_its_step(recipe: Path) -> None:
    found = one(recipe, "gpus=3")
    for picture in found.pictures:
        assert list(picture.rows) == [0, 1, 2]
        parts = [part for row in picture.rows.values() for part in row]
        assert sum(len(part.costs) for part in parts) == picture.num_examples
        assert sum(int(part.costs.sum()) for part in parts) == found.table.rows["cost"][picture.number - 1]
        assert picture.ends[-1] == found.table.rows["waits"][picture.number - 1]
        assert picture.num_tokens == found.table.rows["num_tokens"][picture.number - 1]


@pytest.mark.parametrize("words", [("gpus=3",), ("gpus=2", "packing.grad_accum=5"), ("gpus=7", "packing.grad_accum=1")])
def test_a_bar_is_as_long_as_the_rank_is_busy(recipe: Path, words: tuple[str, ...]) -> None:
    found = one(recipe, *words)
    longest = max(int(picture.ends[-1]) for picture in found.pictures)
    lines = iter(re.findall(r"^  rank (\d+) +([█▏▎▍▌▋▊▉]+) +([\d,]+) +([\d.]+) %$", as_text([found]), re.MULTILINE))
    for picture in found.pictures:
        for rank, row in picture.rows.items():
            shown_rank, bar, sequences, waits = next(lines)
            cost = sum(int(part.costs.sum()) for part in row)
            assert shown_rank == str(rank)
            assert int(sequences.replace(",", "")) == sum(len(part.costs) for part in row)
            assert len(bar) == pytest.approx(40 * cost / longest, abs=1)
            assert float(waits) == pytest.approx(100 * (1 - cost / int(picture.ends[-1])), abs=0.006)
    assert next(lines, None) is None


def test_of_many_ranks_some_are_shown_from_the_lightest_to_the_heaviest(recipe: Path) -> None:
    found = one(recipe, "gpus=40", "packing.grad_accum=1")
    assert found.pictures
    for picture in found.pictures:
        costs = [sum(int(part.costs.sum()) for part in row) for row in picture.rows.values()]
        assert len(set(picture.rows)) == 16
        assert costs == sorted(costs)
        assert costs[-1] == picture.ends[-1]
    text = as_text([found])
    for shown in (text, Page(as_html([found])).text):
        assert shown.count("16 of 40 ranks, from the lightest to the heaviest") >= len(found.pictures)
    assert list(one(recipe, "gpus=32").pictures[0].rows) == list(range(32))


# ---- The page ----


@dataclass
class Nesting(HTMLParser):
    """Fails on a tag that is not closed where it should be."""

    page: str
    open: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> list[PlanReport]:
    """Two plans, one of them of more ranks than fit, with hostile names."""
    folder = tmp_path_factory.mktemp("hostile")
    data = yaml.safe_load(tiny_recipe(folder).read_text())["data"]
    data["sources"][1]["name"] = HOSTILE
    recipe = make(folder, name=HOSTILE, data=data)
    return plan(recipe, "gpus=3", "tokens_per_s=100", vs=["gpus=40", "data.sources.1.weight=0.3"])


def test_the_page_is_well_formed_and_loads_nothing(hostile: list[PlanReport]) -> None:
    for reports in (hostile, hostile[:1]):
        page = as_html(reports)
        Nesting(page)
        parsed = Page(page)
        tags = {tag for tag, _ in parsed.tags}
        assert not tags & {"script", "link", "img", "iframe", "object", "base", "use", "image"}
        names = {name for _, attributes in parsed.tags for name in attributes}
        assert not {name for name in names if name in ("src", "href", "xlink:href", "srcset") or name.startswith("on")}
        assert "url(" not in page and "@import" not in page and "http" not in page


def test_names_are_text_on_the_page(hostile: list[PlanReport]) -> None:
    for reports in (hostile, hostile[:1]):
        page = Page(as_html(reports))
        assert not {tag for tag, _ in page.tags if '"' in tag or "&" in tag}
        assert not re.findall(r"<b>&(?!amp;)", as_html(reports))
        assert page.text.count(HOSTILE) >= 6
        assert HOSTILE in [row[0] for table in page.tables for row in table]


def test_every_picture_has_text_for_those_who_do_not_see_it(hostile: list[PlanReport]) -> None:
    page = Page(as_html(hostile))
    for tag, attributes in page.tags:
        if tag == "svg":
            assert attributes.get("aria-hidden") == "true" or (attributes["role"] == "img" and attributes["aria-label"])
    labels = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"]
    steps = [label for label in labels if label and label.startswith("Step ")]
    assert len(steps) == sum(len(found.pictures) for found in hostile)
    numbers = r"[\d,]+ tokens in \d+ sequences, fill [\d.]+ %, balance [\d.]+ %"
    assert re.fullmatch(rf"Step 1 of \d+, first( and [a-z ]+)?, {numbers}: .*", steps[0])


def step_charts(found: PlanReport) -> list[Chart]:
    return [
        block
        for section in plan_document([found]).sections
        for block in section.blocks
        if isinstance(block, Chart) and block.title.startswith("Step ")
    ]


def test_a_picture_shows_when_ranks_work_on_which_source_and_when_they_wait(hostile: list[PlanReport]) -> None:
    found = hostile[0]
    unit = found.table.shape.quadratic_length
    for picture, chart in zip(found.pictures, step_charts(found), strict=True):
        axes = Figure().subplots()
        chart.draw(axes)
        waiting, *sources = axes.get_lines()
        assert waiting.get_color() == LINE
        gap = 0.002 * max(one.ends[-1] for one in found.pictures) / unit
        assert np.nanmax(waiting.get_xdata()) == pytest.approx(picture.ends[-1] / unit, abs=1.01 * gap)
        assert [line.get_color() for line in sources] == [colour_of(n) for n in range(len(sources))]
        for rank, row in enumerate(picture.rows.values()):
            drawn = 0.0
            for line in sources:
                starts, stops, _ = line.get_xdata().reshape(-1, 3)[line.get_ydata()[::3] == rank].T
                drawn += float((stops - starts).sum())
            busy = sum(int(part.costs.sum()) for part in row) / unit
            assert busy - gap * sum(len(part.costs) for part in row) - 1e-6 <= drawn <= busy
        (ends,) = axes.collections
        assert [segment[0][0] for segment in ends.get_segments()] == pytest.approx(picture.ends / unit)
        assert [label.get_text() for label in axes.get_yticklabels()] == [str(rank) for rank in picture.rows]


def test_sequences_stand_one_after_the_other_by_source_and_narrow_ones_as_one() -> None:
    def part(*costs: int) -> MicroBatch:
        return MicroBatch(np.arange(len(costs), dtype=np.int32) % 2, np.array(costs, np.int64))

    picture = StepPicture((), 1, 8, 8, 1.0, {4: (part(5000, 3, 2, 40, 1), part(70, 200))}, np.array([6000, 6300]))
    # In a picture of 10,000 what is below 20 is narrow: 2 + 1 of the first source, 3 of the second.
    assert source_spans(picture, 10_000) == {
        0: [(0, 0, 5000), (0, 5000, 5003), (0, 6000, 6070)],
        1: [(0, 5003, 5043), (0, 5043, 5046), (0, 6070, 6270)],
    }


# ---- The command ----


def test_the_command_prints_text_and_writes_a_page_whose_path_is_last(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["gpus=2", "tokens_per_s=100"]
    report.main(["plan", str(recipe), *words])
    text = as_text(plan(recipe, *words))
    assert capsys.readouterr().out == f"{text}\n\n{tmp_path / 'run' / 'plan.html'}\n"
    assert (tmp_path / "run" / "plan.html").read_text(encoding="utf-8") == as_html(plan(recipe, *words))
    report.main(["plan", str(recipe), *words, "--vs", "gpus=3", "--out", str(tmp_path / "page.html")])
    assert capsys.readouterr().out.endswith(f"\n\n{tmp_path / 'page.html'}\n")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == as_html(plan(recipe, *words, vs=["gpus=3"]))


def test_the_command_writes_nothing_when_only_text_is_asked_for(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    report.main(["plan", str(recipe), "gpus=2", "--vs", "gpus=3", "--text"])
    assert capsys.readouterr().out == as_text(plan(recipe, "gpus=2", vs=["gpus=3"])) + "\n"
    assert sorted(tmp_path.rglob("*")) == before


def test_a_page_that_cannot_be_written_is_said(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"^error: .*none/page.html cannot be written: No such file"):
        report.main(["plan", str(recipe), "--out", str(tmp_path / "none" / "page.html")])
    with pytest.raises(SystemExit, match=r"^error: .*recipe.yaml/plan.html cannot be written: File exists; name"):
        report.main(["plan", str(recipe), f"checkpoint.dir={recipe}"])
