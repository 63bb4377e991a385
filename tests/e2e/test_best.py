"""The best epoch's model is kept, found again after a kill and exported; a run without gain stops early."""

import signal
from pathlib import Path

import orjson
import pytest
import torch
from safetensors.torch import load_file

from ochat_train.export import main as export
from ochat_train.files import step_name
from ochat_train.report.page import as_text
from ochat_train.report.run import read_run
from ochat_train.report.run_sections import run_document
from ochat_train.training.best_epoch import best_epoch
from tests.e2e.harness import events, preprocess, start_ranks, tiny_recipe, train, write_dump

HELD_OUT = "data.eval_fraction=0.3"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("best")
    write_dump(folder, 40)
    (folder / "questions.jsonl").write_bytes(orjson.dumps({"question": "Hi"}))
    (folder / "equal.py").write_text("def check(text, record):\n    return 0.5\n")
    check = {"name": "equal", "questions": str(folder / "questions.jsonl"), "max_new_tokens": 2}
    check["check"] = f"{folder / 'equal.py'}:check"
    path = tiny_recipe(folder, eval={"checks": [check]})
    preprocess(path, HELD_OUT)
    return path


# The first process is killed while it writes the best model of the second epoch.
KILLED = """
import os, signal, ochat_train.train as t
write, seen = t.write_model, []
def write_or_die(folder, *arguments, **options):
    write(folder, *arguments, **options)
    if folder.parent.name == "best":
        seen.append(folder)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
t.write_model = write_or_die
"""


def test_the_best_model_survives_a_kill_and_is_exported(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = [HELD_OUT, "eval.checks=[]", "train.epochs=4", "optim.lr=0.003", "checkpoint.models.every_epochs=1"]
    options += ["checkpoint.best=loss", "checkpoint.export=best", f"checkpoint.dir={run}"]
    ended = start_ranks("ochat_train.train", str(recipe), *options, code=KILLED).end()
    assert ended[0][0] == -signal.SIGKILL, ended
    train(recipe, *options)
    best = best_epoch(events(run, "eval"))
    assert best is not None and best.epoch > 0  # or nothing was replaced
    (kept,) = [path for path in (run / "best").iterdir() if ".undone" not in path.name]
    assert kept.name == step_name(best.step)
    light = load_file(run / "models" / kept.name / "model.safetensors")
    weights = load_file(kept / "model.safetensors")
    assert all(torch.equal(weights[name].bfloat16(), light[name]) for name in light)
    assert weights.keys() == light.keys() and {weight.dtype for weight in weights.values()} == {torch.float32}
    export(["--best", str(run), str(tmp_path / "out")])
    for model in (run / "model", tmp_path / "out"):
        assert (model / "model.safetensors").read_bytes() == (kept / "model.safetensors").read_bytes()
        assert not (model / "checksums.json").exists()
    assert f"best/{kept.name}" in as_text(run_document(read_run(run)))
    (kept / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"damaged: config\.json"):
        export(["--best", str(run), str(tmp_path / "out")])


def test_a_run_without_gain_stops_early_and_is_finished(recipe: Path, tmp_path: Path) -> None:
    options = [HELD_OUT, "checkpoint.best=equal", "train.early_stop.epochs=2", "train.epochs=6", "optim.lr=1e-4"]
    options += [f"checkpoint.dir={tmp_path}", "checkpoint.every_epochs=null"]
    printed = train(recipe, *options)
    assert "stopped early: 2 epochs without a better equal" in printed
    ends = [event for event in events(tmp_path, "eval") if event["epoch_end"]]
    assert [event["epoch"] for event in ends] == [0, 1, 2]
    assert events(tmp_path, "end")[-1]["reason"] == "early_stop"
    assert [path.name for path in (tmp_path / "best").iterdir()] == [step_name(ends[0]["step"])]
    assert orjson.loads((tmp_path / "model/ochat_train.json").read_bytes())["step"] == ends[-1]["step"]
    again = train(recipe, *options)
    assert f"the run is complete at step {ends[-1]['step']}" in again and len(events(tmp_path, "start")) == 1
    assert "Finished: stopped early at step" in as_text(run_document(read_run(tmp_path)))
    on = train(recipe, *options, "train.early_stop=null", "train.epochs=4")
    assert "the run is complete" not in on and events(tmp_path, "end")[-1]["reason"] == "finished"
