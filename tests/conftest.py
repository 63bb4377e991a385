"""What the tests share: nothing is fetched from the network, and tokenizers are loaded once."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: a name that is no file fails at once

import pytest
from hypothesis import HealthCheck, settings

from ochat_train.conversations.template import TEMPLATES
from ochat_train.tokens.tokenizer import ChatTokenizer, load_tokenizer

# A busy machine draws and runs examples slowly, which says nothing about the code.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

# A shell that starts the suite in the background ignores SIGINT, and so would all processes of tests.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]
# Files that take longest, by name: together with tests/e2e they come first, so that no process works alone at the end.
LONGEST = ("gpu_kit", "ablate", "wheel", "style", "soak", "init", "launch", "docs")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole runs first, then the other long files, then the rest in the order in which it was found."""

    def place(item: pytest.Item) -> int:
        name = item.path.stem.removeprefix("test_")
        return 0 if item.path.parent.name == "e2e" else 1 if name in LONGEST else 2

    items.sort(key=place)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of files that stand beside the project, not in it; without it their tests are skipped."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"needs the files of {folder}")
    return folder


@pytest.fixture(scope="session")
def llama2(shared: Path) -> ChatTokenizer:
    """The Llama 2 tokenizer for openchat_v3.2."""
    return load_tokenizer(str(shared / "fixtures/llama2-tokenizer"), TEMPLATES["openchat_v3.2"])


@pytest.fixture(scope="session")
def quickstart() -> ChatTokenizer:
    """The quickstart's tokenizer for openchat_v3.2."""
    return load_tokenizer(str(ROOT / "data/quickstart_tokenizer"), TEMPLATES["openchat_v3.2"])


@pytest.fixture(scope="session")
def quickstart_chatml() -> ChatTokenizer:
    """The quickstart's tokenizer for chatml."""
    return load_tokenizer(str(ROOT / "data/quickstart_tokenizer"), TEMPLATES["chatml"])


@pytest.fixture(autouse=True)
def keep_environment() -> Iterator[None]:
    """A launch in this process sets DS_ACCELERATOR for its commands, which is not for the tests that follow."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ |= before


@pytest.fixture
def keep_signal_handlers() -> Iterator[None]:
    """The `main` of preprocess sets its own handler for SIGTERM, which is not for pytest."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one checkpoint of 3.5 MB and not for two."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.decode()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)
