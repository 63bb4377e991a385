"""One recipe, resolved.

python -m ochat_train.recipe RECIPE [key=value ...]     print the resolved recipe
python -m ochat_train.recipe RECIPE --key optim.lr      print one value
python -m ochat_train.recipe --schema                   print the JSON schema, for editors
"""

import argparse
import sys
from collections.abc import Sequence

import orjson
import yaml

from ochat_train.recipe import Recipe, leaves, load_recipe, parse_arguments, recipe_arguments, to_json


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the schema, or one resolved recipe as YAML."""
    if "--schema" in (sys.argv[1:] if arguments is None else arguments):
        print(orjson.dumps(Recipe.model_json_schema(), option=orjson.OPT_INDENT_2).decode())
        return
    parser = argparse.ArgumentParser(prog="python -m ochat_train.recipe", description="Check and print a recipe.")
    parser.add_argument("--schema", action="store_true", help="print the JSON schema of recipes instead")
    parser.add_argument("--key", help="print only the value of this key, such as checkpoint.dir")
    recipe_arguments(parser)
    options = parse_arguments(parser, arguments)
    try:
        recipe = load_recipe(options.recipe, options.overrides)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if options.key is None:
        print(yaml.safe_dump(to_json(recipe), sort_keys=False, allow_unicode=True), end="")
        return
    values = dict(leaves(to_json(recipe)))
    if options.key not in values:
        sys.exit(f"error: --key {options.key}: no key of this recipe with a single value, such as optim.lr")
    value = values[options.key]
    print(value if isinstance(value, str) else orjson.dumps(value).decode())  # text as it is, for a shell to use


if __name__ == "__main__":
    main()
