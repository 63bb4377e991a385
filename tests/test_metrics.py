"""The lines of metrics.jsonl, and what a run must remember to write them."""

import re
import shutil
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import numpy as np
import orjson
import psutil
import pytest
import torch
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ochat_train import files
from ochat_train.model.loss import ConditionSums, zero_sums
from ochat_train.recipe import Recipe, load_recipe
from ochat_train.training import metrics as metrics_module
from ochat_train.training import sinks
from ochat_train.training.best_epoch import BestEpoch, best_epoch
from ochat_train.training.held_out import ConditionProbe
from ochat_train.training.metrics import Metrics, RunOutline, StepReport, evaluation_to_json, peak_memory_bytes
from ochat_train.training.saving import SaveResult
from ochat_train.training.sinks import check_sinks, flat_numbers
from ochat_train.training.speed import Utilisation
from tests.waiting import ends, wait_until

ROOT = Path(__file__).resolve().parents[1]
CONDITIONS, SOURCES = ["GPT4", "GPT3"], ["gpt4", "gpt3", "empty"]
ABOUT = {
    "num_processes": 2,
    "started": "2026-01-01T00:00:00Z",
    "device": "cpu",
    "attention": "sdpa",
    "checkpointing": "full",
    "commit": "x",
}


def recipe_for(run: Path, *overrides: str) -> Recipe:
    return load_recipe(ROOT / "recipes/quickstart.yaml", [f"checkpoint.dir={run}", *overrides])


def metrics_for(run: Path, *overrides: str, is_main: bool = True, **changes: Any) -> Metrics:
    outline = RunOutline(recipe_for(run, *overrides), run, CONDITIONS, SOURCES, 0, 10, 1000, None)
    return Metrics(replace(outline, **changes), is_main=is_main)


def report_for(step: int, **changes: Any) -> StepReport:
    fields: dict[str, Any] = {
        "step": step,
        "epoch": 0,
        "examples_consumed": step,
        "progress": 0.5,
        "sums": sums_for(3.0),
        "source_weights": np.array([3.0, 1.0, 0.0]),
        "lr": 1e-3,
        "grad_norm": 1.0,
        "num_tokens": 100,
        "cost": 100 * 1000 + 400,
        "fill": 0.5,
        "num_processes": 2,
        "seconds": 2.0,
        "data_wait_s": 0.0,
        "peak_memory_bytes": 2**40 + 1,
    }
    return StepReport(**fields | changes)


def sums_for(loss: float) -> ConditionSums:
    """Of the first condition ten tokens of weight 1, half of them right; nothing of the second."""
    part = torch.tensor([[10.0 * loss, 0.0], [10.0, 0.0], [5.0, 0.0]], dtype=torch.float64)
    return ConditionSums(torch.stack([part, part]))


def lines(run: Path, kind: str) -> list[dict[str, Any]]:
    events = map(orjson.loads, (run / "metrics.jsonl").read_bytes().splitlines())
    return [event for event in events if event["event"] == kind]


# ---- Evaluations ----


def test_an_evaluation_divides_sums_by_their_weights() -> None:
    # By hand: GPT4 weighs 1 and GPT3 0.1 a token.
    weighted = torch.tensor([[8.0, 0.9], [4.0, 0.3], [1.0, 0.2]], dtype=torch.float64)
    unweighted = torch.tensor([[8.0, 9.0], [4.0, 3.0], [1.0, 2.0]], dtype=torch.float64)
    sums = ConditionSums(torch.stack([weighted, unweighted]))
    line = evaluation_to_json(7, 1, sums, None, CONDITIONS, is_epoch_end=True)
    e = 2.718281828459045
    assert line == {
        "event": "eval",
        "step": 7,
        "epoch": 1,
        "epoch_end": True,
        "loss": pytest.approx(8.9 / 4.3),
        "loss_by_condition": pytest.approx({"GPT4": 2.0, "GPT3": 3.0}),
        "perplexity": pytest.approx(e ** (8.9 / 4.3)),
        "perplexity_by_condition": pytest.approx({"GPT4": e**2, "GPT3": e**3}),
        "accuracy": pytest.approx(1.2 / 4.3),
        "accuracy_by_condition": pytest.approx({"GPT4": 1 / 4, "GPT3": 2 / 3}),
        "unweighted_loss": pytest.approx(17 / 7),
        "unweighted_loss_by_condition": pytest.approx({"GPT4": 2.0, "GPT3": 3.0}),
        "unweighted_perplexity": pytest.approx(e ** (17 / 7)),
        "unweighted_perplexity_by_condition": pytest.approx({"GPT4": e**2, "GPT3": e**3}),
        "unweighted_accuracy": pytest.approx(3 / 7),
        "unweighted_accuracy_by_condition": pytest.approx({"GPT4": 1 / 4, "GPT3": 2 / 3}),
        "probe": None,
        "probe_by_condition": None,
        "probe_left_out": None,
    }


def test_what_has_no_weight_or_is_not_finite_is_null() -> None:
    huge = evaluation_to_json(1, 0, sums_for(1e4), None, CONDITIONS, is_epoch_end=False)
    assert huge["loss_by_condition"] == {"GPT4": 1e4, "GPT3": None}
    assert huge["perplexity_by_condition"] == {"GPT4": None, "GPT3": None}  # e^10000
    none = zero_sums(2, torch.device("cpu"))
    nothing = evaluation_to_json(1, 0, none, None, CONDITIONS, is_epoch_end=False)
    assert nothing["loss"] is nothing["accuracy"] is nothing["unweighted_perplexity"] is None


def test_a_probe_is_shown_by_the_conditions_that_the_answers_have() -> None:
    probe = ConditionProbe(own=sums_for(1.0), other=sums_for(3.0), none=sums_for(2.0), num_left_out=4)
    line = evaluation_to_json(1, 0, sums_for(1.0), probe, CONDITIONS, is_epoch_end=True)
    assert line["probe"] == {"own": 1.0, "other": 3.0, "none": 2.0}
    assert line["probe_by_condition"] == {
        "GPT4": {"own": 1.0, "other": 3.0, "none": 2.0},
        "GPT3": {"own": None, "other": None, "none": None},
    }
    assert line["probe_left_out"] == 4
    alone = ConditionProbe(own=sums_for(1.0), other=None, none=sums_for(2.0), num_left_out=0)
    line = evaluation_to_json(1, 0, sums_for(1.0), alone, CONDITIONS, is_epoch_end=True)
    assert line["probe"] == {"own": 1.0, "other": None, "none": 2.0}


# ---- Steps ----


def test_sources_share_the_weight_of_a_step() -> None:
    line = report_for(1).to_json(CONDITIONS, SOURCES)
    assert line["weight_by_source"] == {"gpt4": 0.75, "gpt3": 0.25, "empty": 0.0}
    silent = report_for(1, source_weights=np.zeros(3)).to_json(CONDITIONS, SOURCES)
    assert set(silent["weight_by_source"].values()) == {0.0}


def test_skipped_steps_are_counted_over_all_parts_of_a_run(tmp_path: Path) -> None:
    with metrics_for(tmp_path) as metrics:
        for step, norm in enumerate([1.0, float("nan"), 1.0, float("inf"), float("inf")], start=1):
            metrics.step(report_for(step, grad_norm=norm))
    assert [line["skipped_steps"] for line in lines(tmp_path, "step")] == [0, 1, 1, 2, 3]
    assert [line["grad_norm"] for line in lines(tmp_path, "step")] == [1.0, None, 1.0, None, None]
    with metrics_for(tmp_path, start=4) as metrics:  # a crash undid the fifth
        metrics.step(report_for(5))
        metrics.step(report_for(6, grad_norm=float("nan")))
    assert [line["skipped_steps"] for line in lines(tmp_path, "step")] == [0, 1, 1, 2, 2, 3]


def test_the_time_left_is_that_of_the_tokens_left_at_the_recent_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_module, "_RECENT_STEPS", 2)
    with metrics_for(tmp_path, start=3, num_tokens=1000) as metrics:
        for step, seconds in enumerate([90.0, 2.0, 4.0, 6.0], start=4):
            metrics.step(report_for(step, seconds=seconds))
        metrics.step(report_for(8, num_tokens=600))
    left = [line["time_left_s"] for line in lines(tmp_path, "step")]
    # The first step of a process, which warms up, counts for nothing.
    assert left == [None, 800 * 2 / 100, 700 * 6 / 200, 600 * 10 / 200, 0.0]


def test_the_utilisation_is_that_of_all_devices_or_null(tmp_path: Path) -> None:
    # 6 * 10^9 * (100 + 400 / 1000) FLOP in 2 s on 2 devices of 10^12.
    known = Utilisation(num_weights=10**9, quadratic_length=1000, is_frozen=False, peak=1e12)
    for utilisation, expected in ((known, 0.1506), (None, None)):
        with metrics_for(tmp_path, utilisation=utilisation) as metrics:
            metrics.step(report_for(1))
        assert lines(tmp_path, "step")[0]["mfu"] == (expected and pytest.approx(expected))


def test_the_peak_of_memory_is_in_bytes() -> None:
    resident = psutil.Process().memory_info().rss
    # The kernel counts both a little late, each in its own way.
    assert 0.9 * resident < peak_memory_bytes(torch.device("cpu")) < 100 * resident


# ---- Start, save, end ----


def test_starts_saves_and_the_end_are_told_by_the_main_process_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    for is_main in (False, True):
        with metrics_for(run, is_main=is_main) as metrics:
            metrics.start(0, 0, resumed=None, about=ABOUT)
            metrics.step(report_for(1))
            metrics.evaluation(1, 0, sums_for(2.5), is_epoch_end=True)
            metrics.saved(SaveResult("checkpoint", run / "step-00000001", 1.5, 10, None))
            metrics.end(1, 0, "finished")
        assert run.exists() == is_main
    assert lines(run, "start") == [
        {
            "event": "start",
            "step": 0,
            "epoch": 0,
            "num_processes": 2,
            "started": "2026-01-01T00:00:00Z",
            "resumed": None,
            "device": "cpu",
            "attention": "sdpa",
            "checkpointing": "full",
            "loss_form": "token",
        }
    ]
    assert lines(run, "save") == [
        {"event": "save", "step": 1, "kind": "checkpoint", "path": "step-00000001", "seconds": 1.5, "bytes": 10}
    ]
    best = {"best_epoch": 0, "best_step": 1, "best_loss": 2.5}
    assert lines(run, "end") == [{"event": "end", "step": 1, "epoch": 0, "reason": "finished", **best}]
    assert capsys.readouterr().out.count("best epoch: 1,") == 1


def test_the_progress_line_shows_what_matters_within_80_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tqdm.std._screen_shape_wrapper", lambda: lambda file: (80, 24))
    with metrics_for(tmp_path / "run", num_steps=120_000) as metrics:
        for step in (99_998, 99_999):  # an hour each would be left
            metrics.step(report_for(step, epoch=11, num_tokens=2_000_000, seconds=1.5))
    shown = [line for line in re.split(r"[\r\n]", capsys.readouterr().err) if line.strip()]
    assert max(map(len, shown)) <= 80
    assert re.match(r"step 99999/120000 \|.+\| .+ left, epoch 12, loss 3\.0000, 1,333,333 tokens/s$", shown[-1])


def test_the_best_epoch_is_the_first_of_lowest_loss_at_an_epochs_end() -> None:
    def ended(epoch: int, loss: float | None, *, is_end: bool = True) -> dict[str, Any]:
        return {"event": "eval", "step": 10 * epoch + 10, "epoch": epoch, "epoch_end": is_end, "loss": loss}

    events = [ended(0, 3.0), ended(1, 2.0), ended(2, 2.0), ended(3, 1.0, is_end=False), ended(4, None)]
    assert best_epoch([{"event": "step", "loss": 0.5}, *events]) == BestEpoch(1, 20, 2.0)
    assert best_epoch(events[3:]) is None
    assert best_epoch([]) is None


def test_a_run_that_goes_on_remembers_its_earlier_epochs(tmp_path: Path) -> None:
    with metrics_for(tmp_path) as metrics:
        for epoch, loss in enumerate([3.0, 2.0, 1.0]):
            metrics.evaluation(epoch + 1, epoch, sums_for(loss), is_epoch_end=True)
    with metrics_for(tmp_path, start=2) as metrics:  # a crash undid the third
        metrics.evaluation(3, 2, sums_for(2.5), is_epoch_end=True)
        metrics.end(3, 2, "max_steps")
    (end,) = lines(tmp_path, "end")
    assert (end["best_epoch"], end["best_step"], end["best_loss"]) == (1, 2, 2.0)
    with metrics_for(tmp_path) as metrics:  # anew
        metrics.end(0, 0, "stopped")
    (end,) = lines(tmp_path, "end")
    assert end["best_epoch"] is end["best_step"] is end["best_loss"] is None


# ---- Disks ----


def fill(disk: Path) -> Path:
    """A file that leaves no room beside it."""
    file = disk / "filler"
    with pytest.raises(OSError, match="No space left"), file.open("wb", buffering=0) as opened:
        while opened.write(bytes(2**12)):
            pass
    return file


def test_a_full_disk_ends_no_reporting_and_lines_are_written_when_there_is_room(
    small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with metrics_for(small_disk, "log.tensorboard=true") as metrics:
        for step in range(1, 100):
            if step == 20:
                filler = fill(small_disk)
            if step == 60:
                filler.unlink()
            metrics.step(report_for(step))
    assert [line["step"] for line in lines(small_disk, "step")] == list(range(1, 100))
    assert capsys.readouterr().out.count("and the lines wait in memory") == 1
    filler = fill(small_disk)
    # It goes on from 50 while the disk is full: the file cannot be rewritten, and stays.
    with metrics_for(small_disk, "log.tensorboard=true", "log.wandb.project=x", start=50) as metrics:
        metrics.step(report_for(51, seconds=3.0))
        assert len(lines(small_disk, "step")) == 99
        filler.unlink()
        metrics.step(report_for(52))
    assert [line["step"] for line in lines(small_disk, "step")] == list(range(1, 53))
    undone = [orjson.loads(line) for line in (small_disk / "metrics.jsonl.old").read_bytes().splitlines()]
    assert [line["step"] for line in undone] == list(range(51, 100)) and undone[0]["seconds"] == 2.0
    said = capsys.readouterr().out
    assert all(f"WARNING: {sink} takes no numbers" in said for sink in ("tensorboard", "wandb"))
    fill(small_disk)
    with metrics_for(small_disk, start=52) as metrics:
        for step in (53, 54, 55, 56, 57):
            metrics.step(report_for(step))
    assert "lines of metrics.jsonl were not written ([Errno 28]" in capsys.readouterr().out


# ---- Sinks ----


def test_numbers_have_their_path_as_their_name() -> None:
    line = {"event": "eval", "step": 3, "loss": 1.5, "none": None, "probe_by_condition": {"GPT4": {"own": 1.0}}}
    assert flat_numbers(line) == {"eval/step": 3, "eval/loss": 1.5, "eval/probe_by_condition/GPT4/own": 1.0}


def test_tensorboard_has_the_numbers_of_the_lines(tmp_path: Path) -> None:
    with metrics_for(tmp_path, "log.tensorboard=true") as metrics:
        for step in (1, 2, 3):
            metrics.step(report_for(step, lr=step / 1000))
        metrics.evaluation(3, 0, sums_for(2.5), is_epoch_end=True)
    with metrics_for(tmp_path, "log.tensorboard=true", start=2) as metrics:  # a crash undid the third
        metrics.step(report_for(3, lr=0.5))
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [(event.step, event.value) for event in read.Scalars("step/lr")] == [
        (step, pytest.approx(line["lr"])) for step, line in enumerate(lines(tmp_path, "step"), start=1)
    ]
    names = {name for line in lines(tmp_path, "step") for name in flat_numbers(line)}
    assert names <= set(read.Tags()["scalars"])
    assert "eval/loss_by_condition/GPT4" in read.Tags()["scalars"]


def test_wandb_has_the_steps_of_a_branch_in_a_run_of_their_own(tmp_path: Path) -> None:
    offline = ("log.wandb.project=chat", "log.wandb.mode=offline")
    ids = []
    # From the start; after a crash that undid steps 3 and 4; and from 2 with another recipe, after 3 and 4 as well.
    for start, is_branch in ((0, False), (2, False), (2, True)):
        with metrics_for(tmp_path, *offline, start=start, is_branch=is_branch) as metrics:
            for step in range(start + 1, 5):
                metrics.step(report_for(step, lr=(82000 if is_branch else 71000) + step))
        ids.append((tmp_path / "wandb_id").read_text())
    assert ids[0] == ids[1] != ids[2]
    (file,) = (tmp_path / "wandb").glob(f"offline-run-*-{ids[2]}/run-{ids[2]}.wandb")

    def rates() -> set[int]:
        # A number follows its name and a few bytes of lengths; a time stamp in the file may hold any digits.
        return set(map(int, re.findall(rb"step/lr[^0-9]+([0-9]+)", file.read_bytes())))

    wait_until(lambda: len(rates()) >= 4)  # wandb's process serves the tests before this one as well, and writes later
    assert rates() == {71001, 71002, 82003, 82004}


def test_a_wandb_that_fails_on_the_way_is_left_alone_with_one_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ("log.wandb.project=chat", "log.wandb.mode=offline")
    with metrics_for(tmp_path, *overrides) as metrics:
        (sink,) = metrics._sinks
        sink._run.finish()  # type: ignore[attr-defined]  # as if its process had died: it takes no more
        for step in (1, 2, 3):
            metrics.step(report_for(step))
    assert capsys.readouterr().out.count("wandb takes no more numbers") == 1
    assert len(lines(tmp_path, "step")) == 3


def test_a_tensorboard_whose_folder_goes_away_stops_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with metrics_for(tmp_path, "log.tensorboard=true") as metrics:
        metrics.step(report_for(1))
        (sink,) = metrics._sinks
        sink._writer.close()  # type: ignore[attr-defined]
        shutil.rmtree(tmp_path / "tensorboard")
        (tmp_path / "tensorboard").write_text("in the way")
        for step in (2, 3):
            metrics.step(report_for(step))
    assert capsys.readouterr().out.count("tensorboard takes no more numbers") == 1
    assert len(lines(tmp_path, "step")) == 3


class FeignedServer(ThreadingHTTPServer):
    """As much of a wandb server as lets a run begin."""

    ANSWERS: ClassVar[dict[str, Any]] = {
        "Viewer": {"viewer": {"id": "1", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}},
        "RunResumeStatus": {"model": None},
        "ServerFeaturesQuery": {"serverInfo": {"features": []}},
        "UpsertBucket": {
            "upsertBucket": {
                "inserted": True,
                "bucket": {
                    "id": "1",
                    "name": "run",
                    "displayName": "run",
                    "config": "{}",
                    "project": {"id": "1", "name": "chat", "entity": {"id": "1", "name": "me"}},
                    "historyLineCount": 0,
                },
            }
        },
    }

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), FeignedAnswers)


class FeignedAnswers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.answer({})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        operation = orjson.loads(body).get("operationName", "") if self.path.endswith("graphql") else ""
        self.answer({"data": FeignedServer.ANSWERS.get(operation, {})})

    def answer(self, content: dict[str, Any]) -> None:
        body = orjson.dumps(content)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


def test_a_wandb_server_that_goes_away_during_a_run_holds_nothing_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb.teardown()  # it remembers the server that it saw first
    monkeypatch.setattr(sinks, "_FINISH_S", 2.0)
    monkeypatch.setenv("WANDB_API_KEY", "7" * 40)
    server = FeignedServer()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    Thread(target=server.serve_forever, daemon=True).start()
    with ends(), metrics_for(tmp_path, "log.wandb.project=chat") as metrics:
        metrics.step(report_for(1))
        server.shutdown()
        server.server_close()
        for step in range(2, 102):
            metrics.step(report_for(step))
    # Without a limit wandb waits for the server, day after day.
    assert len(lines(tmp_path, "step")) == 101
    (file,) = (tmp_path / "wandb").glob("run-*/run-*.wandb")  # for wandb sync
    assert b"step/tokens_per_s" in file.read_bytes()
    wandb.teardown()


def test_without_the_package_tensorboard_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = recipe_for(tmp_path, "log.tensorboard=true")
    check_sinks(asked)
    monkeypatch.setattr(files.importlib.util, "find_spec", lambda name: None)  # type: ignore[attr-defined]
    check_sinks(recipe_for(tmp_path))
    with pytest.raises(ValueError, match=r"log\.tensorboard true needs the package tensorboard: pip install"):
        check_sinks(asked)
