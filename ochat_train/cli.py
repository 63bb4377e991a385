"""The command ochat: `ochat WORD ...` is `python -m` of the word's module, and takes the same arguments.

    ochat preprocess RECIPE [key=value ...]        is python -m ochat_train.preprocess RECIPE [key=value ...]

It imports only that module, so that `ochat --help` starts at once.
"""

import difflib
import os
import runpy
import sys
from pathlib import Path
from typing import Any, NamedTuple

from ochat_train import __version__


class Word(NamedTuple):
    """What a word runs: a module, with arguments before those of the command line."""

    module: str
    about: str
    arguments: tuple[str, ...] = ()


WORDS = {
    "init": Word("init", "write a recipe for your dumps, from five questions or flags"),
    "migrate": Word("init.migrate", "a recipe from settings of OpenChat, axolotl, LLaMA-Factory or TRL"),
    "recipes": Word("recipe", "list the shipped recipes; their names can be given as RECIPE", ("--list",)),
    "recipe": Word("recipe", "check a recipe and print it with all defaults"),
    "preprocess": Word("preprocess", "dumps to a token store; --fields shows what dumps hold"),
    "doctor": Word("doctor", "what would end a run later, its memory and its time"),
    "train": Word("launch", "preprocess, doctor, train, export and report: launch.sh without installing anything"),
    "report": Word("report", "look at a run, a token store or a plan"),
    "serve": Word("serve", "a model on an OpenAI-compatible API"),
    "evaluate": Word("evaluate", "measure a model"),
    "ablate": Word("ablate", "whether conditions and weights helped: arms of a recipe, a table and a page"),
    "export": Word("export", "an earlier checkpoint to a model"),
}


def main() -> None:
    """Run the module of the first word."""
    if "_ARGCOMPLETE" in os.environ:
        _complete()
    word, *arguments = sys.argv[1:] or ["--help"]
    if word in ("-h", "--help"):
        lines = [f"  {name:<12}{found.about}" for name, found in WORDS.items()]
        print("\n".join(["usage: ochat WORD ...", "", *lines, "", "ochat WORD --help says more; ochat --version"]))
    elif word == "--version":
        print(f"ochat_train {__version__}")
    elif word in WORDS:
        found = WORDS[word]
        sys.argv = ["ochat", *found.arguments, *arguments]
        runpy.run_module(f"ochat_train.{found.module}", run_name="__main__", alter_sys=True)
    else:
        near = difflib.get_close_matches(word, WORDS, n=1)
        sys.exit(
            f"ochat: there is no {word}{f'; did you mean {near[0]}?' if near else ''}\nochat --help lists all words"
        )


def _complete() -> None:
    """Answer the shell, which asks through `register-python-argcomplete ochat`: words, options, recipes, files."""
    import argparse

    import argcomplete

    from ochat_train.recipe.shipped import shipped_recipes

    parser = argparse.ArgumentParser(add_help=False)
    words = parser.add_subparsers()
    typed = set(os.environ["COMP_LINE"].split())
    for name, word in WORDS.items():
        found = words.add_parser(name)
        offered = list(shipped_recipes())
        if name in typed and not word.arguments:
            commands, options = _find_arguments(word.module)
            if not typed & set(commands):
                offered = commands or offered
            for option, settings in options.items():
                found.add_argument(option, **settings)
        arguments = found.add_argument("arguments", nargs="*")
        arguments.completer = argcomplete.ChoicesCompleter(offered)  # type: ignore[attr-defined]
    argcomplete.autocomplete(parser, always_complete_options=False)  # these come after a dash


def _find_arguments(module: str) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """The commands and options in a module's source, for the parsers are made in mains, whose imports take seconds."""
    import ast

    path = Path(__file__).parent.joinpath(*module.split("."))
    source = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    commands, options = [], {}
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        match node:
            case ast.Call(
                func=ast.Name(id="add") | ast.Attribute(attr="add_argument"), args=[ast.Constant(value=str(option))]
            ) if option.startswith("--"):
                kept = (keyword for keyword in node.keywords if keyword.arg in ("action", "nargs", "choices"))
                options[option] = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in kept}
            case ast.Call(func=ast.Attribute(attr="add_parser"), args=[ast.Constant(value=str(command))]):
                commands.append(command)
    return commands, options


if __name__ == "__main__":
    main()
