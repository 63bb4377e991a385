"""Whether conditions and weights helped: arms of one recipe trained over several seeds, a table and a page.

    ochat ablate RECIPE [arms=all,good,weights,conditions,both] [seeds=3] [equal=steps|tokens] [key=value ...]

Arms: all data plain, the good source only (that of the inference condition), weights only, conditions only, both. Each
arm and seed is a run of its own, checkpoint.dir/ARM-SEED, started as by `ochat train`; a store is shared by an arm's
seeds. The same command goes on after a stop, and trains no finished run again. At the end it prints the table, and
writes checkpoint.dir/ablation.json and ablation.html. Variables are those of `ochat train`, on one machine.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import orjson

from ochat_train.ablate.arms import ARMS, WHOLE, Ablation, read_ablation
from ochat_train.ablate.results import claim, is_finished, measures_of, read_results
from ochat_train.ablate.sections import ablation_document
from ochat_train.files import publish_file
from ochat_train.launch.commands import Commands, say
from ochat_train.launch.nodes import count_gpus, find_nodes
from ochat_train.launch.steps import launch
from ochat_train.recipe import parse_arguments, recipe_arguments, to_json
from ochat_train.report.page import as_html, as_text


def main(arguments: Sequence[str] | None = None) -> None:
    """Train all arms that are not finished, and print what came of it; exits with a run's code where one fails."""
    parser = argparse.ArgumentParser(prog="ochat ablate", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    recipe_arguments(parser)
    options = parse_arguments(parser, arguments)
    try:
        page = ablate(read_ablation(options.recipe, options.overrides))
    except ValueError as error:
        sys.exit(f"ablate: {error}")
    print(f"\n{page}")


def ablate(ablation: Ablation) -> Path:
    """Train the arms, and write the results; returns the page's path. Raises ValueError for a mistake of the user."""
    if find_nodes(os.environ).kind != "here":
        raise ValueError("an ablation trains on one machine; unset HOSTFILE, or ask Slurm for one node")
    folder, seeds, arms = Path(ablation.recipe.checkpoint.dir), ablation.seeds, ablation.arms
    commands = Commands(folder)
    for arm in dict.fromkeys([WHOLE, *arms]):
        commands.require(["ochat_train.preprocess", ablation.path, *ablation.words(arm, seeds[0])])
    num_processes = int(os.environ.get("NUM_GPUS") or count_gpus() or 2)  # as launch starts them
    runs = {(arm, seed): ablation.settle(arm, seed, num_processes) for seed in seeds for arm in arms}
    recipes = {place: ablation.load(words) for place, words in runs.items()}
    examined: set[str] = set()
    for number, (place, words) in enumerate(runs.items(), start=1):
        arm, seed = place
        about = f"run {number} of {len(runs)}: {ARMS[arm].about}, seed {seed}"
        if is_finished(recipes[place]):
            say(f"{about}: finished before")
            continue
        say(about)
        # The seeds of an arm differ in nothing that preprocessing or doctor sees.
        launch([ablation.path, *words], is_examined=arm in examined)
        examined.add(arm)
    results = read_results(ablation, recipes)
    with publish_file(folder / "ablation.json") as file:
        claims = {measure: claim(results, measure) for measure in measures_of(results)}
        found = {"recipe": to_json(ablation.recipe), "equal": ablation.equal, "claims": claims}
        file.write(orjson.dumps(found | {"runs": list(map(asdict, results))}, option=orjson.OPT_INDENT_2))
    document = ablation_document(ablation.recipe.name, results, ablation.equal)
    print(as_text(document))
    page = folder / "ablation.html"
    page.write_text(as_html(document), encoding="utf-8")
    return page


if __name__ == "__main__":
    main()
