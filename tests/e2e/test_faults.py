"""What goes wrong in a run of two real processes: it ends soon, says why, and loses nothing."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest

from ochat_train.training.checkpoint import find_checkpoints
from tests.e2e.harness import Ranks, events, preprocess, start_ranks, tiny_recipe, weights, write_dump
from tests.waiting import wait_until

# Steps so slow that something can happen in the middle of the run.
SLOW = """
import time, ochat_train.train as t
original = t.train_step
def train_step(*arguments, **options):
    time.sleep(0.3)
    return original(*arguments, **options)
t.train_step = train_step
"""


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    write_dump(folder, 60)
    path = tiny_recipe(folder)
    preprocess(path)
    return path


def start(recipe: Path, run: Path, *overrides: str, code: str = "") -> Ranks:
    """Train into `run`. code: what the processes do before; `rank` is there."""
    return start_ranks("ochat_train.train", str(recipe), f"checkpoint.dir={run}", "zero.stage=1", *overrides, code=code)


def is_done(run: Path, step: int) -> Callable[[], bool]:
    """Whether that step of the run is."""
    file = run / "metrics.jsonl"
    return lambda: file.exists() and f'"step":{step},"epoch":0,"examples_consumed"' in file.read_text()


# A process that has ended is seen, not waited for: silence alone would be noticed after an hour.
SEES_ENDS = """
import ochat_train.training.stopping as w
w.LOST_AFTER_S = 3600.0
"""


@pytest.mark.parametrize(("killed", "other"), [(0, 1), (1, 0)])
def test_a_killed_rank_is_named_and_the_other_stops(recipe_path: Path, tmp_path: Path, killed: int, other: int) -> None:
    ranks = start(recipe_path, tmp_path, code=SEES_ENDS + SLOW)
    ranks.wait_for(is_done(tmp_path, 2))
    ranks.signal(killed, signal.SIGKILL)
    code, output = ranks.end()[other]
    assert code == 1
    assert f"error: rank {killed} was lost at step " in output


SLOW_START = """
import pathlib, time, ochat_train.training.setup as p
original = p.build_model
def build_model(*arguments):
    if rank == 1:
        pathlib.Path(run, "loading").touch()
        time.sleep(600)
    return original(*arguments)
p.build_model = build_model
"""


def test_a_rank_that_is_killed_while_it_loads_the_model_is_named_and_the_other_stops(
    recipe_path: Path, tmp_path: Path
) -> None:
    ranks = start(recipe_path, tmp_path, code=f"run = {str(tmp_path)!r}{SEES_ENDS}{SLOW_START}")
    ranks.wait_for((tmp_path / "loading").exists)
    ranks.signal(1, signal.SIGKILL)
    code, output = ranks.end()[0]
    assert code == 1
    assert "error: rank 1 was lost at step 0 (starting)" in output


# Each rank on a host of its own, as far as it can tell. Their patience is shortened only when one is frozen, so that no
# pause of a rank on a busy machine ends the run before.
APART = """
import os, threading, time, ochat_train.training.stopping as w
readlink = os.readlink
os.readlink = lambda path: f"pid:[{rank}]" if path == "/proc/self/ns/pid" else readlink(path)
def hurry():
    while not os.path.exists(FROZEN):
        time.sleep(0.1)
    w.LOST_AFTER_S = 2.0
threading.Thread(target=hurry, daemon=True).start()
"""


@pytest.mark.parametrize(("frozen", "other"), [(0, 1), (1, 0)])
def test_a_host_of_which_nothing_is_heard_any_more_is_lost(
    recipe_path: Path, tmp_path: Path, frozen: int, other: int
) -> None:
    """No connection is closed, as when a host loses its power; and nothing on this host tells that it is gone."""
    ranks = start(recipe_path, tmp_path, code=APART.replace("FROZEN", repr(str(tmp_path / "frozen"))) + SLOW)
    ranks.wait_for(is_done(tmp_path, 2))
    ranks.signal(frozen, signal.SIGSTOP)
    (tmp_path / "frozen").touch()
    wait_until(lambda: ranks.codes()[other] is not None)
    ranks.signal(frozen, signal.SIGKILL)
    code, output = ranks.end()[other]
    assert code == 1
    assert f"error: rank {frozen} was lost at step " in output


def test_ranks_that_were_suspended_for_longer_blame_nobody_when_they_go_on(recipe_path: Path, tmp_path: Path) -> None:
    """As a scheduler or a laptop suspends them, one a moment longer than the other."""
    # Above any pause of a rank on a busy machine, and below the time that they are stopped.
    code = f"import ochat_train.training.stopping as w; w.LOST_AFTER_S = 10.0{SLOW}"
    ranks = start(recipe_path, tmp_path, "train.max_steps=6", "train.stall_timeout_s=10", code=code)
    ranks.wait_for(is_done(tmp_path, 2))
    for rank in (0, 1):
        ranks.signal(rank, signal.SIGSTOP)
    time.sleep(12)
    for rank in (1, 0):
        ranks.signal(rank, signal.SIGCONT)
        time.sleep(2)
    ended = ranks.end()
    assert [code for code, _ in ended] == [0, 0], ended


STALLED = """
import time, ochat_train.training.data as b
original, calls = b.make_batch, []
def make_batch(*arguments, **options):
    calls.append(1)
    if rank == 1 and len(calls) > 5:
        time.sleep(600)
    return original(*arguments, **options)
b.make_batch = make_batch
"""


def test_a_rank_that_stalls_is_named_and_shows_where_it_is(recipe_path: Path, tmp_path: Path) -> None:
    ranks = start(recipe_path, tmp_path, "train.stall_timeout_s=8", code=STALLED)
    (_, first), (_, second) = ranks.end()
    assert "error: rank 1 (host " in first and "got no further for 8 s" in first
    assert "(waiting for its batches)" in first
    assert "in make_batch" in second  # the stack of its threads
    assert ranks.codes() == [1, 1]


@pytest.mark.parametrize(("number", "rank"), [(signal.SIGUSR1, 1), (signal.SIGINT, 0)])
def test_a_signal_to_one_rank_finishes_the_step_saves_and_exits_with_75(
    recipe_path: Path, tmp_path: Path, number: signal.Signals, rank: int
) -> None:
    ranks = start(recipe_path, tmp_path, code=SLOW)
    ranks.wait_for(is_done(tmp_path, 2))
    ranks.signal(rank, number)
    ended = ranks.end()
    assert [code for code, _ in ended] == [75, 75], ended
    step = events(tmp_path, "step")[-1]["step"]
    assert f"stopped on request at step {step}" in ended[0][1]
    assert find_checkpoints(tmp_path)[-1].name == f"step-{step:08d}"


# Ctrl-C to rank 1 in the evaluation after STEP.
STOPPED_IN_EVALUATION = """
import os, signal, ochat_train.train as t, ochat_train.training.held_out as h
evaluate, is_any, step = t.Trainer.evaluate, h.is_any, None
def evaluate_and_note(trainer):
    global step
    step = trainer.state.step
    evaluate(trainer)
def signal_and_ask(*arguments):
    if rank == 1 and step == STEP:
        os.kill(os.getpid(), signal.SIGINT)
    return is_any(*arguments)
t.Trainer.evaluate, h.is_any = evaluate_and_note, signal_and_ask
"""


def test_an_evaluation_hears_a_stop_and_is_made_when_the_run_goes_on(recipe_path: Path, tmp_path: Path) -> None:
    held_out = [f"data.store={tmp_path / 'store'}", "data.eval_fraction=0.5"]
    preprocess(recipe_path, *held_out)
    run, options = tmp_path / "run", [*held_out, "eval.every_steps=2", "train.max_steps=3"]
    found = []
    for step in (0, 2, 3):
        ended = start(recipe_path, run, *options, code=STOPPED_IN_EVALUATION.replace("STEP", str(step))).end()
        assert f"step {step}: the evaluation was left on request; " in ended[0][1], ended
        evaluated = [event["step"] for event in events(run, "eval")]
        found.append(([code for code, _ in ended], evaluated, [path.name for path in find_checkpoints(run)]))
    assert found == [
        ([75, 75], [], []),  # before the first step: none was trained, and nothing was saved
        ([75, 75], [0], ["step-00000002"]),
        ([0, 0], [0, 2], ["step-00000002", "step-00000003"]),  # it was the last step, and the model is exported
    ]
    assert (run / "model").is_dir()
    assert f"ochat evaluate held-out {run / 'model'} {tmp_path / 'store'} does it" in ended[0][1]


def test_a_second_signal_ends_the_process_at_once(recipe_path: Path, tmp_path: Path) -> None:
    """While rank 1 is in a step that takes ten minutes."""
    began = tmp_path / "began"
    ranks = start(
        recipe_path,
        tmp_path / "run",
        code=SLOW.replace("0.3", f"600 if rank and not open({str(began)!r}, 'w').close() else 0"),
    )
    ranks.wait_for(began.exists)
    ranks.signal(1, signal.SIGTERM)
    time.sleep(2.2)
    assert ranks.codes()[1] is None

    def ends_when_asked_again() -> bool:
        if ranks.codes()[1] is None:
            ranks.signal(1, signal.SIGTERM)
        return ranks.codes()[1] is not None

    wait_until(ends_when_asked_again)
    code, output = ranks.end()[1]
    assert code == 128 + signal.SIGTERM
    assert "SIGTERM again: stopping at once" in output


POISONED = """
import ochat_train.train as t
fast = t.Trainer.train_one_step
def train_one_step(trainer, ready, *others, **options):
    if trainer.state.step + 1 in {STEPS} and rank == 1:
        weights = ready.made[0].loss_weights
        weights[weights.nonzero()[0]] = float("{VALUE}")
    return fast(trainer, ready, *others, **options)
t.Trainer.train_one_step = train_one_step
"""


def test_a_step_without_a_finite_gradient_is_left_out_and_counted(recipe_path: Path, tmp_path: Path) -> None:
    poisoned = POISONED.replace("{STEPS}", "(2, 3, 5)").replace("{VALUE}", "inf")
    kinds = {"1bf": ["model.dtype=bfloat16"], "0": [], "1": [], "2": [], "3": []}
    runs = [
        orjson.dumps([f"checkpoint.dir={tmp_path / kind}", f"zero.stage={kind[0]}", "train.max_steps=6", *options])
        for kind, options in kinds.items()
    ]
    arguments = [run.decode() for run in runs]
    ended = start_ranks("tests.e2e.several", str(recipe_path), *arguments, code=poisoned).end()
    assert [code for code, _ in ended] == [0, 0], ended
    for kind in kinds:
        steps = events(tmp_path / kind, "step")
        assert [step["skipped"] for step in steps] == [False, True, True, False, True, False], kind
        assert [step["grad_norm"] is None for step in steps] == [False, True, True, False, True, False]
        assert steps[-1]["skipped_steps"] == 3
        assert all(tensor.isfinite().all() for tensor in weights(tmp_path / kind).values())


def test_too_many_skipped_steps_in_a_row_stop_the_run_and_name_their_examples(
    recipe_path: Path, tmp_path: Path
) -> None:
    poisoned = POISONED.replace("{STEPS}", "(2, 3)").replace("{VALUE}", "nan")
    ended = start(recipe_path, tmp_path, "train.max_skipped=2", code=poisoned).end()
    assert [code for code, _ in ended] == [1, 1], ended
    assert ended[0][1].count("error: the gradients of 2 steps in a row") == 1
    assert "Traceback" not in ended[0][1] + ended[1][1]
    steps = orjson.loads((tmp_path / "skipped-steps.json").read_bytes())
    assert [step["step"] for step in steps] == [2, 3]
    for step in steps:
        culprit, *others = step["micro_batches"]
        assert (culprit["rank"], culprit["number"], culprit["is_loss_finite"]) == (1, 1, False)
        assert culprit["examples"]
        assert len(others) == 3 and all(other["is_loss_finite"] for other in others)


def test_memory_that_runs_out_is_told_with_the_size_of_the_micro_batch(recipe_path: Path, tmp_path: Path) -> None:
    """A real failure of the CPU's allocator, under a limit of address space that is set once training runs."""
    limited = "import resource, psutil" + SLOW.replace(
        "time.sleep(0.3)",
        "rank and resource.setrlimit(resource.RLIMIT_AS, [psutil.Process().memory_info().vms + 2**20] * 2)",
    )
    (_, first), (code, second) = start(recipe_path, tmp_path, "packing.tokens_per_gpu=12000", code=limited).end()
    assert code == 1
    assert "error: rank 1 ran out of memory in micro-batch 1 of 2: " in second
    assert "Lower packing.tokens_per_gpu" in second
    assert "error: rank 1 was lost at step 1" in first


def test_two_runs_in_one_folder_are_refused(recipe_path: Path, tmp_path: Path) -> None:
    run, go = tmp_path / "run", tmp_path / "go"
    waiting = SLOW.replace(
        "time.sleep(0.3)", f"[time.sleep(0.1) for _ in iter(lambda: os.path.exists({str(go)!r}), True)]"
    )
    first = start(recipe_path, run, "train.max_steps=2", code=waiting)
    first.wait_for((run / "metrics.jsonl").exists)
    second = start(recipe_path, run).end()
    go.touch()
    assert [code for code, _ in second] == [1, 1]
    assert f"another run trains in checkpoint.dir {run}" in second[0][1]
    assert str(first.pids[0]) in second[0][1]
    assert [code for code, _ in first.end()] == [0, 0]


@pytest.mark.parametrize("what", ["removed", "changed"])
def test_a_store_that_is_touched_during_training_stops_the_run(recipe_path: Path, tmp_path: Path, what: str) -> None:
    preprocess(recipe_path, f"data.store={tmp_path / 'store'}")
    ranks = start(recipe_path, tmp_path / "run", f"data.store={tmp_path / 'store'}", code=SLOW)
    ranks.wait_for(is_done(tmp_path / "run", 2))
    (file,) = (tmp_path / "store/train").glob("*.arrow")
    if what == "removed":
        file.unlink()
    else:
        os.utime(file)
    ended = ranks.end()
    assert [code for code, _ in ended] == [1, 1]
    # Said by each rank that meets it. The other may be in a step by then, and ends since that one is lost.
    said = [f"error: token store file {file} was {what} during training" in output for _, output in ended]
    lost = [f"error: rank {1 - rank} was lost" in output for rank, (_, output) in enumerate(ended)]
    assert any(said) and all(one or other for one, other in zip(said, lost, strict=True)), ended


def test_a_damaged_store_is_refused_in_one_line_before_anything_is_made_of_it(
    recipe_path: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    preprocess(recipe_path, f"data.store={store}")
    (file,) = (store / "train").glob("*.arrow")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 64  # in an id or a weight
    file.write_bytes(data)
    ended = start(recipe_path, tmp_path / "run", f"data.store={store}").end()
    assert [code for code, _ in ended] == [1, 1]
    (line,) = [line for _, output in ended for line in output.splitlines() if line.startswith("error: ")]
    assert f"token store {store} is damaged: train/{file.name} has other bytes than were written" in line
    assert not any("Traceback" in output for _, output in ended)
    os.truncate(file, len(data) // 2)
    ended = start(recipe_path, tmp_path / "run", f"data.store={store}", "data.verify=false").end()
    assert [code for code, _ in ended] == [1, 1]
    assert any(f"has {len(data) // 2:,} bytes, not {len(data):,}" in output for _, output in ended)
    assert not any("Traceback" in output for _, output in ended)


# As if something else had filled the disk since the run began, and, in the second, since the save began.
FILLED = "import ochat_train.training.setup as p; p.check_disk = lambda *arguments, **options: None"
FILLED_MEANWHILE = f"{FILLED}\nimport ochat_train.training.saving as s; s.free_bytes = lambda folder: 10**15"


@pytest.mark.parametrize(("code", "told"), [(FILLED, "it takes"), (FILLED_MEANWHILE, "deepspeed/")])
def test_a_full_disk_costs_a_save_and_nothing_else(recipe_path: Path, small_disk: Path, code: str, told: str) -> None:
    run, options = small_disk / "run", ["checkpoint.every_steps=2", "train.max_steps=4", "checkpoint.keep=1"]
    ended = start(recipe_path, run, *options, code=code).end()
    assert [code for code, _ in ended] == [1, 1], ended
    assert f"WARNING: step-00000004 was not saved: {told}" in ended[0][1]
    assert "error: step 4 is done, but could not be saved" in ended[0][1]
    assert "Traceback" not in ended[0][1] + ended[1][1]
    assert [path.name for path in run.glob("step-*")] == ["step-00000002"]
    assert [step["step"] for step in events(run, "step")] == [1, 2, 3, 4]
    subprocess.run(["mount", "-o", "remount,size=50m", str(small_disk)], check=True)
    ended = start(recipe_path, run, *options, code=FILLED).end()
    assert [code for code, _ in ended] == [0, 0], ended
    assert "continuing" in ended[0][1]
    assert find_checkpoints(run)[-1].name == "step-00000004"


def test_a_run_folder_that_is_too_small_or_read_only_is_refused_before_the_model_is_loaded(
    recipe_path: Path, small_disk: Path
) -> None:
    unloadable = "import ochat_train.training.setup as p; p.load_model = None"
    ended = start(recipe_path, small_disk / "run", code=unloadable).end()
    assert [code for code, _ in ended] == [1, 1]
    assert "error: checkpoint.dir lacks room: " in ended[0][1] and "5.0 MiB are free" in ended[0][1]
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    ended = start(recipe_path, small_disk / "run", code=f"{FILLED}\n{unloadable}").end()
    assert [code for code, _ in ended] == [1, 1]
    assert f"error: checkpoint.dir {small_disk / 'run'} cannot be written to (Read-only file system)" in ended[0][1]


@pytest.mark.parametrize(
    "code", [FILLED, f"{FILLED}\nimport ochat_train.training.resources as d; d.free_bytes = lambda f: 10**15"]
)
def test_a_model_that_does_not_fit_the_disk_is_written_by_the_same_command_when_there_is_room(
    recipe_path: Path, small_disk: Path, code: str
) -> None:
    """Seen before it is written, or while it is."""
    subprocess.run(["mount", "-o", "remount,size=4000k", str(small_disk)], check=True)
    run, options = small_disk / "run", ["train.max_steps=1", "checkpoint.keep=1"]
    ended = start(recipe_path, run, *options, code=code).end()
    assert [code for code, _ in ended] == [1, 0], ended
    told = f"error: training has ended, but {run / 'model'} was not written: No space left on device: "
    assert f"{told}{run / 'model.partial'} takes 0.8 MiB, and " in ended[0][1] and "Traceback" not in ended[0][1]
    assert sorted(path.name for path in run.iterdir()) == ["lock", "metrics.jsonl", "step-00000001"]
    subprocess.run(["mount", "-o", "remount,size=50m", str(small_disk)], check=True)
    ended = start(recipe_path, run, *options, code=FILLED).end()
    assert [code for code, _ in ended] == [0, 0], ended
    assert (run / "model/model.safetensors").is_file() and not (run / "model.partial").exists()
