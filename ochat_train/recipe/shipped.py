"""The recipes that come with the package, by name, and the data that they read."""

from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).parents[1]
# A wheel has recipes/ and data/ in the package, a clone beside it.
_ROOT = _PACKAGE / "_shipped" if (_PACKAGE / "_shipped").is_dir() else _PACKAGE.parent


def shipped_recipes() -> dict[str, Path]:
    """The files of all shipped recipes by their names, such as quickstart."""
    return {path.stem: path for path in sorted((_ROOT / "recipes").glob("*.yaml"))}


def place_data(value: Any) -> Any:
    """A shipped recipe's tree with the paths of shipped data, such as data/quickstart.json, where they are."""
    if isinstance(value, dict):
        return {key: place_data(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [place_data(inner) for inner in value]
    is_shipped = isinstance(value, str) and value.startswith("data/") and (_ROOT / value).exists()
    return str(_ROOT / value) if is_shipped else value
