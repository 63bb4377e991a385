"""Models that a run has kept: the best one as an export, and the mean of the last ones."""

import shutil
from pathlib import Path

import orjson
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ochat_train.files import STEP_FOLDERS, flush_tree, publish_folder
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


def average_models(run: Path, num: int, out: Path) -> list[Path]:
    """Write the mean of the newest `num` models in run/models to `out`, in their dtype; returns where these are kept.

    Sums are in fp32. No more than one file of weights and one tensor in fp32 is in memory. All else is the newest
    model's; the metadata name the steps. Raises ValueError for fewer models, one that is damaged or has other weights,
    or when `out` holds something that is not an earlier export.
    """
    found = sorted((run / "models").glob(STEP_FOLDERS))
    if num < 2:
        raise ValueError(f"--average {num}: a mean is of at least 2 models")
    if len(found) < num:
        raise ValueError(
            f"--average {num}: {run / 'models'} has {len(found)}; checkpoint.models.every_epochs=1 keeps one an epoch"
        )
    models, newest = found[-num:], found[-1]
    require_free(out)
    for model in models:
        _check(model)
    files = {model: _files_of_weights(model) for model in models}
    for model in models:
        if (different := _first_difference(files[model], files[newest])) is not None:
            raise ValueError(f"{model} and {newest} have other weights ({different}), so that they have no mean")
    size = sum(file.stat().st_size for file in newest.iterdir())
    with publish_folder(out) as folder, room_for(size, folder):
        shutil.copytree(newest, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(_CHECKSUMS, "*.safetensors"))
        for file in sorted(set(files[newest].values())):
            names = [name for name, place in files[newest].items() if place == file]
            save_file({name: _mean(name, files) for name in names}, folder / file.name, metadata={"format": "pt"})
            (folder / file.name).chmod((folder / "config.json").stat().st_mode)
        metadata = orjson.loads((folder / METADATA_FILE).read_bytes())
        metadata["averaged_steps"] = [int(model.name.removeprefix("step-")) for model in models]
        (folder / METADATA_FILE).write_bytes(orjson.dumps(metadata, option=orjson.OPT_INDENT_2))
        flush_tree(folder)
    return models


def _files_of_weights(model: Path) -> dict[str, Path]:
    """The file that holds each weight, by the weight's name."""
    files: dict[str, Path] = {}
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            files |= dict.fromkeys(opened.keys(), file)
    return files


def _first_difference(files: dict[str, Path], others: dict[str, Path]) -> str | None:
    """The first weight that two models do not both have in one shape."""
    if lonely := sorted(files.keys() ^ others.keys()):
        return lonely[0]
    shapes: list[dict[str, list[int]]] = []
    for of_model in (files, others):
        shapes.append({})
        for file in set(of_model.values()):
            with safe_open(file, "pt") as opened:
                shapes[-1] |= {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    return next((name for name in shapes[0] if shapes[0][name] != shapes[1][name]), None)


def _mean(name: str, files: dict[Path, dict[str, Path]]) -> Tensor:
    """The mean of a weight over the models, in the dtype of the last; of whole numbers those of the last."""
    total: Tensor | None = None
    for of_model in files.values():
        with safe_open(of_model[name], "pt") as opened:
            weight: Tensor = opened.get_tensor(name)
        total = weight.float() if total is None else total.add_(weight)
    assert total is not None
    return (total / len(files)).to(weight.dtype) if weight.is_floating_point() else weight


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
