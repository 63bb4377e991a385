"""The steps of a launch, one command after the other."""

import os
import sys
from pathlib import Path

import orjson

from ochat_train.files import STEP_FOLDERS
from ochat_train.launch.commands import STOPPED, Commands, say
from ochat_train.launch.nodes import count_gpus, find_nodes, training_command
from ochat_train.launch.restarts import train_with_restarts
from ochat_train.recipe import Recipe, load_recipe, refused_differences, to_json


def launch(recipe: list[str], *, is_examined: bool = False) -> None:
    """Run all steps of a recipe, given as its path and overrides. Raises ValueError for a mistake of the user.

    is_examined: the store is there, and doctor has passed a recipe that differs in its seed and folder alone.
    """
    max_restarts = os.environ.get("MAX_RESTARTS") or "0"
    if not max_restarts.isdecimal():
        raise ValueError(f"MAX_RESTARTS={max_restarts} is not a number of restarts, such as 3")
    nodes = find_nodes(os.environ)
    resolved = load_recipe(recipe[0], recipe[1:])
    num_devices = count_gpus()
    run_dir = Path(resolved.checkpoint.dir)
    commands = Commands(run_dir)

    if nodes.is_first:
        check_goes_on(resolved)
        if not is_examined:
            commands.require(["ochat_train.preprocess", *recipe])
            commands.require(["ochat_train.doctor", "--quick", *recipe])
    command = training_command(nodes, recipe, os.environ, num_devices)
    code = train_with_restarts(commands, command, run_dir, int(max_restarts))
    if code == STOPPED:
        say("stopped; the same command goes on from there")
    if code:
        sys.exit(code)
    if nodes.is_first:
        commands.require(["ochat_train.report", "run", str(run_dir)])


def check_goes_on(recipe: Recipe) -> None:
    """Raise ValueError when training would refuse to continue under this recipe, before a store is made anew for it."""
    newest = max(Path(recipe.checkpoint.dir).glob(f"{STEP_FOLDERS}/checkpoint.json"), default=None)
    if newest is None or recipe.checkpoint.resume == "never":
        return
    try:
        was = orjson.loads(newest.read_bytes())["state"]["recipe"]
    except (OSError, orjson.JSONDecodeError, KeyError, TypeError):  # training knows what to do about a damaged one
        return
    # What a store is made of.
    wrong = [line for line in refused_differences(was, to_json(recipe)) if line.startswith(("data.", "template:"))]
    if wrong:
        raise ValueError(
            f"cannot continue {newest.parent}, because this differs (was -> is):\n  "
            + "\n  ".join(wrong)
            + "\nGo back to the old values, or start a new run in another checkpoint.dir. The token store is as it was."
        )
