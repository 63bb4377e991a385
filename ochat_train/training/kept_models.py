"""Models that a run has kept: the best one as an export, and the mean of the last ones."""

import shutil
from pathlib import Path

import orjson

from ochat_train.files import STEP_FOLDERS, publish_folder
from ochat_train.model.exported import METADATA_FILE
from ochat_train.training.checkpoint import Damaged, FileMark, mark_file
from ochat_train.training.resources import room_for

_CHECKSUMS = "checksums.json"


def copy_best(run: Path, out: Path) -> Path:
    """Copy the best model that a run has kept to `out`, in place of an earlier export; returns where it is kept.

    Raises ValueError without one, for one that differs from what was written, or when `out` holds something else.
    """
    if not (found := sorted((run / "best").glob(STEP_FOLDERS))):
        raise ValueError(f"{run} has kept no best model; train with checkpoint.best: loss, or the name of a check")
    require_free(out)
    _check(found[-1])
    size = sum(file.stat().st_size for file in found[-1].iterdir())
    with publish_folder(out) as folder, room_for(size, folder):
        shutil.copytree(found[-1], folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(_CHECKSUMS))
    return found[-1]


def require_free(out: Path) -> None:
    """Raise ValueError when `out` holds something that is not an earlier export."""
    if out.exists() and not (out / METADATA_FILE).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an earlier export; name another folder")


def _check(model: Path) -> None:
    """Raise ValueError, as Damaged, when a file of a kept model differs from what was written."""
    try:
        marks = orjson.loads((model / _CHECKSUMS).read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise Damaged(f"the model {model} is damaged: {_CHECKSUMS} cannot be read ({error})") from None
    for name, mark in marks.items():
        if not (model / name).is_file() or mark_file(model / name) != FileMark(**mark):
            raise Damaged(f"the model {model} is damaged: {name} is missing, or has other bytes than were written")
