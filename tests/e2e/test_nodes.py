"""Two hosts train as one does. They are two network namespaces of this machine, and share its files."""

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.e2e.harness import (
    await_steps,
    events,
    launch_environment,
    preprocess,
    start_launch,
    tiny_recipe,
    train_several,
    weights,
    write_dump,
)
from tests.waiting import HANG_S

# Addresses of a test network that no real one uses (RFC 5737), and the interface that both hosts see.
ADDRESSES = ("192.0.2.1", "192.0.2.2")
INTERFACE = "cable"
# What the second host makes can be written to by everybody: so a file's mode tells who made it.
UMASKS = ("0022", "0000")
OF_SECOND_RANK = re.compile(r"rank_1_|-00001\b")


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[str, str]]:
    """The names of two network namespaces with a cable between them and nothing else."""
    if shutil.which("ip") is None:
        pytest.skip("needs the command ip, of iproute2")
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
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs the right to make network namespaces: ip {' '.join(arguments)}: {done.stderr.strip()}")


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nodes")
    write_dump(folder, 80)
    path = tiny_recipe(folder, zero={"stage": 2}, train={"epochs": 8, "seed": 3})
    preprocess(path)
    return path


@dataclass(frozen=True, slots=True)
class Stopped:
    """A run on two hosts that was asked to stop: its folder, the step where it did, what launch.sh printed."""

    run: Path
    step: int
    output: str


# gloo takes the network of the host's name, which is not the cable.
VARIABLES = {"GLOO_SOCKET_IFNAME": INTERFACE, "NUM_GPUS": "1"}


@pytest.fixture(scope="module")
def slurm(recipe_path: Path, hosts: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    """`launch.sh` in a Slurm allocation of two hosts, and Slurm's warning after two steps.

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
    environment = launch_environment(**VARIABLES, SLURM_JOB_NUM_NODES="2", SLURM_JOB_NODELIST="hosts")
    environment["PATH"] = f"{commands}{os.pathsep}{environment['PATH']}"
    overrides = ["checkpoint.every_steps=1", f"checkpoint.dir={run}"]  # a save lets a step take its time
    process = start_launch(recipe_path, *overrides, environment=environment)
    await_steps(run, 2, process)
    process.send_signal(signal.SIGUSR1)
    output = process.communicate(timeout=HANG_S)[0]
    assert process.returncode == 75, output
    return Stopped(run, events(run, "step")[-1]["step"], output)


@pytest.fixture(scope="module")
def one_host(recipe_path: Path, slurm: Stopped, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two run folders of two processes on one host, two steps further than where the two hosts stopped.

    The first is begun there, the second continues the checkpoint of the two hosts.
    """
    begun, continued = tmp_path_factory.mktemp("one_host"), tmp_path_factory.mktemp("continued")
    shutil.copytree(slurm.run, continued, dirs_exist_ok=True)
    max_steps = f"train.max_steps={slurm.step + 2}"
    output = train_several(recipe_path, *([max_steps, f"checkpoint.dir={run}"] for run in (begun, continued)))
    assert output.count("continuing") == 1
    return begun, continued


def _losses(run: Path) -> list[tuple[int, float, float]]:
    return [(event["step"], event["loss"], event["grad_norm"]) for event in events(run, "step")]


def _assert_same_run(run: Path, other: Path) -> None:
    """Bitwise: each sum over the processes has two terms, which have no order, whatever lies between them."""
    assert _losses(run) == _losses(other)
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_two_hosts_of_a_slurm_allocation_train_as_one_host_does(slurm: Stopped, one_host: tuple[Path, Path]) -> None:
    assert _losses(slurm.run) == _losses(one_host[0])[: slurm.step]
    assert {event["num_processes"] for event in events(slurm.run, "step")} == {2}
    for once in ("is up to date", "attention backend", "finishing the step and saving"):
        assert slurm.output.count(once) == 1, once


def test_only_the_first_host_writes_what_is_not_a_rank_s_own(slurm: Stopped) -> None:
    files = [path for path in slurm.run.rglob("*") if path.is_file()]
    of_second = {path for path in files if path.stat().st_mode & 0o002}
    assert {path for path in files if OF_SECOND_RANK.search(path.name)} == of_second != set()


def test_a_checkpoint_of_two_hosts_continues_on_one(one_host: tuple[Path, Path]) -> None:
    begun, continued = one_host
    _assert_same_run(continued, begun)
