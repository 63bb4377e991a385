"""Examine a recipe on this machine before a run is paid for.

    python -m ochat_train.doctor RECIPE [key=value ...] [--quick] [--gpus N] [--gpu-gib X]

Checks versions and accelerators, the attention backend and kernels, that packed sequences do not see each other,
special tokens, the token store, memory for each ZeRO stage and number of GPUs, disk, ports and hosts, runs the plan's
fullest micro-batch once, and predicts steps and hours. Ends with OK, or with each problem and its remedy and exit
code 1.

--quick leaves out what takes long: no model is run and no plan is made. --gpus: the number of processes; else what
launch.sh would start, by HOSTFILE, NUM_GPUS and the GPUs that are here. --gpu-gib: memory of each GPU, for those that
are not in this machine.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ochat_train.recipe import Recipe, load_recipe, parse_arguments, recipe_arguments

if TYPE_CHECKING:
    from ochat_train.doctor.finding import Finding

_MARKS = {"ok": "ok", "warning": "warning", "problem": "PROBLEM"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print each finding as it is made; exit with 1 when one is a problem."""
    parser = argparse.ArgumentParser(prog="python -m ochat_train.doctor", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--quick", action="store_true", help="only what takes seconds")
    parser.add_argument("--gpus", type=int, metavar="N", help="number of processes, each on its GPU")
    parser.add_argument("--gpu-gib", type=float, metavar="X", help="memory of each GPU, for GPUs that are not here")
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
    findings = []
    for finding in examine(recipe, options):
        print(show(finding), flush=True)
        findings.append(finding)
    problems = [finding for finding in findings if finding.state == "problem"]
    if not problems:
        print("OK")
        return
    print(f"\n{len(problems)} problem(s):")
    for finding in problems:
        print(f"- {finding.name}: {finding.detail.splitlines()[0]}\n    remedy: {finding.remedy}")
    sys.exit(1)


def show(finding: "Finding") -> str:
    """The finding for a terminal."""
    first, *rest = finding.detail.splitlines()
    lines = [f"{_MARKS[finding.state]:<8} {finding.name}: {first}", *(f"           {line}" for line in rest)]
    return "\n".join([*lines, f"           remedy: {finding.remedy}"] if finding.remedy else lines)


def examine(recipe: Recipe, options: argparse.Namespace) -> Iterator["Finding"]:
    """Each finding in turn. What needs something that was not found is left out: that is a problem of its own."""
    # Only here: torch and transformers take seconds to import, and a mistake in the recipe is told before.
    from ochat_train.conversations.template import TEMPLATES
    from ochat_train.doctor import checks
    from ochat_train.doctor.finding import Finding
    from ochat_train.doctor.kernels import check_kernels
    from ochat_train.doctor.memory import check_memory
    from ochat_train.doctor.rows import check_rows
    from ochat_train.model.pretrained import load_config
    from ochat_train.report.plan import measured_rate, read_requests
    from ochat_train.tokens.batch import collate
    from ochat_train.tokens.plan import PlanTable, make_table
    from ochat_train.tokens.store import TokenStore
    from ochat_train.tokens.tokenizer import load_tokenizer, require_model
    from ochat_train.training.memory_plan import plan_memory, size_of
    from ochat_train.training.planning import make_run_plan, trained_rows

    machine = checks.machine_of(options.gpu_gib)
    yield checks.check_versions()
    yield checks.check_accelerators(recipe, machine)

    per_host = os.environ.get("NUM_GPUS", "")
    num_processes = options.gpus or (int(per_host) if per_host.isdecimal() else None)
    if hostfile := os.environ.get("HOSTFILE"):
        try:
            hosts = checks.read_hosts(Path(hostfile))
        except ValueError as error:
            yield Finding("hosts", "problem", str(error), "correct HOSTFILE, or leave it out on one machine")
        else:
            yield checks.check_hosts(hosts, by_ssh="NODE_RANK" not in os.environ)
            slots = [min(number, int(per_host)) if per_host.isdecimal() else number for number in hosts.values()]
            num_processes = options.gpus or sum(slots)
    if num_processes is None:
        (here,) = read_requests(options.recipe, options.overrides, None)
        num_processes = here.num_gpus
    yield checks.check_port(os.environ.get("MASTER_PORT"))

    try:
        tokenizer = load_tokenizer(recipe.tokenizer_name, TEMPLATES[recipe.template])
    except ValueError as error:
        remedy = "name a template that fits the base, or a tokenizer that is there"
        yield Finding("special tokens", "problem", str(error), remedy)
        return
    yield checks.check_special_tokens(tokenizer)
    if recipe.model.base is not None:
        yield check_rows(recipe, tokenizer)
    try:
        if recipe.model.base is not None:
            require_model(recipe.model.base)
        loaded = load_config(recipe.model.base, recipe.model.config, tokenizer.num_ids)
        config = loaded.get_text_config()
        row_ids = trained_rows(recipe, tokenizer)
        size = size_of(recipe, config, len(row_ids))
    except ValueError as error:
        yield Finding("model", "problem", str(error), "name a model that is there, or correct model.config")
        return
    attention = checks.check_attention(recipe, config)
    yield attention
    finding, kernels = check_kernels(recipe, loaded)
    yield finding
    store = checks.check_token_store(recipe, tokenizer, config, is_quick=options.quick)
    yield store
    examples = TokenStore(recipe.data.store) if store.state == "ok" else None
    yield checks.check_settings(recipe, config, size, examples, num_processes)
    if "problem" in (attention.state, finding.state):
        return
    if not options.quick:
        yield checks.check_isolation(recipe, config, machine, kernels)
    try:
        memory = plan_memory(recipe, machine, config, size, num_processes)
    except ValueError as error:
        yield Finding("memory", "warning", str(error), "measure it with train.max_steps=2")
        return
    yield check_memory(memory, is_quick=options.quick)
    num_steps = None
    if examples is not None and not options.quick:
        plan = make_run_plan(recipe, examples, config, num_processes)
        table = make_table(plan)
        table = PlanTable(table.rows[: recipe.train.max_steps], table.shape)
        num_steps = table.num_steps
        positions = checks.find_fullest(plan)
        batch = collate([examples[position] for position in positions.tolist()], examples.condition_ids[positions])
        run = checks.run_fullest(recipe, config, batch, memory, kernels, row_ids)
        yield run.finding
        yield checks.check_steps(table, measured_rate(options.recipe, recipe), run.tokens_per_s)
    yield checks.check_disk(recipe, size, num_steps)


if __name__ == "__main__":
    main()
