"""Several runs one after the other in one set of processes: what `ochat_train.train` does, started once.

    deepspeed --module tests.e2e.several RECIPE OVERRIDES OVERRIDES ...     or as forks, see harness.py

OVERRIDES: those of one run, as a JSON list.
"""

import sys

import orjson
import torch.distributed as dist

from ochat_train.recipe import load_recipe
from ochat_train.train import export_model, train
from ochat_train.training.engine import join_process_group, read_world
from ochat_train.training.setup import prepare
from ochat_train.training.stopping import Watchdog


def main() -> None:
    """Train them all."""
    recipe, *runs = (argument for argument in sys.argv[1:] if not argument.startswith("--local_rank"))
    world = read_world()
    join_process_group(world)
    for overrides in runs:
        with Watchdog(world) as watchdog:
            run = prepare(load_recipe(recipe, orjson.loads(overrides)), world)
            last = train(run, world, watchdog)
        if world.is_main:
            export_model(run, last.checkpoint)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
