"""Optimizer states for another number of ranks or another ZeRO stage, through DeepSpeed's universal checkpoint.

DeepSpeed's converter writes one file for each parameter and state, and each rank then loads its share of them. Stages 1
and 2 use another form of these files than stage 3; `_change_form` turns one into the other, which DeepSpeed does not.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import deepspeed
import torch

from ochat_train.training.checkpoint import ONLY_DATA, Checkpoint, only_data
from ochat_train.training.engine import Refused, World, gather_objects
from ochat_train.training.resources import free_bytes, show_bytes
from ochat_train.training.run_folder import RunFolder

# While it runs, the converter stores the states both in pieces and whole, in fp32, beside copies of the weights.
_TIMES_THE_CHECKPOINT = 2.5
# Its torch.load is held to data, see `only_data`; the classes are registered before the process forks.
_CONVERTER = """
from deepspeed.checkpoint.ds_to_universal import main, parse_arguments
from torch.serialization import add_safe_globals
from ochat_train.training.checkpoint import DEEPSPEED_CLASSES
add_safe_globals(DEEPSPEED_CLASSES)
main(parse_arguments())
"""


@contextmanager
def converted_states(checkpoint: Checkpoint, stage: int, folder: RunFolder, world: World) -> Iterator[Path]:
    """Give the folder of DeepSpeed states that fit this world and ZeRO stage; it is removed after the block.

    All ranks enter it together. Raises Refused when the states of all ranks are not in one folder, when there is no
    room, or when DeepSpeed cannot convert them.
    """
    if not folder.is_shared:
        raise Refused(
            f"{checkpoint.path} was saved by {checkpoint.world_size} processes, and the nodes do not share "
            "checkpoint.dir: copy that folder's deepspeed/ files of all nodes together onto one file system first"
        )
    out = folder.path / f"{checkpoint.path.name}.universal"
    converter, problem = None, None
    if world.is_main:
        shutil.rmtree(out, ignore_errors=True)
        needed = int(_TIMES_THE_CHECKPOINT * sum(mark.size for mark in checkpoint.files.values()))
        if (free := free_bytes(folder.path)) < needed:
            problem = f"converting takes {show_bytes(needed)}, and {show_bytes(free)} are free at {folder.path}"
        else:
            out.mkdir(parents=True)
            converter = _start_converter(checkpoint.path / "deepspeed", out)
    # In short waits: one long collective would time out before the states of a large model are converted.
    while any(gather_objects(converter is not None and converter.poll() is None)):
        time.sleep(0.2)
    if converter is not None and converter.returncode != 0:
        problem = (out / "log").read_text()[-2000:]
    elif converter is not None:
        try:
            with only_data():
                _change_form(out / "states", checkpoint.state.recipe["zero"]["stage"], stage)
        except (OSError, RuntimeError) as error:  # a full disk; the other ranks wait for this one
            problem = str(error)
    try:
        if problem := gather_objects(problem)[0]:
            raise Refused(f"the states of {checkpoint.path} cannot be converted for this run: {problem}")
        yield out / "states"
        gather_objects(None)  # every rank has read them
    finally:
        if world.is_main:
            shutil.rmtree(out, ignore_errors=True)


def _start_converter(states: Path, out: Path) -> subprocess.Popen[bytes]:
    """Start DeepSpeed's converter as its own process: it forks, which a process with threads must not."""
    options = ["--input_folder", str(states), "--output_folder", str(out / "states"), "--inject_missing_state"]
    workers = str(min(4, os.cpu_count() or 1))
    options += ["--num_extract_workers", workers, "--num_merge_workers", workers]
    with open(out / "log", "wb") as log:
        command = [sys.executable, "-c", _CONVERTER, *options]
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | ONLY_DATA)


def _change_form(states: Path, was: int, stage: int) -> None:
    """Rewrite the files of stage `was` in the form that `stage` reads."""
    if (was == 3) == (stage == 3):
        return
    replicas, split = states / "mp_rank_00_model_states.pt", states / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    file = states / "zero" / "optimizer_state.pt"
    common = torch.load(file, map_location="cpu")
    parameters = [path.parent for path in (states / "zero").rglob("exp_avg.pt")]
    if stage == 3:
        replicas.rename(split)
        step = torch.load(parameters[0] / "step.pt")
        common["optimizer_state_dict"] = {"state": {0: {"step": step}}, "param_groups": common["param_groups"]}
    else:
        split.rename(replicas)
        step = common["optimizer_state_dict"]["state"][0]["step"]
        common["ds_version"] = deepspeed.__version__
        for parameter in parameters:
            torch.save(step, parameter / "step.pt")
            for name in ("fp32", "exp_avg", "exp_avg_sq"):
                torch.save({"param": torch.load(parameter / f"{name}.pt")}, parameter / f"{name}.pt")
    torch.save(common, file)
