"""What the repository's hosts read: the release check, the workflow, the issue forms, the hooks."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from ochat_train import __version__
from tests.waiting import HANG_S

ROOT = Path(__file__).resolve().parents[1]


def release(folder: Path) -> subprocess.CompletedProcess[str]:
    """.ci/release with the Python of the tests, which has setuptools, so that pip fetches nothing."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PIP_NO_BUILD_ISOLATION": "0", "PIP_NO_INDEX": "1"}
    command = [folder / ".ci/release"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANG_S)


def git(folder: Path, *words: str) -> None:
    who = ["-c", "user.name=Tester", "-c", "user.email=tester@example.org"]
    subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True, timeout=HANG_S)


def test_a_release_needs_its_tag_its_changelog_and_a_wheel(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("ochat_train", "data", "recipes", ".ci"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "one")
    untagged = release(tmp_path)
    assert untagged.returncode == 1 and f"this commit's tag is missing; tag it v{__version__}" in untagged.stderr
    git(tmp_path, "tag", f"v{__version__}")
    good = release(tmp_path)
    assert (good.returncode, (tmp_path / f"dist/ochat_train-{__version__}-py3-none-any.whl").is_file()) == (0, True)
    changelog = tmp_path / "CHANGELOG.md"
    changelog.write_text(changelog.read_text().replace(f"## {__version__}\n", "## 9.9.9\n"))
    git(tmp_path, "commit", "-q", "-a", "-m", "two")
    git(tmp_path, "tag", "-f", f"v{__version__}")
    unsaid = release(tmp_path)
    assert unsaid.returncode == 1 and f"CHANGELOG.md has no part '## {__version__}'" in unsaid.stderr


def test_the_workflow_calls_what_ci_runs_on_the_versions_that_are_supported() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    assert jobs["test"]["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]
    assert [job["steps"][-1]["run"] for job in jobs.values()] == [".ci/run", ".ci/release"]


def test_issue_forms_have_what_github_asks_for() -> None:
    forms = [path for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml"]
    assert len(forms) == 2
    for path in forms:
        form = yaml.safe_load(path.read_text())
        assert form["name"] and form["description"] and form["body"]
        assert all(item["attributes"]["label"] for item in form["body"])
        assert len({item["id"] for item in form["body"]}) == len(form["body"])


def test_the_tests_that_contributing_names_exist() -> None:
    words = (ROOT / "CONTRIBUTING.md").read_text().replace("`", " ").split()
    named = [word for word in words if word.startswith("tests/") and word.endswith(".py")]
    assert len(named) > 20 and all((ROOT / name).is_file() for name in named)
