"""Where training runs, and the command that starts it there: DeepSpeed's launcher on each node."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ochat_train.files import free_port
from ochat_train.gpus import use_expandable_segments

_RUNNER = [sys.executable, "-m", "deepspeed.launcher.runner"]
_PORT_BY_HAND = 29500  # nodes that do not communicate yet cannot agree on a free one


@dataclass(frozen=True, slots=True)
class Nodes:
    """The nodes of a run.

    kind: here (this node alone), ssh (DeepSpeed's launcher starts the others), by_hand (launch.sh is called on each
    node), slurm (srun starts a launcher on each node). hosts: their names where we know them, the first one first.
    rank: of this node, by hand.
    """

    kind: Literal["here", "ssh", "by_hand", "slurm"]
    hosts: tuple[str, ...] = ()
    hostfile: str = ""
    rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this node prepares the data and reports."""
        return self.rank == 0


@dataclass(frozen=True, slots=True)
class TrainingCommand:
    """A command that trains.

    address, port: where the first node listens; no address where this is the only node. at_once: what ends it on all
    nodes.
    """

    words: tuple[str, ...]
    is_first: bool
    address: str
    port: int
    at_once: signal.Signals


def find_nodes(environment: Mapping[str, str]) -> Nodes:
    """The nodes that the variables HOSTFILE, NODE_RANK and SLURM_* name. Raises ValueError where they are wrong.

    In a Slurm allocation of several nodes we run once, on the first of them.
    """
    hostfile, rank = environment.get("HOSTFILE"), environment.get("NODE_RANK")
    if hostfile:
        try:
            lines = Path(hostfile).read_text().splitlines()
        except OSError as error:
            raise ValueError(f"no HOSTFILE at {hostfile} ({error.strerror})") from None
        hosts = tuple(line.split()[0] for line in lines if line.strip() and not line.startswith("#"))
        if not rank:
            return Nodes("ssh", hosts, hostfile)
        if not rank.isdecimal() or int(rank) >= len(hosts):
            raise ValueError(f"NODE_RANK={rank} is not the number of a host in {hostfile}, from 0 to {len(hosts) - 1}")
        return Nodes("by_hand", hosts, hostfile, int(rank))
    if rank:
        raise ValueError("NODE_RANK is the number of a host in HOSTFILE, from 0; set HOSTFILE too")
    if int(environment.get("SLURM_JOB_NUM_NODES") or 1) == 1:
        return Nodes("here")
    if environment.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        raise ValueError("call launch.sh without srun: it calls srun itself, once for all nodes")
    listing = ["scontrol", "show", "hostnames", environment["SLURM_JOB_NODELIST"]]
    if not shutil.which("scontrol"):
        raise ValueError(
            "the hosts of this Slurm job are not known, because scontrol is not on the PATH: add Slurm's folder of "
            "commands to it, or name the hosts in HOSTFILE"
        )
    try:
        listed = subprocess.run(listing, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", "") or error
        raise ValueError(f"the hosts of this Slurm job are not known: {' '.join(listing)}: {reason}") from None
    return Nodes("slurm", tuple(listed.stdout.split()))


def count_gpus() -> int:
    """How many GPUs torch can use here. Raises ValueError, with the remedy, where there are GPUs that it cannot use."""
    count = [sys.executable, "-c", "from ochat_train import gpus; gpus.main()"]  # torch would stay in our memory
    counted = subprocess.run(count, capture_output=True, text=True)
    if counted.returncode:
        raise ValueError(counted.stderr.strip().splitlines()[-1])  # after warnings of torch
    return int(counted.stdout)


def training_command(
    nodes: Nodes, recipe: Sequence[str], environment: Mapping[str, str], num_devices: int
) -> TrainingCommand:
    """DeepSpeed's launcher on all nodes, with NUM_GPUS processes on each, or one for each GPU, or two on a CPU.

    num_devices: what `count_gpus` has found here.
    """
    num_gpus = environment.get("NUM_GPUS")
    address, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT")
    use_expandable_segments()
    if num_devices == 0:
        os.environ["DS_ACCELERATOR"] = "cpu"  # no search for accelerators, no warning about it
        num_devices = 2
        if nodes.kind == "here":
            num_gpus = num_gpus or "2"

    # DeepSpeed's launcher reports every code but 0 as an error, that of a stop as well; we report codes ourselves.
    launcher, options, at_once = _RUNNER, ["--log_level", "critical"], signal.SIGKILL
    match nodes.kind:
        case "ssh":
            options += ["--hostfile", nodes.hostfile]
            at_once = signal.SIGTERM  # the launcher then ends the processes of the other hosts
        case "by_hand":
            address, port = address or nodes.hosts[0], port or str(_PORT_BY_HAND)
            options += ["--hostfile", nodes.hostfile, "--no_ssh", "--node_rank", str(nodes.rank)]
        case "slurm":
            address = address or nodes.hosts[0]
            launcher = _srun(nodes.hosts, num_gpus or str(num_devices))
            at_once = signal.SIGTERM  # srun then ends the tasks of all nodes
    if num_gpus:  # else the slots, CUDA_VISIBLE_DEVICES, or all GPUs
        options += ["--num_gpus", num_gpus]
    if address:
        options += ["--master_addr", address]
    port = port or str(free_port())
    words = [*launcher, *options, "--master_port", port, "--module", "ochat_train.train", *recipe]
    return TrainingCommand(tuple(words), nodes.is_first, address or "", int(port), at_once)


def _srun(hosts: Sequence[str], slots: str) -> list[str]:
    """A launcher on each node of a Slurm allocation; all processes of a node are one task.

    When the launcher of one node ends, the others stay: it may have been asked to stop, as they were, and the first
    node exports at the end. A task must not be bound to the cores of one process.
    """
    return [
        *("srun", f"--nodes={len(hosts)}", f"--ntasks={len(hosts)}", "--ntasks-per-node=1", "--overlap"),
        *("--kill-on-bad-exit=0", "--wait=0", "--cpu-bind=none"),
        *(sys.executable, "-m", "ochat_train.launch.node"),
        "".join(f"{host} slots={slots}\n" for host in hosts),
    ]
