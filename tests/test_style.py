"""The sources pass the linter, the formatter, the type checker and the shell's own parser."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    "command",
    [("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy",)],
    ids=lambda command: " ".join(command),
)
def test_python_sources_are_clean(command: tuple[str, ...]) -> None:
    result = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("script", ["launch.sh", ".ci/run", ".ci/release"])
def test_shell_scripts_parse_and_may_be_run(script: str) -> None:
    result = subprocess.run(["bash", "-n", script], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    path = ROOT / script
    assert path.stat().st_mode & 0o111
    assert path.read_text().startswith("#!/usr/bin/env bash\n")


MOST_LINES, MOST_PARAMETERS = 60, 7


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function but those whose parameters autograd decides."""
    for parent in ast.walk(tree):
        of_autograd = isinstance(parent, ast.ClassDef) and any("autograd" in ast.unparse(base) for base in parent.bases)
        for node in ast.iter_child_nodes(parent):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not of_autograd:
                yield node


def test_functions_are_short_and_take_few_parameters() -> None:
    wrong = []
    for path in sorted((ROOT / "ochat_train").rglob("*.py")):
        for function in functions(ast.parse(path.read_text(encoding="utf-8"))):
            given = function.args
            names = [argument.arg for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
            num_parameters = len(names) - (names[:1] in (["self"], ["cls"]))
            num_lines = (function.end_lineno or 0) - function.lineno + 1
            if num_lines > MOST_LINES or num_parameters > MOST_PARAMETERS:
                place = f"{path.relative_to(ROOT)}:{function.lineno} {function.name}"
                wrong.append(f"{place}: {num_lines} lines, {num_parameters} parameters")
    assert not wrong, "\n".join(wrong)
