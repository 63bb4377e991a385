"""Two hosts train as one does. They are two network namespaces of this machine, and share its files."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ochat_train.training.checkpoint import find_checkpoints
from tests.e2e.harness import ENVIRONMENT, ROOT, events, free_port, preprocess, tiny_recipe, train, weights, write_dump

# Addresses of a test network that no real one uses (RFC 5737), and the interface that both hosts see.
ADDRESSES = ("192.0.2.1", "192.0.2.2")
INTERFACE = "cable"
# What the second host makes can be written to by everybody: so a file's mode tells who made it.
UMASKS = ("0022", "0000")
OF_SECOND_RANK = re.compile(r"rank_1_|-00001\b")


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[str, str]]:
    """The names of two network namespaces with a cable between them and nothing else."""
    names = (f"ochat-{os.getpid()}-0", f"ochat-{os.getpid()}-1")
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip(*f"link add {INTERFACE} netns {names[0]} type veth peer name {INTERFACE} netns {names[1]}".split())
        for name, address in zip(names, ADDRESSES, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
            for link in ("lo", INTERFACE):
                _ip("-n", name, "link", "set", link, "up")
        yield names
    finally:
        for name in names:
            left = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False).stdout
            for pid in left.split():  # of a test that failed
                os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    if shutil.which("ip") is None:
        pytest.skip("needs the command ip, of iproute2")
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs the right to make network namespaces: ip {' '.join(arguments)}: {done.stderr.strip()}")


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nodes")
    write_dump(folder, 80)
    path = tiny_recipe(folder, zero={"stage": 2})
    preprocess(path)
    return path


@pytest.fixture(scope="module")
def one_host(recipe_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of two processes on one host."""
    run = tmp_path_factory.mktemp("one_host")
    train(recipe_path, "train.max_steps=4", f"checkpoint.dir={run}")
    return run


def launch_environment(**variables: str) -> dict[str, str]:
    """What launch.sh finds: this Python, and the cable, which gloo does not find by the host's name."""
    here = Path(sys.executable).parent
    path = f"{here}{os.pathsep}{os.environ['PATH']}"
    inherited = {name: value for name, value in ENVIRONMENT.items() if not name.startswith("SLURM_")}
    return inherited | {"PATH": path, "GLOO_SOCKET_IFNAME": INTERFACE, "NUM_GPUS": "1"} | variables


@pytest.fixture(scope="module")
def slurm(recipe_path: Path, hosts: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run folder and the output of two steps on two hosts by `launch.sh` in a Slurm allocation.

    Slurm itself is not here: `scontrol` and `srun` are small scripts that name the two hosts and start a task on each.
    """
    run, commands = tmp_path_factory.mktemp("slurm"), tmp_path_factory.mktemp("bin")
    tasks = "".join(
        f'(umask {umask}; SLURM_NODEID={number} exec ip netns exec {host} "$@") & tasks+=($!)\n'
        for number, (host, umask) in enumerate(zip(hosts, UMASKS, strict=True))
    )
    scripts = {
        "scontrol": f"printf '%s\\n' {' '.join(ADDRESSES)}\n",
        "srun": "while [[ $1 == --* ]]; do shift; done\n"
        f"{tasks}"
        'highest=0\nfor task in "${tasks[@]}"; do\n  wait "$task"; code=$?\n'
        "  [ $code -le $highest ] || highest=$code\ndone\nexit $highest\n",
    }
    for name, text in scripts.items():
        (commands / name).write_text(f"#!/usr/bin/env bash\n{text}")
        (commands / name).chmod(0o755)
    environment = launch_environment(SLURM_JOB_NUM_NODES="2", SLURM_JOB_NODELIST="hosts")
    environment["PATH"] = f"{commands}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(
        ["./launch.sh", recipe_path, "train.max_steps=2", f"checkpoint.dir={run}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return run, done.stdout


def _losses(run: Path) -> list[tuple[int, float, float]]:
    return [(event["step"], event["loss"], event["grad_norm"]) for event in events(run, "step")]


def _assert_same_run(run: Path, other: Path) -> None:
    """Bitwise: each sum over the processes has two terms, which have no order, whatever lies between them."""
    assert _losses(run) == _losses(other)
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_two_hosts_of_a_slurm_allocation_train_as_one_host_does(slurm: tuple[Path, str], one_host: Path) -> None:
    run, output = slurm
    assert _losses(run) == _losses(one_host)[:2]
    assert {event["num_processes"] for event in events(run, "step")} == {2}
    for once in ("is up to date", "attention backend", "exported", "question: "):
        assert output.count(once) == 1, once


def test_only_the_first_host_writes_what_is_not_a_rank_s_own(slurm: tuple[Path, str]) -> None:
    files = [path for path in slurm[0].rglob("*") if path.is_file()]
    of_second = {path for path in files if path.stat().st_mode & 0o002}
    assert {path for path in files if OF_SECOND_RANK.search(path.name)} == of_second != set()


def test_nodes_that_are_started_by_hand_continue_as_one_host_does(
    slurm: tuple[Path, str], one_host: Path, recipe_path: Path, hosts: tuple[str, str], tmp_path: Path
) -> None:
    shutil.copytree(slurm[0], tmp_path / "run")
    (tmp_path / "hosts").write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    environment = launch_environment(HOSTFILE=str(tmp_path / "hosts"), MASTER_PORT=str(free_port()))
    processes = [
        subprocess.Popen(
            [
                "ip",
                "netns",
                "exec",
                host,
                "./launch.sh",
                recipe_path,
                "train.max_steps=4",
                f"checkpoint.dir={tmp_path / 'run'}",
            ],
            cwd=ROOT,
            env=environment | {"NODE_RANK": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number, host in enumerate(hosts)
    ]
    first, second = (process.communicate(timeout=300)[0] for process in processes)
    assert [process.returncode for process in processes] == [0, 0], first + second
    assert "continuing" in first and "question: " in first
    assert "waiting until the first node" in second and "question: " not in second
    _assert_same_run(tmp_path / "run", one_host)


def test_a_checkpoint_of_two_hosts_continues_on_one(
    slurm: tuple[Path, str], one_host: Path, recipe_path: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(slurm[0], run)
    assert "continuing" in train(recipe_path, "train.max_steps=4", f"checkpoint.dir={run}")
    assert [path.name for path in find_checkpoints(run)] == ["step-00000002", "step-00000004"]
    _assert_same_run(run, one_host)
