"""Completion in bash: the function that argcomplete registers, called as a TAB calls it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ochat_train.cli import WORDS
from tests.waiting import HANG_S

ROOT = Path(__file__).parents[1]
# What a TAB does: the function that `complete` names, with the line, the place and its words.
TAB = """
eval "$(python -m argcomplete.scripts.register_python_argcomplete ochat)"
COMP_LINE=$1 COMP_POINT=${#1} COMP_TYPE=9 COMP_KEY=9
read -ra COMP_WORDS <<< "$1"
[[ $1 == *" " ]] && COMP_WORDS+=("")
COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
function=$(complete -p ochat | sed 's/.*-F \\([^ ]*\\).*/\\1/')
$function ochat "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""
TORCHLESS = "import sys; sys.modules['torch'] = None\nfrom ochat_train.cli import main\nmain()\n"


def complete(typed: str, folder: Path) -> set[str]:
    """What bash offers for a line, by a command ochat to which an import of torch is an error."""
    ochat = folder / "ochat"
    ochat.write_text(f"#!{sys.executable}\n# PYTHON_ARGCOMPLETE_OK\n{TORCHLESS}")
    ochat.chmod(0o755)
    if not (folder / "python").exists():
        (folder / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        (folder / "python").chmod(0o755)
    variables = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    command = [shutil.which("bash") or "bash", "--norc", "-c", TAB, "bash", typed]
    done = subprocess.run(command, env=variables, cwd=folder, capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return set(done.stdout.split())


def documented_options(word: str) -> set[str]:
    """The options of a word in docs/commands.md, which is made from the parsers; without those that mean nothing."""
    page = (ROOT / "docs" / "commands.md").read_text()
    section = page.split(f"\n## ochat {word}\n")[1].split("\n## ")[0]
    lines = (line for line in section.splitlines() if "without a meaning" not in line)
    return {found[1] for line in lines if (found := re.match(r"\| `(--[a-z-]+)", line))}


@pytest.mark.parametrize("word", [word for word in WORDS if not WORDS[word].arguments])
def test_the_options_of_each_word_are_completed(word: str, tmp_path: Path) -> None:
    assert complete(f"ochat {word} --", tmp_path) - {"--help"} == documented_options(word)


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("ochat pre", {"preprocess"}),
        ("ochat preprocess quick", {"quickstart"}),
        ("ochat preprocess --dry-run quick", {"quickstart"}),
        ("ochat preprocess --engine r", {"ray"}),
        ("ochat evaluate ", {"prompts", "held-out", "answer", "compare", "lm-eval", "table"}),
        ("ochat report s", {"store"}),
        ("ochat report plan quick", {"quickstart"}),
    ],
)
def test_words_recipes_and_choices_are_completed(typed: str, offered: set[str], tmp_path: Path) -> None:
    assert complete(typed, tmp_path) == offered
