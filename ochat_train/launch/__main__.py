"""From a recipe's dump to a trained and exported model, on one node or several: what launch.sh starts.

    ochat train RECIPE [key=value ...]

It preprocesses, examines the recipe, trains (again after a crash, if MAX_RESTARTS says so) and reports, each as a
command of its own. docs/nodes.md lists the environment variables that it reads.
"""

import argparse
import sys
from collections.abc import Sequence

from ochat_train.launch.commands import STOPPED
from ochat_train.launch.steps import launch
from ochat_train.recipe import parse_arguments, recipe_arguments


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all steps; exits with the code of the first one that fails, or with 75 when it was asked to stop."""
    parser = argparse.ArgumentParser(prog="ochat train", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    recipe_arguments(parser)
    options = parse_arguments(parser, arguments)
    try:
        launch([options.recipe, *options.overrides])
    except ValueError as error:
        sys.exit(f"launch: {error}")
    except KeyboardInterrupt:  # before the first command
        sys.exit(STOPPED)


if __name__ == "__main__":
    main()
