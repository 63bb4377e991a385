"""Checkpoints from which a run continues: what one holds, whether it is whole, and which one to resume from.

RUN/step-00000100/checkpoint.json     TrainState, what export needs, size and SHA-256 of all files; written last
RUN/step-00000100/deepspeed/          DeepSpeed's weights and optimizer states, one file or more a rank
RUN/step-00000100/random-00000.pt     random states of rank 0, ...
RUN/step-00000100/model/, tokenizer/  the model's configuration; the tokenizer
RUN/step-00000120.partial             a save that was cut off; the next run removes it
RUN/step-00000120.damaged             a checkpoint that was found damaged; nothing removes it
RUN/step-00000120.undone              newer than the step from which a run went on; nothing removes it

Files of torch.save are pickles, and a pickle can run code when it is read. So only tensors, plain values and three
classes of DeepSpeed are read from them, wherever a checkpoint comes from.
"""

import hashlib
import os
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from ochat_train.conversations.described import Description
from ochat_train.files import STEP_FOLDERS, step_name
from ochat_train.recipe import FREE_AT_RESUME, refused_differences
from ochat_train.training.engine import World

FORMAT_VERSION = 2
MANIFEST = "checkpoint.json"
# What DeepSpeed's files hold beside tensors and plain values: an enumeration and two records of plain values.
DEEPSPEED_CLASSES = [ZeroStageEnum, LossScaler, fragment_address]
# torch reads files of torch.save without running code then, even where its caller asks for everything.
ONLY_DATA = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "0"}


@dataclass(frozen=True, slots=True)
class TrainState:
    """The position of a run. Counts are over all epochs; recipe is in its JSON form.

    order: digest of the order in which examples are consumed. plan: digest of the steps that they make in this run.
    """

    step: int
    epoch: int
    examples_consumed: int
    tokens_seen: int
    store_fingerprint: str
    recipe: dict[str, Any]
    order: str
    plan: str


@dataclass(frozen=True, slots=True)
class FileMark:
    """The size in bytes and SHA-256 of a file."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint. files: all in its folder; on a node's own file system those of that node only.

    run: see `describe_run`.
    """

    path: Path
    state: TrainState
    world_size: int
    template: Description
    inference_condition: str
    conditions: list[str]
    run: dict[str, Any]
    files: dict[str, FileMark]


class Damaged(ValueError):
    """A checkpoint that differs from what was written."""


def mark_file(file: Path) -> FileMark:
    """The FileMark of a file, all of which is read."""
    with open(file, "rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return FileMark(file.stat().st_size, digest)


def manifest_of(checkpoint: Checkpoint) -> bytes:
    """The content of checkpoint.json. It includes a digest of its fields, because this file may be damaged, too."""
    fields = asdict(checkpoint) | {"format_version": FORMAT_VERSION}
    del fields["path"]
    return orjson.dumps(fields | {"digest": _digest(fields)}, option=orjson.OPT_INDENT_2)


def _digest(fields: dict[str, Any]) -> str:
    return hashlib.sha256(orjson.dumps(fields, option=orjson.OPT_SORT_KEYS)).hexdigest()


def read_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint in the folder `path`; only its checkpoint.json is read.

    Raises Damaged when that file differs from what was written, ValueError when it is missing or of another format.
    """
    file = Path(path) / MANIFEST
    if not file.is_file():
        raise ValueError(f"{path} is not a complete checkpoint (it has no {MANIFEST}); name a RUN/step-NNNNNNNN")
    try:
        fields = orjson.loads(file.read_bytes())
        version, digest = fields.pop("format_version"), fields.pop("digest", None)
    except (orjson.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
        raise Damaged(f"checkpoint {path} is damaged: {MANIFEST} cannot be read ({error!r})") from None
    if version != FORMAT_VERSION and (digest is None or digest == _digest(fields | {"format_version": version})):
        raise ValueError(
            f"{path} has checkpoint format {version}, this version reads {FORMAT_VERSION}; {_other_version(fields)}"
        )
    if digest != _digest(fields | {"format_version": version}):
        raise Damaged(f"checkpoint {path} is damaged: {MANIFEST} does not agree with its own digest")
    try:
        state = TrainState(**fields["state"])
        files = {name: FileMark(**mark) for name, mark in fields["files"].items()}
        checkpoint = Checkpoint(**fields | {"path": Path(path), "state": state, "files": files})
    except TypeError as error:
        found = f"{file} has other fields than this version knows ({error})"
        raise ValueError(f"{found}; {_other_version(fields)}") from None
    if lora := state.recipe["model"].get("lora"):  # before this key existed: rows of added tokens only
        lora.setdefault("train_template_tokens", False)
    return checkpoint


def _other_version(fields: dict[str, Any]) -> str:
    """What to do with a checkpoint of another version of the code, from what it says of itself."""
    about = fields.get("run")
    commit = about.get("commit") if isinstance(about, dict) else None
    written = f"the version that wrote it{f', commit {commit}' if commit else ''}"
    return f"continue with {written}, or start a new run in another checkpoint.dir"


def check_files(checkpoint: Checkpoint, *, part: int = 0, parts: int = 1) -> None:
    """Read the `part`-th of `parts` shares of a checkpoint's files.

    Raises Damaged, naming a file that differs; ValueError for one that would run code when it is read.
    """
    by_size = sorted(checkpoint.files, key=lambda name: (-checkpoint.files[name].size, name))
    for name in by_size[part::parts]:
        file, expected = checkpoint.path / name, checkpoint.files[name]
        size = file.stat().st_size if file.is_file() else None
        if size != expected.size:
            what = "is not there" if size is None else f"has {size:,} bytes, not {expected.size:,}"
        elif mark_file(file) != expected:
            what = "has other bytes than were written"
        else:
            if file.suffix == ".pt":
                _check_is_data(file)
            continue
        raise Damaged(f"checkpoint {checkpoint.path} is damaged: {name} {what}")


def _check_is_data(file: Path) -> None:
    """Raise ValueError when a file of torch.save holds anything but data; it is scanned, not loaded."""
    try:
        with safe_globals(DEEPSPEED_CLASSES):
            found = sorted(get_unsafe_globals_in_checkpoint(file))
    except ValueError:  # a bare pickle
        found = ["not a file of torch.save"]
    if found:
        raise ValueError(
            f"{file} holds more than tensors and plain values ({', '.join(found)}), which could run code when it is "
            "read; this version of ochat_train did not write it. Resume from another checkpoint, or train from the "
            "model that was exported from this one"
        )


@contextmanager
def only_data() -> Iterator[None]:
    """In the block, every torch.load, DeepSpeed's too, reads data and runs no code; anything else is an error."""
    before = {name: os.environ.get(name) for name in ONLY_DATA}
    os.environ |= ONLY_DATA
    try:
        with safe_globals(DEEPSPEED_CLASSES):
            yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def find_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(path for path in run.glob(STEP_FOLDERS) if (path / MANIFEST).is_file())


def find_candidates(run: Path, resume: str) -> list[Path]:
    """The checkpoints from which a run may continue, the best first. resume: auto, never, or a path.

    A path is where a run begins: once its folder has checkpoints of the run that began there, those come first, so that
    the same command goes on. Raises ValueError for never when the folder already holds checkpoints, and for a path in
    another folder when this one holds checkpoints of another run, so that neither removes the other's.
    """
    found = find_checkpoints(run)[::-1]
    if found and resume == "never":
        raise ValueError(
            f"checkpoint.dir {run} already holds {found[0].name}, and checkpoint.resume is never; "
            "name another folder, or remove that one"
        )
    if resume in ("auto", "never"):
        return found
    origin = Path(resume)
    newest = newest_readable(found)
    began_from = None if newest is None else newest.run.get("began_from")
    if began_from is not None and _is_origin(began_from, origin):
        return [*(path for path in found if path.name > step_name(began_from["step"])), *_complete(origin)]
    first = read_checkpoint(origin)
    others = [path for path in found if path.name >= step_name(first.state.step)]
    if origin.resolve().parent != run.resolve() and any(not _is_origin(origin_of(first), path) for path in others):
        raise ValueError(
            f"checkpoint.resume {resume}, but checkpoint.dir {run} holds {others[0].name} of another run; continue in "
            "another folder, or from that one with checkpoint.resume=auto"
        )
    return [origin]


def newest_readable(candidates: Iterable[Path]) -> Checkpoint | None:
    """The first checkpoint whose checkpoint.json can be read; damage is reported once all files have been read."""
    for path in candidates:
        with suppress(Damaged):
            return read_checkpoint(path)
    return None


def _complete(path: Path) -> list[Path]:
    return [path] if (path / MANIFEST).is_file() else []


def origin_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """What later checkpoints of a run say of the one from which it began: its place, step and content."""
    return {
        "path": str(checkpoint.path.resolve()),
        "step": checkpoint.state.step,
        "sha256": mark_file(checkpoint.path / MANIFEST).sha256,
    }


def _is_origin(began_from: dict[str, Any], path: Path) -> bool:
    """Whether a run began from the checkpoint at `path`: by its content, or by its place once it was removed."""
    if _complete(path):
        return bool(began_from["sha256"] == mark_file(path / MANIFEST).sha256)
    return bool(began_from["path"] == str(path.resolve()))


def find_incomplete(run: Path) -> list[Path]:
    """Folders that are named as checkpoints and have no checkpoint.json: none is taken for a checkpoint."""
    return sorted(path for path in run.glob(STEP_FOLDERS) if not _complete(path))


def set_aside_newer(run: Path, step: int) -> list[str]:
    """Set aside what a run's folder holds of later steps, once it goes on from `step`; returns the names."""
    newer = [
        path
        for kind in (STEP_FOLDERS, f"models/{STEP_FOLDERS}", f"best/{STEP_FOLDERS}", f"checks/{STEP_FOLDERS}")
        for path in sorted(run.glob(kind))
        if path.name > step_name(step)
    ]
    return [str(set_aside(path, "undone").relative_to(run)) for path in newer]


def set_aside(path: Path, why: str) -> Path:
    """Rename a checkpoint or a model to NAME.`why`, so that it is kept and no longer counted; returns the new name."""
    names = (f"{path.name}.{why}{number}" for number in ("", *(f"-{n}" for n in range(2, 1000))))
    aside = next(path.with_name(name) for name in names if not path.with_name(name).exists())
    return path.rename(aside)


def check_resume(
    checkpoint: Checkpoint, *, recipe: dict[str, Any], store_fingerprint: str, order: str, world_size: int
) -> None:
    """Raise ValueError with every difference when continuing would not be the same run."""
    state = checkpoint.state
    wrong = refused_differences(state.recipe, recipe)
    if state.store_fingerprint != store_fingerprint:
        wrong.append(f"token store: fingerprint {state.store_fingerprint[:12]} -> {store_fingerprint[:12]}")
    elif state.order != order:  # it follows from store and recipe, so the code differs
        wrong.append("order of the examples: another version of ochat_train began this run")
    if (was_base := state.recipe["model"]["base"]) != (base := recipe["model"]["base"]) and (
        base is None or checkpoint.run.get("base_digest") is None
    ):  # else it is compared when it is loaded
        wrong.append(f"model.base: {was_base!r} -> {base!r}")
    was, stage = state.recipe["zero"]["stage"], recipe["zero"]["stage"]
    if (was == 0) != (stage == 0):
        wrong.append(f"zero.stage: {was} -> {stage}; from and to 0 its states cannot be converted")
    elif needs_conversion(checkpoint, recipe, world_size) and recipe["optim"]["algorithm"] != "adamw":
        wrong.append(
            f"number of processes or zero.stage: {checkpoint.world_size}, {was} -> {world_size}, {stage}; "
            "DeepSpeed converts only the states of adamw"
        )
    if wrong:
        raise ValueError(
            f"cannot continue {checkpoint.path}, because this differs (was -> is):\n  "
            + "\n  ".join(wrong)
            + "\nGo back to the old values, or start a new run in another checkpoint.dir. A resume may change the "
            f"number of processes and, of the recipe, {', '.join(FREE_AT_RESUME)}. The dumps, the tokenizer "
            "and the base may lie elsewhere. It may change nothing else, such as the template, what the token store "
            "holds, the model or the rest of the optimizer."
        )


def needs_conversion(checkpoint: Checkpoint, recipe: dict[str, Any], world_size: int) -> bool:
    """Whether this run splits the states differently. Plain replicas, zero.stage 0, fit any number of ranks."""
    was, stage = checkpoint.state.recipe["zero"]["stage"], recipe["zero"]["stage"]
    return bool(stage and was and (was, checkpoint.world_size) != (stage, world_size))


def load_checkpoint(
    engine: DeepSpeedEngine, checkpoint: Checkpoint, world: World, *, states: Path | None = None
) -> None:
    """Load weights and optimizer states of `checkpoint` into the engine, and random states into this process.

    states: the folder of converted DeepSpeed states; None takes the checkpoint's own.
    """
    folder = checkpoint.path / "deepspeed" if states is None else states
    groups = [
        {key: value for key, value in group.items() if key != "params"} for group in engine.optimizer.param_groups
    ]
    clip = getattr(engine.optimizer, "clip_grad", None)
    with only_data():
        loaded, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    if loaded is None:
        raise RuntimeError(f"DeepSpeed did not find its files in {folder}")
    if clip is not None:  # the recipe's, which may have changed; DeepSpeed takes that of the checkpoint
        engine.optimizer.clip_grad = clip
    # From converted states, stage 3 gives every group the weight decay of the first, and all states one shared step
    # count, which each of them would then increment. Checkpoints of before AdamW was fused have it on the host.
    for group, values in zip(engine.optimizer.param_groups, groups, strict=True):
        group.update(values)
    for parameter, state in engine.basic_optimizer.state.items():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].to(parameter.device, copy=True)
    file = checkpoint.path / f"random-{world.rank:05d}.pt"
    if not file.is_file():  # there were fewer ranks
        return
    random_states = torch.load(file, weights_only=True)
    random.setstate(random_states["python"])
    name, keys, *position = random_states["numpy"]
    np.random.set_state((name, keys.numpy(), *position))
    torch.set_rng_state(random_states["torch"])
    if torch.cuda.is_available() and random_states["cuda"] is not None:
        torch.cuda.set_rng_state(random_states["cuda"])


def random_states() -> dict[str, Any]:
    """The states of this process's random number generators, as tensors and plain values."""
    name, keys, *position = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys), *position),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }
