"""launch.sh and ochat_train.launch: what they start in which order, on which nodes, and what signals and crashes do.

`python3`, `srun` and `scontrol` are small scripts here, so that only the launch itself runs; the real commands run in
tests/e2e.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pytest
import yaml

from ochat_train.launch import steps
from ochat_train.recipe import load_recipe, to_json
from tests.waiting import HANG_S, wait_until

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch.sh"

# Notes every command. What takes long is a script that the test wrote; the rest answers as the real commands do.
PYTHON = """#!/usr/bin/env bash
case "$*" in "-m ochat_train.launch"*) exec "$REAL_PYTHON" "$HERE/launch.py" "$0" "${@:2}" ;; esac
printf '%s\\n' "$*" >>"$HERE/calls"
case "$*" in
  *importlib.metadata*) [[ $* =~ \\'(.*)\\' ]]; grep -qx -- "${BASH_REMATCH[1]}" "$HERE/installed" ;;
  *"import gpus"*) [ ! -e "$HERE/gpus" ] || { cat "$HERE/gpus" >&2; exit 1; }; echo 0 ;;
  "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  "-m ochat_train.preprocess "*) exec bash "$HERE/preprocess" ;;
  "-m deepspeed.launcher.runner "*) exec bash "$HERE/train" "$@" ;;
esac
"""
# A module of the launch under the Python that runs the tests, which takes the script above for Python.
LAUNCH_MODULE = """
import os, runpy, sys
sys.executable, *sys.argv = sys.argv[1:]
from ochat_train.launch import nodes, restarts
nodes.free_port = lambda: 4321
restarts.PAUSE_S = float(os.environ["PAUSE_S"])
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
# HERE stands for the folder of the test.
RECIPE: dict[str, Any] = {
    "name": "stub",
    "data": {"store": "store", "sources": [{"name": "a", "path": "a.json", "condition": "GPT4"}]},
    "template": "openchat_v3.2",
    "model": {"base": "base"},
    "packing": {"tokens_per_gpu": 4096},
    "optim": {"lr": 1e-5},
    "train": {"epochs": 1},
}
PORT = 4321  # that the launch finds free
HOLD = f"""printf '{{"host":"%s","pid":%s,"launch":%s,"port":"%s"}}' "$(uname -n)" "$$" \\"$OCHAT_LAUNCH\\" {PORT} \
 >"$HERE/run/lock"\n"""
# In naps, since bash hears a signal only between them; so long that a launch that waits for its end hangs.
WAIT = "echo ready; for i in $(seq 36000); do sleep 0.1; done; exit 3\n"


@dataclass(frozen=True, slots=True)
class Bench:
    """A folder with the commands that launch.sh finds, and what they play."""

    here: Path

    def script(self, name: str, text: str) -> None:
        """What `preprocess` or `train` does, in bash."""
        (self.here / name).write_text(text)

    def write_recipe(self, **sections: Any) -> None:
        """The stub's recipe, with other sections in place of its own."""
        recipe = RECIPE | {"checkpoint": {"dir": str(self.here / "run")}} | sections
        (self.here / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    def command(self, name: str, text: str) -> None:
        """A command on the PATH."""
        path = self.here / "bin" / name
        path.write_text(text)
        path.chmod(0o755)

    def start(self, *arguments: str, script: Path = LAUNCH, **variables: str) -> subprocess.Popen[str]:
        """launch.sh in a process group of its own, as a terminal starts it."""
        # MASTER_ADDR and its like: another test of this process may have joined a process group.
        others = ("SLURM_", "MASTER_")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(others)}
        own = {
            "PATH": f"{self.here / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "REAL_PYTHON": sys.executable,
            "HERE": str(self.here),
            "PAUSE_S": "0",
        }
        return subprocess.Popen(
            [script, self.here / "recipe.yaml", *arguments],
            cwd=self.here,
            env=inherited | own | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def launch(self, *arguments: str, **variables: str) -> tuple[int, str]:
        """Exit code and output of launch.sh."""
        process = self.start(*arguments, script=LAUNCH, **variables)
        output = process.communicate(timeout=HANG_S)[0]
        return process.returncode, output

    def calls(self) -> list[str]:
        """What was called, without the questions to Python."""
        lines = (self.here / "calls").read_text().splitlines()
        return [line.removeprefix("-m ") for line in lines if "import " not in line]

    def num_tries(self) -> int:
        """How often training was started."""
        return sum(call.startswith("deepspeed.launcher.runner") for call in self.calls())


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    made = Bench(tmp_path)
    for folder in ("bin", "run"):
        (tmp_path / folder).mkdir()
    made.command("python3", PYTHON)
    made.script("preprocess", "")
    made.script("train", "")
    (tmp_path / "installed").write_text("ochat_train\n")
    (tmp_path / "launch.py").write_text(LAUNCH_MODULE)
    made.write_recipe()
    return made


def read_until(process: subprocess.Popen[str], word: str) -> str:
    """What the process printed up to the line with `word`."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if word in line:
            break
    assert lines and word in lines[-1], "".join(lines)
    return "".join(lines)


# ---- What is called ----


def test_a_recipe_is_preprocessed_examined_trained_and_reported_with_the_same_arguments(bench: Bench) -> None:
    code, _ = bench.launch("name=1 2", NUM_GPUS="3")
    recipe = bench.here / "recipe.yaml"
    assert code == 0
    assert bench.calls() == [
        f"ochat_train.preprocess {recipe} name=1 2",
        f"ochat_train.doctor --quick {recipe} name=1 2",
        "deepspeed.launcher.runner --log_level critical --num_gpus 3 --master_port 4321 "
        f"--module ochat_train.train {recipe} name=1 2",
        f"ochat_train.report run {bench.here / 'run'}",
    ]


def test_a_recipe_that_was_examined_is_only_trained_and_reported(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.write_recipe()
    called: list[str] = []

    class Noted:
        def __init__(self, run_dir: Path) -> None: ...

        def require(self, module: list[str]) -> None:
            called.append(module[0])

    monkeypatch.setattr(steps, "Commands", Noted)
    monkeypatch.setattr(steps, "training_command", lambda *_: None)  # it sets variables of this process
    monkeypatch.setattr(steps, "train_with_restarts", lambda *_: called.append("train") or 0)
    steps.launch([str(bench.here / "recipe.yaml")], is_examined=True)
    assert called == ["train", "ochat_train.report"]


def test_nothing_is_trained_when_preprocessing_fails(bench: Bench) -> None:
    bench.script("preprocess", "exit 5")
    assert bench.launch()[0] == 5
    assert bench.num_tries() == 0


@pytest.mark.parametrize(
    ("sections", "overrides", "extras"),
    [
        ({"model": {"base": "model.gguf"}}, [], "[gguf]"),
        ({"model": {"base": "base", "lora": {"rank": 8}}}, [], "[lora]"),
        ({"model": {"base": "explorabase"}}, ["model.lora.rank=8", "log.tensorboard=true"], "[lora,tensorboard]"),
        ({"log": {"tensorboard": True}}, ["model.base=model.gguf", "model.lora.rank=8"], "[gguf,lora,tensorboard]"),
        ({"optim": {"lr": 1e-5, "algorithm": "adamw_8bit"}}, [], "[adam8bit]"),
        ({"log": {"tensorboard": False}}, [], ""),
    ],
)
def test_the_extras_that_a_recipe_needs_are_installed_together(
    bench: Bench, sections: dict[str, Any], overrides: list[str], extras: str
) -> None:
    root = bench.here / "clone"
    root.mkdir()
    for name in ("launch.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, root / name)
    bench.write_recipe(**sections)
    (bench.here / "installed").write_text("")
    process = bench.start(*overrides, script=root / "launch.sh")
    assert f"installing ochat_train{extras} into .venv\n" in process.communicate(timeout=HANG_S)[0]
    assert process.returncode == 0
    (install,) = (call for call in bench.calls() if call.startswith("pip install"))
    assert install.endswith(f"-e {root}{extras}")


def test_the_extra_gpu_is_installed_with_an_nvidia_gpu_into_an_environment_that_is_made_here(bench: Bench) -> None:
    bench.command("nvidia-smi", "#!/bin/sh\necho 'GPU 0: NVIDIA A100'\n")
    assert "it lacks liger-kernel" in bench.launch()[1]
    assert "using the current environment" in bench.launch(DS_ACCELERATOR="cpu")[1]
    (bench.here / "installed").write_text("")
    root = bench.here / "clone"
    root.mkdir()
    for name in ("launch.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, root / name)
    assert (
        "installing ochat_train[lora,gpu] into"
        in bench.start("model.lora.rank=8", script=root / "launch.sh").communicate(timeout=HANG_S)[0]
    )


def test_gpus_that_torch_cannot_use_end_the_launch_before_it_preprocesses(bench: Bench) -> None:
    (bench.here / "gpus").write_text("this machine has 8 NVIDIA GPU(s), update the driver\n")
    code, output = bench.launch()
    assert code == 1 and output.endswith("launch: this machine has 8 NVIDIA GPU(s), update the driver\n")
    assert bench.calls() == []


def test_an_environment_that_has_the_extras_is_left_as_it_is(bench: Bench) -> None:
    (bench.here / "installed").write_text("ochat_train\npeft\n")
    assert "using the current environment" in bench.launch("model.lora.rank=8")[1]


# ---- What is said of a command that is not understood ----


def bare(*arguments: str, cwd: Path) -> tuple[int, str, str]:
    """Exit code, output and errors of launch.sh with these arguments alone."""
    process = subprocess.run([LAUNCH, *arguments], cwd=cwd, capture_output=True, text=True, timeout=HANG_S)
    return process.returncode, process.stdout, process.stderr


def test_help_names_commands_steps_and_variables(tmp_path: Path) -> None:
    code, told, errors = bare("--help", cwd=tmp_path)
    assert (code, errors) == (0, "")
    for words in (
        "./launch.sh RECIPE [key=value ...]",
        "./launch.sh test",
        "source .venv/bin/activate",
        "exit code 75",
    ):
        assert words in told
    sources = "".join(path.read_text() for path in (ROOT / "ochat_train/launch").glob("*.py"))
    variables = set(re.findall(r"\.get\(\"([A-Z_]+)\"\)", sources))
    assert variables and variables <= set(re.findall(r"[A-Z_]+", told))
    assert bare("-h", cwd=tmp_path) == bare("recipe.yaml", "a=1", "--help", cwd=tmp_path) == (0, told, "")
    assert bare(cwd=tmp_path) == (1, "", told)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none.yaml"], "no recipe at none.yaml in {here}; name a YAML file such as recipes/quickstart.yaml"),
        ([""], "./launch.sh RECIPE"),
        (["."], ". is a folder; name a recipe, a YAML file such as recipes/quickstart.yaml"),
        (["--quick"], "--quick is no option; see ./launch.sh --help"),
        (["recipe.yaml", "--quick"], "--quick is not of the form key=value, such as optim.lr=1e-5"),
        (["recipe.yaml", "--optim.lr=1"], "--optim.lr=1 is not of the form key=value"),
        (["recipe.yaml", "a=1", "optim.lr"], "optim.lr is not of the form key=value"),
        (["recipe.yaml", "=1"], "=1 is not of the form key=value"),
        (["recipe.yaml", ""], " is not of the form key=value"),
    ],
)
def test_a_wrong_command_is_refused_before_anything_is_installed(
    bench: Bench, arguments: list[str], words: str
) -> None:
    code, told, errors = bare(*arguments, cwd=bench.here)
    assert (code, told) == (1, "")
    assert words.format(here=bench.here) in errors
    assert not (bench.here / "calls").exists()


# ---- Signals ----


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_reaches_training_as_sigusr1_alone_and_its_75_is_passed_on(
    bench: Bench, number: signal.Signals
) -> None:
    traps = "".join(f"trap 'echo got {name}; exit 75' {name}\n" for name in ("INT", "TERM", "USR1", "HUP"))
    bench.script("train", HOLD + traps + WAIT)
    process = bench.start(MAX_RESTARTS="3")
    read_until(process, "ready")
    os.killpg(process.pid, number)  # as a terminal does: all processes of the foreground
    output = process.communicate(timeout=HANG_S)[0]
    assert process.returncode == 75
    assert "finishing the step and saving; press Ctrl-C again to stop at once" in output
    assert [line for line in output.splitlines() if line.startswith("got")] == ["got USR1"]
    assert bench.num_tries() == 1
    assert not bench.calls()[-1].startswith("ochat_train.report")


def test_a_second_signal_kills_all_that_training_started(bench: Bench) -> None:
    bench.script("train", HOLD + "trap 'echo asked' USR1\n(echo $BASHPID >$HERE/helper; exec sleep 3600) &\n" + WAIT)
    process = bench.start(MAX_RESTARTS="3")
    read_until(process, "ready")
    wait_until(lambda: (bench.here / "helper").is_file())  # written beside what prints "ready"
    os.killpg(process.pid, signal.SIGINT)
    read_until(process, "asked")
    os.killpg(process.pid, signal.SIGINT)
    assert "stopping at once" in process.communicate(timeout=HANG_S)[0]
    assert process.returncode == 128 + signal.SIGKILL
    assert bench.num_tries() == 1
    helper = int((bench.here / "helper").read_text())
    wait_until(lambda: not is_running(helper))


def is_running(pid: int) -> bool:
    """Whether the process does anything; a killed one that nobody waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("phase", ["preprocess", "train"])
def test_a_signal_before_training_holds_the_folder_just_stops(bench: Bench, phase: str) -> None:
    bench.script(phase, "trap 'echo got USR1' USR1\n" + WAIT)
    process = bench.start(MAX_RESTARTS="3")
    read_until(process, "ready")
    os.killpg(process.pid, signal.SIGINT)
    output = process.communicate(timeout=HANG_S)[0]
    assert process.returncode == 75
    assert "got USR1" not in output
    assert bench.num_tries() == (phase == "train")


def test_a_signal_that_ends_the_main_process_while_it_loads_is_a_stop(bench: Bench) -> None:
    """DeepSpeed's launcher ends with the number of a signal, negative, which a shell sees as 256 - 10."""
    bench.script("train", HOLD + "trap 'exit 246' USR1\n" + WAIT)
    process = bench.start(MAX_RESTARTS="3")
    read_until(process, "ready")
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=HANG_S)
    assert (process.returncode, bench.num_tries()) == (75, 1)


def test_a_signal_does_not_reach_another_run_in_the_same_folder(bench: Bench) -> None:
    other = subprocess.Popen(["sleep", "3600"])
    try:
        host = os.uname().nodename
        (bench.here / "run/lock").write_text(f'{{"host":"{host}","pid":{other.pid},"started":"before"}}')
        bench.script("train", WAIT)
        process = bench.start()
        read_until(process, "ready")
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=HANG_S)
        assert process.returncode == 75
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


@pytest.mark.parametrize(
    ("launch", "port"), [('\\"another\\"', PORT), ("null", 5678)], ids=["on the same port", "reached by ssh"]
)
def test_a_run_that_took_the_folder_first_outlives_the_launch_that_it_refuses(
    bench: Bench, launch: str, port: int
) -> None:
    """It takes it after the launch has looked whether there is a run."""
    bench.script("other", HOLD.replace('\\"$OCHAT_LAUNCH\\"', launch).replace(f"{PORT}", f"{port}") + WAIT)
    start = 'setsid bash "$HERE/other" >/dev/null 2>&1 &'
    bench.script("train", start + ' until [ -s "$HERE/run/lock" ]; do sleep 0.1; done; exit 1')
    code, output = bench.launch()
    running = orjson.loads((bench.here / "run/lock").read_bytes())["pid"]
    try:
        assert code == 1 and "left training running" not in output
        assert is_running(running)
    finally:
        os.killpg(running, signal.SIGKILL)


def test_a_main_process_on_another_host_is_named(bench: Bench) -> None:
    bench.script("train", HOLD.replace('"$(uname -n)"', "elsewhere") + WAIT)
    process = bench.start()
    read_until(process, "ready")
    os.killpg(process.pid, signal.SIGINT)
    assert "on elsewhere cannot be reached from here" in read_until(process, "again to stop at once")
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=HANG_S)
    assert process.returncode == 128 + signal.SIGKILL


# ---- Crashes ----


def crashes(*steps: int | None) -> str:
    """Training whose tries crash one after the other after a checkpoint of each step, or of none."""
    tries = " ".join("none" if step is None else f"{step:08d}" for step in steps)
    return f"""
      steps=({tries}) try=$(cat $HERE/try 2>/dev/null || echo 0)
      echo $((try + 1)) >$HERE/try
      [ $try -lt ${{#steps[@]}} ] || exit 0
      step=${{steps[$try]}}
      mkdir -p $HERE/run/step-00000900.partial && touch $HERE/run/step-00000900.partial/checkpoint.json
      [ $step = none ] || {{ mkdir -p $HERE/run/step-$step && touch $HERE/run/step-$step/checkpoint.json; }}
      exit 9
    """


def test_a_crash_ends_the_launch_with_its_code_unless_restarts_are_asked_for(bench: Bench) -> None:
    bench.script("train", crashes(8))
    code, output = bench.launch()
    assert (code, bench.num_tries()) == (9, 1)
    assert "launch: training ended with exit code 9" in output and "restart" not in output


def test_after_a_crash_training_starts_again_and_is_reported_at_its_end(bench: Bench) -> None:
    bench.script("train", crashes(8, None, 19))
    code, output = bench.launch(MAX_RESTARTS="3")
    assert (code, bench.num_tries()) == (0, 4)
    assert "exit code 9; the newest checkpoint is of step 8, before this try it was 0" in output
    assert "exit code 9; the newest checkpoint is of step 8, before this try it was 8" in output
    assert "exit code 9; the newest checkpoint is of step 19, before this try it was 8" in output
    assert [f"restart {number} of at most 3 in " in output for number in (1, 2, 3, 4)] == [1, 1, 1, 0]
    assert bench.calls()[-1].startswith("ochat_train.report run")


def test_two_tries_without_a_new_checkpoint_are_the_end(bench: Bench) -> None:
    bench.script("train", crashes(4, None, 3, None, None, 6))  # 3: it goes on from an older one, and another way
    code, output = bench.launch(MAX_RESTARTS="9")
    assert (code, bench.num_tries()) == (9, 5)
    assert "giving up: two tries in a row made no checkpoint" in output


def test_no_more_restarts_are_made_than_asked_for(bench: Bench) -> None:
    bench.script("train", crashes(1, 2, 3, 4, 5))
    code, output = bench.launch(MAX_RESTARTS="2")
    assert (code, bench.num_tries()) == (9, 3)
    assert "giving up after MAX_RESTARTS=2" in output


def test_a_signal_in_the_pause_before_a_restart_stops(bench: Bench) -> None:
    bench.script("train", HOLD + crashes(1, 2))
    process = bench.start(MAX_RESTARTS="5", PAUSE_S="3600")
    read_until(process, "in 3600.0 seconds")
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=HANG_S)
    assert process.returncode == 75
    assert bench.num_tries() == 1


def test_training_that_a_killed_launcher_left_behind_is_killed_and_counts_as_a_crash(bench: Bench) -> None:
    """DeepSpeed's launcher tells 0 when its inner half is killed."""
    bench.script("rank", HOLD + WAIT)
    bench.script("train", 'bash "$HERE/rank" & until [ -s "$HERE/run/lock" ]; do sleep 0.1; done')
    code, output = bench.launch()
    assert code == 1
    assert "left training running" in output
    rank = orjson.loads((bench.here / "run/lock").read_bytes())["pid"]
    wait_until(lambda: not is_running(rank))


def test_restarts_that_are_no_number_are_refused(bench: Bench) -> None:
    code, output = bench.launch(MAX_RESTARTS="some")
    assert code == 1 and "MAX_RESTARTS=some is not a number of restarts" in output


# ---- A run that is there ----


def test_a_resume_that_would_be_refused_is_refused_before_the_store_is_made_anew(bench: Bench) -> None:
    source = RECIPE["data"]["sources"][0]
    recipe = load_recipe(bench.here / "recipe.yaml", [])
    (bench.here / "run/step-00000007").mkdir(parents=True)
    manifest = orjson.dumps({"state": {"recipe": to_json(recipe)}})
    (bench.here / "run/step-00000007/checkpoint.json").write_bytes(manifest)
    bench.write_recipe(data=RECIPE["data"] | {"sources": [source | {"weight": 0.5, "path": "moved.json"}]})
    code, output = bench.launch()
    assert code == 1 and "preprocess" not in (bench.here / "calls").read_text()
    assert "step-00000007, because this differs (was -> is):\n  data.sources.0.weight: 1.0 -> 0.5\nGo back" in output
    for remedy in ("data.sources.0.weight=1.0", f"checkpoint.dir={bench.here / 'other'}"):
        assert bench.launch(remedy)[0] == 0


# ---- Nodes ----


def write_hosts(bench: Bench) -> str:
    path = bench.here / "hosts"
    path.write_text("# first the one that saves\n\n10.0.0.1 slots=4\n127.0.0.1 slots=4\n")
    return str(path)


def launcher_options(call: str) -> str:
    return call.removeprefix("deepspeed.launcher.runner --log_level critical ").partition(" --module")[0]


def test_a_hostfile_alone_leaves_the_other_hosts_to_the_launcher(bench: Bench) -> None:
    hosts = write_hosts(bench)
    assert bench.launch(HOSTFILE=hosts)[0] == 0
    assert launcher_options(bench.calls()[2]) == f"--hostfile {hosts} --master_port 4321"


def test_the_first_of_nodes_that_are_started_by_hand_prepares_and_reports(bench: Bench) -> None:
    hosts = write_hosts(bench)
    assert bench.launch(HOSTFILE=hosts, NODE_RANK="0")[0] == 0
    assert [call.split()[0].rpartition(".")[2] for call in bench.calls()] == [
        *("preprocess", "doctor", "runner", "report")
    ]
    expected = f"--hostfile {hosts} --no_ssh --node_rank 0 --master_addr 10.0.0.1 --master_port 29500"
    assert launcher_options(bench.calls()[2]) == expected


def test_another_node_waits_for_the_first_and_only_trains(bench: Bench) -> None:
    with socket.socket() as first:
        first.bind(("127.0.0.1", 0))
        port = str(first.getsockname()[1])
        variables = {"HOSTFILE": write_hosts(bench), "NODE_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        process = bench.start(script=LAUNCH, **variables)
        read_until(process, f"waiting until the first node has prepared the data and listens on 127.0.0.1:{port}")
        time.sleep(0.5)
        assert bench.num_tries() == 0
        first.listen()
        process.communicate(timeout=HANG_S)
    assert process.returncode == 0
    assert [call.split()[0] for call in bench.calls()] == ["deepspeed.launcher.runner"]
    assert "--node_rank 1 --master_addr 127.0.0.1" in bench.calls()[0]


def test_a_node_without_a_hostfile_is_refused(bench: Bench) -> None:
    code, output = bench.launch(NODE_RANK="1")
    assert code == 1 and "set HOSTFILE too" in output


SLURM = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[07,11]"}
# Not Slurm: what launch.sh uses of it, on this machine.
SCONTROL = """#!/usr/bin/env bash
[ "$*" = "show hostnames node[07,11]" ] && printf 'node07\\nnode11\\n'
"""
SRUN = """#!/usr/bin/env bash
echo "srun $*" | head -1 >>"$HERE/srun"
while [[ $1 == --* ]]; do shift; done
SLURM_NODEID=0 "$@" & first=$!
SLURM_NODEID=1 "$@" & second=$!
wait $first; codes=$?
wait $second; code=$?
exit $((code > codes ? code : codes))
"""


def test_in_a_slurm_allocation_srun_starts_one_launcher_on_each_node(bench: Bench) -> None:
    bench.command("scontrol", SCONTROL)
    bench.command("srun", SRUN)
    bench.script("train", 'while [ "$1" != --hostfile ]; do shift; done; cat "$2" >>"$HERE/hosts-$RANDOM$RANDOM"')
    assert bench.launch(**SLURM, NUM_GPUS="8")[0] == 0
    options = (bench.here / "srun").read_text().split(" -m ochat_train")[0]
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1"} <= set(options.split())
    called = [call.split()[0].rpartition(".")[2] for call in bench.calls()]
    assert called == ["preprocess", "doctor", "runner", "runner", "report"]
    for rank, call in enumerate(sorted(bench.calls()[2:4])):
        assert f"runner --no_ssh --node_rank {rank} --hostfile " in call
        assert "--num_gpus 8 --master_addr node07 --master_port 4321 --module ochat_train.train" in call
    assert [path.read_text() for path in bench.here.glob("hosts-*")] == ["node07 slots=8\nnode11 slots=8\n"] * 2
    hostfiles = [call.split(" --hostfile ")[1].split()[0] for call in bench.calls()[2:4]]
    assert not any(Path(path).exists() for path in hostfiles)


def test_hosts_that_slurm_does_not_name_are_refused_with_its_reason(bench: Bench) -> None:
    bench.command("scontrol", "#!/usr/bin/env bash\necho 'no controller answers' >&2\nexit 1\n")
    code, output = bench.launch(**SLURM)
    assert (code, bench.num_tries()) == (1, 0)
    assert "launch: the hosts of this Slurm job are not known: scontrol show hostnames node[07,11]: no con" in output


def test_without_scontrol_the_hosts_may_be_named_in_a_file(bench: Bench) -> None:
    code, output = bench.launch(**SLURM)
    assert code == 1
    assert "scontrol is not on the PATH: add Slurm's folder of commands to it, or name the hosts in HOSTFILE" in output
    assert bench.launch(**SLURM, HOSTFILE=write_hosts(bench))[0] == 0


def test_the_75_of_the_nodes_is_passed_on_and_a_crash_of_one_is_a_crash(bench: Bench) -> None:
    bench.command("scontrol", SCONTROL)
    bench.command("srun", SRUN)
    bench.script("train", "exit 75")
    assert bench.launch(**SLURM)[0] == 75
    bench.script("train", "exit $((SLURM_NODEID * 7))")
    assert bench.launch(**SLURM)[0] == 7


def test_the_batch_script_of_the_docs_queues_itself_again_when_its_time_is_up(bench: Bench) -> None:
    (script,) = re.findall(r"^```bash\n(#!.*?)^```", (ROOT / "docs/nodes.md").read_text(), re.MULTILINE | re.DOTALL)
    bench.command("scontrol", SCONTROL + 'echo "scontrol $*" >>"$HERE/calls"\n')
    bench.command("srun", SRUN)
    shutil.copy(bench.here / "recipe.yaml", bench.here / "my_recipe.yaml")
    (bench.here / "batch").write_text(script)
    (bench.here / "batch").chmod(0o755)
    (bench.here / "launch.sh").write_text(f'#!/usr/bin/env bash\nexec {LAUNCH} "$@"\n')
    (bench.here / "launch.sh").chmod(0o755)
    # The main process is asked, and the other one agrees.
    main = HOLD + "trap 'touch $HERE/agreed; exit 75' USR1\n" + WAIT
    other = "until [ -e $HERE/agreed ]; do sleep 0.1; done; exit 75"
    bench.script("train", f"if [ $SLURM_NODEID = 0 ]; then\n{main}else\n{other}\nfi\n")
    process = bench.start(script=bench.here / "batch", **SLURM, SLURM_JOB_ID="17")
    read_until(process, "ready")
    process.send_signal(signal.SIGUSR1)  # to the batch script alone, as Slurm does
    output = process.communicate(timeout=HANG_S)[0]
    assert process.returncode == 75, output
    assert "finishing the step and saving" in output
    assert bench.calls()[-1] == "scontrol requeue 17"


def test_an_allocation_of_one_node_needs_no_srun(bench: Bench) -> None:
    assert bench.launch(SLURM_JOB_NUM_NODES="1", SLURM_JOB_NODELIST="node07")[0] == 0
    assert launcher_options(bench.calls()[2]) == "--num_gpus 2 --master_port 4321"


def test_launch_under_srun_is_refused(bench: Bench) -> None:
    code, output = bench.launch(**SLURM, SLURM_STEP_NUM_TASKS="2")
    assert code == 1 and "without srun" in output
