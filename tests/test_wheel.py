"""The wheel, installed into an environment of its own, does everything from any folder."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

from ochat_train.cli import WORDS
from tests.waiting import HANG_S

ROOT = Path(__file__).resolve().parents[1]
OWN = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # which may hold the repository
# Writes down each file of the repository that Python opens or lists, into $READ; those of lent packages do not count.
AUDIT = """import os, sys
def _hook(event, arguments):
    if event in ("open", "os.listdir", "os.scandir") and arguments and isinstance(arguments[0], str):
        path = os.path.abspath(arguments[0])
        if path.startswith({root!r} + os.sep) and not path.startswith({lent!r}) and not path.startswith({own!r}):
            os.write(_log, (path + "\\n").encode())
_log = os.open(os.environ["READ"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
sys.addaudithook(_hook)
"""


class Installed(NamedTuple):
    """A wheel, and an environment that has it and is lent the dependencies of this one, but not ochat_train."""

    wheel: Path
    venv: Path
    folder: Path  # where commands run

    def run(self, *words: str, **variables: str) -> str:
        """What the command ochat prints with these words."""
        environment = OWN | {"READ": str(self.venv / "read"), "DS_ACCELERATOR": "cpu", "NUM_GPUS": "1"} | variables
        done = subprocess.run(
            [self.venv / "bin/ochat", *words],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=HANG_S,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("wheel")
    source, venv = folder / "source", folder / "venv"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("ochat_train", "data", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source]
    subprocess.run(build, check=True, timeout=HANG_S)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True, timeout=HANG_S)
    install = [*pip, "--python", venv / "bin/python", "install", "--no-deps", "--no-index", wheel]
    subprocess.run(install, env=OWN, check=True, timeout=HANG_S)
    (packages,) = venv.glob("lib/python*/site-packages")
    lent = sysconfig.get_path("purelib")
    audit = AUDIT.format(root=str(ROOT), lent=lent, own=str(venv))
    (packages / "audit_reads.py").write_text(audit)
    (packages / "lent.pth").write_text(f"import audit_reads\n{lent}\n")  # whose own .pth files are not followed
    (folder / "elsewhere").mkdir()
    return Installed(wheel, venv, folder / "elsewhere")


def test_the_wheel_holds_every_module_and_file(installed: Installed) -> None:
    held = {name for name in zipfile.ZipFile(installed.wheel).namelist() if ".dist-info/" not in name}
    tracked = subprocess.run(
        ["git", "ls-files", "ochat_train", "recipes", "data"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert len(tracked) > 150
    assert {name.removeprefix("ochat_train/_shipped/") for name in held} >= {*tracked} - {"data/make_quickstart.py"}


def test_the_quickstart_runs_elsewhere_and_reads_nothing_of_the_repository(installed: Installed) -> None:
    assert "quickstart" in installed.run("recipes")
    resolved = installed.run("recipe", "quickstart", "--key", "tokenizer").strip()
    assert resolved.startswith(str(installed.venv))
    said = installed.run("train", "quickstart", "train.max_steps=2")
    assert "545" in said and "\nOK\n" in said and said.endswith("runs/quickstart/report.html\n")
    assert (installed.folder / "runs/quickstart/model/model.safetensors").is_file()
    assert "Ended by train.max_steps at step 2" in installed.run("report", "run", "runs/quickstart", "--text")
    assert (installed.venv / "read").read_text() == ""


def test_help_lists_every_word_and_imports_almost_nothing(installed: Installed) -> None:
    assert all(f"\n  {word} " in installed.run("--help") for word in WORDS)
    code = (
        "import sys; from ochat_train import cli; sys.argv = ['ochat']; cli.main(); "
        "heavy = {'torch', 'transformers', 'pydantic', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, timeout=HANG_S)


def test_a_word_that_there_is_not_is_refused_with_the_nearest(installed: Installed) -> None:
    done = subprocess.run(
        [installed.venv / "bin/ochat", "trian"],
        env=OWN | {"READ": "/dev/null"},
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    assert (done.returncode, "did you mean train?" in done.stderr) == (1, True)


@pytest.mark.parametrize(("typed", "found"), [("ochat pre", {"preprocess"}), ("ochat train quick", {"quickstart"})])
def test_a_shell_completes_words_and_recipes(installed: Installed, typed: str, found: set[str]) -> None:
    answer = installed.folder / "completions"
    variables = {"_ARGCOMPLETE": "1", "COMP_LINE": typed, "COMP_POINT": str(len(typed)), "_ARGCOMPLETE_IFS": "\n"}
    installed.run(**variables, _ARGCOMPLETE_STDOUT_FILENAME=str(answer))
    assert {word.strip() for word in answer.read_text().splitlines()} == found
