"""What an exported model says of itself."""

from pathlib import Path
from typing import Any

import orjson

METADATA_FILE = "ochat_train.json"


def read_export(model: Path) -> dict[str, Any] | None:
    """The metadata of an exported model; None when the folder holds none."""
    file = model / METADATA_FILE
    return dict(orjson.loads(file.read_bytes())) if file.is_file() else None
