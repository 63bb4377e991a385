"""Examine a recipe on this machine before you spend GPU time.

    ochat doctor RECIPE [key=value ...] [--quick] [--gpus N] [--gpu NAME | --gpu-gib X]

Checks versions and accelerators, the attention backend and kernels, that packed sequences do not see each other,
special tokens, the token store, memory for each ZeRO stage and number of GPUs, disk, ports and hosts, runs the plan's
fullest micro-batch once, and predicts steps and hours. Ends with OK, or with each problem and its remedy and exit
code 1.

--quick leaves out what takes long: only a small copy of the model is run, and no plan is made. --gpus: the number of
processes; else what launch.sh would start, by HOSTFILE, NUM_GPUS and the GPUs that are here. --gpu: GPUs that are not
in this machine, by name; --gpu-gib: by the memory of each. Where there is no GPU, --gpus alone means A100-80GB.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ochat_train.recipe import load_recipe, parse_arguments, piped_output, recipe_arguments

if TYPE_CHECKING:
    from ochat_train.doctor.case import Finding

_MARKS = {"ok": "ok", "warning": "warning", "problem": "PROBLEM"}


@piped_output()
def main(arguments: Sequence[str] | None = None) -> None:
    """Print each finding as soon as it is made; exit with 1 when one is a problem."""
    parser = argparse.ArgumentParser(prog="ochat doctor", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--quick", action="store_true", help="only what takes seconds")
    parser.add_argument("--gpus", type=int, metavar="N", help="number of processes, each on its GPU")
    planned = parser.add_mutually_exclusive_group()
    planned.add_argument("--gpu", metavar="NAME", help="GPUs that are not here, such as A100-80GB, H100 or 4090")
    planned.add_argument("--gpu-gib", type=float, metavar="X", help="memory of each GPU, for GPUs that are not here")
    recipe_arguments(parser)
    options = parse_arguments(parser, arguments)
    try:
        if options.gpus is not None and options.gpus < 1:
            raise ValueError(f"--gpus {options.gpus} is below 1; give the number of processes")
        if options.gpu_gib is not None and options.gpu_gib <= 0:
            raise ValueError(f"--gpu-gib {options.gpu_gib:g} is not above 0; give the memory of a GPU")
        recipe = load_recipe(options.recipe, options.overrides)
    except ValueError as error:
        sys.exit(f"error: {error}")

    # Only here: torch and transformers take seconds to import, and a mistake in the recipe is reported before.
    from ochat_train.gpus import find_driver, usable_gpus

    if not usable_gpus() and find_driver() is None:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it finds no accelerator
    from ochat_train.doctor.case import Case
    from ochat_train.doctor.checks import examine
    from ochat_train.training.speed import GPUS

    gpu = options.gpu
    if gpu is not None and gpu not in GPUS:
        sys.exit(f"error: --gpu {gpu} is none of {', '.join(GPUS)}; give the memory of another one with --gpu-gib")
    if options.gpus and not gpu and not options.gpu_gib and not usable_gpus():
        gpu = "A100-80GB"
    gib = options.gpu_gib if gpu is None else GPUS[gpu].gib
    problems = []
    for finding in examine(Case(recipe, options.recipe, options.quick, options.gpus, gib, gpu)):
        print(show(finding), flush=True)
        if finding.state == "problem":
            problems.append(finding)
    if not problems:
        print("OK")
        return
    print(f"\n{len(problems)} problem(s):")
    for finding in problems:
        print(f"- {finding.name}: {finding.detail.splitlines()[0]}\n    remedy: {finding.remedy}")
    sys.exit(1)


def show(finding: "Finding") -> str:
    """The finding as lines of text, with its remedy."""
    first, *rest = finding.detail.splitlines()
    lines = [f"{_MARKS[finding.state]:<8} {finding.name}: {first}", *(f"           {line}" for line in rest)]
    return "\n".join([*lines, f"           remedy: {finding.remedy}"] if finding.remedy else lines)


if __name__ == "__main__":
    main()
