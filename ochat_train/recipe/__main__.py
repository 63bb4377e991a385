"""One recipe, resolved.

ochat recipe RECIPE [key=value ...]     print the resolved recipe
ochat recipe RECIPE --key optim.lr      print one value
ochat recipe --schema                   print the JSON schema, for editors
ochat recipes                           print a line for each shipped recipe
"""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence

import orjson
import yaml

from ochat_train.recipe import Recipe, leaves, load_recipe, parse_arguments, piped_output, recipe_arguments, to_json
from ochat_train.recipe.shipped import shipped_recipes


@piped_output()
def main(arguments: Sequence[str] | None = None) -> None:
    """Print the schema, the shipped recipes, or one resolved recipe as YAML."""
    words = sys.argv[1:] if arguments is None else arguments
    if "--schema" in words:
        print(orjson.dumps(Recipe.model_json_schema(), option=orjson.OPT_INDENT_2).decode())
        return
    if "--list" in words:
        print("\n".join(list_shipped()))
        return
    parser = argparse.ArgumentParser(prog="ochat recipe", description="Check and print a recipe.")
    parser.add_argument("--schema", action="store_true", help="print the JSON schema of recipes instead")
    parser.add_argument("--list", action="store_true", help="print a line for each shipped recipe instead")
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


def list_shipped() -> Iterator[str]:
    """A line for each shipped recipe: name, GPUs (its comment `# For ...`), template, base."""
    rows = [("recipe", "for", "template", "base")]
    for name, path in shipped_recipes().items():
        recipe = load_recipe(path)
        machine = re.search(r"^# For (.+)\.$", path.read_text(encoding="utf-8"), re.MULTILINE)
        base = recipe.model.base or "none: from scratch"
        rows.append((name, machine[1] if machine else "", recipe.template, base))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


if __name__ == "__main__":
    main()
